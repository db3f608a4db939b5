r"""The forward pass of training: log-probabilities that a model gives the responses of packed rows.

.. math::
  \ln \pi(y|x) = \sum_{m \in shared} \ell_m + \sum_{m \in own(y)} \ell_m

where the shared segment (what all responses begin with) is computed once, as the prompt is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
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
    seen = Visibility(rows.context_start, rows.context_end, rows.own_start)
    hidden = model.hidden(rows.tokens, rows.positions, seen, rows.lengths, attend=attend, remat=remat, mesh=mesh)
    predicting = jnp.take_along_axis(hidden, rows.source[..., None], axis=1)
    head = Head(model.config.logit_scale, model.config.logit_softcap)
    return per_token(predicting, model.unembedding, rows.target, head)


def segment_logps(model: Decoder, rows: PackedBatch, **options: Any) -> Float[Array, "B S *n"]:
    """Summed log-probabilities in nats of every segment of packed rows; options of ``prediction_logps``."""
    return segment_sums(prediction_logps(model, rows, **options), rows.segment, rows.last.shape[1])


class ResponseLogps(NamedTuple):
    """What the policy gives the responses of some items, in nats; of a pair the chosen one comes first."""

    responses: Float[Array, "items responses"]
    tokens: Float[Array, "items responses T"] | None = None
    """For objectives of tokens; padding holds anything finite."""


def batch_logps(model: Decoder, batch: Batch, **options: Any) -> ResponseLogps:
    """Log-probabilities of a batch's responses; options of ``prediction_logps``."""
    predictions = prediction_logps(model, batch.rows, **options)
    sums = segment_sums(predictions, batch.rows.segment, batch.rows.last.shape[1])
    row, first = batch.row[:, None], batch.shared[:, None]
    own = first + 1 + jnp.arange(batch.counts.shape[1], dtype=jnp.int32)[None]
    responses = sums[row, first] + sums[row, own]
    if batch.tokens is None:
        return ResponseLogps(responses)
    return ResponseLogps(responses, predictions[row[..., None], batch.tokens.at])
