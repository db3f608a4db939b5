"""Scores of preference pairs: CHES and its relatives, on files, in memory, and on arrays of anyone's model."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ches_jax.data.tokenize import load_tokenizer
    from ches_jax.scores.arrays import PairStatistics, ches, head_score, ln_ches, pair_statistics
    from ches_jax.scores.config import ScoreConfig
    from ches_jax.scores.in_memory import score_pairs
    from ches_jax.scores.run import score
    from ches_jax.scores.table import read_table

_HOME = {
    "PairStatistics": "ches_jax.scores.arrays",
    "ScoreConfig": "ches_jax.scores.config",
    "ches": "ches_jax.scores.arrays",
    "head_score": "ches_jax.scores.arrays",
    "ln_ches": "ches_jax.scores.arrays",
    "load_tokenizer": "ches_jax.data.tokenize",
    "pair_statistics": "ches_jax.scores.arrays",
    "read_table": "ches_jax.scores.table",
    "score": "ches_jax.scores.run",
    "score_pairs": "ches_jax.scores.in_memory",
}

__all__ = [
    "PairStatistics",
    "ScoreConfig",
    "ches",
    "head_score",
    "ln_ches",
    "load_tokenizer",
    "pair_statistics",
    "read_table",
    "score",
    "score_pairs",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first asked for, so that the command line starts without jax."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOME)
