"""CHES and its relatives: the mathematics on arrays, and the run that scores a data set."""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names

if TYPE_CHECKING:
    from ches_jax.scores.config import ScoreConfig as ScoreConfig
    from ches_jax.scores.formulas import ches as ches
    from ches_jax.scores.formulas import ln_ches as ln_ches
    from ches_jax.scores.run import merge as merge
    from ches_jax.scores.run import score as score
    from ches_jax.scores.table import read_table as read_table

_HOMES = {
    "ches": ".formulas",
    "ln_ches": ".formulas",
    "score": ".run",
    "merge": ".run",
    "ScoreConfig": ".config",
    "read_table": ".table",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
