"""Flash attention for TPUs as a Pallas kernel that skips blocks in which no query sees a key.

No score ever leaves the core.

One step of the grid is one block of keys for one block of queries of one key/value head, all its query heads together.
Which block comes at which step is in four integers per block of queries (``BlockSpans``), prefetched as scalars: steps
beyond a block's count fetch nothing and compute nothing, and no block takes more steps than the longest one needs.

Scores are held as [keys, queries]: what belongs to a query (its ranges, running maximum and total) is then a row that
broadcasts down, and the sums of the softmax go down too, which is the cheap direction on a TPU.

Forward only. float32 and bfloat16; other dtypes only when interpreted.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from ches_jax.models.attention.dense import MASKED_SCORE, AttentionInputs, AttentionParams, capped, to_multiple
from ches_jax.models.attention.mask import BlockSpans, KeyRanges, block_index, block_spans, padded
from ches_jax.models.precision import accumulate, matmul_precision

LANES = 128
KEYS = 256
"""Keys of a block."""
SCORE_COLUMNS = 1024
"""Queries of a block times the query heads of a key/value head, about."""


def _steps_kernel(*refs, keys: int, params: AttentionParams, precision: lax.Precision):
    """One step of the grid (row, key/value head, block of queries, block of keys)."""
    *span_refs, ranges_ref, q_ref, k_ref, v_ref, out_ref, top_ref, total_ref, sum_ref = refs
    row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    spans = BlockSpans(*(ref[row, block] for ref in span_refs))
    acc = sum_ref.dtype

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, MASKED_SCORE, acc)
        total_ref[...] = jnp.zeros(total_ref.shape, acc)
        sum_ref[...] = jnp.zeros(sum_ref.shape, acc)

    @pl.when(step < spans.num_blocks)
    def _():
        group, queries, head = q_ref.shape
        q = q_ref[...].reshape(group * queries, head)
        s = lax.dot_general(k_ref[...], q, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=acc)
        s = capped(s * jnp.asarray(params.scale, acc), params.softcap)
        index = block_index(spans, step) * keys + lax.broadcasted_iota(jnp.int32, (keys, queries), 0)
        ranges = KeyRanges(*(ranges_ref[i : i + 1, :] for i in range(4)))
        mask = (index >= ranges.context_start) & (index < ranges.context_end)
        mask |= (index >= ranges.own_start) & (index < ranges.own_end)
        # every query head of the group sees the same
        bias = jnp.where(mask, jnp.asarray(0, acc), jnp.asarray(MASKED_SCORE, acc))
        s += jnp.concatenate([bias] * group, axis=1)
        new_top = jnp.maximum(top_ref[...], s.max(axis=0, keepdims=True))
        p = jnp.exp(s - new_top)
        keep = jnp.exp(top_ref[...] - new_top)
        new = lax.dot_general(
            v_ref[...],
            p.astype(v_ref.dtype),
            (((0,), (0,)), ((), ())),
            precision=precision,
            preferred_element_type=acc,
        )
        top_ref[...] = new_top
        total_ref[...] = total_ref[...] * keep + p.sum(axis=0, keepdims=True)
        sum_ref[...] = sum_ref[...] * keep + new

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        out = (sum_ref[...] / total_ref[...]).T
        out_ref[...] = out.reshape(out_ref.shape).astype(out_ref.dtype)


def query_block(group: int) -> int:
    """Queries of a block: so many that a key/value head's query heads make about ``SCORE_COLUMNS`` columns."""
    return max(LANES, min(512, SCORE_COLUMNS // group // LANES * LANES))


def attend(inputs: AttentionInputs, params: AttentionParams, interpret: bool = False) -> Float[Array, "B Q K G H"]:
    """Attention of any rows; lengths that are no multiples of the blocks are padded.

    Args:
      inputs: queries of any positions, in any order.
      params: scale and soft cap.
      interpret: emulate the kernel on the device at hand, which is slow.
    """
    q, k, v, ranges, _ = inputs
    count, group, head = q.shape[1], q.shape[3], q.shape[4]
    queries = query_block(group)
    q, k, v, ranges = to_multiple(q, queries), to_multiple(k, KEYS), to_multiple(v, KEYS), padded(ranges, queries)
    spans = block_spans(ranges, queries, KEYS)
    rows, kv = q.shape[0], q.shape[2]
    acc = accumulate(q.dtype)

    def by_query(row, kv_head, block, step, *spans):
        return row, kv_head, 0, block, 0

    def by_key(row, kv_head, block, step, *spans):
        of_block = BlockSpans(*(ref[row, block] for ref in spans))
        # beyond the count the last block stays where it is: nothing is fetched
        return row, kv_head, block_index(of_block, jnp.minimum(step, of_block.num_blocks - 1)), 0

    key_block = pl.BlockSpec((None, None, KEYS, head), by_key)
    query_heads = pl.BlockSpec((None, None, group, queries, head), by_query)
    out = pl.pallas_call(
        partial(_steps_kernel, keys=KEYS, params=params, precision=matmul_precision(q.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(spans),
            grid=(rows, kv, q.shape[1] // queries, spans.num_blocks.max()),
            in_specs=[
                pl.BlockSpec((None, 4, queries), lambda row, kv_head, block, step, *spans: (row, 0, block)),
                query_heads,
                key_block,
                key_block,
            ],
            out_specs=query_heads,
            scratch_shapes=[
                pltpu.VMEM((1, group * queries), acc),
                pltpu.VMEM((1, group * queries), acc),
                pltpu.VMEM((head, group * queries), acc),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((rows, kv, group, q.shape[1], head), q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="visible_ranges_attention",
    )(*spans, jnp.stack(ranges, axis=1), q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2))
    return out.transpose(0, 3, 1, 2, 4)[:, :count]
