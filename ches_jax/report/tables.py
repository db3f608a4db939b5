"""What a report says about a score table, as plain rows: shared by the page and the printed summary."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from ches_jax.scores.formulas import available, numbers, score_column
from ches_jax.scores.leading import leading_score
from ches_jax.scores.table import Scores, blocks, words
from ches_jax.stats import auc, mean, partial_spearman, quantiles, spearman

LENGTHS = ("chosen_tokens", "rejected_tokens", "prompt_tokens", "shared_prefix_tokens")


@dataclass(frozen=True, slots=True)
class CategoryRow:
    """A category of the data's own, and how its pairs score."""

    name: str
    rows: int
    mean: float
    """Of the separating score."""
    auc: float
    """Of the same: the chance that a pair of the category scores above one of another."""


def shown_scores(table: Scores) -> list[str]:
    """The names of the scores of a table, without the controls of selection."""
    return [name for name in available(table) if name not in ("chosen_tokens", "random")]


def quantile_rows(table: Scores) -> list[tuple[str, list[float]]]:
    """Quantiles of every score, then of every length."""
    rows = [(name, quantiles(score_column(table, name))) for name in shown_scores(table)]
    return rows + [(n, quantiles(numbers(table, n))) for n in LENGTHS if n in table.schema.names]


def scored_rows(table: Scores) -> int:
    """How many rows have a score."""
    if "ches" not in table.schema.names:
        return len(table)
    return len(table) - sum(block["ches"].null_count for block in blocks(table, ["ches"]))


def flag_counts(table: Scores) -> list[tuple[str, int, str]]:
    """Flags with their number of rows and their meaning, the commonest first."""
    from ches_jax.data.audit import FLAGS

    if "flags" not in table.schema.names:
        return []
    counts: Counter[str] = Counter()  # by first occurrence
    for block in blocks(table, ["flags"]):
        for one in block["flags"].combine_chunks().flatten().value_counts().to_pylist():
            counts[one["values"]] += one["counts"]
    return [(flag, n, FLAGS.get(flag, "")) for flag, n in counts.most_common()]


def flagged_rows(table: Scores) -> int:
    """How many rows have a flag."""
    if "flags" not in table.schema.names:
        return 0
    lengths = (pc.call_function("list_value_length", [block["flags"]]) for block in blocks(table, ["flags"]))
    return sum(int((of_block.fill_null(0).to_numpy() > 0).sum()) for of_block in lengths)


def separating_score(table: Scores) -> str | None:
    """The score that separates categories: the one that leads (``scores.leading``)."""
    found = leading_score(shown_scores(table))
    return None if found is None else found.name


def category_rows(table: Scores) -> list[CategoryRow]:
    """Categories, the highest separating mean first; empty when the data has none."""
    by = separating_score(table)
    if "category" not in table.schema.names or by is None:
        return []
    names, which = words(table, "category")
    if not any(names):
        return []
    values, rows = score_column(table, by), []
    for place, name in enumerate(names):
        inside = which == place
        rows.append(CategoryRow(name, int(inside.sum()), mean(values[inside]), auc(values, inside)))
    return sorted(rows, key=lambda row: -np.nan_to_num(row.auc, nan=-1.0))


@dataclass(frozen=True, slots=True)
class LengthRow:
    """How a score goes with the responses' lengths (Spearman; partial: the other length held fixed)."""

    score: str
    difference: float
    total: float
    difference_given_total: float
    total_given_difference: float


def differences(table: Scores) -> tuple[np.ndarray, np.ndarray]:
    """``rejected - chosen`` tokens, and their sum."""
    chosen, rejected = numbers(table, "chosen_tokens"), numbers(table, "rejected_tokens")
    return rejected - chosen, rejected + chosen


def length_rows(table: Scores) -> list[LengthRow]:
    """The length confound, score by score."""
    difference, total = differences(table)
    rows = []
    for name in shown_scores(table):
        values = score_column(table, name)
        rows.append(
            LengthRow(
                name,
                spearman(values, difference),
                spearman(values, total),
                partial_spearman(values, difference, [total]),
                partial_spearman(values, total, [difference]),
            )
        )
    return rows


def agreement_rows(table: Scores) -> list[tuple[str, float, float]]:
    """Each score against CHES: Spearman, and the same with both response lengths held fixed."""
    names = shown_scores(table)
    if "ches" not in names:
        return []
    ches, lengths = score_column(table, "ches"), [numbers(table, "chosen_tokens"), numbers(table, "rejected_tokens")]
    rows = []
    for name in names:
        if name != "ches":
            values = score_column(table, name)
            rows.append((name, spearman(ches, values), partial_spearman(ches, values, lengths)))
    return rows


def small_edit_high_ches(table: Scores) -> tuple[np.ndarray, float, float]:
    """Pairs that look nearly alike on the surface and to the model.

    Returns:
      Their positions, the highest CHES first, and the bounds: edit distance up to its lower quartile
      (and never above one half, where every pair differs much), CHES from its upper quartile on.
    """
    ches, edit = score_column(table, "ches"), -score_column(table, "minus_edit_distance")
    both = np.isfinite(ches) & np.isfinite(edit)
    if not both.any():
        return np.empty(0, dtype=np.int64), float("nan"), float("nan")
    near, high = min(0.5, float(np.quantile(edit[both], 0.25))), float(np.quantile(ches[both], 0.75))
    corner = np.flatnonzero(both & (edit <= near) & (ches >= high))
    return corner[np.argsort(-ches[corner], kind="stable")], near, high


def extremes(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the highest and of the lowest values, each from its end on."""
    scored = np.flatnonzero(np.isfinite(values))
    order = scored[np.argsort(values[scored], kind="stable")]
    return order[::-1][:count], order[:count]
