"""The printed summary: its numbers, its width, and text that comes from the data."""

import numpy as np
import pyarrow as pa
import pytest

from ches_jax.report import summary_text
from ches_jax.report.tables import extremes, small_edit_high_ches


def make_table(n, **columns):
    base = {
        "row_id": [f"r{i}" for i in range(n)],
        "index": np.arange(n),
        "ches": np.arange(n) * 1.0,
        "ln_ches": np.arange(n) / 10,
        "edit_distance": np.linspace(0, 1, n),
        "chosen_tokens": np.arange(n, dtype=np.int32) + 1,
        "rejected_tokens": np.arange(n, dtype=np.int32)[::-1] + 1,
    }
    return pa.table(base | columns)


def row_of(text, name):
    return next(line.split()[1:] for line in text.splitlines() if line.startswith(name + " "))


def test_quantiles_of_scores_and_lengths():
    text = summary_text(make_table(101))
    assert row_of(text, "ches") == ["0", "5", "25", "50", "75", "95", "100"]
    assert row_of(text, "ln_ches")[3] == "5"
    assert row_of(text, "minus_edit_distance")[0] == "-1"
    assert row_of(text, "chosen_tokens")[-1] == "101"
    assert text.splitlines()[0] == "101 pairs, 101 scored"


def test_flags_with_their_meaning_and_categories_with_their_separation():
    flags = [["truncated_chosen"], ["truncated_chosen", "identical"], [], []]
    text = summary_text(make_table(4, flags=flags, category=["low", "low", "high", None]))
    assert row_of(text, "  truncated_chosen")[0] == "2"
    assert "was cut to --max-length" in text
    assert row_of(text, "low") == ["2", "0.5", "0.00"]
    assert row_of(text, "high") == ["1", "2", "0.67"]
    assert row_of(text, "(none)") == ["1", "3", "1.00"]


@pytest.mark.parametrize("big", [1e300, -1.23456e-200])
def test_no_line_is_wider_than_100_columns(big):
    hostile = ["\x1b[31mred\u202e" + "long " * 40] + [f"c{i}" for i in range(29)]
    flags = [["flag" * 30]] * 30
    text = summary_text(make_table(30, ches=np.full(30, big), category=hostile, flags=flags))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "\x1b" not in text and "\u202e" not in text
    assert "... and 10 more" in text
    text.encode()


@pytest.mark.parametrize("n", [0, 1, 2])
def test_small_tables_and_columns_without_a_value(n):
    nothing = pa.array([None] * n, pa.float64())
    assert f"{n} pairs, 0 scored" in summary_text(make_table(n, ches=nothing, category=["x"] * n))
    summary_text(make_table(n))


def test_rows_without_a_score_are_counted():
    text = summary_text(make_table(3, ches=[1.0, None, 3.0]))
    assert text.startswith("3 pairs, 2 scored, 1 without a score")
    assert row_of(text, "ches")[0] == "1"


def test_pairs_of_small_edits_and_high_ches_the_highest_first():
    ches = np.array([1, 9, 9.5, 2, 12, np.nan, 3, 4, 5, 6])
    edit = np.array([0.1, 0.1, 0.1, 0.9, 0.9, 0.0, 0.8, 0.7, 0.6, 0.5])
    found, near, high = small_edit_high_ches(make_table(10, ches=ches, edit_distance=edit))
    assert (near, high) == (0.1, 9.0)  # quartiles of the nine that have a score
    assert found.tolist() == [2, 1]


def test_the_highest_and_the_lowest_come_from_their_ends_and_what_has_no_score_is_neither():
    highest, lowest = extremes(np.array([2.0, np.nan, 5.0, -1.0, 3.0]), 2)
    assert highest.tolist() == [2, 4] and lowest.tolist() == [3, 0]
