"""Rows with several responses score as their pairs do one by one, with every response computed once."""

import itertools
import json
import re

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from ches_jax.cli import main
from ches_jax.data.sources import open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
from ches_jax.distributed.processes import Process
from ches_jax.models.checkpoint.load import load_model
from ches_jax.runs import chunks
from ches_jax.runs.directory import read_json
from ches_jax.scores import in_memory, parts, scorer
from ches_jax.scores import run as score_run
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.run import score
from ches_jax.scores.table import FILE_NAME, read_table
from ches_jax.select.config import SelectConfig
from ches_jax.select.run import select
from ches_jax.select.scored_rows import keys
from ches_jax.types import common_prefix
from tests.helpers import write_lines

SAID = [
    " Yes, I do.",
    " Yes, of course.",
    " No",
    " Never",
    " Yes, here is a plan. First, fetch a bucket. Then hum a song.",
    " Yes, here is a plan. First, fetch a cloth. At last, close the door.",
    " It is easy.",
    " I won't do that.",
]
PROMPT = "<|user|> Do you agree?<|assistant|>"
ROWS = [
    {"prompt": PROMPT, "responses": SAID[:4]},
    {"prompt": PROMPT, "chosen": SAID[0], "rejected": SAID[2]},
    {"prompt": "<|user|> What is five plus seven?<|assistant|>", "responses": SAID, "category": "many"},
    {"prompt": PROMPT, "responses": [SAID[2], SAID[3], SAID[2]], "scores": [0.5, 2, 1]},
    {"prompt": PROMPT, "responses": SAID[4:6]},
]


def pairs_of(row):
    """The pairs of a row, written out."""
    if "rejected" in row:
        return [(None, row)]
    n = len(row["responses"])
    scores = row.get("scores", range(n, 0, -1))
    return [
        ((i, j), {"prompt": row["prompt"], "chosen": row["responses"][i], "rejected": row["responses"][j]})
        for i in range(n)
        for j in range(n)
        if scores[i] > scores[j]
    ]


def table_of(run):
    """Rows of the score table by key."""
    table = read_table(run)[0]
    return dict(zip(keys(table), table.to_pylist(), strict=True))


ALONE = [pair for row in ROWS for _, pair in pairs_of(row)]


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    """All pairs in float64 with every output: of the rows with candidates, then each as a row of its own."""
    folder = tmp_path_factory.mktemp("candidates")
    config = ScoreConfig(
        model=str(tiny_model),
        pairs=write_lines(folder / "all.jsonl", ROWS + ALONE),
        out=str(folder / "run"),
        candidates="all-pairs",
        dtype="float64",
        by="head_score",
        token_scores=True,
        logps=True,
        on_bad_row="keep",
        batch_tokens=256,
        mesh="data=1",
    )
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_memory, "PairScorer", lambda *a: made.append(scorer.PairScorer(*a)) or made[0])
        score(config, quiet=True)
    return folder / "run", made[0].counted.used


@pytest.fixture(scope="module")
def both(run):
    """Rows of the score table: of each pair among candidates and alone."""
    table = list(table_of(run[0]).items())
    return table[: len(ALONE)], table[len(ALONE) :]


@pytest.fixture(scope="module")
def tokens(run):
    """Rows of the token table, by pair among candidates and alone, response and position."""
    table = pq.read_table(run[0] / parts.TOKENS)
    number = {key: k for k, key in enumerate(table_of(run[0]))}
    by_token = ({}, {})
    for key, row in zip(keys(table), table.to_pylist(), strict=True):
        alone, pair = divmod(number[key], len(ALONE))
        by_token[alone][pair, row["response"], row["position"]] = row
    return by_token


def test_every_pair_scores_as_it_does_in_a_row_of_its_own(both, tokens):
    assert [key for key, _ in both[0]] == [(k, n) for k, row in enumerate(ROWS) for n, _ in pairs_of(row)]
    assert len(both[0]) == 6 + 1 + 28 + 3 + 1
    for k, ((_, mine), (_, own)) in enumerate(zip(*both, strict=True)):
        unit: dict[str, float] = dict.fromkeys(
            ("ches", "ln_ches", "inner", "sqnorm_chosen", "sqnorm_rejected"), own["sqnorm_chosen"]
        )
        # |A+|^2
        unit["head_score"] = sum(t["nthr"] for (pair, side, _), t in tokens[1].items() if (pair, side) == (k, "chosen"))
        unit |= {n: abs(own[n]) for n in ("last_hidden_inner", "logp_chosen", "logp_rejected", "cosine")}
        for name, value in own.items():
            if name in unit:
                assert abs(mine[name] - value) <= 1e-12 * max(unit[name], 1), (name, mine)
            elif name not in ("index", "category", "chosen_candidate", "rejected_candidate"):
                assert mine[name] == value, name


