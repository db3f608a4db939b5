"""One pair in the terminal: found by any of its names, with its numbers, and with nothing that moves the cursor."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.cli import main as ches
from ches_jax.errors import RunError
from ches_jax.report.terminal import BLUE, PLAIN, RED, pair_text
from ches_jax.scores.parts import TOKEN_SCHEMA, TOKENS
from ches_jax.scores.table import write_part
from tests.report.test_page import columns

EVIL = "\x1b[2J\x1b]0;x\x07 \u202e evil"


@pytest.fixture
def run(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"ask {i}", "chosen": EVIL if i == 1 else f"yes {i}", "rejected": "no"} for i in range(3)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    from ches_jax.data.sources import open_pairs

    ids = [row.row_id for chunk in open_pairs(str(pairs)).rows_from(0) for row in chunk]
    run = tmp_path / "run"
    run.mkdir()
    write_part(run / "scores.parquet", columns(3, row_id=ids, head_score=np.array([1.0, 2.0, -3.5])), {})
    (run / "run.json").write_text(json.dumps({"verb": "score", "config": {"pairs": str(pairs)}}))
    tokens = {
        "row_id": [ids[2]] * 3,
        "index": [2] * 3,
        "response": ["chosen", "chosen", "rejected"],
        "position": [0, 1, 0],
        "token": [1, 2, 3],
        "text": ["yes", " 2", "\x1b[41;97mno"],
        "ches": [0.0] * 3,
        "head_score": [3.0, 0.1, -4.0],
        "nthr": [0.0] * 3,
        "logp": [-1.0] * 3,
        "chosen_candidate": [None] * 3,
        "rejected_candidate": [None] * 3,
    }
    pq.write_table(pa.table(tokens, schema=TOKEN_SCHEMA), run / TOKENS)
    return run


def test_a_pair_is_found_by_its_row_its_link_and_its_id(run):
    whole = pair_text(run, "2")
    assert whole.startswith("pair 2\n") and "ask 2" in whole and "yes 2" in whole
    assert "head score                 -3.50" in whole
    row_id = whole.split("row_id")[1].split()[0]
    assert pair_text(run, "#row-2") == pair_text(run, row_id[:8]) == whole


def test_its_tokens_are_coloured_or_listed(run):
    assert "'yes' +3, '2' +0.1" in pair_text(run, "2")
    coloured = pair_text(run, "2", colour=True)
    assert f"{RED}yes{PLAIN} 2" in coloured and f"{BLUE}\\x1b[41;97mno{PLAIN}" in coloured


def test_texts_of_strangers_do_not_reach_the_terminal_raw(run):
    shown = pair_text(run, "1", colour=True)
    assert "\x1b" not in shown and "\x07" not in shown and "\u202e" not in shown and "evil" in shown


def test_a_pair_that_is_not_there_is_reported_with_those_that_are(run):
    with pytest.raises(RunError, match=r"no pair 7; there are 3, such as 0, 1, 2"):
        pair_text(run, "7")
    (run / "dropped.jsonl").write_text(json.dumps({"index": 7, "reasons": ["prompt_too_long", EVIL]}) + "\n")
    with pytest.raises(RunError, match=r"such as 0, 1, 2; row 7 was left out: prompt_too_long, .*evil") as raised:
        pair_text(run, "7")
    assert "\x1b" not in str(raised.value)
    with pytest.raises(RunError, match=r"such as 0, 1, 2$"):
        pair_text(run, "8")


def test_the_command_prints_it(run, capsys):
    assert ches(["show", str(run), "0"]) == 0
    assert "ask 0" in capsys.readouterr().out
    assert ches(["show", str(run), "9"]) == 2
