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
all rows one after the other, and for each over the blocks of keys that it needs, one at a time: how many these are
differs from block to block, and shapes cannot. So each is compiled once. The forward carries the highest score so far,
``m``, the sum of ``exp(z - m)`` and that of ``exp(z - m) v``; a block whose highest score is higher has them weighed by
``exp(m - m')`` first. A sink is what it begins with.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ches_jax.models.attention.dense import (
    KEPT,
    MASKED_SCORE,
    Attend,
    AttentionInputs,
    AttentionParams,
    capped,
    to_multiple,
)
from ches_jax.models.attention.mask import BlockSpans, KeyRanges, SeenByBlock, block_index, seen_by_block, visible
from ches_jax.models.platform import platform
from ches_jax.models.precision import accumulate, einsum

BLOCK, ACCELERATOR_BLOCK = {"cpu": 64}, 128
"""Queries and keys of a block by platform, and elsewhere: what was fastest. On a CPU what two such blocks take is
little enough for XLA to give it to one thread, and larger ones are slower: dividing takes longer than computing."""


class Static(NamedTuple):
    """What a program is compiled for."""

    block: int
    params: AttentionParams
    differentiated: bool = False

    @property
    def with_gradient(self) -> "Static":
        """What a program with a gradient is compiled for."""
        return self._replace(differentiated=True)


class Sums(NamedTuple):
    """Of the keys so far: the highest score of each query, the sum of exp(z - top), that of exp(z - top) v."""

    top: Float[Array, "K group_queries 1"]
    total: Float[Array, "K group_queries 1"]
    out: Float[Array, "K group_queries H"]


def blocks(inputs: AttentionInputs, params: AttentionParams, block: int | None = None) -> Float[Array, "B Q K G H"]:
    """Attention in blocks of queries and keys; differentiable, no forward mode.

    Args:
      inputs: queries of any positions, in any order.
      params: scale and soft cap.
      block: queries and keys of a block; default: by the platform.
    """
    static = Static(block or _block(), params)
    return cast(Array, _attend(*_whole_blocks(inputs, static.block), static))[:, : inputs.q.shape[1]]


def forward_blocks(inputs: AttentionInputs, params: AttentionParams) -> Float[Array, "B Q K G H"]:
    """``blocks`` in forward mode: ``jax.jvp`` passes it, to any order; a backward pass would keep all scores."""
    static = Static(_block(), params, differentiated=True)
    out, _ = _forward(*_whole_blocks(inputs, static.block), static)
    return out.astype(inputs.q.dtype)[:, : inputs.q.shape[1]]


def _block() -> int:
    return BLOCK.get(platform(), ACCELERATOR_BLOCK)


def by_block(attend: Attend, ranges: KeyRanges) -> SeenByBlock | None:
    """The ranges as ``attend`` reads them, for ``AttentionInputs``; None where it does not compute in these blocks."""
    return seen_by_block(ranges, _block()) if attend in (blocks, forward_blocks) else None


def _whole_blocks(inputs: AttentionInputs, block: int) -> tuple[Array, Array, Array, SeenByBlock, Array | None]:
    """With padding to whole blocks of queries and keys."""
    q, k, v = (to_multiple(a, block) for a in inputs[:3])
    seen = inputs.by_block
    if seen is None or seen.ranges.shape[-1] != block:
        seen = seen_by_block(inputs.ranges, block)
    return q, k, v, seen, inputs.sinks


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, seen: SeenByBlock, sinks: Array | None, static: Static) -> Array:
    return _forward(q, k, v, seen, sinks, static)[0]


def _forward_with_gradient(q, k, v, seen, sinks, static: Static):
    out, total = _forward(q, k, v, seen, sinks, static.with_gradient)
    out, total = checkpoint_name((out, total), KEPT)
    return out.astype(q.dtype), (q, k, v, seen, sinks, total, out)


