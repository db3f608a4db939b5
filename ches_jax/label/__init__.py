"""``ches label``: how sure is each label? ``ches gather``: pairs and texts into the rows that losses read."""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names, make_callable

if TYPE_CHECKING:
    from ches_jax.label.config import LabelConfig as LabelConfig
    from ches_jax.label.run import label as label

_HOMES = {"label": ".run", "LabelConfig": ".config"}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
make_callable(__name__)
