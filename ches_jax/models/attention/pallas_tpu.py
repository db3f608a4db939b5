r"""Flash attention for TPUs as Pallas kernels that skip blocks in which no query sees a key, forward and backward.

No score ever leaves the core. The equations are those of ``block_sparse``: the forward keeps ``Z`` of each query where
a gradient is taken, the backward computes the scores again, in two kernels,

    queries    dq, and before it  m_q = sum_t p_qt g_q . v_t,  summed from the terms that it is taken from: the
               gradients by a query's scores then add up to zero, as they must
    keys       dk and dv

One step of a grid is one block of keys and one block of queries of one key/value head, all its query heads together.
Which block comes at which step is in a few integers per block (``BlockSpans``, ``Seen``), prefetched as scalars: steps
beyond a block's count fetch nothing and compute nothing, and no block takes more steps than the longest one needs.

Scores are held as [keys, queries]: what belongs to a query (its ranges, running maximum and total) is then a row that
broadcasts down, and the sums of the softmax go down too, which is the cheap direction on a TPU.

float32 and bfloat16; other dtypes only when interpreted.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from ches_jax.models.attention.dense import KEPT, MASKED_SCORE, AttentionInputs, AttentionParams, capped, to_multiple
from ches_jax.models.attention.mask import BlockSpans, KeyRanges, block_index, block_spans, padded
from ches_jax.models.precision import accumulate, matmul_precision

LANES = 128
KEYS = 256
"""Keys of a block, of half as many where a block of queries is a wide one."""
SCORE_COLUMNS = 1024
"""Queries of a block times the query heads of a key/value head, about."""
WIDE = 2048
LARGE_BLOCK = 2**20
"""Bytes of a block of queries from which the kernels get more of a core's memory than the 16 MiB of the compiler's
default: in float32 the gradient takes 20.1 MiB with 32 query heads of 128 channels on v5e, and 16.4 MiB with 2 of
256 channels on v5p."""
VMEM = 2**25


class Static(NamedTuple):
    """What a program is compiled for."""

    params: AttentionParams
    queries: int
    """Of a block."""
    keys: int
    """Of a block."""
    interpret: bool


class Seen(NamedTuple):
    """For each block of keys the blocks of queries between the first and the last one that sees a key of it."""

    first: Int[Array, "B key_blocks"]
    blocks: Int[Array, "B key_blocks"]


def query_block(group: int) -> int:
    """Queries of a block: so many that a key/value head's query heads make about ``SCORE_COLUMNS`` columns."""
    return max(LANES, min(512, SCORE_COLUMNS // group // LANES * LANES))


def attend(inputs: AttentionInputs, params: AttentionParams, interpret: bool = False) -> Float[Array, "B Q K G H"]:
    """Attention of any rows; differentiable, no forward mode. Lengths that are no multiples of the blocks are padded.

    Args:
      inputs: queries of any positions, in any order.
      params: scale and soft cap.
      interpret: emulate the kernels on the device at hand, which is slow.
    """
    q, k, v, ranges, *_ = inputs
    queries = query_block(q.shape[3])
    keys = KEYS if queries * q.shape[3] <= WIDE else KEYS // 2
    static = Static(params, queries, keys, interpret)
    whole_blocks = to_multiple(q, queries), to_multiple(k, keys), to_multiple(v, keys)
    # heads first: a block of queries is then one piece of memory
    q_heads, k_heads, v_heads = (jnp.moveaxis(a, 1, -2) for a in whole_blocks)
    out: Array = _attend(q_heads, k_heads, v_heads, padded(ranges, queries), static)
    return jnp.moveaxis(out, -2, 1)[:, : q.shape[1]]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, ranges: KeyRanges, static: Static) -> Array:
    return _forward(q, k, v, ranges, static, keep=False)[0]


def _forward_kept(q: Array, k: Array, v: Array, ranges: KeyRanges, static: Static) -> tuple[Array, Any]:
    out, total = checkpoint_name(tuple(_forward(q, k, v, ranges, static, keep=True)), KEPT)
    return out, (q, k, v, ranges, total)


def _backward(static: Static, kept: Any, cotangent: Array) -> tuple[Array | None, ...]:
    q, k, v, ranges, total = kept
    dq, mean = _query_gradients(q, k, v, ranges, total, cotangent, static)
    dk, dv = _key_gradients(q, k, v, ranges, total, mean, cotangent, static)
    return dq, dk, dv, None


_attend.defvjp(_forward_kept, _backward)


def _forward(
    q: Float[Array, "B K G Q H"], k: Float[Array, "B K T H"], v: Float[Array, "B K T H"], ranges: KeyRanges,
    static: Static, *, keep: bool,
) -> Sequence[Array]:  # fmt: skip
    """Outputs like the queries, and with ``keep`` their ``Z``, [B, K, blocks, 1, G block]."""
    call = _Call(q, k, ranges, static)
    columns = q.shape[2] * static.queries
    acc = call.acc
    return call.run(
        partial(_forward_kernel, params=static.params, keep=keep),
        (call.rows, call.heads, call.query_blocks, call.spans.num_blocks.max()),
        call.spans,
        [call.ranges_by(_block), call.queries_by(_block), *[call.keys_by(_key_block)] * 2],
        [call.queries_by(_block), *[call.columns_by(_block)] * keep],
        [q, *[call.columns_like()] * keep],
        [pltpu.VMEM((1, columns), acc), pltpu.VMEM((1, columns), acc), pltpu.VMEM((q.shape[-1], columns), acc)],
        [call.stacked_ranges, q, k, v],
    )


def _query_gradients(q, k, v, ranges, total, cotangent, static: Static) -> Sequence[Array]:
    """Of the queries, and m of each."""
    call = _Call(q, k, ranges, static)
    columns = q.shape[2] * static.queries
    by_block = call.columns_by(_block)
    return call.run(
        partial(_query_kernel, params=static.params),
        (call.rows, call.heads, call.query_blocks, 2, call.spans.num_blocks.max()),
        call.spans,
        [call.ranges_by(_block), call.queries_by(_block), *[call.keys_by(_key_block)] * 2,
         call.queries_by(_block), by_block],
        [call.queries_by(_block), by_block],
        [q, call.columns_like()],
        [pltpu.VMEM((q.shape[-1], columns), call.acc)],
        [call.stacked_ranges, q, k, v, cotangent, total],
    )  # fmt: skip


def _key_gradients(q, k, v, ranges, total, mean, cotangent, static: Static) -> Sequence[Array]:
    """Of the keys and of the values."""
    call = _Call(q, k, ranges, static)
    key_blocks = k.shape[2] // static.keys
    seen = _seen(call.spans, key_blocks)
    by_block, shape = call.columns_by(_query_block), (static.keys, k.shape[-1])
    return call.run(
        partial(_key_kernel, params=static.params),
        (call.rows, call.heads, key_blocks, jnp.maximum(seen.blocks.max(), 1)),
        (*call.spans, *seen),
        [call.ranges_by(_query_block), call.queries_by(_query_block), *[call.keys_by(_block)] * 2,
         call.queries_by(_query_block), by_block, by_block],
        [call.keys_by(_block)] * 2,
        [k, v],
        [pltpu.VMEM(shape, call.acc), pltpu.VMEM(shape, call.acc)],
        [call.stacked_ranges, q, k, v, cotangent, total, mean],
    )  # fmt: skip


class _Call:
    """What the calls of the three kernels have in common: how arrays are cut into blocks."""

    def __init__(self, q: Array, k: Array, ranges: KeyRanges, static: Static):
        self.static = static
        self.rows, self.heads, self.group, count, self.width = q.shape
        self.query_blocks = count // static.queries
        self.spans = block_spans(ranges, static.queries, static.keys)
        self.stacked_ranges = jnp.stack(ranges, axis=1)
        self.acc, self.itemsize = accumulate(q.dtype), q.dtype.itemsize

    def columns_like(self) -> jax.ShapeDtypeStruct:
        """One number a query and head, as rows of the blocks of scores."""
        shape = self.rows, self.heads, self.query_blocks, 1, self.group * self.static.queries
        return jax.ShapeDtypeStruct(shape, self.acc)

    def ranges_by(self, index: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, 4, self.static.queries), lambda row, _, *at: (row, 0, index(row, *at)))

    def queries_by(self, index: Any) -> pl.BlockSpec:
        shape = (None, None, self.group, self.static.queries, self.width)
        return pl.BlockSpec(shape, lambda row, head, *at: (row, head, 0, index(row, *at), 0))

    def keys_by(self, index: Any) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, self.static.keys, self.width), lambda row, head, *at: (row, head, index(row, *at), 0)
        )

    def columns_by(self, index: Any) -> pl.BlockSpec:
        shape = (None, None, None, 1, self.group * self.static.queries)
        return pl.BlockSpec(shape, lambda row, head, *at: (row, head, index(row, *at), 0, 0))

    @property
    def memory(self) -> int | None:
        """Bytes of a core's memory that a kernel may take; None: the compiler's default."""
        block = self.group * self.static.queries * self.width * self.itemsize
        return VMEM if block >= LARGE_BLOCK else None

    def run(self, kernel, grid, scalars, in_specs, out_specs, like, scratch, arrays) -> Sequence[Array]:
        return pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars), grid=grid, in_specs=in_specs, out_specs=out_specs,
                scratch_shapes=scratch,
            ),
            out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in like],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3),
                vmem_limit_bytes=self.memory,
            ),
            interpret=self.static.interpret,
            name="visible_ranges_attention",
        )(*scalars, *arrays)  # fmt: skip


