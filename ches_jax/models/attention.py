"""Softmax attention over the keys that each query sees, in jax.numpy: it runs on every backend.

All compute ``softmax(cap(scale * q k^T) + mask) v`` with scores, maxima and sums in float32 (float64 when the inputs
are) and agree to rounding:

dense   the whole mask; differentiable
slices  never holds the scores of more than a slice of queries; differentiable
blocks  visits only key blocks with something to see, a data-dependent number of them: for forward passes

``kernels`` has others, for one kind of accelerator each, and chooses.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from ches_jax.models.precision import accumulate, matmul_precision, products
from ches_jax.models.visibility import KeyRanges, block_spans, padded, visible, visited

BLOCK, WIDE_BLOCK = {"cpu": 64}, 128
"""Tile of ``blocks`` by platform, and elsewhere: what was fastest."""
SLICE, WIDE_SLICE = {"cpu": 128}, 512
"""Queries of a slice of ``slices``."""
HIDDEN_SCORE = -1e30  # finite: the difference of two of them is 0 and not NaN


class Attend(Protocol):
    """What all ways to compute attention look like."""

    def __call__(
        self,
        q: Float[Array, "B Q K G H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        seen: KeyRanges,
        *,
        scale: float,
        softcap: float | None,
    ) -> Float[Array, "B Q K G H"]:
        """Attention of the queries, G heads for each of the K key/value heads."""
        ...


def capped(scores: Array, softcap: float | None) -> Array:
    """``softcap * tanh(scores / softcap)``."""
    if softcap is None:
        return scores
    cap = jnp.asarray(softcap, scores.dtype)
    return cap * jnp.tanh(scores / cap)


def dense(
    q: Float[Array, "B Q K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    seen: KeyRanges,
    *,
    scale: float,
    softcap: float | None,
) -> Float[Array, "B Q K G H"]:
    """Attention with the whole [Q, T] mask."""
    mask = visible(seen, jnp.arange(k.shape[1], dtype=jnp.int32))
    acc = accumulate(q.dtype)
    s = products("bqkgh,bskh->bkgqs", q, k)
    s = capped(s * jnp.asarray(scale, acc), softcap)
    s = jnp.where(mask[:, None, None], s, jnp.asarray(HIDDEN_SCORE, acc))
    p = jax.nn.softmax(s, axis=-1).astype(v.dtype)
    return products("bkgqs,bskh->bqkgh", p, v).astype(q.dtype)


def slices(
    q: Float[Array, "B T K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    seen: KeyRanges,
    *,
    scale: float,
    softcap: float | None,
    block: int | None = None,
) -> Float[Array, "B T K G H"]:
    """Attention for training: ``block`` queries at a time against the keys up to their end, scores never kept.

    Nobody sees what comes after it, so half of the scores are never computed; the backward pass computes the scores of
    a slice again. Needs the queries of the whole row, each of which sees nothing after itself.
    """
    block = block or SLICE.get(jax.default_backend(), WIDE_SLICE)
    one = jax.checkpoint(partial(dense, scale=scale, softcap=softcap))
    parts = []
    for a in range(0, q.shape[1], block):
        b = min(a + block, q.shape[1])
        here = jax.tree.map(lambda x, a=a, b=b: x[:, a:b], (q, seen))
        parts.append(one(here[0], k[:, :b], v[:, :b], here[1]))
    return jnp.concatenate(parts, axis=1)


def _one_row(q, k, v, seen: KeyRanges, *, block: int, scale: float, softcap: float | None):
    """``blocks`` for one row (no batch axis): a scan over query blocks, inside it a loop over visited key blocks.

    Softmax is summed up as the blocks come (running maximum and total). A block that a query does not see at all, met
    before one that it sees, adds exp(0) terms that the next rescaling multiplies by exp(-1e30) = 0; every query sees
    something, so there always is a next one.
    """
    length, kv, group, head = q.shape
    acc = accumulate(q.dtype)
    here = jnp.arange(block, dtype=jnp.int32)
    in_blocks = partial(jax.tree.map, lambda a: a.reshape(-1, block, *a.shape[1:]))
    queries = in_blocks(q).transpose(0, 2, 3, 1, 4).reshape(-1, kv, group * block, head)
    keys, values = in_blocks(k).transpose(0, 2, 3, 1), in_blocks(v).transpose(0, 2, 1, 3)
    spans = jax.tree.map(lambda a: a[0], block_spans(jax.tree.map(lambda a: a[None], seen), block, block))
    precision = matmul_precision(q.dtype)

    def query_block(args):
        qi, seen_i, spans_i = args

        def key_block(step, carry):
            top, total, out = carry
            j = visited(spans_i, step)
            kj, vj = (lax.dynamic_index_in_dim(a, j, 0, False) for a in (keys, values))
            mask = visible(jax.tree.map(lambda a: a[None], seen_i), j * block + here)[0]
            s = jnp.einsum("kqh,khs->kqs", qi, kj, preferred_element_type=acc, precision=precision)
            s = capped(s * jnp.asarray(scale, acc), softcap).reshape(kv, group, block, block)
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
        _, total, out = lax.fori_loop(0, spans_i.visits, key_block, init)
        return (out / total[..., None]).astype(q.dtype)

    out = lax.map(query_block, (queries, in_blocks(seen), spans))
    return out.transpose(0, 3, 1, 2, 4).reshape(length, kv, group, head)


def to_multiple(x: Array, block: int) -> Array:
    """Zeros after the second axis, up to a multiple of ``block``."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)])


def blocks(
    q: Float[Array, "B Q K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    seen: KeyRanges,
    *,
    scale: float,
    softcap: float | None,
    block: int | None = None,
) -> Float[Array, "B Q K G H"]:
    """Attention in ``block`` x ``block`` tiles, only those with something to see."""
    block = block or BLOCK.get(jax.default_backend(), WIDE_BLOCK)
    one = partial(_one_row, block=block, scale=scale, softcap=softcap)
    rows = (*(to_multiple(a, block) for a in (q, k, v)), padded(seen, block))
    # lax.map, not vmap: each row keeps its own number of visits, and a row is work enough for a device
    return lax.map(lambda row: one(*row), rows)[:, : q.shape[1]]
