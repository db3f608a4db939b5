"""The options of ``ches forecast`` and ``ches influence``. Plain data: importing this module loads no jax."""

from dataclasses import dataclass, fields
from typing import Literal

from ches_jax.options import not_identity
from ches_jax.train.config import TrainConfig, UpdateOptions


@dataclass(frozen=True, kw_only=True)
class PassOptions(UpdateOptions):
    """The training run that is forecast, and how the passes over its data are made."""

    probes: str | None = None
    """Held-out pairs, read as --pairs is: what becomes of their chosen responses is what counts."""
    holdout: int = 0
    """Take so many rows of --pairs, drawn by --seed, as probes in place of --probes."""
    out: str | None = not_identity(None)
    """Run directory; default: the first free one below runs/."""
    optimizer: str = "rmsprop"
    """rmsprop (torch's), adamw or sgd: those whose metric is known."""
    batch_tokens: int | None = not_identity(None)
    """Positions of a batch for each device; default: 4096 on a CPU, 32768 elsewhere."""
    chunk_rows: int = 1024
    """Pairs between two points that --resume continues from."""


@dataclass(frozen=True, kw_only=True)
class ForecastConfig(PassOptions):
    """What ``ches forecast`` does.

    >>> ForecastConfig(loss="ipo_sum", lr=3e-5, steps=16).order
    1
    """

    order: Literal[1, 2] = 1
    """2: second derivatives along the updates too, which costs about seven forward passes more."""
    pilot: int = 0
    """Make so many real updates and measure every pair after them, beside the forecast."""


@dataclass(frozen=True, kw_only=True)
class InfluenceConfig(PassOptions):
    """What ``ches influence`` does.

    >>> InfluenceConfig(probes="held_out.jsonl").optimizer
    'rmsprop'
    """


def training(config: PassOptions, out: str) -> TrainConfig:
    """The run that is forecast: its probes are held-out pairs, all pairs are watched."""
    values = {f.name: getattr(config, f.name) for f in fields(UpdateOptions) if f.name != "out"}
    return TrainConfig(
        **values, eval_pairs=config.probes, probes="none", out=out, attention="auto", watch=2**31, export=False
    )