def _block(row: Any, block: Any, *_: Any) -> Any:
    """The block that the grid says."""
    return block


def _key_block(row: Any, block: Any, *rest: Any) -> Any:
    """The block of keys of a step; beyond the count the last one stays where it is, and nothing is fetched."""
    step, spans = rest[-len(BlockSpans._fields) - 1], _of(BlockSpans, rest[-len(BlockSpans._fields) :], row, block)
    return block_index(spans, jnp.minimum(step, spans.num_blocks - 1))


def _query_block(row: Any, block: Any, step: Any, *scalars: Any) -> Any:
    """The block of queries of a step, the same way."""
    seen = _of(Seen, scalars[len(BlockSpans._fields) :], row, block)
    return seen.first + jnp.clip(step, 0, jnp.maximum(seen.blocks - 1, 0))


def _of(kind: Any, scalars: Sequence[Any], row: Any, block: Any) -> Any:
    return kind(*(ref[row, block] for ref in scalars))


def _holds(spans: BlockSpans, block: Any) -> Any:
    """Whether a block of keys is one of those that a block of queries needs."""
    of_context = (block >= spans.context_first) & (block < spans.context_first + spans.context_count)
    return of_context | ((block >= spans.own_first) & (block < spans.own_first + spans.own_count))


def _seen(spans: BlockSpans, key_blocks: int) -> Seen:
    """The blocks of queries from the first to the last one that needs each block of keys.

    >>> one = BlockSpans(*(jnp.array([a]) for a in ([0, 0], [0, 1], [0, 2], [1, 1])))
    >>> [a.tolist() for a in _seen(one, 4)]
    [[[0, 0, 1, 0]], [[2, 0, 1, 0]]]
    """
    needed = _holds(BlockSpans(*(a[:, None] for a in spans)), jnp.arange(key_blocks, dtype=jnp.int32)[None, :, None])
    first, last = (jnp.argmax(a, axis=-1).astype(jnp.int32) for a in (needed, needed[..., ::-1]))
    count = jnp.where(needed.any(-1), needed.shape[-1] - last - first, 0)
    return Seen(first, count.astype(jnp.int32))


