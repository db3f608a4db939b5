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
unembedding. The vocabulary is walked in chunks; what is kept is one number for each two predictions of a pair.

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
from ches_jax.scores.statistics import segment_sums

CHUNK = 2048
"""Vocabulary rows at a time."""
TILE = 64
"""Predictions at a time, where products between predictions are taken."""
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


def own_pair_tiles(pair: Int[Array, " M"], tile: int) -> tuple[Int[Array, "2 N"], Int[Array, ""]]:
    """Which tiles of predictions have a pair in common: (first, second) with first <= second, and how many they are.

    The predictions of a pair stand together, so these are the diagonal and a few beside it: all other coefficients
    belong to no pair and are never computed.
    """
    tiles = pair.reshape(-1, tile)
    low, high = tiles.min(1), tiles.max(1)
    n = tiles.shape[0]
    upper = jnp.arange(n)[:, None] <= jnp.arange(n)[None, :]
    meet = upper & (low[None, :] <= high[:, None]) & (high[None, :] >= low[:, None])
    flat = jnp.argsort(~meet.reshape(-1), stable=True)[: n * (n + 1) // 2].astype(jnp.int32)
    return jnp.stack([flat // n, flat % n]), meet.sum(dtype=jnp.int32)


def token_gram(
    hidden: Float[Array, "M D"],
    target: Int[Array, " M"],
    visits: Int[Array, "2 N"],
    count: Int[Array, ""],
    unembedding: Float[Array, "V D"],
    transform: Logits = identity,
    *,
    tile: int,
    chunk: int = CHUNK,
) -> Float[Array, "N tile tile"]:
    r"""The coefficients :math:`\alpha_{m,m'} = \langle E_m, E_{m'} \rangle` of one row, in the tiles that are visited.

    Args:
      hidden: states that predict.
      target: the token each predicts.
      visits: (first, second) tile of each visit; only the first ``count`` are computed.
      count: how many visits there are.
      unembedding: W.
      transform: from :math:`h W^\top` to the logits, elementwise.
      tile: predictions of a tile; M is a multiple.
      chunk: vocabulary rows at a time.

    Returns:
      Symmetric in all, in [-2, 2] where ``transform`` is the identity.
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
        raw = jnp.einsum("md,cd->mc", h, w, precision=lax.Precision.HIGHEST)
        logits, slope = jax.jvp(transform, (raw,), (jnp.ones_like(raw),))
        new = (ids >= start)[None, :]
        mine = (ids[None, :] == target[:, None]) & new
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
        probability = jnp.exp(logits - log_z[:, None])
        zero = jnp.zeros((), acc)
        residual = slope * (jnp.where(mine, missing[:, None], zero) - jnp.where(off, probability, zero))
        tiles = residual.reshape(-1, tile, size)

        def visit(i, total):
            first, second = (lax.dynamic_index_in_dim(tiles, visits[side, i], 0, False) for side in (0, 1))
            product = jnp.einsum("mc,nc->mn", first, second, precision=lax.Precision.HIGHEST)
            return lax.dynamic_update_index_in_dim(total, total[i] + product, i, 0)

        return lax.fori_loop(0, count, visit, total), None

    return lax.scan(accumulate_products, jnp.zeros((visits.shape[1], tile, tile), acc), starts)[0]


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

    def row(args):
        states, targets, ids = args
        return _role_products(states, targets, ids, segments, unembedding, transform, chunk)

    return _contributions(lax.map(row, (hidden, target, segment)), segment, segments)


def ches_contributions(hidden: Float[Array, "B M D"], segment: Int[Array, "B M"], segments: int) -> PairContributions:
    """CHES of every pair of packed rows (Definition 2), and what each prediction adds to it: every coefficient is 1."""
    rows, _, width = hidden.shape
    h = hidden.astype(accumulate(hidden.dtype))
    sums = segment_sums(h, segment, segments).reshape(rows, segments // 3, 3, width)
    pair = jnp.minimum(segment // 3, segments // 3 - 1)
    own = jnp.take_along_axis(sums, pair[:, :, None, None], axis=1)
    products = jnp.einsum("bmd,bmrd->bmr", h, own, precision=lax.Precision.HIGHEST)
    real = (segment < segments)[..., None]
    return _contributions(jnp.where(real, products, jnp.zeros((), h.dtype)), segment, segments)


def _role_products(hidden, target, segment, segments, unembedding, transform, chunk) -> Float[Array, "M 3"]:
    """Of one row: each prediction's alpha-weighted product with the shared, chosen and rejected ones of its pair."""
    count = hidden.shape[0]
    tile = min(TILE, count)
    pad = -count % tile
    h = jnp.pad(hidden, ((0, pad), (0, 0))).astype(accumulate(hidden.dtype))
    target = jnp.pad(target, (0, pad))
    segment = jnp.pad(segment, (0, pad), constant_values=segments)
    real = segment < segments
    # padding gets pairs of its own behind all others, so that it meets nobody
    pair, role = jnp.where(real, segment // 3, segments + jnp.arange(count + pad, dtype=segment.dtype)), segment % 3
    visits, meetings = own_pair_tiles(pair, tile)
    alpha = token_gram(h, target, visits, meetings, unembedding, transform, tile=tile, chunk=chunk)
    h_tiles, pair_tiles, role_tiles, real_tiles = (a.reshape(-1, tile, *a.shape[1:]) for a in (h, pair, role, real))

    def visit(i, total):
        first, second = visits[0, i], visits[1, i]
        inner = jnp.einsum("md,nd->mn", h_tiles[first], h_tiles[second], precision=lax.Precision.HIGHEST)
        together = (pair_tiles[first][:, None] == pair_tiles[second][None, :]) & real_tiles[first][:, None]
        weighted = jnp.where(together, alpha[i] * inner, jnp.zeros((), h.dtype))
        mirrored = jnp.where(first == second, jnp.zeros((), h.dtype), weighted.T)
        for at, other, part in ((first, second, weighted), (second, first, mirrored)):
            by_role = role_tiles[other][:, None] == jnp.arange(3, dtype=role.dtype)[None, :]
            total = total.at[at].add(jnp.matmul(part, by_role.astype(h.dtype), precision=lax.Precision.HIGHEST))
        return total

    zeros = jnp.zeros((h_tiles.shape[0], tile, 3), h.dtype)
    return lax.fori_loop(0, meetings, visit, zeros).reshape(-1, 3)[:count]


def _contributions(products: Float[Array, "B M 3"], segment: Int[Array, "B M"], segments: int) -> PairContributions:
    """From each prediction's products with the three parts of its pair."""
    real = segment < segments
    pair, role = segment // 3, segment % 3
    in_chosen, in_rejected = role != REJECTED, role != CHOSEN
    with_chosen = products[..., SHARED] + products[..., CHOSEN]
    # the shared part cancels in A- - A+ before anything is added up
    difference = products[..., REJECTED] - products[..., CHOSEN]
    zero = jnp.zeros((), products.dtype)
    member = (pair[:, None, :] == jnp.arange(segments // 3, dtype=segment.dtype)[None, :, None]) & real[:, None, :]

    def per_pair(values: Array, side: Array) -> Array:
        return jnp.where(member & side[:, None, :], values[:, None, :], zero).sum(-1)

    return PairContributions(
        inner=per_pair(with_chosen, in_rejected),
        sqnorm_chosen=per_pair(with_chosen, in_chosen),
        by_token=jnp.where(real, jnp.where(in_chosen, difference, with_chosen), zero),
    )
