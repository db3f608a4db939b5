"""CHES and its relatives: the mathematics on arrays, pairs scored in memory, and the run that scores a data set."""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names

if TYPE_CHECKING:
    from ches_jax.data.tokenize import load_tokenizer as load_tokenizer
    from ches_jax.scores.arrays import PairStatistics as PairStatistics
    from ches_jax.scores.arrays import ches as ches
    from ches_jax.scores.arrays import head_score as head_score
    from ches_jax.scores.arrays import ln_ches as ln_ches
    from ches_jax.scores.arrays import pair_statistics as pair_statistics
    from ches_jax.scores.config import ScoreConfig as ScoreConfig
    from ches_jax.scores.in_memory import score_pairs as score_pairs
    from ches_jax.scores.run import merge as merge
    from ches_jax.scores.run import score as score
    from ches_jax.scores.table import read_table as read_table

_HOMES = {
    "PairStatistics": ".arrays",
    "pair_statistics": ".arrays",
    "ches": ".arrays",
    "ln_ches": ".arrays",
    "head_score": ".arrays",
    "score_pairs": ".in_memory",
    "load_tokenizer": "ches_jax.data.tokenize",
    "score": ".run",
    "merge": ".run",
    "ScoreConfig": ".config",
    "read_table": ".table",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
