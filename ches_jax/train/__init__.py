"""Preference training that watches displacement: state, objective, step, loop, checkpoints, displacement log."""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names, make_callable

if TYPE_CHECKING:
    from ches_jax.train.config import TrainConfig as TrainConfig
    from ches_jax.train.loop import Stopped as Stopped
    from ches_jax.train.loop import train as train

_HOMES = {
    "train": ".loop",
    "Stopped": ".loop",
    "TrainConfig": ".config",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
make_callable(__name__)
