"""What many prompts begin with, a system prompt above all: its keys and values are computed once for all rows.

A packed row then has keys that it has no queries for. In front of each item that begins with the prefix lies a copy of
the prefix's keys; the item's own tokens follow, without the prefix:

    queries        p3 p4 | c1 | r1    | q3 | ...        prefix: p0 p1 p2 = q0 q1 q2
    keys  p0 p1 p2 p3 p4 | c1 | r1 | q0 q1 q2 q3 | ...

So what a query sees stays two ranges of keys (``models.attention.mask``), windows included, as in the whole row.

Where there are several such beginnings that save enough, each has batches of its own (``by_prefix``).
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ches_jax.data.packing import Item, PackedBatch, Placement, doubled, packed_length
from ches_jax.types import TokenPair, common_prefix

STEP = 64
"""A prefix is cut to a multiple of this many tokens: few lengths, few compiled programs."""
LEAST_POSITIONS = 1024
"""Positions that must be saved, or what is compiled besides costs more."""
LEAST_SHARE = 0.25
"""And of the positions of all items packed with it: copying keys and a wider choice of them cost a little too."""
LEAST_BATCHES = 4
"""And batches' positions, where others are left: both end in a batch that is not full, a program more is compiled."""


class Prefix(NamedTuple):
    """Tokens that the prompts of some items begin with; each of those prompts is longer."""

    tokens: tuple[int, ...]
    members: frozenset[int]
    """Numbers of the items."""

    @property
    def saved(self) -> int:
        """Positions that are computed once in place of once for each member."""
        return len(self.tokens) * (len(self.members) - 1)


class Group(NamedTuple):
    """Items that are packed together."""

    items: list[Item]
    numbers: list[int]
    """Of the items, among all."""
    prefix: Prefix | None
    """What all of them begin with, or its members among them."""


def by_prefix(items: Sequence[Item], batch: int) -> list[Group]:
    """The items in groups, each behind the prefix that saves the most of what is left; the last one as it comes.

    Where a prefix saves too little for batches of its own, those that begin with it stay among the others, and it is
    shared if it saves enough of all of them.

    Args:
      items: of a chunk.
      batch: positions of a batch.
    """
    groups, left = list[Group](), list(range(len(items)))
    while left:
        some = [items[i] for i in left]
        prefix = best_prefix(some)
        if prefix is None or (len(prefix.members) < len(items) and prefix.saved < LEAST_BATCHES * batch):
            return [*groups, Group(some, left, prefix if prefix and _pays(prefix.saved, some) else None)]
        inside = sorted(prefix.members)
        every = prefix._replace(members=frozenset(range(len(inside))))
        groups.append(Group([some[i] for i in inside], [left[i] for i in inside], every))
        left = [n for i, n in enumerate(left) if i not in prefix.members]
    return groups


def best_prefix(items: Sequence[Item]) -> Prefix | None:
    """The prefix that saves the most positions, computed once in place of once for each member; None where it is few.

    An item whose responses have prompts of their own is never a member.
    """
    # the last token of a prompt stays: its state predicts the first one of the response
    prompts = sorted(
        (item.prompt[:-1], i)
        for i, item in enumerate(items)
        if not (isinstance(item, TokenPair) and item.rejected_prompt is not None)
    )
    heights = [common_prefix(a, b) // STEP * STEP for (a, _), (b, _) in pairwise(prompts)]
    # the largest rectangle under the heights: as wide as what is saved of a member, once for all but one of them
    best, open_from = (0, 0, 0, 0), list[tuple[int, int]]()
    for at, height in enumerate([*heights, 0]):
        first = at
        while open_from and open_from[-1][1] >= height:
            first, closed = open_from.pop()
            best = max(best, ((at - first) * closed, closed, first, at))
        open_from.append((first, height))
    saved, length, first, last = best
    members = frozenset(i for _, i in prompts[first : last + 1])
    if not _pays(saved, [items[i] for i in members]):
        return None
    return Prefix(prompts[first][0][:length], members)


def _pays(saved: int, items: Sequence[Item]) -> bool:
    """Whether so many positions saved are worth what sharing costs where these items are packed."""
    return saved >= max(LEAST_POSITIONS, LEAST_SHARE * sum(map(packed_length, items)))


def without(items: Sequence[Item], prefix: Prefix) -> list[Item]:
    """The items as they are packed: the members' prompts without the prefix."""
    n = len(prefix.tokens)
    return [replace(item, prompt=item.prompt[n:]) if i in prefix.members else item for i, item in enumerate(items)]


def most_copies(batches: Sequence[tuple[PackedBatch, list[Placement]]], prefix: Prefix) -> int:
    """Copies of the prefix that every row has room for, a power of two."""
    counts = [0]
    for rows, placements in batches:
        of_row = np.bincount([p.row for p in placements if p.item in prefix.members], minlength=len(rows.tokens))
        counts.append(int(of_row.max()))
    return doubled(1, max(counts))


def behind(
    rows: PackedBatch, placements: Sequence[Placement], items: Sequence[Item], prefix: Prefix, copies: int
) -> PackedBatch:
    """The batch with the keys of the module docstring.

    Args:
      rows: a batch of ``items``.
      placements: where they lie, row by row from left to right.
      items: from ``without``.
      prefix: what their members begin with.
      copies: room for it in each row.
    """
    size, (count, length) = len(prefix.tokens), rows.tokens.shape
    keys = np.zeros((count, length + copies * size), np.int32)
    shift = np.zeros((count, length), np.int32)  # from a position to its key
    extra = np.zeros((count, length), np.int32)  # tokens that its sequence has before the row's
    for row in range(count):
        at = offset = 0
        for place in (p for p in placements if p.row == row):
            end, of_prefix = at + packed_length(items[place.item]), size if place.item in prefix.members else 0
            keys[row, at + offset : at + offset + of_prefix] = np.arange(of_prefix)
            offset += of_prefix
            shift[row, at:end], extra[row, at:end] = offset, of_prefix
            at = end
        shift[row, at:] = offset
    index = np.arange(length, dtype=np.int32)[None]
    np.put_along_axis(keys, index + shift, np.broadcast_to(size + index, shift.shape), axis=1)
    continues = rows.context_end > rows.context_start
    return rows._replace(
        positions=rows.positions + extra,
        lengths=rows.lengths + extra,
        context_start=np.where(continues, rows.context_start + shift - extra, 0),
        context_end=np.where(continues, rows.context_end + shift, 0),
        own_start=rows.own_start + shift - np.where(continues, 0, extra),
        own_end=index + 1 + shift,
        keys=keys,
    )
