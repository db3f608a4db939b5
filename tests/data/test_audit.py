"""Counting findings, the message that tells them, and the record of what is left out."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ches_jax.data.audit import (
    FLAGS,
    UNSCORABLE,
    Audit,
    dropped_record,
    quantiles,
    require_clean,
    visible,
)
from ches_jax.data.habits import HABITS
from ches_jax.errors import DataError
from ches_jax.types import Response, TokenPair, shared_prefix


def pair(index=0, prompt=(1, 5), chosen=(6, 7), rejected=(6, 8, 9), flags=(), detail=None, end: int | None = 2):
    return TokenPair(
        row_id=f"{index:032x}",
        index=index,
        prompt=prompt,
        chosen=Response(chosen, end),
        rejected=Response(rejected, end),
        flags=flags,
        detail=detail or {},
    )


def audit_of(*pairs):
    audit = Audit(bos_id=1, eos_id=2)
    audit.extend(pairs)
    return audit


def test_rows_are_counted_by_flag_length_and_special_token():
    audit = audit_of(
        pair(0),
        pair(1, flags=("identical",), chosen=(6,), rejected=(6,)),
        pair(2, flags=("double_bos", "double_eos"), prompt=(1, 1), chosen=(6, 2, 7)),
        pair(3, flags=("empty_chosen",), chosen=()),
    )
    audited = audit.to_json()
    assert (audited["rows"], audited["flagged"], audited["unscorable"]) == (4, 3, 1)
    assert audited["flags"] == {"double_bos": 1, "double_eos": 1, "empty_chosen": 1, "identical": 1}
    assert audited["tokens"]["chosen"] == {"min": 1, "p50": 2, "p90": 4, "p99": 4, "max": 4}
    assert audited["tokens"]["shared prefix"]["max"] == 1
    assert audited["specials"]["BOS in prompt"] == {"1": 3, "2": 1}
    assert audited["specials"]["EOS in chosen"] == {"1": 3, "2": 1}
    assert audited["specials"]["BOS in rejected"] == {"0": 4}
    assert json.loads(json.dumps(audited)) == audited


def test_the_table_names_every_finding_with_its_meaning():
    flagged = [pair(i, flags=("truncated_chosen",)) for i in range(9)]
    text = audit_of(*flagged, pair(9)).describe()
    assert text.startswith("10 rows, 9 flagged, 0 cannot be scored")
    assert f"truncated_chosen           9  {FLAGS['truncated_chosen']}" in text
    assert text.count("row ") == 3  # examples are few, however many rows


def test_an_empty_audit_has_a_table():
    assert Audit().describe() == "0 rows, 0 flagged, 0 cannot be scored"


def test_a_clean_audit_passes_and_a_flagged_one_tells_all_at_once():
    require_clean(audit_of(pair(0)))
    flagged = [pair(i, flags=("identical",)) for i in range(5)]
    mismatch = pair(7, flags=("prefix_mismatch",), detail={"prefix_mismatch": "3 recut to 2"})
    with pytest.raises(DataError) as caught:
        require_clean(audit_of(*flagged, mismatch), "pairs.jsonl")
    message = str(caught.value)
    assert message.startswith("pairs.jsonl: 6 of 6 rows are not fit to be scored")
    assert f"identical: 5 rows ({FLAGS['identical']}): row 0 (" in message
    assert "row 7 (000000000000, 3 recut to 2)" in message
    assert "--on-bad-row drop" in message
    assert "dropped.jsonl" in message
    assert "--on-bad-row keep" in message
    assert "--max-length" not in message


@pytest.mark.parametrize("flag", ["truncated_chosen", "truncated_rejected", "prompt_too_long"])
def test_rows_that_are_too_long_point_to_max_length(flag):
    with pytest.raises(DataError, match="a larger --max-length"):
        require_clean(audit_of(pair(0, flags=(flag,))))


def test_a_dropped_row_is_recorded_with_its_reasons():
    record = dropped_record(pair(3, flags=("identical", "double_eos"), detail={"double_eos": "2"}))
    assert record == {
        "row_id": f"{3:032x}",
        "index": 3,
        "reasons": ["identical", "double_eos"],
        "detail": {"double_eos": "2"},
    }


def test_every_flag_and_habit_has_its_entry_on_the_page_that_says_what_to_do():
    page = (Path(__file__).parents[2] / "docs/audit.md").read_text(encoding="utf-8")
    entries = re.findall(r"^(`\w+`(?:, `\w+`)*)((?: \(\*no score\*\))?)\n: (.*?)\n\n", page, re.S | re.M)
    documented = {
        name: (bool(no_score), text) for names, no_score, text in entries for name in re.findall(r"\w+", names)
    }
    assert set(documented) == {*FLAGS, *HABITS}
    assert {name for name, (no_score, _) in documented.items() if no_score} == UNSCORABLE
    assert [name for name in FLAGS if "**Do:**" not in documented[name][1]] == []


def test_unscorable_flags_are_flags():
    assert set(FLAGS) > UNSCORABLE


@pytest.mark.parametrize(("chosen", "rejected", "common"), [((), (), 0), ((1,), (2,), 0), ((1, 2), (1, 2, 3), 2)])
def test_shared_prefix(chosen, rejected, common):
    assert shared_prefix(pair(chosen=chosen, rejected=rejected)) == common


@given(st.lists(st.integers(0, 50), min_size=1))
def test_quantiles_are_exact(values):
    audited = quantiles(Counter(values))
    assert (audited["min"], audited["max"]) == (min(values), max(values))
    ordered = sorted(values)
    assert audited["p50"] == ordered[-(-len(values) // 2) - 1]
    assert list(audited.values()) == sorted(audited.values())


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["[UNK]", "<s>", "</s>", "x", "\n", "▁a", "▁b", "▁c", "▁d", "▁e"]
    backend = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens([AddedToken(n, special=True) for n in ("<s>", "</s>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_a_pair_is_shown_with_its_special_tokens_and_boundary(tokenizer):
    text = visible(tokenizer, pair(4, prompt=(1, 5, 4), flags=("identical",)))
    assert text.splitlines() == [
        "row 4 (000000000000) identical",
        r"  prompt   [3] <s> a\n |<- response",
        "  chosen   [3] ->| b c|</s>",
        "  rejected [4] ->| b d e|</s>",
    ]


def test_long_parts_and_cut_ends_are_shown_as_such(tokenizer):
    shown = visible(tokenizer, pair(prompt=(5,) * 99, chosen=(6,) * 99, end=None), limit=20)
    assert " ... " in shown.splitlines()[1]
    assert shown.splitlines()[2].endswith("...(no end: cut)")
    assert max(map(len, shown.splitlines())) < 80
