"""One pair in the terminal."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.displacement.show import LOWERS, PLAIN, RAISES, show
from ches_jax.errors import ChesError

PAIRS = {"row_id": ["aa1", "ab2"], "index": [3, 7], "dlogp_chosen": [-1.5, 0.25], "prompt": ["p", "q"],
         "chosen": ["c\x1b[31m", "d"], "rejected": ["r", "s"]}  # fmt: skip


def test_a_pair_is_shown_by_index_or_row_id(tmp_path):
    pq.write_table(pa.table(PAIRS), tmp_path / "pairs.parquet")
    text, numbers = show(tmp_path, "3")
    assert "dlogp_chosen: -1.5" in text and "chosen:\nc [31m" in text and numbers["row_id"] == "aa1"
    assert show(tmp_path, "ab")[1]["index"] == 7
    with pytest.raises(ChesError, match="2 pairs are called a; give the row_id of one: aa1, ab2"):
        show(tmp_path, "a")
    with pytest.raises(ChesError, match="no row 4; rows have an index such as 3, 7"):
        show(tmp_path, "4")
    with pytest.raises(ChesError, match=r"none of pairs.parquet, scores.parquet, displacement.parquet"):
        show(tmp_path / "x", "4")


def test_tokens_are_coloured_by_what_they_add(tmp_path):
    pq.write_table(pa.table({"row_id": ["a"], "index": [3], "head_score": [2.0]}), tmp_path / "scores.parquet")
    tokens = {"index": [3] * 4 + [4], "response": ["chosen", "chosen", "chosen", "rejected", "chosen"],
              "text": ["up", " little", " down", "x", "other"], "ches": [0.0] * 5,
              "head_score": [4.0, 0.1, -4.0, 0.0, 9.0]}  # fmt: skip
    pq.write_table(pa.table(tokens), tmp_path / "token_scores.parquet")
    assert f"{RAISES}up{PLAIN} little{LOWERS} down{PLAIN}\n" in show(tmp_path, "3", colour=True)[0]
    plain = show(tmp_path, "3")[0]
    assert "\x1b" not in plain and "up little down" in plain and "head_score; red raises it" in plain


def test_the_last_evaluation_of_a_run_is_shown(tmp_path):
    table = pa.table({"step": [0, 5], "row_id": ["a", "a"], "index": [0, 0], "dlogp_chosen": [0.0, -2.0]})
    pq.write_table(table, tmp_path / "displacement.parquet")
    assert show(tmp_path, "0")[1]["dlogp_chosen"] == -2
