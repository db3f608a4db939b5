"""The options of ``ches plan``. Plain data: importing this module loads no jax."""

from dataclasses import dataclass
from typing import Literal

import tyro

from ches_jax.bundled import BUNDLED
from ches_jax.options import Options


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Options):
    """What is planned, of which model, on which devices.

    >>> PlanConfig(what="score", topology="v5e:4x4").mesh
    'auto'
    """

    what: tyro.conf.Positional[Literal["score", "train", "generate", "forecast"]]
    """The command that is planned."""
    model: str = BUNDLED
    """Model directory, hub name or address, or a config.json alone: no weight is read."""
    topology: str
    """The devices: v5e:4x4, v5p:2x2x4, v6e:16x16, h100:8."""
    slices: int = 1
    """How many such slices, with a slow network between them."""
    mesh: str = "auto"
    """fsdp=16, or data=2,fsdp=8 and so on; auto: the best of those that divide."""
    dtype: str = "bfloat16"
    """Dtype of the computation, and of weights that are not trained."""
    rows: int = 1
    """Rows on each device that a batch is sharded over, in one step."""
    row_tokens: int = 2048
    """Tokens of a row."""
    pairs: int = 100_000
    """Pairs of the data set."""
    pair_tokens: int = 800
    """Mean tokens of a pair: the prompt once, and both responses."""
    epochs: int = 1
    """Of training."""
    logps: bool = False
    """Score log-probabilities too."""
    loss: str = "dpo"
    """Of training."""
    optimizer: str = "adamw"
    """Of training."""
    lora_rank: int | None = None
    """Train adapters of this rank; default: every weight."""
    remat: bool = True
    """Compute activations again in the gradient instead of keeping them."""
    prompt_tokens: int = 512
    """Of a prompt of generate."""
    new_tokens: int = 256
    """Of a text of generate."""
    arithmetic: bool = False
    """Only count; do not compile."""
    out: str | None = None
    """File for the plan as JSON."""
