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

Works on packed rows (``data.packing``), whose items have one segment that all responses share and one for each: the
inner products of every prediction with every segment of its item (``head_products``) hold the scores of all pairs of
the item and the shares of their tokens (``pair_contributions``). What a pair shares drops out of :math:`A^- - A^+`.

On a mesh each device walks over its part of the vocabulary for the states of all devices that have other parts
(``models.vocabulary``): states and coefficients travel, and neither W nor logits.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ches_jax.distributed.mesh import LogicalMesh
from ches_jax.models.precision import accumulate
from ches_jax.models.segment_sums import segment_sums
from ches_jax.models.vocabulary import Vocabulary, place_of

CHUNK = 2048
"""Vocabulary rows at a time."""
TILE = 64
"""Predictions at a time, where products between predictions are taken."""

Logits = Callable[[Array], Array]
"""Elementwise, from h W^T to the logits: a scale, a soft-cap, or both."""


class PairContributions(NamedTuple):
    """What one pair's predictions add to its score; numpy or jax arrays."""

    inner: Any
    """<A+, A-> (for CHES <S+, S->)."""
    sqnorm_chosen: Any
    """|A+|^2 (for CHES |S+|^2)."""
    shares: Any
    """[M] of each prediction of the chosen response: its inner product with (A- - A+), 0 for all others; these add up
    to the score."""
    with_chosen: Any
    """[M] of each prediction of either response: its inner product with A+; 0 for all others."""

    @property
    def score(self) -> Any:
        """``inner - sqnorm_chosen``."""
        return self.inner - self.sqnorm_chosen


def pair_contributions(products: Any, segment: Any, shared: int, chosen: int, rejected: int) -> PairContributions:
    """What each prediction adds to the score of one pair of a row.

    Args:
      products: [M, S] of ``head_products`` or ``ches_products``, one row's.
      segment: [M] segment of each prediction.
      shared: segment of what the responses of the item share.
      chosen: the chosen response's own segment.
      rejected: the rejected response's own segment.
    """
    one = products.dtype
    in_shared, in_chosen, in_rejected = ((segment == s).astype(one) for s in (shared, chosen, rejected))
    with_chosen = products[:, shared] + products[:, chosen]
    # the shared part cancels in A- - A+ before anything is added up
    difference = products[:, rejected] - products[:, chosen]
    return PairContributions(
        inner=(with_chosen * (in_shared + in_rejected)).sum(),
        sqnorm_chosen=(with_chosen * (in_shared + in_chosen)).sum(),
        shares=difference * (in_shared + in_chosen),
        # one response may be both, where equal ones are there once
        with_chosen=with_chosen * (in_shared + in_chosen + in_rejected - in_chosen * in_rejected),
    )


def identity(x: Array) -> Array:
    """Logits of a model without scale and soft-cap."""
    return x


