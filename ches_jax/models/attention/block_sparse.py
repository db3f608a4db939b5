r"""Attention that computes only the blocks of scores in which a query sees a key, forward and backward.

With ``z = cap(scale * q k^T)`` of a query, its weights ``p = exp(z - Z)`` with ``Z = ln sum exp z``, output ``o = p v``
and the gradient ``g`` by that output:

.. math::
  \frac{\partial}{\partial v_t} = \sum_q p_{qt} g_q, \qquad
  \frac{\partial}{\partial z_{qt}} = p_{qt} \Big(g_q \cdot v_t - \sum_u p_{qu}\, g_q \cdot v_u\Big)

A sink is one more term of ``Z``, with the weight ``p = exp(sink - Z)`` and the value zero. The sum over u equals
``g . o``; summed from the same rounded terms it makes the gradients by a query's scores add up to zero, which
matters to an optimiser that divides by the size of a gradient.

The forward keeps ``Z``, the backward computes the scores again. Both walk over blocks of queries; the blocks of keys
that such a block needs are gathered first, so that its matrix products are few and large. Their number differs from
block to block and shapes cannot: it is rounded up to one of a few bucket sizes, each compiled once, and the keys of the
surplus blocks are masked. In the forward, what is more than ``AT_ONCE`` keys is computed in parts of so many:

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
from jaxtyping import Array, Float, Int

from ches_jax.models.attention.dense import KEPT, MASKED_SCORE, AttentionInputs, AttentionParams, capped, to_multiple
from ches_jax.models.attention.mask import KeyRanges, block_index, block_spans, padded, visible
from ches_jax.models.platform import platform
from ches_jax.models.precision import accumulate, einsum

BLOCK, ACCELERATOR_BLOCK = {"cpu": 64}, 128
"""Queries and keys of a block by platform, and elsewhere: what was fastest."""
KEYS = {"cpu": 32}
"""Keys of a block in the forward, where that is less: fewer of those that are computed are masked."""
AT_ONCE = 512
"""Keys whose scores are computed at once at most, in the forward: the scores of more do not fit in a CPU's cache, and
each number of blocks is a branch to compile. Measured with 2,048 and 256 too."""
SHORT_ROW, SMALLER = 1024, {"cpu": 32}
"""With a gradient, rows up to so long have smaller blocks: on a CPU 0.87 to 0.97 of the time of the others, forward
and backward together, with pairs of 100 to 700 tokens; 1.1 of it with pairs of 2,000. Forward alone gains nothing."""


class Static(NamedTuple):
    """What a program is compiled for."""

    block: int
    gradient_block: int
    params: AttentionParams

    @property
    def keys(self) -> int:
        """Keys of a block in the forward."""
        return min(self.block, KEYS.get(platform(), self.block))

    @property
    def with_gradient(self) -> "Static":
        """What a program with a gradient is compiled for."""
        return self._replace(block=self.gradient_block)


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
    static = _static(inputs, params, block)
    q, k, v, ranges, sinks = _whole_blocks(inputs, static.block)
    return cast(Array, _attend(q, k, v, ranges, sinks, static))[:, : inputs.q.shape[1]]


def forward_blocks(inputs: AttentionInputs, params: AttentionParams) -> Float[Array, "B Q K G H"]:
    """``blocks`` in forward mode: ``jax.jvp`` passes it, to any order; a backward pass would keep all scores."""
    static = _static(inputs, params).with_gradient
    return _forward(*_whole_blocks(inputs, static.block), static)[0][:, : inputs.q.shape[1]]


def _static(inputs: AttentionInputs, params: AttentionParams, block: int | None = None) -> Static:
    size = block or BLOCK.get(platform(), ACCELERATOR_BLOCK)
    short = block is None and inputs.k.shape[1] <= SHORT_ROW
    return Static(size, SMALLER.get(platform(), size) if short else size, params)


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
    return _forward(q, k, v, ranges, sinks, static.with_gradient)


def _forward(q, k, v, ranges, sinks, static: Static):
    # lax.map, not vmap: each row needs its own blocks, and a row is work enough for a device
    out, total = lax.map(partial(_row_forward, static, sinks), (q, k, v, ranges))
    out, total = checkpoint_name((out, total), KEPT)
    return out, (q, k, v, ranges, sinks, total)


def _backward(static: Static, kept, cotangent):
    q, k, v, ranges, sinks, total = kept
    dq, dk, dv, dsinks = lax.map(
        partial(_row_backward, static.with_gradient, sinks), (q, k, v, ranges, total, cotangent)
    )
    return dq, dk, dv, None, None if sinks is None else dsinks.sum(0).astype(sinks.dtype)


_attend.defvjp(_forward_with_gradient, _backward)


def _row_forward(
    static: Static, sinks: Array | None, row: tuple[Array, Array, Array, KeyRanges]
) -> tuple[Array, Array]:
    """Outputs of a row, [Q, K, G, H], and Z of each block's queries, [blocks, K, G block]."""
    q, k, v, ranges = row
    keys, values = (_key_blocks(a, static.keys) for a in (k, v))
    indices = _block_indices(ranges, len(k), static.block, static.keys)
    at_once = min(AT_ONCE // static.keys, keys.shape[1])

    def block(rows, args):
        at, ranges_i, kv_index, kv_count = args
        queries, params = _scaled(lax.dynamic_slice_in_dim(rows, at, static.block), static.params)
        (qi,) = _query_blocks(queries, static.block)

        def seen(index: Int[Array, " kv_blocks"], count: Int[Array, ""] | int) -> Part:
            """What the queries see in the first ``count`` of some blocks of keys."""
            ki, vi = (_take_blocks(a, index) for a in (keys, values))
            z = _scores(qi, ki, _bias(ranges_i, index, count, static.keys, qi.dtype), params)[0]
            top = lax.stop_gradient(z.max(-1, keepdims=True))  # outputs do not depend on it: for forward mode
            p = jnp.exp(z - top)
            return Part(top, p.sum(-1, keepdims=True), einsum("kqs,ksh->kqh", p.astype(v.dtype), vi))

        further = (kv_count - 1) // at_once
        first = kv_count - further * at_once
        part = _in_bucket(first, at_once, lambda size: seen(kv_index[:size], first))
        if at_once < keys.shape[1]:  # else XLA finds that the one slice depends on nothing, and computes it for all

            def with_more(step: Int[Array, ""], part: Part) -> Part:
                index = lax.dynamic_slice_in_dim(kv_index, first + step * at_once, at_once)
                return _joined(part, seen(index, at_once))

            part = lax.fori_loop(0, further, with_more, part)
        sink = _sink_scores(sinks, part.out)
        if sink is not None:
            part = _joined(part, _sink_part(sink, part))
        out = _query_rows((part.out / part.total).astype(q.dtype)[None], static.block)
        return lax.dynamic_update_slice_in_dim(rows, out, at, 0), (part.top + jnp.log(part.total))[..., 0]

    # outputs take the place of the queries they are of: arrays of their own would be filled with zeros first
    at = jnp.arange(0, len(q), static.block)
    return lax.scan(block, q, (at, _in_blocks(ranges, static.block), *indices))


def _row_backward(
    static: Static, sinks: Array | None, row: tuple[Array, Array, Array, KeyRanges, Array, Array]
) -> tuple[Array, ...]:
    """Gradients by the queries, keys and values of a row, and by the sinks."""
    q, k, v, ranges, total, cotangent = row
    acc = accumulate(q.dtype)
    q, params = _scaled(q, static.params)
    keys, values = (_key_blocks(a, static.block) for a in (k, v))
    indices = _block_indices(ranges, len(k), static.block, static.block)

    def block(carry, args):
        qi, gi, total_i, ranges_i, kv_index, kv_count = args

        def compute(size: int):
            ki, vi = (_take_blocks(a, kv_index[:size]) for a in (keys, values))
            z, cap_gradient = _scores(qi, ki, _bias(ranges_i, kv_index[:size], kv_count, static.block, q.dtype), params)
            p = jnp.exp(z - total_i[..., None])
            dp = einsum("kqh,ksh->kqs", gi, vi)
            mean = jnp.sum(p * dp, -1, keepdims=True)
            dz = p * (dp - mean) * cap_gradient
            sink = _sink_scores(sinks, z)
            dsink = 0 * mean if sink is None else -jnp.exp(sink - total_i[..., None]) * mean
            dz, p = dz.astype(q.dtype), p.astype(v.dtype)
            # [H, keys] with the smaller factor first: transposing the larger one is what would take long
            parts = einsum("kqh,kqs->khs", qi, dz), einsum("kqh,kqs->khs", gi, p)
            dq = einsum("kqs,ksh->kqh", dz, ki) * jnp.asarray(static.params.scale, acc)
            blocks_of = (_gradient_blocks(a, static.block, most) for a in parts)
            return dq.astype(q.dtype), dsink.reshape(*q.shape[1:3], -1).sum(-1), *blocks_of

        most = kv_index.shape[0]
        dq, dsink, *parts = _in_bucket(kv_count, most, compute)

        def add(step, sums):
            return tuple(s.at[kv_index[step]].add(part[step]) for s, part in zip(sums, parts, strict=True))

        return lax.fori_loop(0, kv_count, add, carry), (dq, dsink)

    start = jnp.zeros((keys.shape[1], keys.shape[0], keys.shape[3], static.block), acc)
    queries = (_query_blocks(a, static.block) for a in (q, cotangent))
    (dk, dv), (dq, dsinks) = lax.scan(
        block, (start, start), (*queries, total, _in_blocks(ranges, static.block), *indices)
    )
    transposed = (a.transpose(0, 3, 1, 2).reshape(k.shape) for a in (dk * jnp.asarray(params.scale, acc), dv))
    return _query_rows(dq, static.block), *(a.astype(k.dtype) for a in transposed), dsinks.sum(0)


def _block_indices(ranges: KeyRanges, count: int, queries: int, keys: int) -> BlockIndices:
    """What each block of a row's queries needs of ``count`` keys; indices past ``kv_num_blocks`` are of some block."""
    spans = jax.tree.map(lambda a: a[0], block_spans(jax.tree.map(lambda a: a[None], ranges), queries, keys))
    most = count // keys
    steps = jnp.arange(most, dtype=jnp.int32)[None]
    indices = block_index(jax.tree.map(lambda a: a[:, None], spans), steps)
    return BlockIndices(jnp.clip(indices, 0, most - 1), spans.num_blocks)


def _in_bucket(count: Int[Array, ""], most: int, compute: Callable[[int], Any]) -> Any:
    """``compute`` at the first bucket size of at least ``count`` blocks."""
    sizes = bucket_sizes(most)
    bucket = jnp.sum(jnp.asarray(sizes, count.dtype) < count)
    return lax.switch(bucket, [partial(compute, size) for size in sizes])


def _take_blocks(
    key_blocks: Float[Array, "K blocks block H"], kv_index: Int[Array, " kv_blocks"]
) -> Float[Array, "K keys H"]:
    """The keys of the blocks of ``kv_index``, one block after the other."""
    heads, _, _, width = key_blocks.shape
    return jnp.take(key_blocks, kv_index, axis=1).reshape(heads, -1, width)


def _bias(
    ranges: KeyRanges, kv_index: Int[Array, " kv_blocks"], kv_count: Int[Array, ""] | int, keys: int, dtype: DTypeLike
) -> Float[Array, "block keys"]:
    """Far below zero for keys that a query of a block does not see, as those past ``kv_count`` blocks; else 0.

    In a branch that is always taken, since XLA fuses none: it would compute the bias anew, from the ranges, for every
    head and use, which took five times as long as the exponentials.
    """
    shape, acc = (ranges.own_end.shape[0], len(kv_index) * keys), accumulate(dtype)

    def of_ranges() -> Array:
        steps = jnp.arange(len(kv_index), dtype=kv_index.dtype)
        key = kv_index[:, None] * keys + jnp.arange(keys, dtype=kv_index.dtype)[None]
        key = jnp.where(steps[:, None] < kv_count, key, -1)  # which no query sees
        mask = visible(jax.tree.map(lambda a: a[None], ranges), key.reshape(-1))[0]
        return jnp.where(mask, jnp.asarray(0, acc), jnp.asarray(MASKED_SCORE, acc))

    return lax.cond(ranges.own_end[0] > 0, of_ranges, lambda: jnp.zeros(shape, acc))


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
    bias: Float[Array, "block keys"],
    params: AttentionParams,
) -> tuple[Float[Array, "K group_queries keys"], Array]:
    """Scores, masked ones far below, and the derivative of the soft cap there (1 without one)."""
    acc, cap = accumulate(q.dtype), params.softcap
    z = capped(einsum("kqh,ksh->kqs", q, k) * jnp.asarray(params.scale, acc), cap)
    cap_gradient = jnp.ones((), acc) if cap is None else 1 - jnp.square(z / jnp.asarray(cap, acc))
    by_head = z.reshape(z.shape[0], -1, *bias.shape) + bias[None, None]
    return by_head.reshape(z.shape), cap_gradient


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


def _gradient_blocks(part: Float[Array, "K H keys"], block: int, most: int) -> Float[Array, "kv_blocks K H block"]:
    """The gradient of each gathered block, and zeros up to ``most`` of them."""
    kv, width, _ = part.shape
    cut = part.reshape(kv, width, -1, block).transpose(2, 0, 1, 3)
    return jnp.pad(cut, [(0, most - len(cut)), *[(0, 0)] * 3])
