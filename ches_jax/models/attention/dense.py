"""Softmax attention over the keys that each query sees, in jax.numpy: it runs on every backend.

All compute ``softmax(cap(scale * q k^T) + mask) v`` with scores, maxima and sums in float32 (float64 when the inputs
are) and agree to rounding:

dense   the whole mask
slices  never holds the scores of more than a slice of queries

``blocks`` leaves out what nobody sees; ``kernels`` has others, for one kind of accelerator each, and chooses.
"""

from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from ches_jax.models.attention.mask import KeyRanges, visible
from ches_jax.models.precision import accumulate, products

SLICE = 512
"""Queries of a slice of ``slices``."""
KEPT = "attention"
"""Name of what the backward pass keeps and does not compute again."""
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


def to_multiple(x: Array, block: int) -> Array:
    """Zeros after the second axis, up to a multiple of ``block``."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), *[(0, 0)] * (x.ndim - 2)])


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
    block: int = SLICE,
) -> Float[Array, "B T K G H"]:
    """Attention for training: ``block`` queries at a time against the keys up to their end, scores never kept.

    Nobody sees what comes after it, so half of the scores are never computed; the backward pass computes the scores of
    a slice again. Needs the queries of the whole row, each of which sees nothing after itself.
    """
    one = jax.checkpoint(partial(dense, scale=scale, softcap=softcap))
    parts = []
    for a in range(0, q.shape[1], block):
        b = min(a + block, q.shape[1])
        here = jax.tree.map(lambda x, a=a, b=b: x[:, a:b], (q, seen))
        parts.append(one(here[0], k[:, :b], v[:, :b], here[1]))
    return checkpoint_name(jnp.concatenate(parts, axis=1), KEPT)