def item_tiles(
    item: Int[Array, " M"], preferred: Int[Array, " M"], tile: int
) -> tuple[Int[Array, "2 N"], Int[Array, ""]]:
    """Which tiles of predictions have products that a score needs: (first, second), first <= second; how many they are.

    The predictions of an item stand together, so these are the diagonal and a few beside it; of them those in which
    one side is shared or of a response that is chosen in some pair. All other coefficients are never computed.

    Args:
      item: what each prediction belongs to, rising; padding behind all others and alone.
      preferred: 1 for predictions that are shared or of a chosen response.
      tile: predictions of a tile; M is a multiple.
    """
    tiles = item.reshape(-1, tile)
    low, high, some = tiles.min(1), tiles.max(1), preferred.reshape(-1, tile).max(1) > 0
    n = tiles.shape[0]
    upper = jnp.arange(n)[:, None] <= jnp.arange(n)[None, :]
    meet = upper & (low[None, :] <= high[:, None]) & (high[None, :] >= low[:, None])
    meet &= some[:, None] | some[None, :]
    flat = jnp.argsort(~meet.reshape(-1), stable=True)[: n * (n + 1) // 2].astype(jnp.int32)
    return jnp.stack([flat // n, flat % n]), meet.sum(dtype=jnp.int32)


class _VocabularyChunk(NamedTuple):
    """Logits of all predictions for a chunk of C vocabulary rows."""

    logits: Float[Array, "M C"]
    derivative: Float[Array, "M C"]
    """Of the transform, at the products h W^T."""
    is_target: Bool[Array, "M C"]
    is_other: Bool[Array, "M C"]
    """Neither the target nor a row that an earlier chunk has counted."""


def _vocabulary_chunk(
    hidden: Float[Array, "M D"],
    target: Int[Array, " M"],
    unembedding: Float[Array, "V_p D"],
    vocabulary: Vocabulary,
    transform: Logits,
    start: Int[Array, ""],
    size: int,
) -> _VocabularyChunk:
    # the last chunk reaches back over rows already counted, so that W is never padded (a copy); they are masked
    at = jnp.minimum(start, unembedding.shape[0] - size)
    ids = lax.dynamic_slice_in_dim(vocabulary.number(unembedding.shape[0]), at, size)
    w = lax.dynamic_slice_in_dim(unembedding, at, size).astype(hidden.dtype)
    raw = jnp.einsum("md,cd->mc", hidden, w, precision=lax.Precision.HIGHEST)
    logits, derivative = jax.jvp(transform, (raw,), (jnp.ones_like(raw),))
    new = ((at + jnp.arange(size, dtype=jnp.int32) >= start) & (ids < vocabulary.size))[None, :]
    is_target = (ids[None, :] == target[:, None]) & new
    return _VocabularyChunk(logits, derivative, is_target, new & ~is_target)


def _normalisers(
    chunk_at: Callable[[Array], _VocabularyChunk], starts: Int[Array, " n"], empty: Float[Array, " M"]
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """First walk over the vocabulary: ln of the sum of exp(logits), over all tokens and over all but the target."""
    low = jnp.asarray(-jnp.inf, empty.dtype)

    def step(carry, start):
        everything, others = carry
        c = chunk_at(start)
        rest = jax.nn.logsumexp(jnp.where(c.is_other, c.logits, low), axis=-1)
        own = jax.nn.logsumexp(jnp.where(c.is_target, c.logits, low), axis=-1)
        others = jnp.logaddexp(others, rest)
        return (jnp.logaddexp(everything, jnp.logaddexp(rest, own)), others), None

    return lax.scan(step, (empty, empty), starts)[0]


def token_gram(
    hidden: Float[Array, "M D"],
    target: Int[Array, " M"],
    tile_pairs: Int[Array, "2 N"],
    count: Int[Array, ""],
    unembedding: Float[Array, "V_p D"],
    transform: Logits = identity,
    *,
    tile: int,
    chunk: int = CHUNK,
    vocabulary: Vocabulary | None = None,
) -> Float[Array, "N tile tile"]:
    r"""The coefficients :math:`\alpha_{m,m'} = \langle E_m, E_{m'} \rangle` of one row, in the listed pairs of tiles.

    Two walks over the vocabulary: the first sums up the normalisers of every prediction, the second the products of
    residuals, :math:`\alpha = \sum_v E_{m,v} E_{m',v}`, chunk by chunk.

    Args:
      hidden: states that predict.
      target: the token each predicts.
      tile_pairs: (first, second) tile of each product; only the first ``count`` are computed.
      count: how many they are.
      unembedding: W; of a vocabulary that lies on a mesh the part of this device (``Vocabulary.part``).
      transform: from :math:`h W^\top` to the logits, elementwise.
      tile: predictions of a tile; M is a multiple.
      chunk: vocabulary rows at a time.
      vocabulary: which part it is, inside ``shard_map``; default: all of it.

    Returns:
      Symmetric in all, in [-2, 2] where ``transform`` is the identity.
    """
    acc, held = accumulate(hidden.dtype), unembedding.shape[0]
    vocabulary = Vocabulary(held) if vocabulary is None else vocabulary
    size = min(chunk, held)
    starts = jnp.arange(-(-held // size), dtype=jnp.int32) * size
    # the rows of all devices that have other parts of the vocabulary
    rows = tuple(
        vocabulary.all_rows(a[None])
        for a in (hidden.astype(acc), target.astype(jnp.int32), tile_pairs, jnp.asarray(count))
    )

    def normalise(row):
        h, target, *_ = row
        chunk_at = partial(_vocabulary_chunk, h, target, unembedding, vocabulary, transform, size=size)
        return _normalisers(chunk_at, starts, jnp.full(target.shape, -jnp.inf, acc))

    log_z, log_others = (_log_total(vocabulary, a) for a in lax.map(normalise, rows))
    # 1 - pi(y) as the sum of the other probabilities: by subtraction nothing would be left of it near pi(y) = 1
    missing = jnp.exp(log_others - log_z)

    def products(args):
        row, log_z, missing = args
        return _row_gram(row, log_z, missing, unembedding, vocabulary, transform, starts, size, tile)

    return vocabulary.sum_of_rows(lax.map(products, (rows, log_z, missing)))[0]


def _log_total(vocabulary: Vocabulary, parts: Float[Array, "rows M"]) -> Float[Array, "rows M"]:
    """The logarithm of the sum of exponentials over all parts of the vocabulary."""
    if not vocabulary.over:
        return parts
    top = vocabulary.largest(parts)
    return top + jnp.log(vocabulary.total(jnp.exp(parts - top)))


def _row_gram(row, log_z, missing, unembedding, vocabulary, transform, starts, size, tile) -> Float[Array, "N t t"]:
    """What a part of the vocabulary adds to the coefficients of one row."""
    h, target, tile_pairs, count = row

    def add_products(total, start):
        c = _vocabulary_chunk(h, target, unembedding, vocabulary, transform, start, size)
        probability = jnp.exp(c.logits - log_z[:, None])
        zero = jnp.zeros((), h.dtype)
        residual = c.derivative * (
            jnp.where(c.is_target, missing[:, None], zero) - jnp.where(c.is_other, probability, zero)
        )
        tiles = residual.reshape(-1, tile, size)

        def one_pair(i, total):
            first, second = (lax.dynamic_index_in_dim(tiles, tile_pairs[side, i], 0, False) for side in (0, 1))
            product = jnp.einsum("mc,nc->mn", first, second, precision=lax.Precision.HIGHEST)
            return lax.dynamic_update_index_in_dim(total, total[i] + product, i, 0)

        return lax.fori_loop(0, count, one_pair, total), None

    return lax.scan(add_products, jnp.zeros((tile_pairs.shape[1], tile, tile), h.dtype), starts)[0]


def head_products(
    hidden: Float[Array, "B M D"],
    target: Int[Array, "B M"],
    segment: Int[Array, "B M"],
    item: Int[Array, "B S"],
    preferred: Int[Array, "B S"],
    unembedding: Float[Array, "V D"],
    transform: Logits = identity,
    chunk: int = CHUNK,
    logical: LogicalMesh | None = None,
) -> Float[Array, "B M S"]:
    r"""Inner products of the unembedding gradients of single predictions with those of the segments of their item.

    .. math:: P_{m,s} = \langle E_m h_m^\top, A_s \rangle = \sum_{m' \in s} \alpha_{m,m'} \langle h_m, h_{m'} \rangle

    Products between predictions of responses that are never chosen are needed by no score and may be missing in the
    sum; those with segments of other items are 0.

    Args:
      hidden: states that predict, gathered at ``PackedBatch.source``.
      target: ``PackedBatch.target``.
      segment: ``PackedBatch.segment``; S or more for padding.
      item: ``PackedBatch.item``.
      preferred: ``PackedBatch.preferred``.
      unembedding: ``Decoder.unembedding``.
      transform: the model's logit scale and soft-cap.
      chunk: vocabulary rows at a time.
      logical: the mesh on which rows and unembedding lie; None: on one device.
    """

    def on_device(vocabulary: Vocabulary, unembedding: Array, *rows: Array) -> Array:
        part = vocabulary.part(unembedding)

        def products(row: tuple[Array, ...]) -> Array:
            states, targets, ids, items, some = row
            return _row_products(states, targets, ids, items, some, part, vocabulary, transform, chunk)

        return lax.map(products, rows)

    arrays = unembedding, hidden, target, segment, item, preferred
    if logical is None:
        return on_device(Vocabulary(unembedding.shape[0]), *arrays)
    place = place_of(logical, hidden.shape[0], unembedding.shape)
    run = jax.shard_map(
        partial(on_device, place.vocabulary),
        mesh=logical.current,
        in_specs=(place.weight, *[place.rows] * 5),
        out_specs=place.rows,
        check_vma=False,
    )
    return run(*arrays)


def ches_products(hidden: Float[Array, "B M D"], segment: Int[Array, "B M"], segments: int) -> Float[Array, "B M S"]:
    r"""The same for CHES, where every coefficient is 1, and of all segments: :math:`\langle h_m, S_s \rangle`."""
    h = hidden.astype(accumulate(hidden.dtype))
    sums = segment_sums(h, segment, segments)
    return jnp.einsum("bmd,bsd->bms", h, sums, precision=lax.Precision.HIGHEST)


def _row_products(
    hidden, target, segment, item, preferred, unembedding, vocabulary, transform, chunk
) -> Float[Array, "M S"]:
    count, segments = hidden.shape[0], item.shape[0]
    tile = min(TILE, count)
    pad = -count % tile
    h = jnp.pad(hidden, ((0, pad), (0, 0))).astype(accumulate(hidden.dtype))
    target = jnp.pad(target, (0, pad))
    segment = jnp.pad(segment, (0, pad), constant_values=segments)
    real = segment < segments
    place = jnp.minimum(segment, segments - 1)
    # padding gets items of its own behind all others, so that it shares no tile with an item
    own = jnp.where(real, item[place], segments + jnp.arange(count + pad, dtype=segment.dtype))
    tile_pairs, tile_pair_count = item_tiles(own, jnp.where(real, preferred[place], 0), tile)
    alpha = token_gram(
        h, target, tile_pairs, tile_pair_count, unembedding, transform, tile=tile, chunk=chunk, vocabulary=vocabulary
    )
    member = segment[:, None] == jnp.arange(segments, dtype=segment.dtype)[None, :]
    h_tiles, own_tiles, member_tiles = (a.reshape(-1, tile, *a.shape[1:]) for a in (h, own, member.astype(h.dtype)))

    def add_tile_pair(i, total):
        first, second = tile_pairs[0, i], tile_pairs[1, i]
        inner = jnp.einsum("md,nd->mn", h_tiles[first], h_tiles[second], precision=lax.Precision.HIGHEST)
        together = own_tiles[first][:, None] == own_tiles[second][None, :]
        weighted = jnp.where(together, alpha[i] * inner, jnp.zeros((), h.dtype))
        mirrored = jnp.where(first == second, jnp.zeros((), h.dtype), weighted.T)
        for at, other, part in ((first, second, weighted), (second, first, mirrored)):
            total = total.at[at].add(jnp.matmul(part, member_tiles[other], precision=lax.Precision.HIGHEST))
        return total

    zeros = jnp.zeros((h_tiles.shape[0], tile, segments), h.dtype)
    return lax.fori_loop(0, tile_pair_count, add_tile_pair, zeros).reshape(-1, segments)[:count]
