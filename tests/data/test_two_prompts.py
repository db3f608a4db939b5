"""Rows with a prompt for each response: what is read, what is refused, and that each response is as in a row alone."""

import json

import numpy as np
import pytest

from ches_jax import ScoreConfig, bundled
from ches_jax.data.audit import visible
from ches_jax.data.packing import group_by_prompt, pack, packed_length, shared_tokens
from ches_jax.data.prompts import canonical_content, canonical_prompt, pair_contents
from ches_jax.data.sources import open_pairs, rows_in_memory
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
from ches_jax.data.two_prompts import has_two_prompts
from ches_jax.errors import DataError
from ches_jax.health.checks import Row, contradictions, duplicates, identical
from ches_jax.scores.run import score
from ches_jax.scores.table import read_table

TWO = {"chosen_prompt": "Q: 1+1?", "chosen": " 2", "rejected_prompt": "Q: 1+2?", "rejected": " 4"}


def talk(*turns):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]


def test_a_row_with_two_prompts_keeps_both_in_every_shape():
    assert canonical_content(TWO, {}) == TWO
    named = {"p1": "Q: 1+1?", "a1": " 2", "p2": "Q: 1+2?", "a2": " 4"}
    names = {"chosen_prompt": "p1", "chosen": "a1", "rejected_prompt": "p2", "rejected": "a2"}
    assert canonical_content(named, names) == TWO
    chats = {
        "chosen_prompt": talk("1+1?"),
        "chosen": [{"role": "assistant", "content": "2"}],
        "rejected_prompt": talk("1+2?"),
        "rejected": talk("1+2?", "4"),  # the whole conversation, which repeats its prompt
    }
    whole = canonical_content(chats, {})
    assert (whole["rejected_prompt"], whole["rejected"]) == (talk("1+2?"), [{"role": "assistant", "content": "4"}])
    ids = {"chosen_prompt_ids": [5], "chosen_ids": [6], "rejected_prompt_ids": [7], "rejected_ids": [8]}
    assert canonical_content({**TWO, **ids}, {}) == ids  # ids win over text beside them
    assert has_two_prompts(ids) and not has_two_prompts({"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [8]})
    assert pair_contents({**TWO, "tools": '[{"name": "f"}]'}, {}, "all-pairs")[0][1]["tools"] == [{"name": "f"}]


def test_equal_prompts_make_the_plain_pair():
    one = {"prompt": "Q: 1+1?", "chosen": " 2", "rejected": " 3"}
    both = {"chosen_prompt": "Q: 1+1?", "rejected_prompt": "Q: 1+1?", "chosen": " 2", "rejected": " 3"}
    assert canonical_content(both, {}) == canonical_content({**both, "prompt": "Q: 1+1?"}, {}) == one
    assert next(iter(rows_in_memory([both]))).row_id == next(iter(rows_in_memory([one]))).row_id


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"prompt": "Q: 1+1?"}, "'prompt' and 'rejected_prompt' are two prompts of one response"),
        ({"prompt": "Q: 0?"}, "'prompt' and 'chosen_prompt' are two prompts of one response"),
        ({"rejected_prompt": None}, "'chosen_prompt' without 'rejected_prompt'"),
        ({"chosen_prompt": None, "prompt": "Q: 1+1?"}, "'rejected_prompt' without 'chosen_prompt'"),
        ({"responses": [" 2", " 3"], "rejected": None}, "'responses' are answers to one prompt"),
        ({"rejected_prompt": talk("1+2?")}, "one of 'chosen_prompt' and 'rejected_prompt' is text"),
        ({"rejected": None}, "no column 'rejected'"),
    ],
)
def test_contradictions_are_refused(more, message):
    with pytest.raises(DataError, match=message):
        pair_contents({**TWO, **more}, {}, "all-pairs")


def test_one_prompt_is_asked_for_by_name():
    with pytest.raises(DataError, match="the row has two prompts"):
        canonical_prompt(TWO, {})
    assert canonical_prompt(TWO, {"prompt": "rejected_prompt"}) == {"prompt": "Q: 1+2?"}


@pytest.fixture(scope="module")
def rows():
    plain = [record.content for record, _ in zip(open_pairs(str(bundled.pairs_file())), range(8), strict=False)]
    crossed = [
        {"chosen_prompt": a["prompt"], "chosen": a["chosen"], "rejected_prompt": b["prompt"], "rejected": b["rejected"]}
        for a, b in zip(plain, plain[1:] + plain[:1], strict=True)
    ]
    return plain, crossed


