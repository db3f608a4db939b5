"""Figures that all items draw alike: small, plain, the same bytes for the same numbers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Sequence[str] = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#7f7f7f", "#56b4e9", "#000000")
"""Colours that colour-blind readers tell apart."""


def axes_row(count: int, width: float = 3.1, height: float = 2.8, shared: bool = True) -> "tuple[Figure, list[Axes]]":
    """A figure with a row of panels, whose vertical axis is ``shared`` or not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count + 1.5, height), dpi=110, layout="constrained")
    axes = figure.subplots(1, count, sharey=shared, squeeze=False)
    for ax in axes[0]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, list(axes[0])


def save(figure: "Figure", path: Path) -> Path:
    """Write the figure, without a time in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    return path
