"""Softmax attention over the key ranges of a ``Visibility``, whole or in blocks that skip what nobody sees.

Both ways compute ``softmax(cap(scale * q k^T) + mask) v`` with scores, maxima and sums in float32 (float64 when the
inputs are) and agree to rounding. ``dense`` is differentiable, and so is ``slices``, which never holds the scores of
more than a slice of queries; ``blocks`` visits only key blocks with something to see (a data-dependent number of them),
so it is for forward passes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.precision import accumulate, matmul_precision
from ches_jax.models.visibility import Visibility, block_visits, visible

HIDDEN_SCORE = -1e30  # finite: the difference of two of them is 0 and not NaN


def _capped(scores: Array, softcap: float | None) -> Array:
    """``softcap * tanh(scores / softcap)``."""
    if softcap is None:
        return scores
    cap = jnp.asarray(softcap, scores.dtype)
    return cap * jnp.tanh(scores / cap)


def dense(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    seen: Visibility,
    positions: Int[Array, "B T"],
    window: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B T K G H"]:
    """Attention with the whole [T, T] mask."""
    return _queries(q, k, v, seen, positions, positions, window, first=0, scale=scale, softcap=softcap)


def _queries(q, k, v, seen: Visibility, q_positions, k_positions, window, *, first: int, scale: float, softcap):
    """Queries ``first``, ``first + 1``, ... of a row against its first keys; ``seen`` is that of the queries."""
    keys = jnp.arange(k.shape[1], dtype=jnp.int32)
    queries = jnp.arange(first, first + q.shape[1], dtype=jnp.int32)
    mask = visible(seen, keys, queries) & (q_positions[:, :, None] - k_positions[:, None, :] < window)
    acc = accumulate(q.dtype)
    s = jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=acc, precision=matmul_precision(q.dtype))
    s = _capped(s * jnp.asarray(scale, acc), softcap)
    s = jnp.where(mask[:, None, None], s, jnp.asarray(HIDDEN_SCORE, acc))
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgqs,bskh->bqkgh", p, v, preferred_element_type=acc, precision=matmul_precision(v.dtype))
    return out.astype(q.dtype)


def slices(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    seen: Visibility,
    positions: Int[Array, "B T"],
    window: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None,
    block: int,
) -> Float[Array, "B T K G H"]:
    """Attention for training: ``block`` queries at a time against the keys up to their end, scores never kept.

    Nobody sees what comes after it, so half of the scores are never computed; the backward pass computes the scores of
    a slice again. Needs rows in which every key range ends before or at its query, as packed rows do.
    """
    parts = []
    for a in range(0, q.shape[1], block):
        b = min(a + block, q.shape[1])
        one = jax.checkpoint(partial(_queries, first=a, scale=scale, softcap=softcap))
        here = jax.tree.map(lambda x, a=a, b=b: x[:, a:b], (q, seen, positions))
        parts.append(one(here[0], k[:, :b], v[:, :b], here[1], here[2], positions[:, :b], window))
    return jnp.concatenate(parts, axis=1)


def _one_row(q, k, v, seen: Visibility, positions, order, counts, window, *, block: int, scale: float, softcap):
    """``blocks`` for one row (no batch axis): a scan over query blocks, inside it a loop over visited key blocks.

    Softmax is summed up as the blocks come (running maximum and total). A block that a query does not see at all, met
    before one that it sees, adds exp(0) terms that the next rescaling multiplies by exp(-1e30) = 0; every query sees
    itself, so there always is a next one.
    """
    length, kv, group, head = q.shape
    n = length // block
    acc = accumulate(q.dtype)
    here = jnp.arange(block, dtype=jnp.int32)
    in_blocks = partial(jax.tree.map, lambda a: a.reshape(n, block, *a.shape[1:]))
    queries = in_blocks(q).transpose(0, 2, 3, 1, 4).reshape(n, kv, group * block, head)
    keys, values = in_blocks(k).transpose(0, 2, 3, 1), in_blocks(v).transpose(0, 2, 1, 3)
    places = in_blocks(positions)
    precision = matmul_precision(q.dtype)

    def query_block(args):
        i, qi, seen_i, place_i, order_i, count = args

        def key_block(step, carry):
            top, total, out = carry
            j = order_i[step]
            kj, vj, place_j = (lax.dynamic_index_in_dim(a, j, 0, False) for a in (keys, values, places))
            mask = visible(jax.tree.map(lambda a: a[None], seen_i), j * block + here, i * block + here)[0]
            mask &= place_i[:, None] - place_j[None, :] < window
            s = jnp.einsum("kqh,khs->kqs", qi, kj, preferred_element_type=acc, precision=precision)
            s = _capped(s * jnp.asarray(scale, acc), softcap).reshape(kv, group, block, block)
            s += jnp.where(mask, jnp.asarray(0, acc), jnp.asarray(HIDDEN_SCORE, acc))[None, None]
            new_top = jnp.maximum(top, s.max(-1))
            p = jnp.exp(s - new_top[..., None])
            keep = jnp.exp(top - new_top)
            p_flat = p.astype(v.dtype).reshape(kv, group * block, block)
            new = jnp.einsum("kqs,ksh->kqh", p_flat, vj, preferred_element_type=acc, precision=precision)
            return new_top, total * keep + p.sum(-1), out * keep[..., None] + new.reshape(out.shape)

        init = (
            jnp.full((kv, group, block), HIDDEN_SCORE, acc),
            jnp.zeros((kv, group, block), acc),
            jnp.zeros((kv, group, block, head), acc),
        )
        _, total, out = lax.fori_loop(0, count, key_block, init)
        return (out / total[..., None]).astype(q.dtype)

    numbers = jnp.arange(n, dtype=jnp.int32)
    out = lax.map(query_block, (numbers, queries, in_blocks(seen), places, order, counts))
    return out.transpose(0, 3, 1, 2, 4).reshape(length, kv, group, head)


def blocks(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    seen: Visibility,
    positions: Int[Array, "B T"],
    window: Int[Array, ""],
    *,
    scale: float,
    softcap: float | None,
    block: int,
) -> Float[Array, "B T K G H"]:
    """Attention in ``block`` x ``block`` tiles, only those with something to see; T is a multiple of ``block``."""
    order, counts = block_visits(seen, block)
    one = partial(_one_row, block=block, scale=scale, softcap=softcap)

    # lax.map, not vmap: each row keeps its own number of visits, and a row is work enough for a device
    def row(args):
        q, k, v, seen, positions, order, counts = args
        return one(q, k, v, seen, positions, order, counts, window)

    return lax.map(row, (q, k, v, seen, positions, order, counts))
