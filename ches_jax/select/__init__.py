"""Turn scores into a preference data set, with controls and soft weights."""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names, make_callable

if TYPE_CHECKING:
    from ches_jax.select.config import SelectConfig as SelectConfig
    from ches_jax.select.keep import keep_indices as keep_indices
    from ches_jax.select.keep import parse_rule as parse_rule
    from ches_jax.select.keep import soft_weights as soft_weights
    from ches_jax.select.run import decide as decide
    from ches_jax.select.run import select as select

_HOMES = {
    "select": ".run",
    "decide": ".run",
    "SelectConfig": ".config",
    "parse_rule": ".keep",
    "keep_indices": ".keep",
    "soft_weights": ".keep",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
make_callable(__name__)
