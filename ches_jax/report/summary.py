"""The summary that ``ches score`` prints at its end: monospaced, at most 100 columns."""

import math

from ches_jax.errors import printable
from ches_jax.report.tables import category_rows, flag_counts, quantile_rows, scored_rows, separating_score
from ches_jax.scores.table import Scores
from ches_jax.stats import QUANTILES

WIDTH = 100
_CATEGORIES = 20
_NAME = 22


def number(value: float, digits: int = 4) -> str:
    """A number for a table; a dash where there is none.

    >>> number(-1234.5678), number(0.25), number(float("nan"))
    ('-1235', '0.25', '-')
    """
    return "-" if math.isnan(value) else f"{value:.{digits}g}"


def correlation(value: float) -> str:
    """A number in [-1, 1] with two decimals (no minus zero); a dash where it is undefined."""
    return "-" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"


def one_line(text: str, width: int) -> str:
    """Text from the data on one line of a terminal, cut to ``width``."""
    clean = printable(text.translate({ord("\n"): " ", ord("\t"): " "}))
    return clean if len(clean) <= width else clean[: width - 3] + "..."


def summary_text(table: Scores) -> str:
    """Quantiles of scores and lengths, flags, and how categories separate.

    >>> import pyarrow as pa
    >>> ids = {"row_id": ["a"], "index": [0], "ches": [1.5]}
    >>> print(summary_text(pa.table(ids)).splitlines()[0])
    1 pairs, 1 scored
    """
    blocks = [_counts(table), _quantiles(table), _flags(table), _categories(table)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def _counts(table: Scores) -> list[str]:
    scored = scored_rows(table)
    without = len(table) - scored
    return [f"{len(table)} pairs, {scored} scored" + (f", {without} without a score" if without else "")]


def _quantiles(table: Scores) -> list[str]:
    if not len(table):
        return []
    header = f"{'score':<{_NAME}}" + "".join(f"{name:>11}" for name in QUANTILES)
    rows = [f"{name:<{_NAME}}" + "".join(f"{number(v):>11}" for v in vs) for name, vs in quantile_rows(table)]
    return [header, *rows]


def _flags(table: Scores) -> list[str]:
    counts = flag_counts(table)
    if not counts:
        return []
    return ["flags", *(one_line(f"  {flag:<20}{n:>9}  {meaning}", WIDTH) for flag, n, meaning in counts)]


def _categories(table: Scores) -> list[str]:
    rows = category_rows(table)
    if not rows:
        return []
    lines = [f"{'category':<40}{'pairs':>9}{f'mean {separating_score(table)}':>28}{'AUC':>8}"]
    for row in rows[:_CATEGORIES]:
        name = one_line(row.name or "(none)", 38)
        lines.append(f"{name:<40}{row.rows:>9}{number(row.mean):>28}{correlation(row.auc):>8}")
    if len(rows) > _CATEGORIES:
        lines.append(f"... and {len(rows) - _CATEGORIES} more")
    return [
        *lines,
        f"AUC: the chance that a pair of the category has a higher {separating_score(table)} than one of another;",
        "1 or 0 is full separation, 0.5 none",
    ]
