"""Flash attention for TPUs as a Pallas kernel: no score ever leaves the core, blocks with nothing to see are skipped.

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

from ches_jax.models.attention.dense import HIDDEN_SCORE, capped, to_multiple
from ches_jax.models.attention.mask import BlockSpans, KeyRanges, block_spans, padded, visited
from ches_jax.models.precision import accumulate, matmul_precision

LANES = 128
KEYS = 256
"""Keys of a block."""
SCORE_COLUMNS = 1024
"""Queries of a block times the query heads of a key/value head, about."""


def _steps_kernel(*refs, keys: int, scale: float, softcap: float | None, precision: lax.Precision):
    """One step of the grid (row, key/value head, block of queries, visit)."""
    *span_refs, seen_ref, q_ref, k_ref, v_ref, out_ref, top_ref, total_ref, sum_ref = refs
    row, block, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    spans = BlockSpans(*(ref[row, block] for ref in span_refs))
    acc = sum_ref.dtype

    @pl.when(step == 0)
    def _():
        top_ref[...] = jnp.full(top_ref.shape, HIDDEN_SCORE, acc)
        total_ref[...] = jnp.zeros(total_ref.shape, acc)
        sum_ref[...] = jnp.zeros(sum_ref.shape, acc)

    @pl.when(step < spans.visits)
    def _():
        group, queries, head = q_ref.shape
        q = q_ref[...].reshape(group * queries, head)
        s = lax.dot_general(
            k_ref[...], q, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=acc
        )  # fmt: skip
        s = capped(s * jnp.asarray(scale, acc), softcap)
        here = visited(spans, step) * keys + lax.broadcasted_iota(jnp.int32, (keys, queries), 0)
        seen = KeyRanges(*(seen_ref[i : i + 1, :] for i in range(4)))
        mask = (here >= seen.context_start) & (here < seen.context_end)
        mask |= (here >= seen.own_start) & (here < seen.own_end)
        # every query head of the group sees the same
        hidden = jnp.where(mask, jnp.asarray(0, acc), jnp.asarray(HIDDEN_SCORE, acc))
        s += jnp.concatenate([hidden] * group, axis=1)
        new_top = jnp.maximum(top_ref[...], s.max(axis=0, keepdims=True))
        p = jnp.exp(s - new_top)
        keep = jnp.exp(top_ref[...] - new_top)
        new = lax.dot_general(
            v_ref[...], p.astype(v_ref.dtype), (((0,), (0,)), ((), ())), precision=precision,
            preferred_element_type=acc,
        )  # fmt: skip
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


def attend(
    q: Float[Array, "B Q K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    seen: KeyRanges,
    *,
    scale: float,
    softcap: float | None,
    interpret: bool = False,
) -> Float[Array, "B Q K G H"]:
    """Attention of any rows; lengths that are no multiples of the blocks are filled up."""
    count, group, head = q.shape[1], q.shape[3], q.shape[4]
    queries = query_block(group)
    q, k, v, seen = to_multiple(q, queries), to_multiple(k, KEYS), to_multiple(v, KEYS), padded(seen, queries)
    spans = block_spans(seen, queries, KEYS)
    rows, kv = q.shape[0], q.shape[2]
    acc = accumulate(q.dtype)

    def by_query(row, kv_head, block, step, *spans):
        return row, kv_head, 0, block, 0

    def by_key(row, kv_head, block, step, *spans):
        here = BlockSpans(*(ref[row, block] for ref in spans))
        # beyond the count the last block stays where it is: nothing is fetched
        return row, kv_head, visited(here, jnp.minimum(step, here.visits - 1)), 0

    key_block = pl.BlockSpec((None, None, KEYS, head), by_key)
    query_heads = pl.BlockSpec((None, None, group, queries, head), by_query)
    out = pl.pallas_call(
        partial(_steps_kernel, keys=KEYS, scale=scale, softcap=softcap, precision=matmul_precision(q.dtype)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(spans),
            grid=(rows, kv, q.shape[1] // queries, spans.visits.max()),
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
    )(*spans, jnp.stack(seen, axis=1), q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2))
    return out.transpose(0, 3, 1, 2, 4)[:, :count]
