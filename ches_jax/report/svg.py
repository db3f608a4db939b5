"""Figures as SVG text: pure functions of numbers. Colours come from the page's style sheet and turn dark with it.

A series differs from its neighbours in colour and in the shape of its marks or dashes, and bears its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ches_jax.report.axes import Axis, axis, readable
from ches_jax.report.html import escape

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 66, 14, 22, 40
MARKS = ("circle", "square", "triangle")


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points of a line: x and y, [points]; NaN leaves a gap."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int = 0
    """0 chosen, 1 rejected, 2 to 5 others."""
    dashed: bool = False
    line: bool = True
    faint: bool = False
    marks: bool = True
    band: tuple[np.ndarray, np.ndarray] | None = field(default=None)
    """Lower and upper end, [points] each."""


def lines(series: Sequence[Series], *, x: str, y: str, zero: bool = False) -> str:
    """Curves over steps, each named in a legend of words above the frame."""
    across = axis(np.concatenate([s.x for s in series]), whole=True)
    up = axis(np.concatenate([s.y for s in series]), zero=zero, pad=0.05)
    legend, rows = _legend(series)
    place = _Frame(across, up, top=TOP + 14 * (rows - 1))
    parts = [place.grid(x, y)]
    for s in series:
        points = [(place.x(a), place.y(b)) for a, b in zip(s.x, s.y, strict=True) if np.isfinite(b)]
        kind = f"s{s.colour}"
        if s.band is not None and len(s.x) > 1:
            low, high = (
                [f"{place.x(a):.1f},{place.y(b):.1f}" for a, b in zip(s.x, end, strict=True)] for end in s.band
            )
            parts.append(f'<polygon class="{kind} band" points="{" ".join(low + high[::-1])}"/>')
        if s.line and len(points) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
            css = f"{kind} curve{' dashed' * s.dashed}{' faint' * s.faint}"
            parts.append(f'<polyline class="{css}" points="{path}"/>')
        if s.marks or len(points) == 1:
            parts += [_mark(MARKS[s.colour % 3], a, b, 3.4 if s.line else 4.4, kind) for a, b in points[-400:]]
    return place.svg([*parts, legend])


def histogram(values: np.ndarray, *, x: str, of: str = "pairs", bins: int = 48) -> str:
    """How many pairs have which value; those beyond the frame stand in the first and the last bar and are counted."""
    finite = values[np.isfinite(values)]
    across = axis(finite)
    counts, edges = np.histogram(np.clip(finite, across.low, across.high), bins=bins, range=(across.low, across.high))
    place = _Frame(across, _counts(counts))
    parts = [place.grid(x, of)]
    for n, a, b in zip(counts, edges[:-1], edges[1:], strict=True):
        if n:
            parts.append(place.bar("s0", place.x(a) + 0.5, place.x(b) - 0.5, 0, float(n)))
    if finite.size:
        at = place.x(float(np.median(finite)))
        parts.append(f'<line class="axis dashed" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        anchor, step = ("start", 4) if at < WIDTH / 2 else ("end", -4)
        parts.append(f'<text x="{at + step:.1f}" y="{TOP + 11}" text-anchor="{anchor}">median</text>')
    return place.svg(parts)


def two_histograms(values: Mapping[str, np.ndarray], *, x: str, of: str = "pairs", bins: int = 40) -> str:
    """The distributions of two or three columns on one axis, as outlines."""
    across = axis(np.concatenate([*values.values()]))
    histograms = {
        name: np.histogram(np.clip(v[np.isfinite(v)], across.low, across.high), bins, (across.low, across.high))
        for name, v in values.items()
    }
    place = _Frame(across, _counts(np.concatenate([c for c, _ in histograms.values()])))
    parts, series = [place.grid(x, of)], []
    for k, (name, (counts, edges)) in enumerate(histograms.items()):
        steps = " ".join(
            f"{place.x(e):.1f},{place.y(c):.1f}"
            for c, a, b in zip(counts, edges[:-1], edges[1:], strict=True)
            for e in (a, b)
        )
        parts.append(f'<polyline class="s{k} curve{" dashed" * (k == 1)}" points="{steps}"/>')
        series.append(Series(name=name, x=edges, y=edges, colour=k, dashed=k == 1, marks=False))
    return place.svg([*parts, _legend(series)[0]])


def stacked(shares: Mapping[str, np.ndarray], steps: np.ndarray, *, x: str, y: str) -> str:
    """Bars of parts that add up, one for each step; negative parts hang below zero."""
    values = np.array([*shares.values()], dtype=float)
    highest = np.where(values > 0, values, 0).sum(axis=0)
    lowest = np.where(values < 0, values, 0).sum(axis=0)
    up = axis(np.concatenate([highest, lowest]), zero=True, whole=True)
    at = np.arange(len(steps))
    shown = at[:: max(1, -(-len(steps) // 8))]
    across = Axis(-0.6, len(steps) - 0.4, tuple(map(float, shown)), tuple(str(steps[i]) for i in shown))
    series = [Series(name=n, x=at, y=at, colour=k % 6, line=False) for k, n in enumerate(shares)]
    legend, rows = _legend(series, swatch=True)
    place = _Frame(across, up, top=TOP + 14 * (rows - 1))
    parts, over, under = [place.grid(x, y)], np.zeros(len(steps)), np.zeros(len(steps))
    half = min(0.42, 0.09 * (len(steps) + 1))  # a single bar is no wall
    for k, (name, row) in enumerate(zip(shares, values, strict=True)):
        for i, value in enumerate(row):
            if np.isfinite(value) and value:
                base = over if value > 0 else under
                parts.append(
                    place.bar(f"s{k % 6}", place.x(i - half), place.x(i + half), base[i], base[i] + value, name)
                )
                base[i] += value
    return place.svg([*parts, legend])


def ranges(rows: Mapping[str, tuple[float, float, float]], *, x: str) -> str:
    """Quartiles of groups: a line from the lower to the upper, a dot at the median; one group below the other."""
    height = 26 * len(rows) + TOP + BOTTOM
    ends = np.array([*rows.values()], dtype=float).ravel()
    across = axis(ends, whole=True)
    left = 170
    place = _Frame(across, Axis(0, 1, (), ()), left=left, height=height)
    parts = [place.grid(x, "")]
    for i, (name, (low, middle, high)) in enumerate(rows.items()):
        at = TOP + 26 * i + 13
        short = name if len(name) <= 26 else name[:25] + "…"
        parts.append(f'<text x="{left - 8}" y="{at + 4}" text-anchor="end" class="strong">{escape(short)}</text>')
        parts.append(f'<line class="s0 curve" x1="{place.x(low):.1f}" x2="{place.x(high):.1f}" y1="{at}" y2="{at}"/>')
        parts.append(_mark("circle", place.x(middle), at, 4.5, "s0"))
    return place.svg(parts)


def _counts(values: np.ndarray) -> Axis:
    """The axis of numbers of pairs: from 0, ticks at whole numbers."""
    whole = axis(values.astype(float), zero=True, whole=True, count=4)
    kept = [(t, label) for t, label in zip(whole.ticks, whole.labels, strict=True) if t == int(t)]
    return Axis(whole.low, whole.high, tuple(t for t, _ in kept), tuple(f"{int(t):,}" for t, _ in kept))


class _Frame:
    """From values to places, and the frame with its ticks."""

    def __init__(self, across: Axis, up: Axis, *, left: int = LEFT, height: int = HEIGHT, top: int = TOP):
        self.across, self.up, self.left, self.height, self.top = across, up, left, height, top

    def x(self, value: float) -> float:
        part = (min(max(value, self.across.low), self.across.high) - self.across.low) / (
            self.across.high - self.across.low
        )
        return self.left + part * (WIDTH - RIGHT - self.left)

    def y(self, value: float) -> float:
        part = (min(max(value, self.up.low), self.up.high) - self.up.low) / (self.up.high - self.up.low)
        return self.height - BOTTOM - part * (self.height - BOTTOM - self.top)

    def bar(self, kind: str, left: float, right: float, low: float, high: float, name: str = "") -> str:
        top, bottom = sorted((self.y(low), self.y(high)))
        title = f"<title>{escape(name)}: {escape(readable(abs(high - low), 3))}</title>" if name else ""
        return (
            f'<rect class="{kind} fillbar" x="{left:.1f}" y="{top:.1f}" width="{max(0.5, right - left):.1f}" '
            f'height="{bottom - top:.1f}">{title}</rect>'
        )

    def grid(self, x: str, y: str) -> str:
        bottom, right, parts = self.height - BOTTOM, WIDTH - RIGHT, []
        for tick, label in zip(self.up.ticks, self.up.labels, strict=True):
            at, kind = self.y(tick), "axis" if tick == 0 else "grid"
            parts.append(f'<line class="{kind}" x1="{self.left}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{self.left - 6}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
        for tick, label in zip(self.across.ticks, self.across.labels, strict=True):
            at = self.x(tick)
            parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
            half = 3.5 * len(label)  # a label at the end of the axis stays within the figure
            at = min(at, WIDTH - half)
            parts.append(f'<text x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>')
        parts.append(f'<line class="axis" x1="{self.left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        parts.append(f'<text class="strong" x="{right}" y="{self.height - 6}" text-anchor="end">{escape(x)}</text>')
        return "".join([*parts, f'<text class="strong" x="4" y="12">{escape(y)}</text>' if y else ""])

    def svg(self, parts: Sequence[str]) -> str:
        span = f"{self.left},{WIDTH - RIGHT}"
        body = "".join(parts)
        return f'<svg viewBox="0 0 {WIDTH} {self.height}" data-span="{span}" role="img" aria-label="ALT">{body}</svg>'


def _mark(kind: str, x: float, y: float, r: float, colour: str) -> str:
    css = f'class="{colour} mark"'
    if kind == "square":
        return f'<rect {css} x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r:.1f}" height="{2 * r:.1f}"/>'
    if kind == "triangle":
        return f'<path {css} d="M{x:.1f} {y - 1.2 * r:.1f}l{1.1 * r:.1f} {2.1 * r:.1f}h{-2.2 * r:.1f}z"/>'
    return f'<circle {css} cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'


def _legend(series: Sequence[Series], swatch: bool = False) -> tuple[str, int]:
    """Names at the top, from the right, each behind what it looks like; and how many rows they take."""
    parts, right, row = [], float(WIDTH - RIGHT), 12
    for s in reversed(series):
        wide = 6.3 * len(s.name) + 30
        if right - wide < 110:
            right, row = float(WIDTH - RIGHT), row + 14
        at, kind = right - wide, f"s{s.colour}"
        if swatch:
            parts.append(f'<rect class="{kind} fillbar" x="{at + 8:.1f}" y="{row - 9}" width="12" height="10"/>')
        else:
            if s.line:
                dash = " dashed" * s.dashed
                parts.append(
                    f'<line class="{kind} curve{dash}" x1="{at:.1f}" x2="{at + 20:.1f}" y1="{row - 4}" y2="{row - 4}"/>'
                )
            if s.marks:
                parts.append(_mark(MARKS[s.colour % 3], at + 10, row - 4, 3.4, kind))
        parts.append(f'<text class="strong" x="{at + 24:.1f}" y="{row}">{escape(s.name)}</text>')
        right = at - 6
    return "".join(parts), (row - 12) // 14 + 1
