"""Figures of a score table, each as PNG bytes. Figures are objects: no global state, no display."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BLUE, ORANGE = "#1a1a1a", "#1f5f99", "#c2410c"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f", "#56b4e9", "#000000")
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""
_SIZE = (5.2, 3.4)
_DENSE = 4000
"""Points above which a scatter is a blot; hexagons with their counts are drawn instead."""


CATEGORIES = 12
"""Categories whose histograms still fit one figure."""


def _new(xlabel: str, ylabel: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.ticklabel_format(axis="both", style="sci", scilimits=(-3, 4))
    return figure, axes


def panels(
    rows: int, columns: int, size: tuple[float, float] = (3.0, 2.6), **options: Any
) -> "tuple[Figure, list[Axes]]":
    """A figure of several plots, row by row; ``size`` is one plot's, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), dpi=120, layout="constrained")
    axes_of_all = figure.subplots(rows, columns, squeeze=False, **options).ravel().tolist()
    for axes in axes_of_all:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.xaxis.label.set_fontsize(9)
        axes.yaxis.label.set_fontsize(9)
    return figure, axes_of_all


def png(figure: "Figure") -> bytes:
    """The figure as PNG, the same bytes for the same numbers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _bins(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # one value: a bar around it
        pad = 0.5 * max(1.0, abs(low) * 1e-3)
        low, high = low - pad, high + pad
    return np.linspace(low, high, 41)


def histogram(values: np.ndarray, name: str) -> bytes:
    """How many pairs have which score, with the median marked."""
    values = values[np.isfinite(values)]
    figure, axes = _new(name, "pairs")
    if values.size:
        axes.hist(values, bins=_bins(values), color=BLUE)  # type: ignore[arg-type]
        axes.axvline(float(np.median(values)), color=ORANGE, linewidth=1.5, label="median")
        axes.legend(frameon=False, fontsize=9)
    return png(figure)


def histogram_by_category(values: np.ndarray, categories: np.ndarray, name: str, limit: int = CATEGORIES) -> bytes:
    """The score's distribution in each of the largest categories, on common bins, one below the other."""
    from matplotlib.figure import Figure

    finite = np.isfinite(values)
    values, categories = values[finite], categories[finite]
    names, counts = np.unique(categories, return_counts=True)
    names = names[np.argsort(-counts, kind="stable")][:limit]
    names = sorted(names, key=lambda n: -float(np.median(values[categories == n])))
    figure = Figure(figsize=(_SIZE[0], 0.9 + 0.7 * max(1, len(names))), dpi=120, layout="constrained")
    if not len(names):
        return png(figure)
    rows = np.atleast_1d(figure.subplots(len(names), 1, sharex=True))
    for axes, category in zip(rows, names, strict=True):
        axes.hist(values[categories == category], bins=_bins(values), color=BLUE)
        # The name comes from the data: with mathtext off, a dollar sign in it is a dollar sign.
        axes.set_title(drawable(category), fontsize=9, loc="left", color=INK, parse_math=False)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_yticks([])
    rows[-1].set_xlabel(name)
    return png(figure)


def drawable(name: str) -> str:
    """A name from the data as a label: short, without glyphs that the font lacks."""
    # Such glyphs would warn; the page itself shows the name as it is.
    text = "".join(c if 32 <= ord(c) < 0x250 else "?" for c in name) or "(none)"
    return text if len(text) <= 48 else text[:45] + "..."


def scatter(x: np.ndarray, y: np.ndarray, xlabel: str, ylabel: str) -> bytes:
    """One score against a length (or against another score)."""
    figure, axes = _new(xlabel, ylabel)
    _points(figure, axes, x, y)
    return png(figure)


def _points(figure: "Figure", axes: "Axes", x: np.ndarray, y: np.ndarray) -> None:
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if x.size > _DENSE and np.ptp(x) > 0 and np.ptp(y) > 0:
        drawn = axes.hexbin(x, y, gridsize=45, bins="log", mincnt=1, cmap="viridis_r", linewidths=0)
        figure.colorbar(drawn, ax=axes, label="pairs")
    elif x.size:
        alpha = float(np.clip(400 / x.size, 0.15, 0.8))
        axes.scatter(x, y, s=12, color=BLUE, alpha=alpha, linewidths=0)


def edit_against_ches(edit: np.ndarray, ches: np.ndarray, near: float, high: float) -> bytes:
    """Edit distance against CHES; the corner "small edit + high CHES" is framed."""
    from matplotlib.patches import Rectangle

    figure, axes = _new("edit distance (0: same tokens)", "ches")
    _points(figure, axes, edit, ches)
    if np.isfinite(near) and np.isfinite(high):
        (left, _), (_, top) = axes.get_xlim(), axes.get_ylim()
        frame = Rectangle((left, high), max(0.0, near - left), top - high, fill=False, edgecolor=ORANGE, linewidth=2)
        axes.add_patch(frame)
        words = f"small edit + high CHES (edit <= {near:.3g}, ches >= {high:.3g})"
        axes.legend([frame], [words], loc="lower right", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
    return png(figure)
