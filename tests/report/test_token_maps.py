"""Token scores go with the texts of the page; bytes become characters, hostile tokens stay text."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.report.texts import read_tokens, readable_tokens, token_table
from ches_jax.scores.parts import TOKEN_SCHEMA, TOKENS


def write(run, head, candidates=(None, None, None)):
    rows = {
        "row_id": ["a"] * 3,
        "index": [4, 4, 5],
        "response": ["chosen", "rejected", "chosen"],
        "position": [0, 0, 0],
        "token": [7, 8, 9],
        "text": [" Yes", "<script>", "x"],
        "ches": [2.0, -1.0, 0.0],
        "head_score": head,
        "nthr": head,
        "logp": head,
        "chosen_candidate": candidates,
        "rejected_candidate": candidates,
    }
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


def test_the_shared_beginning_stands_before_the_rejected_tokens_without_a_number(tmp_path):
    write(tmp_path, [0.5, 0.25, 0.0])
    table = pa.table({"row_id": ["a", "b"], "index": [4, 5], "shared_prefix_tokens": [1, 0]})
    found = token_table(tmp_path, table, [0, 1], {})
    assert found is not None and found.name == "head_score"
    assert found.of[0]["rejected"] == [[" Yes", None], ["<script>", 0.25]]
    assert found.of[1] == {"chosen": [["x", 0.0]], "rejected": []}


BAD = "\ufffd"


@pytest.mark.parametrize(
    ("tokens", "text", "shown"),
    [
        ([" 안", BAD, BAD, " hi"], "안녕 hi", [" 안", "녕", " hi"]),
        ([BAD, BAD, BAD], "\U0001f600", ["\U0001f600"]),
        (["ok ", BAD, BAD], "ok \U0001f600", ["ok ", "\U0001f600"]),
        (["a", BAD, "b", BAD, "c"], "aéböc", ["a", "é", "b", "ö", "c"]),
        (["a", BAD, "b"], "something else", ["a", BAD, "b"]),
        (["x", "y"], "xy", ["x", "y"]),
        ([], "", []),
    ],
)
def test_bytes_of_one_character_are_joined(tokens, text, shown):
    found = readable_tokens([(t, 1.0) for t in tokens], text)
    assert [t for t, _ in found] == shown
    assert sum(v or 0 for _, v in found) == len(tokens)
