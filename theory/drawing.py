"""Drawing with matplotlib: figures are objects, without global state and without a display, and come out as SVG."""

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, BLUE, ORANGE = "#1a1a1a", "#1f5f99", "#c2410c"
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f", "#56b4e9", "#000000")
"""Colours that colour-blind readers tell apart (Okabe and Ito)."""


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


def vector(figure: "Figure") -> bytes:
    """The figure as SVG, the same bytes for the same numbers."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "ches_jax", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def drawable(name: str) -> str:
    """A name from the data as a label: short, without glyphs that the font lacks."""
    # Such glyphs would warn; the page itself shows the name as it is.
    text = "".join(c if 32 <= ord(c) < 0x250 else "?" for c in name) or "(none)"
    return text if len(text) <= 48 else text[:45] + "..."
