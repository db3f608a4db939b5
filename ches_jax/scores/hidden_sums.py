r"""From hidden states to the sums every score is made of: pure jax, one batch of packed rows at a time.

For a segment s with predictions (source m, target y_m):

.. math::
  S_s = \sum_m h_{source(m)}, \qquad  \ell_s = \sum_m \ln \mathrm{softmax}(\mathrm{logits}(h_{source(m)}))_{y_m}

Sums accumulate in float32 (float64 for a float64 model) at full matrix precision, as products with a 0/1 matrix: unlike
a scatter, the order of the additions is fixed on every backend, so a run repeats itself bit for bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ches_jax.models.precision import accumulate
from ches_jax.models.segment_sums import segment_sums


class SegmentStatistics(NamedTuple):
    """What the device hands back; S segments of each row."""

    sums: Float[Array, "B S D"]
    last: Float[Array, "B S D"]
    logps: Float[Array, "B S"] | None = None
    ches_products: Float[Array, "B M S"] | None = None
    """Each prediction's inner product with the sum of each segment (``unembedding_gradients.ches_products``)."""
    head_products: Float[Array, "B M S"] | None = None
    """The same between unembedding gradients (``unembedding_gradients.head_products``)."""
    token_logps: Float[Array, "B M"] | None = None
    """Each prediction's log-probability."""


def segment_statistics(
    hidden: Float[Array, "B T D"],
    source: Int[Array, "B M"],
    target: Int[Array, "B M"],
    segment: Int[Array, "B M"],
    last: Int[Array, "B S"],
    token_logps: Callable[[Array, Array], Array] | None = None,
) -> SegmentStatistics:
    """Sums of hidden states, last states and (given ``token_logps``) summed log-probabilities of every segment.

    Args:
      hidden: states after the final norm.
      source: position of the state that makes each prediction.
      target: the token it predicts.
      segment: the sum it joins; S or more for padding.
      last: position of each segment's last content token.
      token_logps: states and their targets to log-probabilities (``models.logprobs.token_logps`` of a model); None
        leaves them out.
    """
    segments = last.shape[1]
    predicting = jnp.take_along_axis(hidden, source[..., None], axis=1)
    ends = jnp.take_along_axis(hidden, last[..., None], axis=1).astype(accumulate(hidden.dtype))
    logps = per_token = None
    if token_logps is not None:
        per_token = token_logps(predicting, target)
        logps = segment_sums(per_token[..., None], segment, segments)[..., 0]
    return SegmentStatistics(segment_sums(predicting, segment, segments), ends, logps, token_logps=per_token)
