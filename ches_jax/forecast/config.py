"""The options of ``ches forecast``, ``influence`` and ``groups``. Plain data: importing this module loads no jax."""

from dataclasses import dataclass, field, fields
from typing import Literal

from ches_jax.options import ModelOptions, Numbers, Options, RowOptions, not_identity
from ches_jax.train.config import LoraOptions, TrainConfig, UpdateOptions
from ches_jax.types import Eos, Objective, OnBadRow


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Who computes, and how much at a time; no number depends on it beyond rounding."""

    batch_tokens: int | None = not_identity(None)
    """Positions of a batch for each device; default: 4096 on a CPU, 32768 elsewhere."""
    distributed: str = not_identity("off")
    """Several processes: auto (as the cluster says) or coordinator:port,n,id. They compute together, on a mesh over all
    of their devices; the first one writes."""


@dataclass(frozen=True, kw_only=True)
class PassOptions(DeviceOptions, UpdateOptions):
    """The training run that is forecast, and how the passes over its data are made."""

    probes: str | None = None
    """Held-out pairs, read as --pairs is: what becomes of their chosen responses is what counts."""
    holdout: int = 0
    """Take so many rows of --pairs, drawn by --seed, as probes in place of --probes."""
    out: str | None = not_identity(None)
    """Run directory; default: the first free one below runs/."""
    optimizer: str = "rmsprop"
    """rmsprop (torch's), adamw or sgd: those whose metric is known."""
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


@dataclass(frozen=True, kw_only=True)
class GroupsConfig(DeviceOptions, RowOptions, ModelOptions, LoraOptions):
    """What ``ches groups`` does.

    >>> GroupsConfig(groups="rollouts.jsonl").objective
    'grpo'
    """

    groups: str
    """Responses with rewards or advantages (docs/forecast.md): rollouts of verl, TRL, OpenRLHF or NeMo RL, or rows of
    prompt, responses, rewards. A file, several with commas or a pattern, a folder, an address or a hub name."""
    objective: Objective = "grpo"
    """What makes advantages of rewards, and coefficients of advantages: grpo, dapo, dr_grpo or rloo. Advantages in the
    rows are taken as they are."""
    eos: Eos = "include"
    """Whether the terminator of a response counts in |y|. include: a response that nothing ends gets one; given: only
    where the row has it (rollouts that were cut have none)."""
    optimizer: str = "adamw"
    """adamw, rmsprop (torch's) or sgd: those whose metric is known."""
    optimizer_args: Numbers = field(default_factory=dict)
    """Hyper-parameters of the optimiser: weight_decay=0.01."""
    lr: float = 1e-6
    """Learning rate."""
    batch_size: int = 32
    """Groups of an update."""
    steps: int | None = None
    """Number of updates; default: one pass over the groups."""
    seed: int = 0
    """Order of the groups."""
    clip: float | None = None
    """Largest global gradient norm; default: no clipping."""
    dtype: str = "float32"
    """Dtype of the computation: float32, bfloat16, float16 or float64. Sums are float32 at least."""
    remat: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""
    mesh: str | None = not_identity(None)
    """Devices, such as data=4 or fsdp=8; default: all of them on the data axis."""
    on_bad_row: OnBadRow = "error"
    """What becomes of groups with a flagged response: error, drop (listed in dropped.jsonl), keep (if possible)."""
    out: str | None = not_identity(None)
    """Run directory; default: the first free one below runs/."""


def training(config: PassOptions, out: str) -> TrainConfig:
    """The run that is forecast: its probes are held-out pairs, all pairs are watched."""
    values = {f.name: getattr(config, f.name) for f in fields(UpdateOptions) if f.name != "out"}
    return TrainConfig(
        **values, eval_pairs=config.probes, probes="none", out=out, attention="auto", watch=2**31, export=False
    )
