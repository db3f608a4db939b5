"""Flash attention for NVIDIA GPUs as a Pallas kernel (lowered by Triton) that skips blocks where no query sees a key.

One program is one block of queries of one query head of one row. It walks over the blocks of keys that its queries see
(``BlockSpans``: two runs), and keeps running maximum, total and sum in registers.

Forward only. float32 (full precision, not TF32), bfloat16 and float16, float64 only when interpreted; heads of up to
256 channels.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from ches_jax.models.attention.dense import MASKED_SCORE, AttentionInputs, AttentionParams, capped, to_multiple
from ches_jax.models.attention.mask import BlockSpans, KeyRanges, block_index, block_spans, padded, visible
from ches_jax.models.precision import accumulate, matmul_precision

WARPS, STAGES = 8, 2


def tile(width: int, itemsize: int) -> tuple[int, int]:
    """(queries, keys) of a tile for heads padded to ``width``.

    The largest powers of two that, compiled for compute capabilities 8.0 and 9.0, keep everything in registers and need
    less than 100 KB of shared memory.
    """
    smaller = int(width > 128) + int(itemsize > 2)
    return 128 >> smaller, 64 >> smaller


def _program(spans_ref, ranges_ref, q_ref, k_ref, v_ref, out_ref, *, keys: int, head: int, params: AttentionParams):
    """One block of queries against its blocks of keys; q, k and v are padded to a power of two along ``head``."""
    queries, width = q_ref.shape
    acc, precision = accumulate(q_ref.dtype), matmul_precision(q_ref.dtype)
    real = (jnp.arange(width, dtype=jnp.int32) < head)[None, :]
    q = plgpu.load(q_ref, mask=real, other=0.0)
    spans = BlockSpans(*(spans_ref[i] for i in range(4)))
    ranges = KeyRanges(*(ranges_ref[i, :][None] for i in range(4)))
    index = jnp.arange(keys, dtype=jnp.int32)

    def add_block(step, carry):
        top, total, out = carry
        start = block_index(spans, step) * keys
        k, v = (plgpu.load(ref.at[pl.ds(start, keys), :], mask=real, other=0.0) for ref in (k_ref, v_ref))
        s = plgpu.dot(q, k, trans_b=True, precision=precision)
        s = capped(s * jnp.asarray(params.scale, acc), params.softcap)
        s = jnp.where(visible(ranges, start + index)[0], s, jnp.asarray(MASKED_SCORE, acc))
        new_top = jnp.maximum(top, s.max(axis=1))
        p = jnp.exp(s - new_top[:, None])
        keep = jnp.exp(top - new_top)
        out = out * keep[:, None] + plgpu.dot(p.astype(v.dtype), v, precision=precision)
        return new_top, total * keep + p.sum(axis=1), out

    start = jnp.full((queries,), MASKED_SCORE, acc), jnp.zeros((queries,), acc), jnp.zeros((queries, width), acc)
    _, total, out = lax.fori_loop(0, spans.num_blocks, add_block, start)
    plgpu.store(out_ref, (out / total[:, None]).astype(out_ref.dtype), mask=real)


def attend(inputs: AttentionInputs, params: AttentionParams, interpret: bool = False) -> Float[Array, "B Q K G H"]:
    """Attention of any rows; lengths that are no multiples of the blocks are padded.

    Args:
      inputs: queries of any positions, in any order.
      params: scale and soft cap.
      interpret: emulate the kernel on the device at hand, which is slow.
    """
    q, k, v, ranges, *_ = inputs
    rows, count, kv, group, head = q.shape
    width = max(16, pl.next_power_of_2(head))  # the smallest tile of a tensor core is 16 wide
    queries, keys = tile(width, q.dtype.itemsize)
    q, k, v, ranges = to_multiple(q, queries), to_multiple(k, keys), to_multiple(v, keys), padded(ranges, queries)
    spans = jnp.stack(block_spans(ranges, queries, keys), axis=1)
    query_block = pl.BlockSpec((None, queries, None, width), lambda block, row, n: (row, block, n, 0))
    all_keys = pl.BlockSpec((None, k.shape[1], None, width), lambda block, row, n: (row, 0, n // group, 0))
    flat = (rows, q.shape[1], kv * group, head)
    out = pl.pallas_call(
        partial(_program, keys=keys, head=head, params=params),
        grid=(q.shape[1] // queries, rows, kv * group),
        in_specs=[
            pl.BlockSpec((None, 4, None), lambda block, row, n: (row, 0, block)),
            pl.BlockSpec((None, 4, queries), lambda block, row, n: (row, 0, block)),
            query_block,
            all_keys,
            all_keys,
        ],
        out_specs=query_block,
        out_shape=jax.ShapeDtypeStruct(flat, q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="visible_ranges_attention",
    )(spans, jnp.stack(ranges, axis=1), q.reshape(flat), k, v)
    return out.reshape(q.shape)[:, :count]