def _product(a: Array, b: Array, axes: tuple[int, int], acc: Any) -> Array:
    """The matrix product that sums over these axes of its factors."""
    contracted = (((axes[0],), (axes[1],)), ((), ()))
    return lax.dot_general(a, b, contracted, precision=matmul_precision(a.dtype), preferred_element_type=acc)


def _flat(ref: Any) -> Array:
    """The queries of all heads of a block, head by head."""
    group, queries, width = ref.shape
    return ref[...].reshape(group * queries, width)


def _scores(q: Array, k: Array, ranges_ref: Any, first_key: Any, params: AttentionParams, acc: Any) -> tuple[Any, Any]:
    """Scores, [keys, queries of all heads], masked ones far below, and the derivative of the soft cap there."""
    keys, queries = k.shape[0], ranges_ref.shape[1]
    s = capped(_product(k, q, (1, 1), acc) * jnp.asarray(params.scale, acc), params.softcap)
    slope = None if params.softcap is None else 1 - jnp.square(s / jnp.asarray(params.softcap, acc))
    index = first_key + lax.broadcasted_iota(jnp.int32, (keys, queries), 0)
    ranges = KeyRanges(*(ranges_ref[i : i + 1, :] for i in range(4)))
    mask = (index >= ranges.context_start) & (index < ranges.context_end)
    mask |= (index >= ranges.own_start) & (index < ranges.own_end)
    bias = jnp.where(mask, jnp.asarray(0, acc), jnp.asarray(MASKED_SCORE, acc))
    # every query head of the group sees the same
    return s + jnp.concatenate([bias] * (q.shape[0] // queries), axis=1), slope


def _forward_kernel(*refs: Any, params: AttentionParams, keep: bool) -> None:
    """One step of the grid (row, key/value head, block of queries, block of keys)."""
    *span_refs, ranges_ref, q_ref, k_ref, v_ref, out_ref = refs[: len(refs) - 3 - keep]
    *kept, top_ref, total_ref, sum_ref = refs[len(refs) - 3 - keep :]
    row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    spans = _of(BlockSpans, span_refs, row, block)
    acc = sum_ref.dtype

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, MASKED_SCORE, acc)
        total_ref[...] = jnp.zeros(total_ref.shape, acc)
        sum_ref[...] = jnp.zeros(sum_ref.shape, acc)

    @pl.when(step < spans.num_blocks)
    def _():
        s, _ = _scores(_flat(q_ref), k_ref[...], ranges_ref, block_index(spans, step) * k_ref.shape[0], params, acc)
        new_top = jnp.maximum(top_ref[...], s.max(axis=0, keepdims=True))
        p = jnp.exp(s - new_top)
        fade = jnp.exp(top_ref[...] - new_top)
        top_ref[...] = new_top
        total_ref[...] = total_ref[...] * fade + p.sum(axis=0, keepdims=True)
        sum_ref[...] = sum_ref[...] * fade + _product(v_ref[...], p.astype(v_ref.dtype), (0, 0), acc)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        out = (sum_ref[...] / total_ref[...]).T
        out_ref[...] = out.reshape(out_ref.shape).astype(out_ref.dtype)
        for ref in kept:
            ref[...] = top_ref[...] + jnp.log(total_ref[...])


def _gradients_of_scores(
    q: Array, k: Array, v: Array, g: Array, ranges_ref: Any, total: Array, first_key: Any, params: AttentionParams,
    acc: Any,
) -> tuple[Array, Array, Any]:  # fmt: skip
    """Weights p, their gradients g . v, and the derivative of the soft cap (1 without one), all [keys, queries]."""
    s, slope = _scores(q, k, ranges_ref, first_key, params, acc)
    return jnp.exp(s - total), _product(v, g, (1, 1), acc), 1 if slope is None else slope


def _query_kernel(*refs: Any, params: AttentionParams) -> None:
    """One step of the grid (row, key/value head, block of queries, m or dq, block of keys)."""
    *span_refs, ranges_ref, q_ref, k_ref, v_ref, g_ref, total_ref, dq_ref, mean_ref, sum_ref = refs
    row, block, phase, step = (pl.program_id(i) for i in (0, 2, 3, 4))
    spans = _of(BlockSpans, span_refs, row, block)
    acc = sum_ref.dtype

    @pl.when((phase == 0) & (step == 0))
    def _():
        mean_ref[...] = jnp.zeros(mean_ref.shape, acc)
        sum_ref[...] = jnp.zeros(sum_ref.shape, acc)

    @pl.when(step < spans.num_blocks)
    def _():
        k, first_key = k_ref[...], block_index(spans, step) * k_ref.shape[0]
        p, dp, slope = _gradients_of_scores(
            _flat(q_ref), k, v_ref[...], _flat(g_ref), ranges_ref, total_ref[...], first_key, params, acc
        )

        @pl.when(phase == 0)
        def _():
            mean_ref[...] += (p * dp).sum(axis=0, keepdims=True)

        @pl.when(phase == 1)
        def _():
            dz = p * (dp - mean_ref[...]) * slope
            sum_ref[...] += _product(k, dz.astype(k.dtype), (0, 0), acc)

    @pl.when((phase == 1) & (step == pl.num_programs(4) - 1))
    def _():
        dq = (sum_ref[...] * jnp.asarray(params.scale, acc)).T
        dq_ref[...] = dq.reshape(dq_ref.shape).astype(dq_ref.dtype)


def _key_kernel(*refs: Any, params: AttentionParams) -> None:
    """One step of the grid (row, key/value head, block of keys, block of queries)."""
    *scalars, ranges_ref, q_ref, k_ref, v_ref, g_ref, total_ref, mean_ref, dk_ref, dv_ref, k_sum_ref, v_sum_ref = refs
    row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    acc = k_sum_ref.dtype
    of_queries = _query_block(row, block, step, *scalars)
    seen = _of(Seen, scalars[len(BlockSpans._fields) :], row, block)
    spans = _of(BlockSpans, scalars[: len(BlockSpans._fields)], row, of_queries)

    @pl.when(step == 0)
    def _():
        k_sum_ref[...] = jnp.zeros(k_sum_ref.shape, acc)
        v_sum_ref[...] = jnp.zeros(v_sum_ref.shape, acc)

    @pl.when((step < seen.blocks) & _holds(spans, block))
    def _():
        q, g = _flat(q_ref), _flat(g_ref)
        p, dp, slope = _gradients_of_scores(
            q, k_ref[...], v_ref[...], g, ranges_ref, total_ref[...], block * k_ref.shape[0], params, acc
        )
        dz = p * (dp - mean_ref[...]) * slope
        k_sum_ref[...] += _product(dz.astype(q.dtype), q, (1, 0), acc)
        v_sum_ref[...] += _product(p.astype(g.dtype), g, (1, 0), acc)

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        dk_ref[...] = (k_sum_ref[...] * jnp.asarray(params.scale, acc)).astype(dk_ref.dtype)
        dv_ref[...] = v_sum_ref[...].astype(dv_ref.dtype)
