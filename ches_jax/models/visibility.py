"""Who sees whom in a row of tokens, in three integers per position instead of a T x T mask.

A position sees a *context* range (the shared prompt it continues) and its *own* range up to itself:

    keys in [context_start, context_end)  and  keys in [own_start, itself]

One stretch of text is (no context, own_start = its first position). Two responses after one prompt, many pairs in one
row:

    token          p0 p1 p2 | c1 c2 | r1 r2 | q0 q1 ...
    own_start       0  0  0 |  3  3 |  5  5 |  7  7
    context                   [0,3)   [0,3)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Visibility(NamedTuple):
    """Key ranges of every query position; see the module docstring."""

    context_start: Int[Array, "B T"]
    context_end: Int[Array, "B T"]
    own_start: Int[Array, "B T"]


def causal(mask: Bool[Array, "B T"]) -> Visibility:
    """One sequence per row; ``mask`` is True on real tokens, padding may be on the left or on the right.

    >>> causal(jnp.array([[False, True, True]])).own_start.tolist()
    [[0, 1, 1]]
    """
    first = jnp.argmax(mask, axis=1, keepdims=True).astype(jnp.int32)
    here = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    none = jnp.zeros(mask.shape, jnp.int32)
    # padding before the first token sees only itself, so that its softmax is not empty
    return Visibility(none, none, jnp.minimum(first, here))


def visible(v: Visibility, keys: Int[Array, " K"], queries: Int[Array, " Q"]) -> Bool[Array, "B Q K"]:
    """The dense mask of rows ``queries`` (already sliced in ``v``) against key indices ``keys``."""
    k = keys[None, None, :]
    context = (k >= v.context_start[..., None]) & (k < v.context_end[..., None])
    own = (k >= v.own_start[..., None]) & (k <= queries[None, :, None])
    return context | own


def block_visits(v: Visibility, block: int) -> tuple[Int[Array, "B Q K"], Int[Array, "B Q"]]:
    """For each block of queries: the key blocks with something to see, first, and how many they are.

    T must be a multiple of ``block``.
    """
    rows, length = v.own_start.shape
    n = length // block
    low = jnp.arange(n, dtype=jnp.int32)[None, None] * block
    here = jnp.arange(length, dtype=jnp.int32)[None, :, None]
    context = (v.context_start[..., None] < low + block) & (v.context_end[..., None] > low)
    context &= v.context_start[..., None] < v.context_end[..., None]
    own = (v.own_start[..., None] < low + block) & (here >= low)
    seen = (context | own).reshape(rows, n, block, n).any(2)
    return jnp.argsort(~seen, axis=-1, stable=True).astype(jnp.int32), seen.sum(-1, dtype=jnp.int32)
