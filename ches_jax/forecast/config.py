"""The options of ``ches forecast`` and ``ches influence``. Plain data: importing this module loads no jax."""

from dataclasses import dataclass, field, fields
from typing import Literal

from ches_jax.options import ModelOptions, Numbers, PairOptions, not_identity
from ches_jax.train.config import ScheduleName, TrainConfig
from ches_jax.types import OnBadRow, SftUnit


@dataclass(frozen=True, kw_only=True)
class PassOptions(PairOptions, ModelOptions):
    """The training run that is forecast, named as in ``ches train``, and where the passes run."""

    holdout: int = 0
    """Take so many rows of --pairs, drawn by --seed, as probes in place of --probes."""
    out: str | None = not_identity(None)
    """Run directory; default: the first free one below runs/."""

    loss: str = "dpo"
    """Objective by name, as in `ches train`."""
    loss_args: Numbers = field(default_factory=dict)
    """Hyper-parameters of the loss: beta=0.1."""
    sft: float = 0.0
    """Coefficient of a likelihood term of the chosen response."""
    sft_per: SftUnit = "token"
    """Unit of that term: sum, token or batch_token."""
    weights: str | None = None
    """Column with the weight of each pair's loss."""
    rewards: str | None = None
    """Columns with the rewards of both responses, CHOSEN,REJECTED."""
    reference: str = "initial"
    """Reference model: initial, none, columns, a model directory, or a cache file."""

    lora_rank: int | None = None
    """Adapters of this rank are what moves (LoRA)."""
    lora_alpha: float | None = None
    """Adapters are scaled by alpha / rank; default: twice the rank."""
    lora_targets: str | None = None
    """Matrices that get adapters: names of q, k, v, o, gate, up, down with commas between them, or all-linear."""
    lora_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    adapter: str | None = None
    """A PEFT adapter that moves on from where it is."""

    optimizer: str = "rmsprop"
    """rmsprop (torch's), adamw or sgd: those whose metric is known."""
    optimizer_args: Numbers = field(default_factory=dict)
    """Hyper-parameters of the optimiser."""
    lr: float = 1e-6
    """Peak learning rate."""
    schedule: ScheduleName = "constant"
    """Course of the learning rate after the warm-up."""
    warmup: int = 0
    """Updates of linear warm-up."""
    clip: float | None = None
    """Largest global gradient norm; default: no clipping."""
    batch_size: int = 32
    """Pairs of an update."""
    accumulate: int = 1
    """Micro-batches an update is cut into."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """So many updates instead."""
    seed: int = 0
    """Order of the data, and the rows of --holdout."""

    dtype: str = "float32"
    """Dtype of the computation; sums, directions and moments are float32 at least."""
    remat: bool = False
    """Compute layers again in backward passes instead of keeping their activations."""
    mesh: str | None = not_identity(None)
    """Devices, such as data=4 or fsdp=8; default: all of them on the data axis."""
    row_tokens: int | None = None
    """Standard length of a packed row; default: the longest pair."""
    batch_tokens: int | None = not_identity(None)
    """Positions of a batch for each device; default: 4096 on a CPU, 32768 elsewhere."""
    chunk_rows: int = 1024
    """Pairs between two points that --resume goes on from."""
    on_bad_row: OnBadRow = "error"
    """What becomes of flagged rows: error, drop (listed in dropped.jsonl) or keep."""


@dataclass(frozen=True, kw_only=True)
class ForecastConfig(PassOptions):
    """What ``ches forecast`` does.

    >>> ForecastConfig(loss="ipo_sum", lr=3e-5, steps=16).order
    1
    """

    probes: str | None = None
    """Held-out pairs whose change is forecast too, read as --pairs is."""
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

    probes: str | None = None
    """Pairs whose chosen responses should not fall, read as --pairs is."""


def training(config: PassOptions, out: str) -> TrainConfig:
    """The run that is forecast: its probes are held-out pairs, all pairs are watched."""
    shared = {f.name for f in fields(TrainConfig)} & {f.name for f in fields(config)}
    values = {name: getattr(config, name) for name in shared - {"out", "probes"}}
    probes = getattr(config, "probes", None)
    return TrainConfig(**values, eval_pairs=probes, probes="none", out=out, attention="auto", watch=2**31, export=False)
