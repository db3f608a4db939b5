r"""Softmax attention over the keys that each query sees, in jax.numpy: it runs on every backend.

For a query q, the keys k and values v that it sees:

.. math::
  o = \sum_t \mathrm{softmax}_t\big(\mathrm{cap}(s\, q \cdot k_t)\big)\, v_t, \qquad \mathrm{cap}(z) = c \tanh(z / c)

Where a head has a *sink*, the exponential of that number joins the total of its softmax.

All ways to compute it take ``AttentionInputs`` and ``AttentionParams``, hold scores, maxima and sums in float32
(float64 when the inputs are), and agree to rounding:

dense          the whole mask
query_chunked  never holds the scores of more than a chunk of queries

``block_sparse`` skips blocks in which no query sees a key; ``pallas_tpu`` and ``pallas_gpu`` are kernels for one kind
of accelerator each; ``choose`` chooses.
"""

from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ches_jax.models.attention.mask import KeyRanges, SeenByBlock, visible
from ches_jax.models.platform import platform
from ches_jax.models.precision import accumulate, einsum

QUERY_CHUNK = 512
ONE_THREAD = 2**16
"""Most products that XLA makes with one thread on a CPU: it divides them by 32,768 of a tile."""
KEPT = "attention"
"""Name of what is kept for the backward pass and not computed again."""
MASKED_SCORE = -1e30  # finite: the difference of two of them is 0 and not NaN


class AttentionInputs(NamedTuple):
    """Arrays that attention is computed from: Q queries of G heads for each of K key/value heads, T keys."""

    q: Float[Array, "B Q K G H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    ranges: KeyRanges
    """Which keys each query sees."""
    sinks: Float[Array, "K G"] | None = None
    """For each head a score of a key that everything sees and whose value is zero."""
    by_block: SeenByBlock | None = None
    """The ranges as ``block_sparse`` reads them, where they were made once for many layers."""


class AttentionParams(NamedTuple):
    """Static parameters of attention."""

    scale: float
    """Multiplies the products of queries and keys."""
    softcap: float | None = None
    """Scores are ``softcap * tanh(scores / softcap)``; None: as they are."""


@runtime_checkable
class Attend(Protocol):
    """A way to compute attention."""

    def __call__(self, inputs: AttentionInputs, params: AttentionParams) -> Float[Array, "B Q K G H"]:
        """The outputs of the queries, in their dtype."""
        ...


def capped(scores: Array, softcap: float | None) -> Array:
    """``softcap * tanh(scores / softcap)``."""
    if softcap is None:
        return scores
    cap = jnp.asarray(softcap, scores.dtype)
    return cap * jnp.tanh(scores / cap)


def to_multiple(x: Array, block: int) -> Array:
    """Zeros after the second axis, up to a multiple of ``block``."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)])


def dense(inputs: AttentionInputs, params: AttentionParams) -> Float[Array, "B Q K G H"]:
    """Attention with the whole [Q, T] mask: every score is computed, then masked."""
    q, k, v, ranges, sinks, _ = inputs
    mask = visible(ranges, jnp.arange(k.shape[1], dtype=jnp.int32))
    acc = accumulate(q.dtype)
    s = capped(_products(q, k) * jnp.asarray(params.scale, acc), params.softcap)
    s = jnp.where(mask[:, None, None], s, jnp.asarray(MASKED_SCORE, acc))
    if sinks is not None:
        sink = jnp.broadcast_to(sinks.astype(acc)[None, :, :, None, None], (*s.shape[:-1], 1))
        s = jnp.concatenate([s, sink], axis=-1)
    p = jax.nn.softmax(s, axis=-1)[..., : k.shape[1]].astype(v.dtype)
    out = einsum("bkgqs,bskh->bkgqh", p, v)
    return out.transpose(0, 3, 1, 2, 4).astype(q.dtype)


def _products(q: Float[Array, "B Q K G H"], k: Float[Array, "B T K H"]) -> Float[Array, "B K G Q T"]:
    """Those of every query with every key, in ``accumulate`` of their dtype.

    A token that is made next has one query a head. Two of them for a head of keys XLA multiplies at half the speed on a
    CPU that it multiplies each by itself, while all are too few for more than one of its threads.
    """
    rows, queries, heads, groups, _ = q.shape
    if platform() == "cpu" and (queries, groups) == (1, 2) and rows * heads * groups * k.shape[1] <= ONE_THREAD:
        each = [einsum("bqkh,bskh->bkqs", q[:, :, :, g], k) for g in range(groups)]
        return jnp.stack(each, axis=2)
    return einsum("bqkgh,bskh->bkgqs", q, k)


def query_chunked(
    inputs: AttentionInputs, params: AttentionParams, chunk: int = QUERY_CHUNK
) -> Float[Array, "B Q K G H"]:
    """Attention for training where there is no kernel: ``chunk`` queries at a time against the keys up to their end.

    No query sees a key after itself, so half of the scores are never computed; the backward pass computes the scores of
    a chunk again.

    Args:
      inputs: queries of the whole row in order (Q = T), each of which sees nothing after itself.
      params: scale and soft cap.
      chunk: queries at a time.
    """
    q, k, v, ranges, sinks, _ = inputs
    of_chunk = jax.checkpoint(partial(dense, params=params))
    parts = []
    for start in range(0, q.shape[1], chunk):
        end = min(start + chunk, q.shape[1])
        some_q, some_ranges = jax.tree.map(lambda x, a=start, b=end: x[:, a:b], (q, ranges))
        parts.append(of_chunk(AttentionInputs(some_q, k[:, :end], v[:, :end], some_ranges, sinks)))
    return checkpoint_name(jnp.concatenate(parts, axis=1), KEPT)
