"""The page of ``score_scaling``: its curves, and every number."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ches_jax.report.document import Page, Section
from ches_jax.report.html import data_table, figure, gallery, paragraphs
from ches_jax.report.render import render
from ches_jax.report.svg import Series, lines

SHARE = "share of the peak"
PARAMETERS = {"1m": 1e6, "3m": 3e6, "30m": 3e7, "120m": 1.2e8, "1b": 1e9}
BUSY = 0.5
"""Cores of others above which a point is marked."""


class Curve(NamedTuple):
    """What a figure shows of a curve of the results."""

    curve: str
    title: str
    x: str
    at: Callable[[str], float]
    y: str
    value: Callable[[Mapping[str, Any]], float]


def _share(row: Mapping[str, Any]) -> float:
    return row["share_of_matmul_peak"]


def _pairs_a_second(row: Mapping[str, Any]) -> float:
    return row["pairs"] / row["seconds"]


CURVES = [
    Curve("length", "Length", "tokens of prompt + response, log2", lambda n: np.log2(int(n)), SHARE, _share),
    Curve("size", "Models", "parameters, log10", lambda n: np.log10(PARAMETERS[n]), SHARE, _share),
    Curve("pairs", "Pairs", "pairs, log10", lambda n: np.log10(int(n)), "pairs a second", _pairs_a_second),
    Curve("pairs", "Memory", "pairs, log10", lambda n: np.log10(int(n)), "MB", lambda r: r["largest_process_mb"]),
    Curve("processes", "Processes on the same cores", "processes", float, "pairs a second", _pairs_a_second),
    Curve("devices", "Virtual devices", "devices", float, SHARE, _share),
]  # fmt: skip
COLUMNS = {
    "pairs": "pairs", "cpu_seconds": "CPU s", "seconds": "s", "share_of_matmul_peak": "share of peak",
    "positions": "positions", "used_positions": "useful", "largest_process_mb": "MB", "others": "cores of others",
}  # fmt: skip


def page_of(result: Mapping[str, Any]) -> Page:
    """The page of a result with its environment."""
    table, env = result["table"], result["environment"]
    shown = [c for c in CURVES if c.curve in table]
    figures = [
        figure(
            f"{c.curve}-{k}",
            c.title,
            lines([_series(c, table[c.curve])], x=c.x, y=c.y, zero=True),
            "; ".join(f"{point}: {c.value(row):.3g}" for point, row in table[c.curve].items()),
        )
        for k, c in enumerate(shown)
    ]
    rows = [
        [curve, point, *(_number(row[name]) if name in row else "" for name in COLUMNS)]
        for curve, points in table.items()
        for point, row in points.items()
    ]
    busy = [f"{c} {at}" for c, points in table.items() for at, row in points.items() if row.get("others", 0) > BUSY]
    how = paragraphs(
        "The share is of a large matrix product in the same process, of useful positions alone: padding counts as "
        "lost. Pairs and processes are whole commands with their start."
    )
    return Page(
        kind="benchmark",
        title="How scoring scales",
        headline="; ".join(_span(c, table[c.curve]) for c in shown),
        subtitle=f"one run of each point, {env['cpu']}, {env['cores']} cores",
        tone="plain",
        notes=[f"Others used more than {BUSY} of a core during: {', '.join(busy)}."] if busy else [],
        sections=[
            Section(anchor="curves", heading="Curves", body=how + gallery(figures)),
            Section(
                anchor="numbers",
                heading="Every number",
                body=data_table(["curve", "point", *COLUMNS.values()], rows, text_columns=2),
            ),
            Section(
                anchor="environment",
                heading="Environment",
                body=data_table(["what", "value"], [[k, str(v)] for k, v in env.items()], text_columns=2),
                folded=True,
            ),
        ],
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if isinstance(value, int) or value >= 100 else f"{value:.3g}"


def _span(curve: Curve, points: Mapping[str, Mapping[str, Any]]) -> str:
    """The values at both ends of a curve."""
    (first, a), *_, (last, b) = sorted(points.items(), key=lambda point: curve.at(point[0]))
    return f"{curve.title}, {first} to {last}: {curve.y} {_number(curve.value(a))} to {_number(curve.value(b))}"


def _series(curve: Curve, points: Mapping[str, Mapping[str, Any]]) -> Series:
    at = np.array([curve.at(point) for point in points])
    values = np.array([curve.value(row) for row in points.values()])
    order = np.argsort(at)
    return Series(name=curve.y, x=at[order], y=values[order])


def write_page(result: Mapping[str, Any], out: Path) -> Path:
    """Writes it."""
    out.write_text(render(page_of(result)), encoding="utf-8")
    return out
