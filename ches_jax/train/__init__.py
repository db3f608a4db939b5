"""Preference training that watches displacement: state, objective, step, loop, checkpoints, displacement log."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ches_jax.train.config import TrainConfig
    from ches_jax.train.loop import Stopped, train

__all__ = ["Stopped", "TrainConfig", "train"]
_MODULES = {"TrainConfig": "config", "Stopped": "loop", "train": "loop"}


def __getattr__(name: str) -> Any:
    """Public names, imported when they are asked for: ``TrainConfig`` alone loads no jax."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
