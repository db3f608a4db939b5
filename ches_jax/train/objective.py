r"""From a packed batch and a model to the loss of each item: log-probabilities, objective, metrics.

.. math::
  \ln \pi(y|x) = \sum_{m \in shared} \ell_m + \sum_{m \in own(y)} \ell_m

where the shared segment (what all responses begin with) is computed once, as the prompt is.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ches_jax.data.packing import PackedBatch
from ches_jax.errors import ChesError
from ches_jax.losses import Loss, LossInputs, RunningMean, get_loss, kto_baseline, loss_names, with_sft, with_weights
from ches_jax.losses.inputs import LENGTHS, REFERENCE, REWARDS, Aux
from ches_jax.losses.registry import unknown_name
from ches_jax.losses.tokens import TOKEN_LOGPS, TOKEN_MASKS, TOKEN_REFERENCE
from ches_jax.models.attention.choose import with_gradient
from ches_jax.models.attention.dense import Attend, dense
from ches_jax.models.attention.mask import Visibility
from ches_jax.models.decoder import Decoder
from ches_jax.models.logprobs import Head, token_logps
from ches_jax.models.segment_sums import segment_sums
from ches_jax.train.data.batches import Batch
from ches_jax.types import SftUnit

SUPPLIED = (
    REFERENCE | LENGTHS | REWARDS | TOKEN_LOGPS | TOKEN_MASKS | TOKEN_REFERENCE
    | {"weights", "reward_mean", "logp", "ref_logp", "desirable", "kl_baseline"}
    | {"logp_candidates", "ref_logp_candidates"}
)  # fmt: skip
"""Fields of ``LossInputs`` that training can fill."""
WHY_NOT = (
    "divergences over the whole vocabulary at each position need the reference model beside the policy, and a run "
    "keeps one model in memory"
)
"""Why the others cannot be filled: they are SparsePO's."""
SFT = {
    "sft": "mean over the tokens of all chosen responses of the update",
    "sft_sum": "mean over the pairs of the summed negative log-probability of the chosen response",
}
"""Supervised objectives: cross-entropy on the chosen response."""


def prediction_logps(
    model: Decoder,
    rows: PackedBatch,
    *,
    per_token: Callable[..., Array] = token_logps,
    attend: Attend = dense,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "B M *n"]:
    """Log-probabilities in nats of every prediction of packed rows.

    Args:
      model: the decoder.
      rows: packed pairs.
      per_token: what is computed of each prediction; ``logps.token_statistics`` for more than its log-probability.
      attend: how attention is computed; ``choose.with_gradient`` (or ``dense``) where a gradient is taken.
      remat: recompute layers in the backward pass.
      mesh: where parameters and rows lie.
    """
    seen = Visibility(rows.context_start, rows.context_end, rows.own_start)
    hidden = model.hidden(rows.tokens, rows.positions, seen, rows.lengths, attend=attend, remat=remat, mesh=mesh)
    predicting = jnp.take_along_axis(hidden, rows.source[..., None], axis=1)
    head = Head(model.config.logit_scale, model.config.logit_softcap)
    return per_token(predicting, model.unembedding, rows.target, head)


def segment_logps(model: Decoder, rows: PackedBatch, **options: Any) -> Float[Array, "B S *n"]:
    """Summed log-probabilities in nats of every segment of packed rows; options of ``prediction_logps``."""
    return segment_sums(prediction_logps(model, rows, **options), rows.segment, rows.last.shape[1])


class Logps(NamedTuple):
    """What the policy gives the responses of P items, in nats; of a pair the chosen one comes first."""

    responses: Float[Array, "P R"]
    tokens: Float[Array, "P R T"] | None = None
    """For objectives of tokens; padding holds anything finite."""


def batch_logps(model: Decoder, batch: Batch, **options: Any) -> Logps:
    """Log-probabilities of a batch's responses; options of ``prediction_logps``."""
    every = prediction_logps(model, batch.rows, **options)
    sums = segment_sums(every, batch.rows.segment, batch.rows.last.shape[1])
    row, first = batch.row[:, None], batch.shared[:, None]
    own = first + 1 + jnp.arange(batch.counts.shape[1], dtype=jnp.int32)[None]
    found = Logps(sums[row, first] + sums[row, own])
    if batch.tokens is None:
        return found
    return found._replace(tokens=every[row[..., None], batch.tokens.at])


