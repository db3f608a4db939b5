"""Log-probabilities on a mesh where states stay on their device and the unembedding comes by in pieces.

Over ``fsdp`` both rows of the batch and columns of the unembedding W [V, D] are sharded. For T tokens on the devices
that share W, either T D numbers travel (``vocabulary.Vocabulary.all_rows``) or V D; here it is W, for T > V. Its parts
are turned once, from columns to rows; a piece is a few rows of each device's part, and all devices have it for the
logits of their own tokens. Of Z only the largest logit and the sum are kept from piece to piece:

    m' = max(m, max_v z_v),    s' = s e^(m - m') + sum_v e^(z_v - m'),    Z = m + ln s

The gradient by W goes the way back piece by piece. No collective is larger than a piece, ``PIECE`` numbers.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.head import Head, logit_gradient, logits_of
from ches_jax.models.precision import accumulate, einsum
from ches_jax.models.vocabulary import Vocabulary

PIECE = 2**25
"""Numbers that travel at a time: in 16 bits 64 MiB, less than a matrix of a layer of an 8B model."""
LOGITS_OF_PIECE = 2**27
"""Logits of a device's tokens that exist at a time."""


def unembedding_travels(parts: Vocabulary, rows: int, count: int) -> bool:
    """Whether the unembedding is less than the states it is multiplied with; inside ``shard_map``.

    Args:
      parts: how both lie.
      rows: of a device.
      count: positions of a row.
    """
    shared = bool(parts.gathered) and parts.gathered == parts.turned
    return shared and rows * count * parts.sharing > parts.stored_rows


class _Pieces(NamedTuple):
    """A device's part of W, to be walked over."""

    rows: Float[Array, "n k D"]
    first: Int[Array, " n"]
    held: int
    """Rows of the part; what is beyond is padding."""


def _pieces(parts: Vocabulary, part: Float[Array, "V_p D"], tokens: int) -> _Pieces:
    held, width = part.shape
    most = min(PIECE // width, LOGITS_OF_PIECE // tokens)
    count = -(-held // max(1, most // parts.sharing))
    rows = -(-held // count)
    padded = jnp.pad(part, ((0, count * rows - held), (0, 0)))
    return _Pieces(padded.reshape(count, rows, width), jnp.arange(count, dtype=jnp.int32) * rows, held)


def _number(parts: Vocabulary, rows: int, first: Int[Array, ""], held: int) -> Int[Array, " v"]:
    """The token of each row of a piece of all devices; V of padding."""
    inside = (first + jnp.arange(rows, dtype=jnp.int32))[None]
    of_device = jnp.arange(parts.sharing, dtype=jnp.int32)[:, None] * held
    return jnp.where(inside < held, parts.number_of(of_device + inside), parts.size).reshape(-1)


def _of_piece(
    parts: Vocabulary, hidden: Array, own: Array, first: Array, held: int, head: Head
) -> tuple[Float[Array, "B M v"], Float[Array, "v D"], Int[Array, " v"]]:
    """Logits of the device's tokens, the piece they are of, its token numbers."""
    whole, number = parts.all_rows(own), _number(parts, len(own), first, held)
    z = logits_of(hidden, whole, head)
    return jnp.where((number < parts.size)[None, None], z, jnp.asarray(-jnp.inf, z.dtype)), whole, number


def logps_by_piece(
    parts: Vocabulary,
    hidden: Float[Array, "B M D"],
    weight: Float[Array, "V_t D_f"],
    target: Int[Array, "B M"],
    head: Head,
) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """Log-probabilities of the targets of a device's tokens, and logs of the sums, Z; open to forward mode.

    Args:
      parts: how states and unembedding lie.
      hidden: states of this device's rows.
      weight: the stored part of the unembedding.
      target: token each state predicts.
      head: the model's logit scale and soft cap.
    """
    acc = accumulate(hidden.dtype)
    pieces = _pieces(parts, parts.part(weight.astype(hidden.dtype)), target.size)

    def one(carry, piece):
        most, total, at_target = carry
        own, first = piece
        z, _, number = _of_piece(parts, hidden, own, first, pieces.held, head)
        now = jnp.maximum(most, lax.stop_gradient(z.max(-1)))
        total = total * jnp.exp(most - now) + jnp.exp(z - now[..., None]).sum(-1)
        is_target = target[..., None] == number.astype(target.dtype)[None, None]
        return (now, total, at_target + jnp.where(is_target, z, jnp.zeros_like(z)).sum(-1)), None

    # not minus infinity: a piece may be padding alone
    start = jnp.full(target.shape, jnp.finfo(acc).min, acc), jnp.zeros(target.shape, acc), jnp.zeros(target.shape, acc)
    (most, total, at_target), _ = lax.scan(one, start, (pieces.rows, pieces.first))
    if parts.outer:
        over_all = lax.pmax(lax.stop_gradient(most), parts.outer)
        total, at_target = lax.psum((total * jnp.exp(most - over_all), at_target), parts.outer)
        most = over_all
    logs = most + jnp.log(total)
    return at_target - logs, logs


def gradients_by_piece(
    parts: Vocabulary, hidden: Array, weight: Array, target: Array, totals: Array, cotangent: Array, head: Head
) -> tuple[Float[Array, "B M D"], Float[Array, "V_t D_f"]]:
    """Gradients by states and by the stored part of the unembedding; ``totals`` from ``logps_by_piece``."""
    pieces = _pieces(parts, parts.part(weight.astype(hidden.dtype)), target.size)

    def one(dh, piece):
        rows, first = piece
        z, whole, number = _of_piece(parts, hidden, rows, first, pieces.held, head)
        dz = logit_gradient(z, totals, target, cotangent, head, number).astype(hidden.dtype)
        own = lax.psum_scatter(einsum("bmv,bmd->vd", dz, hidden), parts.gathered, scatter_dimension=0, tiled=True)
        return dh + einsum("bmv,vd->bmd", dz, whole), own

    start = jnp.zeros(hidden.shape, accumulate(hidden.dtype))
    dh, own = lax.scan(one, start, (pieces.rows, pieces.first))
    dh = lax.psum(dh, parts.outer) if parts.outer else dh
    dw = own.reshape(-1, own.shape[-1])[: pieces.held]
    return dh.astype(hidden.dtype), parts.stored(dw, len(weight)).astype(weight.dtype)
