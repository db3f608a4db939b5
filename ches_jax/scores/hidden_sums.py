r"""From hidden states to the sums every score is made of: pure jax, one batch of packed rows at a time.

For a segment s with predictions (source m, target y_m):

.. math::
  S_s = \sum_m h_{source(m)}, \qquad  \ell_s = \sum_m \ln \mathrm{softmax}(\mathrm{logits}(h_{source(m)}))_{y_m}

Sums accumulate in float32 (float64 for a float64 model) at full matrix precision, as products with a 0/1 matrix: unlike
a scatter, the order of the additions is fixed on every backend, so a run repeats itself bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.precision import accumulate
from ches_jax.models.segment_sums import segment_sums

TOKENS_PER_LOGIT_CHUNK = 256


class SegmentStatistics(NamedTuple):
    """What the device hands back; S segments of each row."""

    sums: Float[Array, "B S D"]
    last: Float[Array, "B S D"]
    logps: Float[Array, "B S"] | None = None
    ches_products: Float[Array, "B M S"] | None = None
    """Each prediction's inner product with the sum of each segment (``head.ches_products``)."""
    head_products: Float[Array, "B M S"] | None = None
    """The same between unembedding gradients (``head.head_products``)."""


def token_logps(
    logits: Callable[[Array], Array], hidden: Float[Array, "B M D"], target: Int[Array, "B M"]
) -> Float[Array, "B M"]:
    """Log-probability in nats of each target, a few hundred positions of logits at a time.

    Args:
      logits: ``Decoder.logits``.
      hidden: states that predict.
      target: token each predicts.
    """
    rows, count, width = hidden.shape
    size = max(1, TOKENS_PER_LOGIT_CHUNK // rows)
    chunks = -(-count // size)
    pad = chunks * size - count
    # chunks run over predictions, not over rows, which may lie on several devices
    h = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, chunks, size, width).swapaxes(0, 1)
    y = jnp.pad(target, ((0, 0), (0, pad))).reshape(rows, chunks, size).swapaxes(0, 1)

    def chunk(args):
        h, y = args
        z = logits(h)
        picked = jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0]
        return picked - jax.nn.logsumexp(z, axis=-1)

    return lax.map(chunk, (h, y)).swapaxes(0, 1).reshape(rows, -1)[:, :count]


def segment_statistics(
    hidden: Float[Array, "B T D"],
    source: Int[Array, "B M"],
    target: Int[Array, "B M"],
    segment: Int[Array, "B M"],
    last: Int[Array, "B S"],
    logits: Callable[[Array], Array] | None = None,
) -> SegmentStatistics:
    """Sums of hidden states, last states and (given ``logits``) summed log-probabilities of every segment.

    Args:
      hidden: states after the final norm.
      source: position of the state that makes each prediction.
      target: the token it predicts.
      segment: the sum it joins; S or more for padding.
      last: position of each segment's last content token.
      logits: ``Decoder.logits``; None leaves the log-probabilities out.
    """
    segments = last.shape[1]
    predicting = jnp.take_along_axis(hidden, source[..., None], axis=1)
    ends = jnp.take_along_axis(hidden, last[..., None], axis=1).astype(accumulate(hidden.dtype))
    logps = None
    if logits is not None:
        per_token = token_logps(logits, predicting, target)
        logps = segment_sums(per_token[..., None], segment, segments)[..., 0]
    return SegmentStatistics(segment_sums(predicting, segment, segments), ends, logps)
