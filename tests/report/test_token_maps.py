"""Token scores become coloured tokens beside the texts; hostile tokens stay text."""

import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.report.html import token_map
from ches_jax.report.pairs import read_tokens, token_maps
from ches_jax.scores.parts import TOKEN_SCHEMA, TOKENS


def write(run, head, candidates=(None, None, None)):
    rows = {
        "row_id": ["a"] * 3, "index": [4, 4, 5], "response": ["chosen", "rejected", "chosen"], "position": [0, 0, 0],
        "token": [7, 8, 9], "text": [" Yes", "<script>", "x"], "ches": [2.0, -1.0, 0.0], "head_score": head,
        "nthr": head, "chosen_candidate": candidates, "rejected_candidate": candidates,
    }  # fmt: skip
    pq.write_table(pa.table(rows, schema=TOKEN_SCHEMA), run / TOKENS)


def test_tokens_of_the_asked_rows_by_the_head_score_where_there_is_one(tmp_path):
    write(tmp_path, [0.5, 0.25, 0.0])
    assert read_tokens(tmp_path, [(4, None)]) == (
        {(4, None): {"chosen": [(" Yes", 0.5)], "rejected": [("<script>", 0.25)]}},
        "head_score",
    )
    write(tmp_path, [None] * 3)
    assert read_tokens(tmp_path, [(5, None)]) == ({(5, None): {"chosen": [("x", 0.0)]}}, "ches")


def test_the_pairs_of_one_row_are_told_apart(tmp_path):
    write(tmp_path, [None] * 3, (0, 1, None))
    assert read_tokens(tmp_path, [(4, (1, 1)), (4, None)]) == (
        {(4, (1, 1)): {"rejected": [("<script>", -1.0)]}},
        "ches",
    )


def test_a_run_without_token_scores_has_none(tmp_path):
    assert read_tokens(tmp_path, [(1, None)]) == ({}, "")


def test_both_responses_share_one_scale_and_texts_are_escaped():
    html = token_maps({"chosen": [(" Yes", 2.0)], "rejected": [("<script>", -1.0)]}, "ches")
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert "rgba(215,48,39,0.75);text-decoration:underline" in html
    assert "rgba(69,117,180,0.38)" in html


def test_all_zero_and_no_tokens_are_no_division_by_zero():
    assert "0.00" in token_map("chosen", [("a", 0.0)], 0.0)
    assert token_maps({}, "ches")