def _forward(q, k, v, seen, sinks, static: Static):
    """Outputs, where they are differentiated in the dtype of their sums, and Z."""
    out, total = _row_forward(static, sinks, *_one_row(q, k, v), seen)
    return out.reshape(q.shape), total


def _backward(static: Static, kept, cotangent):
    q, k, v, seen, sinks, total, out = kept
    row = _one_row(q, k, v)
    flat = (a.reshape(row[0].shape) for a in (out, cotangent))
    dq, dk, dv, dsinks = _row_backward(static.with_gradient, sinks, *row, seen, total, *flat)
    of_arrays = (d.reshape(a.shape) for d, a in ((dq, q), (dk, k), (dv, v)))
    return *of_arrays, None, None if sinks is None else dsinks.astype(sinks.dtype)


_attend.defvjp(_forward_with_gradient, _backward)


def _one_row(
    q: Float[Array, "B Q K G H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> tuple[Float[Array, "rows_q K G H"], Float[Array, "rows_t K H"], Float[Array, "rows_t K H"]]:
    """All rows one after the other, as one: no loop over rows is compiled."""
    q, k, v = (a.reshape(-1, *a.shape[2:]) for a in (q, k, v))
    return q, k, v


def _row_forward(
    static: Static, sinks: Array | None, q: Array, k: Array, v: Array, seen: SeenByBlock
) -> tuple[Array, Array]:
    """Outputs, [Q, K, G, H], and Z of each block's queries, [blocks, K, G block]."""
    acc, params = accumulate(q.dtype), _unscaled(q.dtype, static.params)
    keys, values = (_in_blocks(a, static.block) for a in (k, v))

    def block(rows, seen_i):
        qi = _scaled(_queries_at(rows, seen_i.at, static.block).astype(q.dtype), static.params)

        def with_block(step: Int[Array, ""], sums: Sums) -> Sums:
            index = block_index(seen_i.spans, step)
            ki, vi = (_block_at(a, seen_i.before + index) for a in (keys, values))
            z = _scores(qi, ki, _mask(seen_i.ranges, index), params)[0]
            # outputs do not depend on it: for forward mode
            top = lax.stop_gradient(jnp.maximum(sums.top, z.max(-1, keepdims=True)))
            before, p = jnp.exp(sums.top - top), jnp.exp(z - top)
            # a rounded weight would not be the one whose gradient the backward computes
            factors = (p, vi.astype(acc)) if static.differentiated else (p.astype(v.dtype), vi)
            total = before * sums.total + p.sum(-1, keepdims=True)
            return Sums(top, total, before * sums.out + einsum("kqs,ksh->kqh", *factors))

        sums = lax.fori_loop(0, seen_i.spans.num_blocks, with_block, _nothing_seen(qi, sinks))
        rows = _with_queries(rows, seen_i.at, sums.out / sums.total)
        return rows, (sums.top + jnp.log(sums.total))[..., 0]

    # outputs take the place of the queries they are of: arrays of their own would be filled with zeros first
    outputs = q.astype(acc) if static.differentiated else q
    return lax.scan(block, outputs, _each(seen, keys))


def _row_backward(
    static: Static,
    sinks: Array | None,
    q: Array,
    k: Array,
    v: Array,
    seen: SeenByBlock,
    total: Array,
    out: Array,
    cotangent: Array,
) -> tuple[Array, ...]:
    """Gradients by queries, keys and values, and by the sinks (zero without any)."""
    acc, params = accumulate(q.dtype), _unscaled(q.dtype, static.params)
    keys, values = (_in_blocks(a, static.block) for a in (k, v))
    mean = jnp.sum(out * cotangent.astype(acc), -1, keepdims=True)

    def block(carry, args):
        rows, *by_keys = carry
        total_i, seen_i = args
        taken, gi, mean_i = (_queries_at(a, seen_i.at, static.block) for a in (rows, cotangent, mean))
        qi = _scaled(taken, static.params)

        def with_block(step: Int[Array, ""], sums: tuple[Array, ...]) -> tuple[Array, ...]:
            dq, *by_keys = sums
            index = block_index(seen_i.spans, step)
            ki, vi = (_block_at(a, seen_i.before + index) for a in (keys, values))
            z, cap_gradient = _scores(qi, ki, _mask(seen_i.ranges, index), params)
            p = jnp.exp(z - total_i)
            dz = p * (einsum("kqh,ksh->kqs", gi, vi) - mean_i) * cap_gradient
            parts = einsum("kqs,kqh->skh", dz, qi.astype(acc)), einsum("kqs,kqh->skh", p, gi.astype(acc))
            at = seen_i.before + index
            by_keys = [_added(a, at, part) for a, part in zip(by_keys, parts, strict=True)]
            return dq + einsum("kqs,ksh->kqh", dz, ki.astype(acc)), *by_keys

        zero = jnp.zeros(qi.shape, acc)
        dq, *by_keys = lax.fori_loop(0, seen_i.spans.num_blocks, with_block, (zero, *by_keys))
        dq = dq * jnp.asarray(static.params.scale, acc)
        sink = _sink_scores(sinks, dq)
        dsink = [] if sink is None else [-jnp.exp(sink - total_i) * mean_i]
        dsinks = tuple(d.reshape(*q.shape[1:3], -1).sum(-1) for d in dsink)
        return (_with_queries(rows, seen_i.at, dq), *by_keys), dsinks

    start = jnp.zeros(keys.shape, acc)
    # gradients take the place of the queries, as outputs do
    (dq, dk, dv), dsinks = lax.scan(block, (q, start, start), (total[..., None], _each(seen, keys)))
    by_arrays = (a.reshape(k.shape).astype(k.dtype) for a in (dk * jnp.asarray(params.scale, acc), dv))
    return dq, *by_arrays, dsinks[0].sum(0) if dsinks else jnp.zeros(q.shape[1:3], acc)


class _Seen(NamedTuple):
    """What one block of queries sees; of all of them with a leading axis."""

    ranges: Int[Array, "4 block"]
    """``KeyRanges``."""
    numbers: Int[Array, "6"]
    """``BlockSpans``, and what follows: all in one array, since each would be cut out by a program of its own."""

    @property
    def spans(self) -> BlockSpans:
        return BlockSpans(*self.numbers[:4])

    @property
    def before(self) -> Int[Array, ""]:
        """How many blocks of keys the rows before its own have."""
        return self.numbers[4]

    @property
    def at(self) -> Int[Array, ""]:
        """Where its queries begin, among those of all rows."""
        return self.numbers[5]


def _each(seen: SeenByBlock, key_blocks: Float[Array, "blocks block K H"]) -> _Seen:
    """Of the blocks of all rows, one after the other."""
    rows, blocks_of_row = seen.spans.shape[:2]
    before = len(key_blocks) // rows * jnp.arange(rows, dtype=jnp.int32)[:, None, None]
    at = seen.ranges.shape[-1] * jnp.arange(rows * blocks_of_row, dtype=jnp.int32).reshape(rows, blocks_of_row, 1)
    numbers = jnp.concatenate([seen.spans, jnp.broadcast_to(before, at.shape), at], axis=-1)
    return _Seen(*(a.reshape(-1, *a.shape[2:]) for a in (seen.ranges, numbers)))


def _block_at(key_blocks: Float[Array, "blocks block K H"], index: Int[Array, ""]) -> Float[Array, "K block H"]:
    """One block, as a slice: XLA divides a gather among a CPU's threads, which takes ten times as long as the copy."""
    one = lax.dynamic_index_in_dim(key_blocks, index, 0, keepdims=False, allow_negative_indices=False)
    return one.transpose(1, 0, 2)


def _added(
    blocks: Float[Array, "blocks block K H"], index: Int[Array, ""], part: Float[Array, "block K H"]
) -> Float[Array, "blocks block K H"]:
    """With ``part`` added to one block; ``at[index].add`` would compute whether there is such a block."""
    own = lax.dynamic_index_in_dim(blocks, index, 0, keepdims=False, allow_negative_indices=False)
    return lax.dynamic_update_index_in_dim(blocks, own + part, index, 0, allow_negative_indices=False)


def _mask(ranges: Int[Array, "4 block"], index: Int[Array, ""]) -> Bool[Array, "block block"]:
    """Whether each query of a block sees each key of the block at ``index`` of its row.

    In a branch that is always taken, since XLA fuses none: it would compute the mask anew, from the ranges, for every
    head and use, which took five times as long as the exponentials.
    """
    block = ranges.shape[1]

    def of_ranges(ranges: Int[Array, "4 block"]) -> Array:
        key = index * block + jnp.arange(block, dtype=index.dtype)
        return visible(KeyRanges(*ranges[:, None]), key)[0]

    return lax.cond(index >= 0, of_ranges, lambda _: jnp.zeros((block, block), bool), ranges)


def _scaled(q: Float[Array, "K group_queries H"], params: AttentionParams) -> Float[Array, "K group_queries H"]:
    """Queries with the scale of their scores, which are many more, where ``_unscaled`` leaves it out."""
    return q if q.dtype != accumulate(q.dtype) else q * jnp.asarray(params.scale, q.dtype)


def _unscaled(dtype: jnp.dtype, params: AttentionParams) -> AttentionParams:
    """What scores of ``_scaled`` queries are made with: a scale of 1, but in a dtype narrower than that of the scores.

    There the product would be rounded.
    """
    return params if dtype != accumulate(dtype) else params._replace(scale=1.0)


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


def _nothing_seen(q: Float[Array, "K group_queries H"], sinks: Array | None) -> Sums:
    """What queries begin with: the sink, as a key whose value is zero, or nothing."""
    acc = accumulate(q.dtype)
    out, sink = jnp.zeros(q.shape, acc), _sink_scores(sinks, q.astype(acc))
    if sink is None:
        top = jnp.full((*q.shape[:2], 1), MASKED_SCORE, acc)
        return Sums(top, jnp.zeros_like(top), out)
    top = lax.stop_gradient(jnp.broadcast_to(sink, (*q.shape[:2], 1)))
    return Sums(top, jnp.exp(sink - top), out)


def _sink_scores(sinks: Array | None, z: Float[Array, "K group_queries keys"]) -> Array | None:
    """The sink of each query's head, in the rank and dtype of the scores."""
    if sinks is None:
        return None
    return jnp.repeat(sinks.astype(z.dtype), z.shape[1] // sinks.shape[1], axis=1)[..., None]


def _in_blocks(a: Any, block: int) -> Any:
    """[Q, ...] to [blocks, block, ...], of every array."""
    return jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), a)


def _queries_at(rows: Float[Array, "Q K G H"], at: Int[Array, ""], block: int) -> Float[Array, "K group_queries H"]:
    """A block of queries with heads first; ``group_queries`` are those of each head of the group, head by head."""
    cut = lax.dynamic_slice_in_dim(rows, at, block, allow_negative_indices=False)
    return cut.transpose(1, 2, 0, 3).reshape(cut.shape[1], -1, cut.shape[-1])


def _with_queries(
    rows: Float[Array, "Q K G H"], at: Int[Array, ""], of_block: Float[Array, "K group_queries H"]
) -> Float[Array, "Q K G H"]:
    """The rows with those of a block, in the form of ``_queries_at``, in their place."""
    heads, _, width = of_block.shape
    own = of_block.reshape(heads, rows.shape[2], -1, width).transpose(2, 0, 1, 3).astype(rows.dtype)
    return lax.dynamic_update_slice_in_dim(rows, own, at, 0, allow_negative_indices=False)
