r"""Attention that computes only the blocks of scores in which a query sees a key, forward and backward.

With ``z = cap(scale * q k^T)`` of a query, its weights ``p = exp(z - Z)`` with ``Z = ln sum exp z``, output ``o = p v``
and the gradient ``g`` by that output:

.. math::
  \frac{\partial}{\partial v_t} = \sum_q p_{qt} g_q, \qquad
  \frac{\partial}{\partial z_{qt}} = p_{qt} \Big(g_q \cdot v_t - \sum_u p_{qu}\, g_q \cdot v_u\Big)

A sink is one more term of ``Z``, with the weight ``p = exp(sink - Z)`` and the value zero. The sum over u is
``g . o``, of an output that is kept as it was summed. Neither it nor ``p`` and the gradient by ``z`` are rounded to 16
bits: so the gradients by a query's scores add up to zero, which matters to an optimiser that divides by their size.

The forward keeps ``Z`` and ``o``, the backward computes the scores again. Both walk over blocks of queries, those of
all rows one after the other. The number of blocks of keys that such a block needs differs from block to block, and
shapes cannot. With a gradient they are taken one at a time, as often as it takes: the forward is compiled once and the
backward once. Without one they are gathered first, so that matrix products are few and large: their number is rounded
up to one of a few bucket sizes, each compiled once, and what is more than ``AT_ONCE`` keys is computed in parts of so
many. The keys of surplus blocks are masked, and parts are put together:

.. math::
  Z = \ln(e^{Z_a} + e^{Z_b}), \qquad o = e^{Z_a - Z} o_a + e^{Z_b - Z} o_b
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ches_jax.models.attention.dense import KEPT, MASKED_SCORE, AttentionInputs, AttentionParams, capped, to_multiple
from ches_jax.models.attention.mask import KeyRanges, block_index, block_spans, padded, visible
from ches_jax.models.platform import platform
from ches_jax.models.precision import accumulate, einsum

BLOCK, ACCELERATOR_BLOCK = {"cpu": 64}, 128
"""Queries and keys of a block by platform, and elsewhere: what was fastest. With a gradient on a CPU, what two such
blocks take is little enough for XLA to give it to one thread, and larger ones are slower: dividing takes longer."""
KEYS = {"cpu": 32}
"""Keys of a block where nothing is differentiated, if that is less: fewer of those that are computed are masked."""
AT_ONCE = 512
"""Keys whose scores are computed at once at most, without a gradient: the scores of more do not fit in a CPU's cache,
and each number of blocks is a branch to compile. Measured with 2,048 and 256 too."""


class Static(NamedTuple):
    """What a program is compiled for."""

    block: int
    params: AttentionParams
    differentiated: bool = False

    @property
    def keys(self) -> int:
        """Keys of a block."""
        return self.block if self.differentiated else min(self.block, KEYS.get(platform(), self.block))

    @property
    def with_gradient(self) -> "Static":
        """What a program with a gradient is compiled for."""
        return self._replace(differentiated=True)


class Part(NamedTuple):
    """What queries see in some of their keys: the highest score, the sum of exp(z - top), that of exp(z - top) v."""

    top: Float[Array, "K group_queries 1"]
    total: Float[Array, "K group_queries 1"]
    out: Float[Array, "K group_queries H"]


class BlockIndices(NamedTuple):
    """The blocks of keys that each block of queries needs: the first ``kv_num_blocks`` of ``kv_indices``."""

    kv_indices: Int[Array, "blocks kv_blocks"]
    kv_num_blocks: Int[Array, " blocks"]


def blocks(inputs: AttentionInputs, params: AttentionParams, block: int | None = None) -> Float[Array, "B Q K G H"]:
    """Attention in blocks of queries and keys; differentiable, no forward mode.

    Args:
      inputs: queries of any positions, in any order.
      params: scale and soft cap.
      block: queries and keys of a block; default: by the platform.
    """
    static = Static(block or _block(), params)
    q, k, v, ranges, sinks = _whole_blocks(inputs, static.block)
    return cast(Array, _attend(q, k, v, ranges, sinks, static))[:, : inputs.q.shape[1]]


def forward_blocks(inputs: AttentionInputs, params: AttentionParams) -> Float[Array, "B Q K G H"]:
    """``blocks`` in forward mode: ``jax.jvp`` passes it, to any order; a backward pass would keep all scores."""
    static = Static(_block(), params, differentiated=True)
    out, _ = _forward(*_whole_blocks(inputs, static.block), static)
    return out.astype(inputs.q.dtype)[:, : inputs.q.shape[1]]


def _block() -> int:
    return BLOCK.get(platform(), ACCELERATOR_BLOCK)


def _whole_blocks(inputs: AttentionInputs, block: int) -> AttentionInputs:
    """With padding to whole blocks of queries and keys."""
    q, k, v = (to_multiple(a, block) for a in inputs[:3])
    return AttentionInputs(q, k, v, padded(inputs.ranges, block), inputs.sinks)


def bucket_sizes(most: int) -> list[int]:
    """Numbers of blocks that a program is compiled for; each at most half more than what it is taken for.

    Twice as many sizes would compute fewer masked keys, but a pass is no faster for it (measured on a CPU), and each is
    a branch that is compiled: a third of the time.

    >>> bucket_sizes(11)
    [1, 2, 3, 4, 6, 8, 11]
    """
    powers = range(most.bit_length())
    return sorted({min(most, size * 2**n) for n in powers for size in (1, 3)})


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, ranges: KeyRanges, sinks: Array | None, static: Static) -> Array:
    return _forward(q, k, v, ranges, sinks, static)[0]


def _forward_with_gradient(q, k, v, ranges, sinks, static: Static):
    out, total = _forward(q, k, v, ranges, sinks, static.with_gradient)
    out, total = checkpoint_name((out, total), KEPT)
    return out.astype(q.dtype), (q, k, v, ranges, sinks, total, out)


def _forward(q, k, v, ranges, sinks, static: Static):
    """Outputs, where they are differentiated in the dtype of their sums, and Z."""
    out, total = _row_forward(static, k.shape[1], sinks, *_one_row(q, k, v, ranges))
    return out.reshape(q.shape), total


def _backward(static: Static, kept, cotangent):
    q, k, v, ranges, sinks, total, out = kept
    row = _one_row(q, k, v, ranges)
    flat = (a.reshape(row[0].shape) for a in (out, cotangent))
    dq, dk, dv, dsinks = _row_backward(static.with_gradient, k.shape[1], sinks, *row, total, *flat)
    of_arrays = (d.reshape(a.shape) for d, a in ((dq, q), (dk, k), (dv, v)))
    return *of_arrays, None, None if sinks is None else dsinks.astype(sinks.dtype)


_attend.defvjp(_forward_with_gradient, _backward)


def _one_row(
    q: Float[Array, "B Q K G H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"], ranges: KeyRanges
) -> tuple[Array, Array, Array, KeyRanges]:
    """All rows as one, in which every query sees what it saw: no loop over rows is compiled."""
    before = k.shape[1] * jnp.arange(len(k), dtype=ranges.own_end.dtype)[:, None]
    q, k, v = (a.reshape(-1, *a.shape[2:]) for a in (q, k, v))
    return q, k, v, KeyRanges(*((a + before).reshape(-1) for a in ranges))


def _row_forward(
    static: Static, most: int, sinks: Array | None, q: Array, k: Array, v: Array, ranges: KeyRanges
) -> tuple[Array, Array]:
    """Outputs, [Q, K, G, H], and Z of each block's queries, [blocks, K, G block], of which each sees ``most`` keys."""
    acc = accumulate(q.dtype)
    keys, values = (_key_blocks(a, static.keys) for a in (k, v))
    most = most // static.keys
    at_once = 1 if static.differentiated else min(max(1, AT_ONCE // static.keys), most)
    indices = _block_indices(ranges, static.block, static.keys, (keys.shape[1], most, at_once))

    def block(rows, args):
        at, ranges_i, kv_index, kv_count = args
        queries, params = _scaled(lax.dynamic_slice_in_dim(rows, at, static.block).astype(q.dtype), static.params)
        (qi,) = _query_blocks(queries, static.block)

        def seen(index: Int[Array, " kv_blocks"], count: Int[Array, ""] | int) -> Part:
            """What the queries see in the first ``count`` of some blocks of keys."""
            ki, vi = (_take_blocks(a, index) for a in (keys, values))
            z = _scores(qi, ki, _mask(ranges_i, index, count, static.keys), params)[0]
            top = lax.stop_gradient(z.max(-1, keepdims=True))  # outputs do not depend on it: for forward mode
            p = jnp.exp(z - top)
            # a rounded weight would not be the one whose gradient the backward computes
            factors = (p, vi.astype(acc)) if static.differentiated else (p.astype(v.dtype), vi)
            return Part(top, p.sum(-1, keepdims=True), einsum("kqs,ksh->kqh", *factors))

        def joined_from(start: Int[Array, ""] | int, parts: Int[Array, ""], part: Part) -> Part:
            """With ``parts`` times ``at_once`` blocks more."""

            def with_more(step: Int[Array, ""], part: Part) -> Part:
                first = start + step * at_once
                return _joined(part, seen(lax.dynamic_slice_in_dim(kv_index, first, at_once), kv_count - first))

            return lax.fori_loop(0, parts, with_more, part)

        if static.differentiated:
            column = jnp.full((*qi.shape[:2], 1), MASKED_SCORE, acc)
            nothing = Part(column, jnp.zeros_like(column), jnp.zeros(qi.shape, acc))
            part = joined_from(0, kv_count, nothing)
        else:
            further = (kv_count - 1) // at_once
            first = kv_count - further * at_once
            part = _in_bucket(first, at_once, lambda size: seen(kv_index[:size], first))
            if at_once < most:  # else XLA finds that the one slice depends on nothing, and computes it for all
                part = joined_from(first, further, part)
        sink = _sink_scores(sinks, part.out)
        if sink is not None:
            part = _joined(part, _sink_part(sink, part))
        out = _query_rows((part.out / part.total).astype(rows.dtype)[None], static.block)
        return lax.dynamic_update_slice_in_dim(rows, out, at, 0), (part.top + jnp.log(part.total))[..., 0]

    # outputs take the place of the queries they are of: arrays of their own would be filled with zeros first
    at = jnp.arange(0, len(q), static.block)
    outputs = q.astype(acc) if static.differentiated else q
    return lax.scan(block, outputs, (at, _in_blocks(ranges, static.block), *indices))


def _row_backward(
    static: Static,
    most: int,
    sinks: Array | None,
    q: Array,
    k: Array,
    v: Array,
    ranges: KeyRanges,
    total: Array,
    out: Array,
    cotangent: Array,
) -> tuple[Array, ...]:
    """Gradients by queries, keys and values, and by the sinks (zero without any)."""
    acc = accumulate(q.dtype)
    q, params = _scaled(q, static.params)
    keys, values = (_key_blocks(a, static.block) for a in (k, v))
    most = most // static.block
    indices = _block_indices(ranges, static.block, static.block, (keys.shape[1], most, 1))

    def block(carry, args):
        qi, gi, total_i, mean_i, ranges_i, kv_index, kv_count = args

        def with_more(step: Int[Array, ""], sums: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, *by_keys = sums
            index = lax.dynamic_slice_in_dim(kv_index, step, 1)
            ki, vi = (_take_blocks(a, index) for a in (keys, values))
            mask = _mask(ranges_i, index, 1, static.block)
            z, cap_gradient = _scores(qi, ki, mask, params)
            p = jnp.exp(z - total_i)
            dz = p * (einsum("kqh,ksh->kqs", gi, vi) - mean_i) * cap_gradient
            # [H, block] with the smaller factor first: transposing the larger one is what would take long
            parts = einsum("kqh,kqs->khs", qi.astype(acc), dz), einsum("kqh,kqs->khs", gi.astype(acc), p)
            by_keys = [a.at[index[0]].add(part) for a, part in zip(by_keys, parts, strict=True)]
            return dq + einsum("kqs,ksh->kqh", dz, ki.astype(acc)), *by_keys

        zero = jnp.zeros(qi.shape, acc)
        dq, *carry = lax.fori_loop(0, kv_count, with_more, (zero, *carry))
        dq = dq * jnp.asarray(static.params.scale, acc)
        sink = _sink_scores(sinks, dq)
        dsink = [] if sink is None else [-jnp.exp(sink - total_i) * mean_i]
        return tuple(carry), (dq.astype(q.dtype), *(d.reshape(*q.shape[1:3], -1).sum(-1) for d in dsink))

    start = jnp.zeros((keys.shape[1], keys.shape[0], keys.shape[3], static.block), acc)
    mean = jnp.sum(out * cotangent.astype(acc), -1, keepdims=True)
    queries = (_query_blocks(a, static.block) for a in (q, cotangent))
    of_queries = (total[..., None], _query_blocks(mean, static.block))
    (dk, dv), (dq, *dsinks) = lax.scan(
        block, (start, start), (*queries, *of_queries, _in_blocks(ranges, static.block), *indices)
    )
    transposed = (a.transpose(0, 3, 1, 2).reshape(k.shape) for a in (dk * jnp.asarray(params.scale, acc), dv))
    by_arrays = (a.astype(k.dtype) for a in transposed)
    return _query_rows(dq, static.block), *by_arrays, dsinks[0].sum(0) if dsinks else jnp.zeros(q.shape[1:3], acc)


def _block_indices(ranges: KeyRanges, queries: int, keys: int, blocks: tuple[int, int, int]) -> BlockIndices:
    """What each block of queries needs; indices past ``kv_num_blocks`` are of some block.

    ``blocks``: of keys, how many there are, how many a block of queries may need, and how many are taken at a time.
    """
    count, most, at_once = blocks
    spans = jax.tree.map(lambda a: a[0], block_spans(jax.tree.map(lambda a: a[None], ranges), queries, keys))
    steps = jnp.arange(-(-most // at_once) * at_once, dtype=jnp.int32)[None]
    indices = block_index(jax.tree.map(lambda a: a[:, None], spans), steps)
    return BlockIndices(jnp.clip(indices, 0, count - 1), spans.num_blocks)


def _in_bucket(count: Int[Array, ""], most: int, compute: Callable[[int], Any]) -> Any:
    """``compute`` at the first bucket size of at least ``count`` blocks."""
    sizes = bucket_sizes(most)
    bucket = jnp.sum(jnp.asarray(sizes, count.dtype) < count)
    return lax.switch(bucket, [partial(compute, size) for size in sizes])


def _take_blocks(
    key_blocks: Float[Array, "K blocks block H"], kv_index: Int[Array, " kv_blocks"]
) -> Float[Array, "K keys H"]:
    """The keys of the blocks of ``kv_index``, one block after the other."""
    if len(kv_index) == 1:  # a gather XLA divides among a CPU's threads, however short: in ten times the time of a copy
        return lax.dynamic_index_in_dim(key_blocks, kv_index[0], 1, keepdims=False, allow_negative_indices=False)
    heads, _, _, width = key_blocks.shape
    return key_blocks.at[:, kv_index].get(mode="promise_in_bounds").reshape(heads, -1, width)


def _mask(
    ranges: KeyRanges, kv_index: Int[Array, " kv_blocks"], kv_count: Int[Array, ""] | int, keys: int
) -> Bool[Array, "block keys"]:
    """Whether each query of a block sees each key of some blocks of ``keys`` keys; none past ``kv_count`` blocks.

    In a branch that is always taken, since XLA fuses none: it would compute the mask anew, from the ranges, for every
    head and use, which took five times as long as the exponentials.
    """

    def of_ranges() -> Array:
        steps = jnp.arange(len(kv_index), dtype=kv_index.dtype)
        key = kv_index[:, None] * keys + jnp.arange(keys, dtype=kv_index.dtype)[None]
        key = jnp.where(steps[:, None] < kv_count, key, -1)  # which no query sees
        return visible(jax.tree.map(lambda a: a[None], ranges), key.reshape(-1))[0]

    shape = (ranges.own_end.shape[0], len(kv_index) * keys)
    return lax.cond(ranges.own_end[0] > 0, of_ranges, lambda: jnp.zeros(shape, bool))


def _scaled(q: Float[Array, "Q K G H"], params: AttentionParams) -> tuple[Array, AttentionParams]:
    """Queries with the scale of their scores, which are many more, and 1 in its place.

    Not in a dtype narrower than that of the scores, which would round the product.
    """
    acc = accumulate(q.dtype)
    if q.dtype != acc:
        return q, params
    return q * jnp.asarray(params.scale, acc), params._replace(scale=1.0)


def _scores(
    q: Float[Array, "K group_queries H"],
    k: Float[Array, "K keys H"],
    mask: Bool[Array, "block keys"],
    params: AttentionParams,
) -> tuple[Float[Array, "K group_queries keys"], Array]:
    """Scores, masked ones far below, and the derivative of the soft cap there (1 without one)."""
    acc, cap = accumulate(q.dtype), params.softcap
    z = capped(einsum("kqh,ksh->kqs", q, k) * jnp.asarray(params.scale, acc), cap)
    cap_gradient = jnp.ones((), acc) if cap is None else 1 - jnp.square(z / jnp.asarray(cap, acc))
    by_head = z.reshape(z.shape[0], -1, *mask.shape)
    return jnp.where(mask, by_head, jnp.asarray(MASKED_SCORE, acc)).reshape(z.shape), cap_gradient


def _joined(a: Part, b: Part) -> Part:
    """What the queries see in the keys of both."""
    top = jnp.maximum(a.top, b.top)
    of_a, of_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    return Part(top, a.total * of_a + b.total * of_b, a.out * of_a + b.out * of_b)


def _sink_part(scores: Array, part: Part) -> Part:
    """A sink as a key whose value is zero."""
    return Part(lax.stop_gradient(scores), jnp.exp(scores - lax.stop_gradient(scores)), jnp.zeros_like(part.out))


def _sink_scores(sinks: Array | None, z: Float[Array, "K group_queries keys"]) -> Array | None:
    """The sink of each query's head, in the rank and dtype of the scores."""
    if sinks is None:
        return None
    return jnp.repeat(sinks.astype(z.dtype), z.shape[1] // sinks.shape[1], axis=1)[..., None]


def _in_blocks(a: Any, block: int) -> Any:
    """[Q, ...] to [blocks, block, ...], of every array."""
    return jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), a)


def _query_blocks(q: Float[Array, "Q K G H"], block: int) -> Float[Array, "blocks K group_queries H"]:
    """Blocks with heads first; ``group_queries`` are a block's queries for each head of the group, head by head."""
    n, _, kv, _, width = (cut := _in_blocks(q, block)).shape
    return cut.transpose(0, 2, 3, 1, 4).reshape(n, kv, -1, width)


def _query_rows(q: Float[Array, "blocks K group_queries H"], block: int) -> Float[Array, "Q K G H"]:
    """The inverse of ``_query_blocks``."""
    n, kv, _, width = q.shape
    return q.reshape(n, kv, -1, block, width).transpose(0, 3, 1, 2, 4).reshape(n * block, kv, -1, width)


def _key_blocks(k: Float[Array, "T K H"], block: int) -> Float[Array, "K blocks block H"]:
    return _in_blocks(k, block).transpose(2, 0, 1, 3)
