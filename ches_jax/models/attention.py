"""Softmax attention over the key ranges of a ``Visibility``, whole or in blocks that skip what nobody sees.

Both ways compute ``softmax(cap(scale * q k^T) + mask) v`` with scores, maxima and sums in float32 (float64 when the
inputs are) and agree to rounding. ``dense`` is differentiable; ``blocks`` visits only key blocks with something to see
(a data-dependent number of them), so it is for forward passes.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.precision import accumulate, matmul_precision
from ches_jax.models.visibility import Visibility, block_visits, visible

HIDDEN_SCORE = -1e30  # finite, so that an all-hidden block leaves exp(0) * 0 and no NaN


def _scores(q, k, scale: float, softcap: float | None, dtype):
    """Scaled, capped scores [B, K, G, Q, S] of queries [B, Q, K, G, H] against keys [B, S, K, H]."""
    s = jnp.einsum("bqkgh,bskh->bkgqs", q, k, preferred_element_type=dtype, precision=matmul_precision(q.dtype))
    s = s * jnp.asarray(scale, dtype)
    if softcap is not None:
        s = jnp.asarray(softcap, dtype) * jnp.tanh(s / jnp.asarray(softcap, dtype))
    return s


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
    here = jnp.arange(q.shape[1], dtype=jnp.int32)
    mask = visible(seen, here, here) & (positions[:, :, None] - positions[:, None, :] < window)
    acc = accumulate(q.dtype)
    s = jnp.where(mask[:, None, None], _scores(q, k, scale, softcap, acc), jnp.asarray(HIDDEN_SCORE, acc))
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgqs,bskh->bqkgh", p, v, preferred_element_type=acc, precision=matmul_precision(v.dtype))
    return out.astype(q.dtype)


def _one_row(
    q,
    k,
    v,
    seen: Visibility,
    positions,
    order,
    counts,
    window,
    *,
    block: int,
    scale: float,
    softcap,
):
    """``blocks`` for one row (no batch axis): a scan over query blocks, inside it a loop over visited key blocks."""
    length, kv, group, head = q.shape
    n = length // block
    acc = accumulate(q.dtype)
    here = jnp.arange(block, dtype=jnp.int32)

    def query_block(args):
        i, qi, seen_i, pos_i, order_i, count = args
        queries = i * block + here

        def key_block(step, carry):
            top, total, out = carry
            start = order_i[step] * block
            kj = lax.dynamic_slice_in_dim(k, start, block)
            vj = lax.dynamic_slice_in_dim(v, start, block)
            pos_j = lax.dynamic_slice_in_dim(positions, start, block)
            mask = visible(jax.tree.map(lambda a: a[None], seen_i), start + here, queries)[0]
            mask &= pos_i[:, None] - pos_j[None, :] < window
            s = _scores(qi[None], kj[None], scale, softcap, acc)[0]
            s = jnp.where(mask[None, None], s, jnp.asarray(HIDDEN_SCORE, acc))
            new_top = jnp.maximum(top, s.max(-1))
            # hidden keys get weight 0 by the mask itself: where a whole row is hidden, s - top is 0, not -inf
            p = jnp.where(mask[None, None], jnp.exp(s - new_top[..., None]), jnp.asarray(0, acc))
            keep = jnp.exp(top - new_top)
            new = jnp.einsum(
                "kgqs,skh->kgqh",
                p.astype(v.dtype),
                vj,
                preferred_element_type=acc,
                precision=matmul_precision(v.dtype),
            )
            return new_top, total * keep + p.sum(-1), out * keep[..., None] + new

        init = (
            jnp.full((kv, group, block), HIDDEN_SCORE, acc),
            jnp.zeros((kv, group, block), acc),
            jnp.zeros((kv, group, block, head), acc),
        )
        _, total, out = lax.fori_loop(0, count, key_block, init)
        return (out / total[..., None]).transpose(2, 0, 1, 3).astype(q.dtype)

    split = partial(jax.tree.map, lambda a: a.reshape(n, block, *a.shape[1:]))
    out = lax.map(
        query_block,
        (jnp.arange(n, dtype=jnp.int32), split(q), split(seen), split(positions), order, counts),
    )
    return out.reshape(length, kv, group, head)


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
