"""The attention mask of a row of tokens, in a few integers per position instead of T x T booleans.

A position sees a *context* range (the shared prompt it continues) and its *own* range up to itself:

    keys in [context_start, context_end)  and  keys in [own_start, itself]

A single sequence is (no context, own_start = its first position). Two responses after one prompt, many pairs in one
row:

    token          p0 p1 p2 | c1 c2 | r1 r2 | q0 q1 ...
    own_start       0  0  0 |  3  3 |  5  5 |  7  7
    context                   [0,3)   [0,3)

The own range continues where the context ends: the position after the context's last one is that of ``own_start``. So a
sliding window cuts both ranges at their start, and what a position sees stays two ranges.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


class Visibility(NamedTuple):
    """What every position of a row sees, in order; see the module docstring."""

    context_start: Int[Array, "B T"]
    context_end: Int[Array, "B T"]
    own_start: Int[Array, "B T"]


class KeyRanges(NamedTuple):
    """What queries see: keys in [context_start, context_end) and in [own_start, own_end), the query being the last one.

    The queries may be any positions of the row, in any order; context_end <= own_start < own_end.
    """

    context_start: Int[Array, "B Q"]
    context_end: Int[Array, "B Q"]
    own_start: Int[Array, "B Q"]
    own_end: Int[Array, "B Q"]


class BlockSpans(NamedTuple):
    """Blocks of keys that a block of queries needs: ``context_count`` from ``context_first`` on, then its own."""

    context_first: Int[Array, "B blocks"]
    context_count: Int[Array, "B blocks"]
    own_first: Int[Array, "B blocks"]
    own_count: Int[Array, "B blocks"]

    @property
    def num_blocks(self) -> Int[Array, "*blocks"]:
        """How many there are."""
        return self.context_count + self.own_count


class SeenByBlock(NamedTuple):
    """What each block of queries sees, in one array of each kind: ``seen_by_block``."""

    ranges: Int[Array, "B blocks 4 block"]
    """``KeyRanges`` of its queries."""
    spans: Int[Array, "B blocks 4"]
    """Its ``BlockSpans``, of blocks of as many keys as it has queries."""


def causal(mask: Bool[Array, "B T"]) -> Visibility:
    """One sequence per row; ``mask`` is True on real tokens, padding may be on the left or on the right.

    >>> causal(jnp.array([[False, True, True]])).own_start.tolist()
    [[0, 1, 1]]
    """
    first = jnp.argmax(mask, axis=1, keepdims=True).astype(jnp.int32)
    index = jnp.arange(mask.shape[1], dtype=jnp.int32)[None]
    none = jnp.zeros(mask.shape, jnp.int32)
    # padding before the first token sees only itself, so that its softmax is not empty
    return Visibility(none, none, jnp.minimum(first, index))


def key_ranges(v: Visibility) -> KeyRanges:
    """Every position of the row as a query."""
    index = jnp.arange(v.own_start.shape[1], dtype=jnp.int32)[None]
    return KeyRanges(*v, jnp.broadcast_to(index + 1, v.own_start.shape))


def within(r: KeyRanges, window: Int[Array, "*bq"]) -> KeyRanges:
    """What is left in a layer where a position sees at most ``window`` positions, itself included.

    The window may differ from query to query.

    >>> ranges = key_ranges(Visibility(*(jnp.array([a]) for a in ([0, 0, 0, 0], [0, 0, 2, 2], [0, 0, 2, 2]))))
    >>> [a.tolist() for a in within(ranges, jnp.int32(3))]
    [[[0, 0, 0, 1]], [[0, 0, 2, 2]], [[0, 0, 2, 2]], [[1, 2, 3, 4]]]
    """
    own = r.own_end - r.own_start
    return KeyRanges(
        jnp.maximum(r.context_start, r.context_end + own - window),
        r.context_end,
        jnp.maximum(r.own_start, r.own_end - window),
        r.own_end,
    )


def visible(r: KeyRanges, keys: Int[Array, "*rows T"]) -> Bool[Array, "B Q T"]:
    """The dense mask: whether each query sees the keys at indices ``keys``, the same for all rows or some for each.

    >>> visible(key_ranges(causal(jnp.ones((1, 2), bool))), jnp.arange(2)).tolist()
    [[[True, False], [True, True]]]
    """
    k = jnp.atleast_2d(keys)[:, None, :]
    context = (k >= r.context_start[..., None]) & (k < r.context_end[..., None])
    own = (k >= r.own_start[..., None]) & (k < r.own_end[..., None])
    return context | own


def padded(r: KeyRanges, queries: int) -> KeyRanges:
    """The ranges with queries added that see only the first key, up to a multiple of ``queries``."""
    missing = -r.own_end.shape[1] % queries
    fill = (0, 0, 0, 1)
    return KeyRanges(*(jnp.pad(a, ((0, 0), (0, missing)), constant_values=x) for a, x in zip(r, fill, strict=True)))


def block_spans(r: KeyRanges, queries: int, keys: int) -> BlockSpans:
    """Two runs of blocks of ``keys`` keys that hold every key that each block of ``queries`` queries sees.

    The number of queries is a multiple of ``queries``. Where the queries of a block belong to one pair these are
    exactly the blocks in which one of them sees a key.
    """
    context_start, context_end, own_start, own_end = (a.reshape(a.shape[0], -1, queries) for a in r)
    own = own_start // keys
    start, end = context_start // keys, jnp.minimum((context_end + keys - 1) // keys, own)
    left = (context_start < context_end) & (start < end)  # what the query's own blocks do not hold already
    # ends below zero, so that one minimum finds all: each reduction would be a program of its own
    bounds = [own, -own_end, jnp.where(left, start, own), jnp.where(left, -end, 0)]
    own_first, minus_own_end, context_first, minus_context_end = stacked(bounds, 0).min(-1)
    context_count = jnp.maximum(jnp.minimum(-minus_context_end, own_first) - context_first, 0)
    return BlockSpans(context_first, context_count, own_first, (-minus_own_end - 1) // keys + 1 - own_first)


def seen_by_block(r: KeyRanges, block: int) -> SeenByBlock:
    """What blocks of ``block`` queries see; the last one is filled up as ``padded`` does."""
    whole = padded(r, block)
    cut = [a.reshape(a.shape[0], -1, block) for a in whole]
    return SeenByBlock(stacked(cut, 2), stacked(block_spans(whole, block, block), 2))


def stacked(parts: Sequence[Int[Array, "..."]], axis: int) -> Int[Array, "..."]:
    """``jnp.stack`` of a few small arrays: each element chooses, where XLA would compile a loop for every part.

    >>> stacked([jnp.array([1, 2]), jnp.array([3, 4])], 1).tolist()
    [[1, 3], [2, 4]]
    """
    shape = (*parts[0].shape[:axis], len(parts), *parts[0].shape[axis:])
    at = lax.broadcasted_iota(jnp.int32, shape, axis)
    whole, *others = (jnp.broadcast_to(jnp.expand_dims(part, axis), shape) for part in parts)
    for i, part in enumerate(others, 1):
        whole = jnp.where(at == i, part, whole)
    return whole


def block_index(s: BlockSpans, step: Int[Array, "..."]) -> Int[Array, "..."]:
    """The index of the ``step``-th block of keys, ``step`` in 0 .. num_blocks - 1, which broadcasts with the spans."""
    own = s.own_first + step - s.context_count
    return jnp.where(step < s.context_count, s.context_first + step, own)
