r"""The exact head score of a pair: CHES with its coefficients, computed without a [V, D] or a [T, V] object.

A response's log-probability has, with respect to the unembedding matrix, the gradient
:math:`A = \sum_k E_k h_k^\top`, where :math:`E_k = J_k (e_{y_k} - \pi_k)` is the residual of prediction k (J is the
derivative of the logits' scale or soft-cap; the identity for most models). The head score is

.. math::
  \langle A^+, A^- \rangle - \|A^+\|_F^2
    = \sum_{k,k'} \alpha^-_{k,k'} \langle h_k, h_{k'} \rangle - \sum_{k,k'} \alpha^+_{k,k'} \langle h_k, h_{k'} \rangle,
  \qquad \alpha_{k,k'} = \langle E_k, E_{k'} \rangle .

It is the part of Theorem 6 that CHES keeps, before CHES sets every :math:`\alpha` to 1 (Razin et al.,
https://arxiv.org/abs/2410.08847). Higher means: training the pair pushes the chosen response down through the
unembedding. The vocabulary is walked in chunks; what is kept is one number for each two predictions of a row.

Works on packed rows (``data.packing``): segments come in threes, shared, chosen, rejected; what a pair shares drops out
of :math:`A^- - A^+`, which is rejected minus chosen alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.precision import accumulate

CHUNK = 2048
"""Vocabulary rows at a time."""
SHARED, CHOSEN, REJECTED = 0, 1, 2
"""Role of a segment: its id modulo 3."""

Logits = Callable[[Array], Array]
"""Elementwise, from h W^T to the logits: a scale, a soft-cap, or both."""


class PairContributions(NamedTuple):
    """Per pair: the two inner products of a score. Per prediction: its share. P pairs of a row (segments / 3)."""

    inner: Float[Array, "B P"]
    """<A+, A-> (for CHES <S+, S->)."""
    sqnorm_chosen: Float[Array, "B P"]
    """|A+|^2 (for CHES |S+|^2)."""
    by_token: Float[Array, "B M"]
    """Of a prediction of the chosen response: its inner product with (A- - A+); these add up to the score. Of one of
    the rejected response: its inner product with A+. 0 for padding."""

    @property
    def score(self) -> Float[Array, "B P"]:
        """``inner - sqnorm_chosen``."""
        return self.inner - self.sqnorm_chosen


def identity(x: Array) -> Array:
    """Logits of a model without scale and soft-cap."""
    return x


def token_gram(
    hidden: Float[Array, "B M D"],
    target: Int[Array, "B M"],
    unembedding: Float[Array, "V D"],
    transform: Logits = identity,
    chunk: int = CHUNK,
) -> Float[Array, "B M M"]:
    r"""The coefficients :math:`\alpha_{m,m'} = \langle E_m, E_{m'} \rangle` between all predictions of a row.

    Args:
      hidden: states that predict.
      target: the token each predicts.
      unembedding: W.
      transform: from :math:`h W^\top` to the logits, elementwise.
      chunk: vocabulary rows at a time.

    Returns:
      Symmetric, in [-2, 2] where ``transform`` is the identity.
    """
    acc = accumulate(hidden.dtype)
    vocabulary = unembedding.shape[0]
    size = min(chunk, vocabulary)
    starts = jnp.arange(-(-vocabulary // size), dtype=jnp.int32) * size
    h, target = hidden.astype(acc), target.astype(jnp.int32)

    def pieces(start):
        # the last chunk reaches back over rows already seen, so that W is never padded (a copy); they are masked
        at = jnp.minimum(start, vocabulary - size)
        ids = at + jnp.arange(size, dtype=jnp.int32)
        w = lax.dynamic_slice_in_dim(unembedding, at, size).astype(acc)
        raw = jnp.einsum("bmd,cd->bmc", h, w, precision=lax.Precision.HIGHEST)
        logits, slope = jax.jvp(transform, (raw,), (jnp.ones_like(raw),))
        new = (ids >= start)[None, None, :]
        mine = (ids[None, None, :] == target[..., None]) & new
        return logits, slope, mine, new & ~mine

    def normalise(carry, start):
        everything, others = carry
        logits, _, mine, off = pieces(start)
        low = jnp.asarray(-jnp.inf, acc)
        rest = jax.nn.logsumexp(jnp.where(off, logits, low), axis=-1)
        own = jax.nn.logsumexp(jnp.where(mine, logits, low), axis=-1)
        others = jnp.logaddexp(others, rest)
        return (jnp.logaddexp(everything, jnp.logaddexp(rest, own)), others), None

    empty = jnp.full(target.shape, -jnp.inf, acc)
    (log_z, log_others), _ = lax.scan(normalise, (empty, empty), starts)
    # 1 - pi(y) as the sum of the other probabilities: by subtraction nothing would be left of it near pi(y) = 1
    missing = jnp.exp(log_others - log_z)

    def accumulate_products(total, start):
        logits, slope, mine, off = pieces(start)
        probability = jnp.exp(logits - log_z[..., None])
        zero = jnp.zeros((), acc)
        residual = slope * (jnp.where(mine, missing[..., None], zero) - jnp.where(off, probability, zero))
        return total + jnp.einsum("bmc,bnc->bmn", residual, residual, precision=lax.Precision.HIGHEST), None

    rows, count = target.shape
    return lax.scan(accumulate_products, jnp.zeros((rows, count, count), acc), starts)[0]


def head_score(
    hidden: Float[Array, "B M D"],
    target: Int[Array, "B M"],
    segment: Int[Array, "B M"],
    segments: int,
    unembedding: Float[Array, "V D"],
    transform: Logits = identity,
    chunk: int = CHUNK,
) -> PairContributions:
    """The head score of every pair of packed rows, and what each prediction adds to it; see the module's equation.

    Args:
      hidden: states that predict, gathered at ``Rows.source``.
      target: ``Rows.target``.
      segment: ``Rows.segment``; ``segments`` or more for padding.
      segments: segments of a row, three for each pair.
      unembedding: ``Decoder.unembedding``.
      transform: the model's logit scale and soft-cap.
      chunk: vocabulary rows at a time.
    """
    alpha = token_gram(hidden, target, unembedding, transform, chunk)
    return _contributions(alpha * _inner_products(hidden), segment, segments)


def ches_contributions(hidden: Float[Array, "B M D"], segment: Int[Array, "B M"], segments: int) -> PairContributions:
    """CHES of every pair of packed rows (Definition 2), and what each prediction adds to it: every coefficient is 1."""
    return _contributions(_inner_products(hidden), segment, segments)


def _inner_products(hidden: Float[Array, "B M D"]) -> Float[Array, "B M M"]:
    h = hidden.astype(accumulate(hidden.dtype))
    return jnp.einsum("bmd,bnd->bmn", h, h, precision=lax.Precision.HIGHEST)


def _contributions(products: Float[Array, "B M M"], segment: Int[Array, "B M"], segments: int) -> PairContributions:
    acc = products.dtype
    real = segment < segments
    pair, role = segment // 3, segment % 3
    together = (pair[:, :, None] == pair[:, None, :]) & real[:, :, None] & real[:, None, :]
    in_chosen, in_rejected = role != REJECTED, role != CHOSEN

    def against(side: Array) -> Array:
        """Each prediction's product with the sum over one response of its own pair."""
        return jnp.where(together & side[:, None, :], products, jnp.zeros((), acc)).sum(-1)

    with_chosen = against(in_chosen)
    # the shared part cancels in A- - A+ before anything is added up
    difference = against(role == REJECTED) - against(role == CHOSEN)
    by_token = jnp.where(in_chosen, difference, with_chosen)
    pairs = jnp.arange(segments // 3, dtype=segment.dtype)
    member = (pair[:, None, :] == pairs[None, :, None]) & real[:, None, :]

    def per_pair(values: Array, side: Array) -> Array:
        return jnp.where(member & side[:, None, :], values[:, None, :], jnp.zeros((), acc)).sum(-1)

    return PairContributions(
        inner=per_pair(with_chosen, in_rejected),
        sqnorm_chosen=per_pair(with_chosen, in_chosen),
        by_token=by_token,
    )