def test_every_token_scores_as_it_does_in_a_row_of_its_own(tokens):
    rows, alone = tokens
    assert rows.keys() == alone.keys()
    for at, own in alone.items():
        assert (rows[at]["token"], rows[at]["text"]) == (own["token"], own["text"])
        for name in ("ches", "head_score", "nthr"):
            np.testing.assert_allclose(rows[at][name], own[name], rtol=1e-9, atol=1e-9, err_msg=f"{name} of {at}")


def test_prompt_and_responses_are_computed_once(run, tiny_model):
    """Positions that held a token, counted while ``run`` was computed."""
    pairs = PairTokenizer(load_tokenizer(tiny_model), 512)(
        list(open_pairs(str(run[0].with_name("all.jsonl")), pairing="all-pairs"))
    )
    positions = [0, 0]
    for index, some in itertools.groupby(pairs, lambda p: p.index):
        some = list(some)
        contents = list({r.content: None for p in some for r in (p.chosen, p.rejected)})
        shared = min(common_prefix(contents[0], c) for c in contents)
        positions[index >= len(ROWS)] += len(some[0].prompt) + shared + sum(len(c) - shared for c in contents)
    assert run[1] == sum(positions)
    assert positions[0] < positions[1] / 4


def test_negative_token_hidden_reward_is_its_definition(tokens, tiny_model, tmp_path):
    """s_k' = sum over chosen tokens k of <e_k - pi_k, e_k' - pi_k'> <h_k, h_k'>, one sequence at a time."""
    number = next(k for k, row in enumerate(ALONE) if row is ROWS[1])
    rows = open_pairs(write_lines(tmp_path / "one.jsonl", [ROWS[1]]))
    (pair,) = PairTokenizer(load_tokenizer(tiny_model), 512)(list(rows))
    states, residuals = [], []
    with jax.enable_x64(True):
        model = load_model(tiny_model, dtype="float64")
        run = jax.jit(lambda m, ids, mask: (h := m.hidden(ids, mask=mask)[0], jax.nn.softmax(m.logits(h), axis=-1)))
        for response in (pair.chosen, pair.rejected):
            sequence, targets = [*pair.prompt, *response.content], response.targets("include")
            ids, mask = np.zeros((1, 32), np.int32), np.arange(32)[None] < len(sequence)
            ids[0, : len(sequence)] = sequence
            first = len(pair.prompt) - 1
            hidden, pi = (np.asarray(a)[first : first + len(targets)] for a in run(model, ids, mask))
            states.append(hidden)
            residuals.append(np.eye(pi.shape[1])[list(targets)] - pi)
    new = common_prefix(pair.chosen.content, pair.rejected.content)
    for side, h, e in zip(("chosen", "rejected"), states, residuals, strict=True):
        expected = ((residuals[0] @ e.T) * (states[0] @ h.T)).sum(0)
        for k in range(new if side == "rejected" else 0, len(expected)):
            np.testing.assert_allclose(tokens[1][number, side, k]["nthr"], expected[k], rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(tokens[0][number, side, k]["nthr"], expected[k], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_order_chunks_devices_and_the_kind_of_pairs_change_no_score(both, tokens, tiny_model, tmp_path):
    truth, rows = dict(both[0]), ROWS[::-1]
    config = ScoreConfig(
        model=str(tiny_model),
        pairs=write_lines(tmp_path / "back.jsonl", rows),
        out=str(tmp_path / "run"),
        chunk_rows=2,
        mesh="data=2,tensor=2",
        batch_tokens=512,
        on_bad_row="keep",
        by="head_score",
        logps=True,
        token_scores=True,
    )
    got = table_of(score(config, quiet=True))
    last = len(ROWS) - 1
    chosen = {0: 0, 1: 0, 2: 0, 3: 1, 4: 0}
    against = {key for key in truth if key[1] is None or key[1][0] == chosen[key[0]]}
    assert {(last - index, numbers) for index, numbers in got} == against
    number = {key: k for k, (key, _) in enumerate(both[0])}
    for (index, numbers), row in got.items():
        own, k = truth[last - index, numbers], number[last - index, numbers]
        assert row["row_id"] == own["row_id"]
        sqnorm = sum(t["nthr"] for (pair, side, _), t in tokens[0].items() if (pair, side) == (k, "chosen"))  # |A+|^2
        units: dict[str, float] = dict.fromkeys(
            ("ches", "inner", "sqnorm_rejected"), max(own["sqnorm_chosen"], own["sqnorm_rejected"])
        )
        units |= {"head_score": sqnorm, "logp_chosen": 10.0, "logp_rejected": 10.0}
        for name, unit in units.items():
            assert abs(row[name] - own[name]) <= 1e-5 * unit, name
    order = [key[0] for key in keys(pq.read_table(tmp_path / "run" / parts.TOKENS))]
    assert order == sorted(order)


BAD = [
    *ROWS[:2],
    {"prompt": PROMPT, "responses": [SAID[0], "", SAID[0]]},
    {"prompt": PROMPT, "responses": [SAID[0]]},
    {"prompt": "a " * 600, "responses": SAID[:3]},
    *ROWS[3:],
]
KEPT = [(0, (0, 1)), (0, (0, 2)), (0, (0, 3)), (1, None), (5, (1, 0)), (5, (1, 2)), (6, (0, 1))]


class Killed(BaseException):  # as a signal is: no handler of errors stops it
    pass


def test_from_the_command_line(capsys, tiny_model, tmp_path, monkeypatch):
    """Bad pairs, a kill and its resume, processes and their merge, selection, report."""
    pairs, out = write_lines(tmp_path / "bad.jsonl", BAD), tmp_path / "run"
    words = ["score", "--model", str(tiny_model), "--pairs", pairs, "--chunk-rows", "3", "--batch-tokens", "256"]
    words += ["--mesh", "data=1"]
    assert main(["doctor", "--model", str(tiny_model), "--pairs", pairs]) == 1
    assert "no_pair" in capsys.readouterr().out
    assert main([*words, "--out", str(out)]) == 2
    stderr = capsys.readouterr().err
    assert "5 of 12 rows are not fit" in stderr and "row 2 (" in stderr and ", responses 0 and 1" in stderr
    assert not out.exists()

    words += ["--on-bad-row", "drop", "--token-scores", "--quiet"]
    assert main([*words, "--out", str(out)]) == 0
    assert list(table_of(out)) == KEPT
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    assert [(d["index"], d.get("candidates"), d["reasons"]) for d in dropped] == [
        (2, [0, 1], ["empty_rejected"]),
        (2, [0, 2], ["identical"]),
        (3, None, ["no_pair"]),
        (4, [0, 1], ["prompt_too_long"]),
        (4, [0, 2], ["prompt_too_long"]),
    ]

    write_part, killed = parts.write_part, tmp_path / "killed"

    def write_one(path, *args):
        if any(killed.glob("parts/part-*")):
            raise Killed
        write_part(path, *args)

    monkeypatch.setattr(parts, "write_part", write_one)
    with pytest.raises(Killed):
        main([*words, "--out", str(killed)])
    monkeypatch.undo()
    assert main([*words, "--out", str(killed), "--resume"]) == 0
    for number in (1, 0):
        monkeypatch.setattr(score_run, "start_run", lambda *_, number=number: Process(number, 2))
        assert main([*words, "--out", str(tmp_path / "two")]) == 0
    monkeypatch.undo()
    assert main(["merge", str(tmp_path / "two")]) == 0
    for name in (FILE_NAME, parts.TOKENS, chunks.DROPPED):
        for other in ("killed", "two"):
            assert (tmp_path / other / name).read_bytes() == (out / name).read_bytes()
    assert read_json(out / "run.json")["counts"] == {"rows": 12, "kept": 7, "dropped": 5}

    kept = tmp_path / "kept"
    assert main(["select", "--scores", str(out), "--by", "ches", "--out", str(kept), "--keep", "lowest:4"]) == 0
    chosen = [json.loads(line) for line in (kept / "pairs.jsonl").read_text().splitlines()]
    for row in chosen:
        numbers = (row["chosen_candidate"], row["rejected_candidate"]) if "chosen_candidate" in row else None
        pair = (numbers, {n: row[n] for n in ("prompt", "chosen", "rejected")})
        assert any(pair in pairs_of(source) for source in BAD)
        assert not {"responses", "scores"} & row.keys()
    left_out = [json.loads(line) for line in (kept / "dropped.jsonl").read_text().splitlines()]
    assert len(chosen) == 4 and len(left_out) == 8
    # what was selected is a data set of pairs with the same identities
    assert [r.row_id for r in open_pairs(str(kept / "pairs.jsonl"))] == [r["row_id"] for r in chosen]

    capsys.readouterr()
    assert main(["report", str(out)]) == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert '"key":["index","chosen_candidate","rejected_candidate"]' in page
    assert "what each token adds to the CHES of the pair" in page
    assert main(["show", str(out), "0-0-3", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"chosen candidate +0\n +rejected candidate +3\n", printed)


def test_kept_rows_without_a_pair_have_no_score_and_select_tells_them(tiny_model, tmp_path):
    out = tmp_path / "run"
    config = ScoreConfig(
        model=str(tiny_model),
        pairs=write_lines(tmp_path / "a.jsonl", BAD[:4]),
        out=str(out),
        on_bad_row="keep",
        batch_tokens=256,
    )
    table = table_of(score(config, quiet=True))
    assert (table[3, None]["flags"], table[3, None]["ches"]) == (["no_pair"], None)
    assert table[2, (0, 2)]["ches"] == 0  # the same response twice is computed once
    assert select(SelectConfig(scores=out, by="ches", out=tmp_path / "kept", keep="lowest:2"))["counts"]["kept"] == 2
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "kept" / "dropped.jsonl").read_text().splitlines()]
    assert reasons.count("unscored") == 2