def get_objective(
    name: str, hyper: Mapping[str, float], *, sft: float = 0.0, sft_per: SftUnit = "token", weighted: bool = False
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
        raise ChesError(unknown_name(name, sorted({*loss_names(), *SFT})))
    loss = get_loss(name, **hyper)
    if sft:
        loss = with_sft(loss, sft, per=sft_per)
    if weighted:
        loss = with_weights(loss)
    missing = sorted(loss.needs - SUPPLIED)
    if missing:
        raise ChesError(f"loss {name!r} needs {', '.join(missing)}, which `ches train` cannot supply: {WHY_NOT}")
    return loss


def needs_reference(loss: Loss) -> bool:
    """Whether the loss reads log-probabilities of a reference model."""
    return any(name.startswith("ref_") for name in loss.needs)


def is_supervised(loss: Loss) -> bool:
    """Whether the loss reads the chosen response alone, so that the rejected one need not be computed."""
    return loss.name in SFT


def is_unpaired(loss: Loss) -> bool:
    """Whether an example is one response with a label, as KTO's are."""
    return "logp" in loss.needs


def reads_samples(loss: Loss) -> bool:
    """Whether several responses stand where the chosen one stood, as D2O's samples do."""
    return "logp_candidates" in loss.needs


def reads_tokens(loss: Loss) -> bool:
    """Whether the loss reads the log-probability of each token."""
    return loss.needs >= TOKEN_LOGPS


def reads_reference_tokens(loss: Loss) -> bool:
    """Whether it reads the reference's too."""
    return loss.needs >= TOKEN_REFERENCE


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

    needs = frozenset({"logp_chosen", "chosen_tokens"} | ({"weights"} if name == "sft" else set()))
    return Loss(name=name, needs=needs, compute=compute, source=SFT[name])


def initial_loss_state(loss: Loss, dtype: Any = jnp.float32) -> dict[str, Any]:
    """State of a stateful loss before the first batch; empty for all others."""
    return {"reward_mean": RunningMean(jnp.zeros((), dtype), jnp.zeros((), dtype))} if loss.stateful else {}


def loss_inputs(loss: Loss, batch: Batch, found: Logps, state: Mapping[str, Any]) -> LossInputs:
    """What the loss declares that it reads, and nothing else."""
    logps, ref = found.responses, jnp.asarray(batch.reference)
    every: dict[str, Any] = {
        "logp_chosen": logps[:, 0],
        "logp_rejected": logps[:, -1],
        "ref_logp_chosen": ref[:, 0],
        "ref_logp_rejected": ref[:, -1],
        "chosen_tokens": batch.counts[:, 0],
        "rejected_tokens": batch.counts[:, -1],
        # samples stand where the chosen response stood
        "logp_candidates": logps[:, :-1],
        "ref_logp_candidates": ref[:, :-1],
        # unpaired: the first response is the row's own, the second another row's (``examples.unpaired``)
        "logp": logps[:, 0],
        "ref_logp": ref[:, 0],
        "kl_baseline": kto_baseline(logps[:, -1], ref[:, -1]),
        **batch.extra,
        **state,
    }
    if batch.tokens is not None and found.tokens is not None:
        for side, i in (("chosen", 0), ("rejected", -1)):
            every[f"token_logps_{side}"] = found.tokens[:, i]
            every[f"ref_token_logps_{side}"] = batch.tokens.reference[:, i]
            every[f"token_mask_{side}"] = batch.tokens.mask[:, i]
    return LossInputs(**cast(Any, {name: value for name, value in every.items() if name in loss.needs}))


def loss_and_metrics(
    loss: Loss, batch: Batch, found: Logps, state: Mapping[str, Any]
) -> tuple[Array, tuple[dict[str, Array], dict[str, Any]]]:
    """Mean loss over the examples; means of metrics under TRL's names, to be finished by ``named``; the next state."""
    inputs = loss_inputs(loss, batch, found, state)
    value, aux = loss(inputs)
    new_state = {k.removeprefix("state/"): v for k, v in aux.items() if k.startswith("state/")}
    metrics = {k: v for k, v in aux.items() if not k.startswith("state/")}
    if is_unpaired(loss):
        good = jnp.asarray(inputs.desirable).astype(value.dtype)
        metrics = {"kl": inputs.kl_baseline, DESIRABLE: good}
        for name in ("rewards", "logps"):
            metrics |= {f"{name}/chosen": aux[name] * good, f"{name}/rejected": aux[name] * (1 - good)}
    elif reads_tokens(loss):  # whatever tokens the objective keeps, this is the response's own
        metrics |= {"logps/chosen": found.responses[:, 0], "logps/rejected": found.responses[:, -1]}
    metrics[POLICY] = found.responses
    means = {k: jnp.mean(jax.lax.stop_gradient(jnp.asarray(v))) for k, v in metrics.items()}
    return jnp.mean(value), (means, new_state)


POLICY = "policy/logps"
"""Mean log-probability of all responses: compared with the reference's before the first update."""
DESIRABLE = "share/desirable"


def named(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an update as they are logged; means over good and over bad rows become means of each."""
    out = {k: v for k, v in metrics.items() if k not in (DESIRABLE, POLICY)}
    if DESIRABLE not in metrics:
        return out
    for side, share in (("chosen", metrics[DESIRABLE]), ("rejected", 1 - metrics[DESIRABLE])):
        for name in (f"rewards/{side}", f"logps/{side}"):
            mean = out.pop(name)
            if share > 0:  # an update may have no row of a side
                out[name] = mean / share
    if {"rewards/chosen", "rewards/rejected"} <= out.keys():
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
    return out


def batch_loss(
    model: Decoder,
    loss: Loss,
    batch: Batch,
    state: Mapping[str, Any],
    *,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Array, tuple[dict[str, Array], dict[str, Any]]]:
    """``loss_and_metrics`` of the log-probabilities that a model gives a batch."""
    found = batch_logps(model, batch, attend=with_gradient(), remat=remat, mesh=mesh)
    return loss_and_metrics(loss, batch, found, state)
