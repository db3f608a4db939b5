r"""The forward pass of training: log-probabilities that a model gives the responses of packed rows.

.. math::
  \ln \pi(y|x) = \sum_{m \in shared} \ell_m + \sum_{m \in own(y)} \ell_m

where the shared segment (what all responses begin with) is computed once, as the prompt is.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ches_jax.data.packing import PackedBatch
from ches_jax.models.attention.dense import Attend, dense
from ches_jax.models.attention.mask import Visibility
from ches_jax.models.decoder import Decoder
from ches_jax.models.logprobs import Head, token_logps
from ches_jax.models.segment_sums import segment_sums
from ches_jax.train.data.batches import Batch


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
      per_token: what is computed of each prediction; ``models.logprobs.token_statistics`` gives more than its
        log-probability.
      attend: how attention is computed; ``attention.choose.with_gradient`` (or ``dense``) where a gradient is taken.
      remat: recompute layers in the backward pass.
      mesh: where parameters and rows lie.
    """
    predicting = predicting_states(model, rows, attend=attend, remat=remat, mesh=mesh)
    return per_token(predicting, model.unembedding, rows.target, head_of(model, mesh))


def head_of(model: Decoder, mesh: Mesh | None) -> Head:
    """What turns a model's states into logits, where they lie."""
    return Head(model.config.logit_scale, model.config.logit_softcap, logical=model.auto_mesh(mesh))


def predicting_states(
    model: Decoder, rows: PackedBatch, *, attend: Attend = dense, remat: bool = False, mesh: Mesh | None = None
) -> Float[Array, "B M D"]:
    """Hidden states of every prediction of packed rows; options of ``prediction_logps``."""
    seen = Visibility(rows.context_start, rows.context_end, rows.own_start)
    hidden = model.hidden(rows.tokens, rows.positions, seen, rows.lengths, attend=attend, remat=remat, mesh=mesh)
    return jnp.take_along_axis(hidden, rows.source[..., None], axis=1)


def segment_logps(model: Decoder, rows: PackedBatch, **options: Any) -> Float[Array, "B S *n"]:
    """Summed log-probabilities in nats of every segment of packed rows; options of ``prediction_logps``."""
    return segment_sums(prediction_logps(model, rows, **options), rows.segment, rows.last.shape[1])


class ResponseLogps(NamedTuple):
    """What the policy gives the responses of some items, in nats; of a pair the chosen one comes first."""

    responses: Float[Array, "items responses"]
    tokens: Float[Array, "items responses T"] | None = None
    """For objectives of tokens; padding holds anything finite."""
    head_norms: Any = (None, None)
    """``head_norms``, where they were requested."""
    balance: Float[Array, ""] | None = None
    """The load-balancing loss of the routers, where it was requested."""
    fields: Mapping[str, Array] | None = None
    """What else was made of the states, by field of ``LossInputs``."""


def balanced_states(
    model: Decoder, rows: PackedBatch, **options: Any
) -> tuple[Float[Array, "B M D"], Float[Array, ""]]:
    """``predicting_states``, and the load-balancing loss over the real tokens of the rows, each computed once."""
    seen, real = Visibility(rows.context_start, rows.context_end, rows.own_start), rows.lengths > 0
    hidden, balance = model.hidden_and_balance(rows.tokens, rows.positions, seen, rows.lengths, real, **options)
    return jnp.take_along_axis(hidden, rows.source[..., None], axis=1), balance


def batch_logps(
    model: Decoder,
    batch: Batch,
    *,
    norms: bool = False,
    balance: bool = False,
    also: Callable[[Array], Mapping[str, Array]] | None = None,
    **options: Any,
) -> ResponseLogps:
    """Log-probabilities of a batch's responses; options of ``prediction_logps``.

    Args:
      model: the policy.
      batch: its rows and items.
      norms: with ``head_norms``.
      balance: with the load-balancing loss of the routers.
      also: from the states of the predictions to further fields of ``LossInputs``.
      options: of ``prediction_logps``.
    """
    if balance:
        states, balanced = balanced_states(model, batch.rows, **options)
    else:
        states, balanced = predicting_states(model, batch.rows, **options), None
    mesh = options.get("mesh")
    predictions = token_logps(states, model.unembedding, batch.rows.target, head_of(model, mesh))
    found = head_norms(model, batch, states, mesh) if norms else (None, None)
    sums = segment_sums(predictions, batch.rows.segment, batch.rows.last.shape[1])
    row, first = batch.row[:, None], batch.shared[:, None]
    own = first + 1 + jnp.arange(batch.counts.shape[1], dtype=jnp.int32)[None]
    # a list may be shorter than there is room for; what lies behind it belongs to others
    there = jnp.minimum(own, sums.shape[1] - 1)
    responses = jnp.where(batch.counts > 0, sums[row, first] + sums[row, there], 0.0)
    if batch.tokens is None:
        return ResponseLogps(responses, head_norms=found, balance=balanced)
    fields = None if also is None else also(states)
    return ResponseLogps(responses, predictions[row[..., None], batch.tokens.at], found, balanced, fields)


def head_norms(
    model: Decoder, batch: Batch, states: Float[Array, "B M D"], mesh: Mesh | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""Norms of the gradients of the mean log-probabilities with respect to the unembedding matrix, without gradient.

    .. math:: \left\| \nabla_W \tfrac1P \sum_i \ln \pi(y_\pm^{(i)}|x^{(i)}) \right\|_F

    of the batch's P pairs, chosen and rejected. A tied embedding counts as the head alone.
    """
    states, weight = lax.stop_gradient((states, model.unembedding))
    segments, items = batch.rows.last.shape[1], batch.row.shape[0]

    def norm(side: int) -> Array:
        # segments of the side: what both responses share, and its own part
        of_side = jnp.zeros((batch.rows.segment.shape[0], segments + 1), bool)
        of_side = of_side.at[batch.row, batch.shared].set(True).at[batch.row, batch.shared + 1 + side].set(True)
        counted = jnp.take_along_axis(of_side, batch.rows.segment, axis=1)
        _, back = jax.vjp(lambda w: token_logps(states, w, batch.rows.target, head_of(model, mesh)), weight)
        (gradient,) = back(counted.astype(jnp.promote_types(states.dtype, jnp.float32)) / items)
        return jnp.sqrt(jnp.sum(jnp.square(gradient)))

    return norm(0), norm(1)
