"""What to train, on what, and how: every choice of a run in one frozen dataclass.

Plain data: importing this module loads no jax. ``train.setup`` checks the options, and builds what they name.

>>> TrainConfig(loss="ipo_mean", loss_args={"tau": 0.05}, steps=10).batch_size
32
"""

from dataclasses import dataclass, field
from typing import Literal

import tyro

from ches_jax.displacement import TOLERANCE
from ches_jax.options import ModelOptions, Numbers, Options, PairOptions, not_identity
from ches_jax.types import OnBadRow, SftUnit

ScheduleName = Literal["constant", "linear", "cosine"]
TrackerName = Literal["tensorboard", "wandb"]


@dataclass(frozen=True, kw_only=True)
class LoraOptions(Options):
    """Which adapters are trained, for the verbs that make updates and those that forecast them."""

    lora_rank: int | None = None
    """Train adapters of this rank beside the layers' matrices (LoRA) instead of the weights."""
    lora_alpha: float | None = None
    """Adapters are scaled by alpha / rank; default: twice the rank."""
    lora_targets: str | None = None
    """Matrices that get adapters: names of q, k, v, o, gate, up, down (and in, out, in_proj_qkv, ... of layers
    with a state; q_a, q_b, kv_a, kv_b of latent attention; shared_gate, ..., expert_gate, ... and router of a mixture)
    with commas between them, or all-linear (the default: all but routed experts and routers)."""
    lora_rslora: bool = False
    """Scale by alpha / sqrt(rank) instead."""
    adapter: str | None = None
    """A PEFT adapter (directory or hub name) to continue training; the initial policy is the model with it."""


@dataclass(frozen=True, kw_only=True)
class UpdateOptions(PairOptions, ModelOptions, LoraOptions):
    """What decides the updates of a run, for the verbs that make them and those that forecast them.

    >>> UpdateOptions(loss="simpo", lora_rank=8).optimizer
    'rmsprop'
    """

    holdout: int = 0
    """Hold out so many rows of --pairs, drawn by --seed."""
    out: str | None = not_identity(None)
    """Run directory; default: the first free runs/train-NNN."""

    loss: str = "dpo"
    """The loss: a name, or an expression of losses, wrappers and weights: "wpo(dpo(beta=0.1)) + 0.2*sft". sft (mean
    over tokens), sft_token and sft_sum are cross-entropy on the chosen response. docs/objectives.md lists all."""
    loss_args: Numbers = field(default_factory=dict)
    """Hyper-parameters of a loss that is one name: beta=0.1."""
    sft: float = 0.0
    """Coefficient of a likelihood term of the chosen response."""
    sft_per: SftUnit = "token"
    """Unit of that term: sum (nats of the response), token (nats per token), batch_token (mean over the batch)."""
    router_balance: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts, for sft losses; 0: without it."""
    weights: str | None = None
    """Column with the weight of each pair's loss, such as the `weight` that a soft `ches select` writes. Weighs the
    whole loss, or what weighted(...) wraps in it. Held-out pairs without the column count 1 each."""
    label_probabilities: str | None = None
    """Column with the probability that the label of each pair is right: the loss of the flipped pair has the rest."""
    token_weights: str | None = None
    """Columns with the weights of the tokens of both responses, CHOSEN,REJECTED: lists of numbers, one for each token;
    for given_weights(...)."""
    rewards: str | None = None
    """Columns with the rewards of both responses, CHOSEN,REJECTED, for rebel and odpo; default: chosen_reward and
    rejected_reward, score_chosen and score_rejected, or other names in use."""
    reference: str = "initial"
    """Reference model: initial, none, columns (ref_chosen_logps, ref_rejected_logps of the rows), a model directory,
    or a cache file written before."""

    optimizer: str = "rmsprop"
    """rmsprop (torch's), adamw, adafactor or sgd."""
    optimizer_args: Numbers = field(default_factory=dict)
    """Hyper-parameters of the optimiser: weight_decay=0.01."""
    lr: float = 1e-6
    """Peak learning rate."""
    schedule: ScheduleName = "constant"
    """Course of the learning rate after the warm-up: constant, linear or cosine (both to 0)."""
    warmup: int = 0
    """Updates of linear warm-up."""
    clip: float | None = None
    """Largest global gradient norm; default: no clipping."""
    batch_size: int = 32
    """Pairs of an update; the last update of an epoch takes what is left."""
    accumulate: int = 1
    """Micro-batches an update is cut into; the result is the same to rounding, and a loss for which it is not (aot,
    aot_unpaired, bco_pair) is refused."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Stop after so many updates instead."""
    seed: int = 0
    """Order of the data, and the pairs that are held out and watched."""

    dtype: str = "float32"
    """Dtype of the computation: float32, bfloat16, float16 or float64. Master weights are float32 at least."""
    remat: bool = False
    """Compute layers again in the backward pass instead of keeping their activations."""
    mesh: str | None = not_identity(None)
    """Devices, such as data=4 or fsdp=8; default: all of them on the data axis."""
    row_tokens: int | None = None
    """Standard length of a packed row; default: the longest pair."""
    on_bad_row: OnBadRow = "error"
    """What becomes of flagged rows: error, drop (listed in dropped.jsonl) or keep (trained on where possible)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(UpdateOptions):
    """A training run. All fields but those of ``not_identity`` decide it.

    >>> TrainConfig(loss="simpo", lora_rank=8).model
    'bundled'
    """

    eval_pairs: str | None = None
    """Held-out pairs, read as --pairs is."""
    sft_pairs: str | None = None
    """Another set for the likelihood term of --sft: pairs, of which the chosen responses count, or rows of one response
    (prompt, completion), read as --pairs is; each update takes --batch-size of them beside its pairs."""

    reference_cache: str | None = not_identity(None)
    """Folder that keeps reference log-probabilities between runs; default: the run directory."""

    attention: str = not_identity("auto")
    """How attention is computed where no gradient is taken, as in `ches score`."""
    distributed: str = not_identity("off")
    """Join other processes: off, auto (the cluster knows), or coordinator:port,n,id. All see the same --out directory;
    the first one writes."""

    watch: int = 256
    """Training pairs whose log-probabilities are followed, drawn by --seed; held-out pairs all are."""
    probes: str | None = None
    """Prompts whose next-token distribution is followed (a file or data set with a prompt column), or none; default:
    the bundled ones for the bundled model, else none."""
    eval_every: int | None = None
    """Updates between evaluations of the displacement; default: at the start and at the end."""
    tolerance: float = TOLERANCE
    """Changes up to so many nats count as none."""
    tracker: tyro.conf.UseAppendAction[tuple[TrackerName, ...]] = not_identity(())
    """Show the numbers there too (repeatable): tensorboard (OUT/tensorboard), wandb (its WANDB_* variables hold)."""
    save_every: int | None = not_identity(None)
    """Updates between checkpoints; default: one every ten minutes, at the end, and on SIGTERM."""
    keep: int = not_identity(2)
    """How many checkpoints are kept: the last ones."""
    keep_best: str | None = not_identity(None)
    """Keep the best one too: METRIC[:min|max] of the evaluations, such as eval_loss:min; each evaluation is saved."""
    export: bool = not_identity(True)
    """Write the trained weights as a Hugging Face directory, OUT/model (adapters merged; those are in OUT/adapter)."""
    export_whole: bool = not_identity(False)
    """Of a multimodal model, write all of it to OUT/model, the trained text model inside; default: that alone."""
