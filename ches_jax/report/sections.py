"""The sections of a score report. Each takes its data and returns the HTML of its body."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.report import figures, tables
from ches_jax.report.html import data_table, escape, gallery, paragraphs, picture
from ches_jax.report.summary import correlation, number
from ches_jax.scores.formulas import SCORES, score_column
from ches_jax.stats import QUANTILES, quantiles, spearman

Draw = Callable[[str, bytes], bytes]
"""Saves a figure under a name and returns it."""

READING = (
    "When a model is trained on preference pairs with DPO or a relative of it, the chosen response can lose "
    "probability together with the rejected one, and the mass moves to something else. This is likelihood "
    "displacement. The theory says it is driven by pairs whose two responses look alike to the model: what "
    "lowers the one then lowers the other.",
    "CHES (centered hidden embedding similarity) measures this per pair, before any training: it adds up the "
    "model's last hidden states over each response, takes the inner product of the two sums, and subtracts the "
    "squared length of the chosen sum. Identical responses score 0; below 0 the rejected response reaches less "
    "far than the chosen one in the chosen direction; above 0 it reaches further. Higher means more similar and "
    "more at risk. Only the order of pairs on one model matters: values do not compare across models.",
    "ln_ches is the same with means in place of sums, so that length alone does not raise it. It is the version "
    "the paper used for filtering.",
)

LIMITS = (
    "Plain CHES goes with length: hidden states mostly have positive inner products, so a rejected response that "
    "is longer than the chosen one raises it. Look at the correlations above before a selection by CHES is "
    "credited to similarity, and compare with the length and random controls of ches select.",
    "Whether similar pairs should be dropped is debated. The paper found that keeping the 5% of pairs with the "
    "lowest ln_ches kept safety-tuned models from unlearning refusals, although the chosen responses still lost "
    "probability. Others find pairs with a minimal surface difference the most instructive. The two agree where "
    "the edit is small and the meaning differs.",
    "A score is a prediction from the untrained model, not a measurement of displacement: that takes the "
    "log-probabilities before and after training (ches diagnose). And displacement is not harm: mass can move "
    "to responses just as good.",
)


def quantile_section(table: pa.Table) -> str:
    """The quantile table and what each score is."""
    rows = [[name, *map(number, values)] for name, values in tables.quantile_rows(table)]
    meanings = [[n, SCORES[n].meaning] for n in tables.shown_scores(table)]
    return data_table(["", *QUANTILES], rows) + data_table(["score", "meaning"], meanings, text_columns=2)


def distribution_section(table: pa.Table, keep: Draw) -> str:
    """A histogram of every score."""
    pictures = []
    for name, values in tables.shown_scores(table).items():
        low, _, q25, median, q75, _, high = map(number, quantiles(values))
        alt = f"Histogram of {name}: from {low} to {high}, median {median}, middle half {q25} to {q75}."
        pictures.append(picture(keep(f"histogram_{name}", figures.histogram(values, name)), alt, name))
    return gallery(pictures)


def category_section(table: pa.Table, keep: Draw) -> str:
    """How categories separate; empty when the data has none."""
    rows = tables.category_rows(table)
    if not rows:
        return ""
    by = str(tables.separating_score(table))
    cells = [[r.name or "(none)", r.rows, number(r.ches), number(r.ln_ches), correlation(r.auc)] for r in rows]
    names = np.array([name or "" for name in table["category"].to_pylist()], dtype=object)
    few = f" (the {figures.CATEGORIES} largest)" if len(rows) > figures.CATEGORIES else ""
    pictures = []
    for score in ("ches", "ln_ches"):
        if score not in table.schema.names:
            continue
        drawn = figures.histogram_by_category(score_column(table, score), names, score)
        alt = f"Histograms of {score} for the largest categories; the table holds their means."
        pictures.append(picture(keep(f"categories_{score}", drawn), alt, f"{score} by category{few}"))
    return (
        paragraphs(
            f"AUC: the chance that a pair of the category has a higher {by} than a pair of another; "
            "1 or 0 is full separation, 0.5 none."
        )
        + data_table(["category", "pairs", "mean ches", "mean ln_ches", f"AUC of {by}"], cells)
        + gallery(pictures)
    )


def length_section(table: pa.Table, keep: Draw) -> str:
    """Scores against response lengths."""
    difference, total = tables.differences(table)
    rows = [
        [
            r.score,
            *(correlation(v) for v in (r.difference, r.total, r.difference_given_total, r.total_given_difference)),
        ]
        for r in tables.length_rows(table)
    ]
    header = ["Spearman of", "rejected - chosen", "total", "rejected - chosen | total", "total | rejected - chosen"]
    pictures = []
    for name in [n for n in ("ches", "ln_ches", "head_score") if n in table.schema.names]:
        values = score_column(table, name)
        for key, lengths, words in (
            ("difference", difference, "rejected - chosen tokens"),
            ("total", total, "chosen + rejected tokens"),
        ):
            png = keep(f"{name}_length_{key}", figures.scatter(lengths, values, words, name))
            rho = correlation(spearman(values, lengths))
            alt = f"{name} of each pair against {words}; Spearman correlation {rho}."
            pictures.append(picture(png, alt, f"{name} against {words} (Spearman {rho})"))
    explained = paragraphs(
        "A score that is mostly length says little that the lengths do not. Columns with a bar are partial "
        "correlations of ranks, with the length after the bar held fixed; a dash means undefined."
    )
    return explained + data_table(header, rows) + gallery(pictures)


def surface_section(table: pa.Table, keep: Draw, cards: Mapping[int, str], shown: int) -> str:
    """Edit distance against CHES, and how the other scores agree with CHES."""
    agreement = [[name, correlation(rho), correlation(partial)] for name, rho, partial in tables.agreement_rows(table)]
    body = data_table(["with ches", "Spearman", "given both lengths"], agreement)
    if not {"ches", "edit_distance"} <= set(table.schema.names):
        return body
    corner, near, high = tables.small_edit_high_ches(table)
    edit, ches = -score_column(table, "minus_edit_distance"), score_column(table, "ches")
    png = keep("edit_distance_ches", figures.edit_against_ches(edit, ches, near, high))
    bounds = f"edit distance up to {number(near)} and ches from {number(high)} on"
    alt = f"CHES of each pair against its edit distance; {len(corner)} lie in the framed corner, {bounds}."
    explained = paragraphs(
        f"Pairs with a small edit and a high CHES ({bounds}): {len(corner)}. They look alike on the surface and "
        "to the model as well."
    )
    first = f"Show {min(shown, len(corner))}, the highest ches first"
    body += gallery([picture(png, alt, "edit distance and CHES")]) + explained
    return body + (_folded(first, (cards[p] for p in corner[:shown])) if len(corner) else "")


def health_section(table: pa.Table, dropped: Mapping[str, int]) -> str:
    """What was wrong with rows, in numbers."""
    scored = tables.scored_rows(table)
    flags = tables.flag_counts(table)
    rows = [["in the table", len(table)], ["with a score", scored], ["without a score", len(table) - scored]]
    rows.append(["dropped before scoring", sum(dropped.values())])
    body = data_table(["rows", "number"], rows)
    if dropped:
        body += data_table(["dropped because of", "rows"], Counter(dropped).most_common())
    if not flags:
        return body + paragraphs("No row of the table has a flag.")
    return body + data_table(
        ["flag", "meaning", "rows"], [[flag, meaning, n] for flag, n, meaning in flags], text_columns=2
    )


def provenance_section(metadata: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """How the numbers came to be: the table's metadata, then the run's own record."""
    rows = [*flat({"scores": metadata}), *flat({"run": run})]
    return data_table(["what", "value"], rows[:200], text_columns=2)


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Nested JSON as dotted names with values.

    >>> flat({"a": {"b": 1, "c": None}})
    [('a.b', '1')]
    """
    if value is None or value == {} or value == []:
        return []
    if isinstance(value, Mapping):
        return [row for k, v in value.items() for row in flat(v, f"{name}.{k}" if name else str(k))]
    text = value if isinstance(value, str) else str(value)
    return [(name, text if len(text) <= 300 else text[:297] + "...")]


def extremes_section(by: str, most: np.ndarray, least: np.ndarray, cards: Mapping[int, str]) -> str:
    """The pairs at the two ends of one score, folded away until asked for."""
    parts = []
    for words, positions in (("Most", most), ("Least", least)):
        title = f"{words} similar by {by} ({len(positions)} pairs)"
        parts.append(_folded(title, (cards[p] for p in positions), is_open=words == "Most"))
    return f"<h3>By {escape(by)}</h3>" + "".join(parts)


def _folded(title: str, bodies: Iterable[str], is_open: bool = False) -> str:
    return f"<details{' open' * is_open}><summary>{escape(title)}</summary>{''.join(bodies)}</details>"
