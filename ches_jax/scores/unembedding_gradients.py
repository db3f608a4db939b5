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

On a mesh states and coefficients stay with their rows (``models.vocabulary``). Where W is sharded over the axes of the
rows too, it comes by in pieces, a chunk of the vocabulary each, twice for as many rows as ``COEFFICIENTS`` allows;
over other axes each device walks over its part, and the sums over all parts are added up.
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
COEFFICIENTS = 2**24
"""Most coefficients that a device holds where W travels, 64 MiB: the more rows they are of, the less often it does."""

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


class _Piece(NamedTuple):
    """C rows of W that a device computes logits with at a time."""

    rows: Float[Array, "C D"]
    ids: Int[Array, " C"]
    """Their tokens; V of rows that are padding, or that an earlier piece has counted."""


def _pieces(
    unembedding: Float[Array, "V_p D"], vocabulary: Vocabulary, chunk: int
) -> tuple[Callable[[Array], _Piece], Int[Array, " n"]]:
    """``piece_at(start)`` and all starts: a walk over W, also over parts of it that other devices of the rows have."""
    held = len(unembedding)
    size = min(held, max(1, chunk // vocabulary.sharing))

    def piece_at(start: Array) -> _Piece:
        # the last piece reaches back over rows already counted, so that W is never padded (a copy)
        at = jnp.minimum(start, held - size)
        ids = lax.dynamic_slice_in_dim(vocabulary.number(held), at, size)
        ids = jnp.where(at + jnp.arange(size, dtype=jnp.int32) >= start, ids, vocabulary.size)
        return _Piece(*map(vocabulary.all_rows, (lax.dynamic_slice_in_dim(unembedding, at, size), ids)))

    return piece_at, jnp.arange(-(-held // size), dtype=jnp.int32) * size


class _VocabularyChunk(NamedTuple):
    """Logits of all predictions for a chunk of C vocabulary rows."""

    logits: Float[Array, "M C"]
    derivative: Float[Array, "M C"]
    """Of the transform, at the products h W^T."""
    is_target: Bool[Array, "M C"]
    is_other: Bool[Array, "M C"]
    """A token, and not the target."""


def _vocabulary_chunk(
    hidden: Float[Array, "M D"], target: Int[Array, " M"], piece: _Piece, size: int, transform: Logits
) -> _VocabularyChunk:
    raw = jnp.einsum("md,cd->mc", hidden, piece.rows.astype(hidden.dtype), precision=lax.Precision.HIGHEST)
    logits, derivative = jax.jvp(transform, (raw,), (jnp.ones_like(raw),))
    is_target = piece.ids[None, :] == target[:, None]
    return _VocabularyChunk(logits, derivative, is_target, (piece.ids < size)[None, :] & ~is_target)


class _Rows(NamedTuple):
    """R rows of predictions in tiles."""

    hidden: Float[Array, "R M D"]
    target: Int[Array, "R M"]
    tile_pairs: Int[Array, "R 2 N"]
    """(first, second) tile of each product."""
    needed: Int[Array, " R"]
    """How many of them are computed, the first ones."""


def token_gram(
    hidden: Float[Array, "M D"],
    target: Int[Array, " M"],
    tile_pairs: Int[Array, "2 N"],
    count: Int[Array, ""],
    unembedding: Float[Array, "V D"],
    transform: Logits = identity,
    *,
    tile: int,
    chunk: int = CHUNK,
) -> Float[Array, "N tile tile"]:
    r"""The coefficients :math:`\alpha_{m,m'} = \langle E_m, E_{m'} \rangle` of one row, in the listed pairs of tiles.

    Two walks over the vocabulary: the first sums up the normalisers of every prediction, the second the products of
    residuals, :math:`\alpha = \sum_v E_{m,v} E_{m',v}`, chunk by chunk.

    Args:
      hidden: states that predict.
      target: the token each predicts.
      tile_pairs: (first, second) tile of each product; only the first ``count`` are computed.
      count: how many they are.
      unembedding: W.
      transform: from :math:`h W^\top` to the logits, elementwise.
      tile: predictions of a tile; M is a multiple.
      chunk: vocabulary rows at a time.

    Returns:
      Symmetric in all, in [-2, 2] where ``transform`` is the identity.
    """
    h = hidden.astype(accumulate(hidden.dtype))
    rows = _Rows(*(a[None] for a in (h, target.astype(jnp.int32), tile_pairs, jnp.asarray(count))))
    return _grams(rows, unembedding, Vocabulary(len(unembedding)), transform, tile, chunk)[0]


def _grams(
    rows: _Rows, unembedding: Float[Array, "V_p D"], vocabulary: Vocabulary, transform: Logits, tile: int, chunk: int
) -> Float[Array, "R N tile tile"]:
    """``token_gram`` of some rows of a device, from its part of the unembedding."""
    piece_at, starts = _pieces(unembedding, vocabulary, chunk)
    log_z, log_others = _normalisers(rows, piece_at, starts, vocabulary, transform)
    # 1 - pi(y) as the sum of the other probabilities: by subtraction nothing would be left of it near pi(y) = 1
    missing = jnp.exp(log_others - log_z)
    each, listed = rows.needed.shape[0], rows.tile_pairs.shape[2]
    zero = jnp.zeros((), rows.hidden.dtype)

    def add_piece(total, start):
        piece = piece_at(start)

        def add_row(r, total):
            c = _vocabulary_chunk(rows.hidden[r], rows.target[r], piece, vocabulary.size, transform)
            probability = jnp.exp(c.logits - log_z[r, :, None])
            residual = c.derivative * (
                jnp.where(c.is_target, missing[r, :, None], zero) - jnp.where(c.is_other, probability, zero)
            )
            tiles = residual.reshape(-1, tile, residual.shape[-1])

            def add_pair(i, total):
                first, second = (lax.dynamic_index_in_dim(tiles, rows.tile_pairs[r, k, i], 0, False) for k in (0, 1))
                product = jnp.einsum("mc,nc->mn", first, second, precision=lax.Precision.HIGHEST)
                at = r * listed + i
                return lax.dynamic_update_index_in_dim(total, total[at] + product, at, 0)

            return lax.fori_loop(0, rows.needed[r], add_pair, total)

        return lax.fori_loop(0, each, add_row, total), None

    total = lax.scan(add_piece, jnp.zeros((each * listed, tile, tile), zero.dtype), starts)[0]
    return vocabulary.sum_of_parts(total).reshape(each, listed, tile, tile)


def _normalisers(
    rows: _Rows, piece_at: Callable[[Array], _Piece], starts: Array, vocabulary: Vocabulary, transform: Logits
) -> tuple[Float[Array, "R M"], Float[Array, "R M"]]:
    """First walk over the vocabulary: ln of the sum of exp(logits), over all tokens and over all but the target."""
    low = jnp.asarray(-jnp.inf, rows.hidden.dtype)

    def step(carry, start):
        piece = piece_at(start)

        def of_row(args):
            hidden, target, everything, others = args
            c = _vocabulary_chunk(hidden, target, piece, vocabulary.size, transform)
            rest = jax.nn.logsumexp(jnp.where(c.is_other, c.logits, low), axis=-1)
            own = jax.nn.logsumexp(jnp.where(c.is_target, c.logits, low), axis=-1)
            return jnp.logaddexp(everything, jnp.logaddexp(rest, own)), jnp.logaddexp(others, rest)

        return lax.map(of_row, (rows.hidden, rows.target, *carry)), None

    empty = jnp.full(rows.target.shape, low)
    return tuple(_log_total(vocabulary, a) for a in lax.scan(step, (empty, empty), starts)[0])  # type: ignore[return-value]


def _log_total(vocabulary: Vocabulary, parts: Float[Array, "R M"]) -> Float[Array, "R M"]:
    """The logarithm of the sum of exponentials over the parts of the vocabulary that did not come by."""
    if not vocabulary.stays:
        return parts
    top = lax.pmax(parts, vocabulary.stays)
    return top + jnp.log(vocabulary.sum_of_parts(jnp.exp(parts - top)))


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
        together = _rows_together(vocabulary, *rows[0].shape[:2])
        groups = tuple(a.reshape(-1, together, *a.shape[1:]) for a in rows)
        found = lax.map(lambda group: _products(group, part, vocabulary, transform, chunk), groups)
        return found.reshape(-1, *found.shape[2:])

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


def _rows_together(vocabulary: Vocabulary, rows: int, count: int) -> int:
    """How many of a device's rows are worked on while the unembedding comes by, a divisor; 1 where it does not."""
    if not vocabulary.gathered:
        return 1
    tile = min(TILE, count)
    tiles = -(-count // tile)
    most = COEFFICIENTS // (tiles * (tiles + 1) // 2 * tile**2)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and n <= max(1, most))


def _products(
    rows: tuple[Array, ...],
    unembedding: Float[Array, "V_p D"],
    vocabulary: Vocabulary,
    transform: Logits,
    chunk: int,
) -> Float[Array, "R M S"]:
    """``head_products`` of some rows of a device; ``rows`` are its five arrays."""
    hidden, target, segment, item, preferred = rows
    count, segments = hidden.shape[1], item.shape[1]
    tile = min(TILE, count)
    pad = -count % tile
    h = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).astype(accumulate(hidden.dtype))
    target = jnp.pad(target, ((0, 0), (0, pad)))
    segment = jnp.pad(segment, ((0, 0), (0, pad)), constant_values=segments)

    def tiles_of(segment, item, preferred):
        real = segment < segments
        place = jnp.minimum(segment, segments - 1)
        # padding gets items of its own behind all others, so that it shares no tile with an item
        own = jnp.where(real, item[place], segments + jnp.arange(count + pad, dtype=segment.dtype))
        return own, *item_tiles(own, jnp.where(real, preferred[place], 0), tile)

    own, tile_pairs, tile_pair_count = jax.vmap(tiles_of)(segment, item, preferred)
    in_tiles = _Rows(h, target.astype(jnp.int32), tile_pairs, tile_pair_count)
    alpha = _grams(in_tiles, unembedding, vocabulary, transform, tile, chunk)
    member = (segment[..., None] == jnp.arange(segments, dtype=segment.dtype)[None, None]).astype(h.dtype)
    found = lax.map(partial(_row_products, tile), (h, own, member, alpha, tile_pairs, tile_pair_count))
    return found[:, :count]


def _row_products(tile: int, row: tuple[Array, ...]) -> Float[Array, "M S"]:
    """From the coefficients of a row to inner products with its segments."""
    h, own, member, alpha, tile_pairs, tile_pair_count = row
    h_tiles, own_tiles, member_tiles = (a.reshape(-1, tile, *a.shape[1:]) for a in (h, own, member))

    def add_tile_pair(i, total):
        first, second = tile_pairs[0, i], tile_pairs[1, i]
        inner = jnp.einsum("md,nd->mn", h_tiles[first], h_tiles[second], precision=lax.Precision.HIGHEST)
        together = own_tiles[first][:, None] == own_tiles[second][None, :]
        weighted = jnp.where(together, alpha[i] * inner, jnp.zeros((), h.dtype))
        mirrored = jnp.where(first == second, jnp.zeros((), h.dtype), weighted.T)
        for at, other, part in ((first, second, weighted), (second, first, mirrored)):
            total = total.at[at].add(jnp.matmul(part, member_tiles[other], precision=lax.Precision.HIGHEST))
        return total

    segments = member.shape[-1]
    zeros = jnp.zeros((h_tiles.shape[0], tile, segments), h.dtype)
    return lax.fori_loop(0, tile_pair_count, add_tile_pair, zeros).reshape(-1, segments)