def test_tokens_are_those_of_each_response_alone(rows):
    plain, crossed = rows
    tokenizer = PairTokenizer(load_tokenizer("bundled"), max_length=40)
    alone, pairs = (tokenizer(list(rows_in_memory(some))) for some in (plain, crossed))
    for i, pair in enumerate(pairs):
        first, second = alone[i], alone[(i + 1) % len(alone)]
        assert (pair.prompts, pair.chosen) == ((first.prompt, second.prompt), first.chosen)
        assert pair.rejected == second.rejected
        sides = {f for f in first.flags if f.endswith("_chosen")} | {f for f in second.flags if f.endswith("_rejected")}
        assert {f for f in pair.flags if f.startswith("truncated")} == {f for f in sides if f.startswith("truncated")}
    shown = visible(tokenizer.tokenizer, pairs[0])
    assert shown.count("prompt   [") == 2 and "\n  rejected" in shown


def test_findings_are_reported_of_the_side_they_are_of():
    tokenizer = PairTokenizer(load_tokenizer("bundled"), max_length=64)
    (pair,) = tokenizer(list(rows_in_memory([{**TWO, "rejected": " 4<eos><eos>", "chosen": " 2"}])))
    assert pair.flags == ("double_eos",) and "rejected" in pair.detail["double_eos"]
    assert "chosen" not in pair.detail["double_eos"]
    (same,) = tokenizer(list(rows_in_memory([{**TWO, "rejected": " 2"}])))
    assert same.flags == () and same.chosen == same.rejected  # one answer to two questions is a pair


def test_two_prompts_share_nothing_in_a_row(rows):
    tokenizer = PairTokenizer(load_tokenizer("bundled"), max_length=512)
    pairs = tokenizer(list(rows_in_memory(rows[1])))
    items, refs = group_by_prompt(pairs)
    assert items == pairs and all(shared_tokens(item, None) is None for item in items)
    expected = [sum(map(len, (*p.prompts, p.chosen.content, p.rejected.content))) for p in pairs]
    assert [packed_length(item) for item in items] == expected
    ((batch, places),) = pack(items, length=1024, rows_per_batch=1, eos="include")
    assert int((batch.lengths > 0).sum()) == sum(expected) and len(refs) == len(places) == len(pairs)


def test_scores_are_those_of_the_sequences_alone(rows, tmp_path, tiny_model):
    """Sums and log-probabilities of a response are those of the row where it stands with its own prompt."""
    plain, crossed = rows
    tables = []
    for name, some in (("plain", plain), ("crossed", crossed)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
        options = {"model": str(tiny_model), "pairs": str(file), "logps": True, "token_scores": True}
        out = score(ScoreConfig(**options, dtype="float64", out=str(tmp_path / name)), quiet=True)
        tables.append(read_table(out)[0])
    one, two = ({n: np.array(t[n].to_pylist()) for n in ("sqnorm_chosen", "sqnorm_rejected")} for t in tables)
    logps = [{n: np.array(t[n].to_pylist()) for n in ("logp_chosen", "logp_rejected")} for t in tables]
    np.testing.assert_allclose(two["sqnorm_chosen"], one["sqnorm_chosen"], rtol=1e-9)
    np.testing.assert_allclose(two["sqnorm_rejected"], np.roll(one["sqnorm_rejected"], -1), rtol=1e-9)
    np.testing.assert_allclose(logps[1]["logp_rejected"], np.roll(logps[0]["logp_rejected"], -1), rtol=1e-9)
    tokens = read_table_of_tokens(tmp_path / "crossed")
    for index, pair in enumerate(logps[1]["logp_rejected"]):
        own = [t for t in tokens if (t["index"], t["response"]) == (index, "rejected")]
        assert sorted(t["position"] for t in own) == list(range(len(own)))
        assert sum(t["logp"] for t in own) == pytest.approx(pair, rel=1e-9)


def read_table_of_tokens(folder):
    import pyarrow.parquet as pq

    return pq.read_table(folder / "token_scores.parquet").to_pylist()


def test_doctor_compares_both_prompts():
    def row(name, p1, c, p2, r):
        return Row(name, p1, c, r, {}, p2)

    same_answer = row("a", "1+1?", "2", "0+1?", "2")
    assert not identical([same_answer]).finding
    turned = row("b", "0+1?", "2", "1+1?", "2")
    assert contradictions([same_answer, turned]).examples == ["b against a"]
    assert not duplicates([same_answer, row("c", "1+1?", "2", "9+9?", "2")]).finding
