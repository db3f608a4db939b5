r"""From a packed batch and a model to the loss of each pair: log-probabilities, objective, metrics.

.. math::
  \ln \pi(y|x) = \sum_{m \in shared} \ell_m + \sum_{m \in own(y)} \ell_m

where the shared segment (what both responses begin with) is computed once, as the prompt is.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ches_jax.data.packing import Rows
from ches_jax.errors import ChesError
from ches_jax.losses import Loss, LossInputs, RunningMean, get_loss, loss_names, mean_loss, with_sft, with_weights
from ches_jax.losses.inputs import LENGTHS, REFERENCE, Aux
from ches_jax.losses.wrappers import Per
from ches_jax.models.decoder import Decoder
from ches_jax.models.visibility import Visibility
from ches_jax.train.batches import Batch
from ches_jax.train.logps import Head, segment_sums, token_logps

SUPPLIED = REFERENCE | LENGTHS | {"weights", "reward_mean"}
"""Fields of ``LossInputs`` that training can fill."""
SFT = {
    "sft": "mean over the tokens of all chosen responses of the update",
    "sft_sum": "mean over the pairs of the summed negative log-probability of the chosen response",
}
"""Supervised objectives: cross-entropy on the chosen response."""


def segment_logps(
    model: Decoder,
    rows: Rows,
    *,
    block: int | None = None,
    backward: bool = False,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "B S"]:
    """Summed log-probabilities in nats of every segment of packed rows.

    Args:
      model: the decoder.
      rows: packed pairs.
      block: tile of attention; default: dense attention.
      backward: a gradient will be taken (block-skipping attention has none).
      remat: recompute layers in the backward pass.
      mesh: where parameters and rows lie.
    """
    seen = Visibility(rows.context_start, rows.context_end, rows.own_start)
    hidden = model.hidden(
        rows.tokens, rows.positions, seen, rows.lengths, block=block, backward=backward, remat=remat, mesh=mesh
    )
    predicting = jnp.take_along_axis(hidden, rows.source[..., None], axis=1)
    head = Head(model.config.logit_scale, model.config.logit_softcap)
    logps = token_logps(predicting, model.unembedding, rows.target, head)
    return segment_sums(logps, rows.segment, rows.last.shape[1])


def pair_logps(model: Decoder, batch: Batch, **options: Any) -> tuple[Float[Array, " P"], Float[Array, " P"]]:
    """Summed log-probabilities in nats of the chosen and the rejected response; options of ``segment_logps``."""
    sums = segment_logps(model, batch.rows, **options)
    shared = sums[batch.row, batch.shared]
    return shared + sums[batch.row, batch.shared + 1], shared + sums[batch.row, batch.shared + 2]


def get_objective(
    name: str, hyper: Mapping[str, float], *, sft: float = 0.0, sft_per: Per = "token", weighted: bool = False
) -> Loss:
    """A loss of the registry or a supervised one, with an SFT term and weights of the pairs where asked.

    Raises:
      ChesError: unknown name (the names are listed), wrong hyper-parameters, or a loss that asks for more than
        training supplies.
    """
    if name in SFT:
        if hyper or sft or weighted:
            raise ChesError(f"loss {name!r}: has no hyper-parameters and takes neither an SFT term nor weights")
        return _supervised(name)
    if name not in loss_names():
        raise ChesError(f"no loss is named {name!r}; the names are: {', '.join(sorted({*loss_names(), *SFT}))}")
    loss = get_loss(name, **hyper)
    if sft:
        loss = with_sft(loss, sft, per=sft_per)
    if weighted:
        loss = with_weights(loss)
    missing = sorted(loss.needs - SUPPLIED)
    if missing:
        raise ChesError(f"loss {name!r} needs {', '.join(missing)}, which `ches train` cannot supply yet")
    return loss


def needs_reference(loss: Loss) -> bool:
    """Whether the loss reads log-probabilities of a reference model."""
    return any(name.startswith("ref_") for name in loss.needs)


def is_supervised(loss: Loss) -> bool:
    """Whether the loss reads the chosen response alone, so that the rejected one need not be computed."""
    return loss.name in SFT


def _supervised(name: str) -> Loss:
    r"""Cross-entropy on the chosen response in nats, :math:`-w \ln \pi(y_+|x)`.

    ``sft_sum`` has w = 1. For ``sft`` the batch brings w = pairs / tokens of the whole update, so that the mean over
    its pairs is the mean over its tokens, however it is cut into micro-batches.
    """

    def compute(inputs: LossInputs) -> tuple[Array, Aux]:
        logp = jnp.asarray(inputs.logp_chosen)
        value = -logp if name == "sft_sum" else -logp * jnp.asarray(inputs.weights)
        stopped = jax.lax.stop_gradient(logp)
        per_token = stopped / jnp.asarray(inputs.chosen_tokens).astype(logp.dtype)
        return value, {"logps/chosen": stopped, "logps_per_token/chosen": per_token}

    needs = frozenset({"logp_chosen", "chosen_tokens", "weights"})
    return Loss(name=name, needs=needs, compute=compute, source=SFT[name])


def initial_loss_state(loss: Loss, dtype: Any = jnp.float32) -> dict[str, Any]:
    """State of a stateful loss before the first batch; empty for all others."""
    return {"reward_mean": RunningMean(jnp.zeros((), dtype), jnp.zeros((), dtype))} if loss.stateful else {}


def loss_inputs(loss: Loss, batch: Batch, chosen: Array, rejected: Array, state: Mapping[str, Any]) -> LossInputs:
    """What the loss declares that it reads, and nothing else."""
    every = {
        "logp_chosen": chosen,
        "logp_rejected": rejected,
        "ref_logp_chosen": batch.ref_logp_chosen,
        "ref_logp_rejected": batch.ref_logp_rejected,
        "chosen_tokens": batch.chosen_tokens,
        "rejected_tokens": batch.rejected_tokens,
        "weights": batch.weights,
        **state,
    }
    return LossInputs(**cast(Any, {name: value for name, value in every.items() if name in loss.needs}))


def batch_loss(
    model: Decoder,
    loss: Loss,
    batch: Batch,
    state: Mapping[str, Any],
    *,
    remat: bool = False,
    mesh: Mesh | None = None,
    block: int | None = None,
) -> tuple[Array, tuple[dict[str, Array], dict[str, Any]]]:
    """Mean loss over the pairs; metrics (means, TRL's names) and the loss's next state."""
    chosen, rejected = pair_logps(model, batch, block=block, backward=True, remat=remat, mesh=mesh)
    value, logs = mean_loss(loss, loss_inputs(loss, batch, chosen, rejected, state))
    metrics = {k: v for k, v in logs.items() if not k.startswith("state/")}
    new_state = {k.removeprefix("state/"): v for k, v in logs.items() if k.startswith("state/")}
    return value, (metrics, new_state)
