"""Token pairs -> rows for the model: prompt once, responses after it, many pairs in one row of fixed length.

A pair is written as ``[prompt + what both responses begin with | rest of chosen | rest of rejected]``; each rest sees
the shared part and itself (see ``models.visibility``), so one pass gives the states of both sequences. Rows of one
length and padding only at their ends: one compiled shape, or two and three where single pairs need longer rows.

What is wanted of the states is written down as *predictions* (source position, target token, segment): the state at
``source`` predicts ``target`` and joins the sum of ``segment``. A pair has three segments: shared, chosen, rejected;
S(chosen) = shared + chosen, and so for rejected.

    row        p0 p1 p2 y1 | c2 c3 | r2          y1 is shared; EOS is predicted and never fed
    positions   0  1  2  3 |  4  5 |  4
    predictions (source -> target): shared p2->y1; chosen y1->c2, c2->c3, c3->EOS; rejected y1->r2, r2->EOS
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ches_jax.data.audit import shared_prefix
from ches_jax.types import Eos, TokenPair

SMALLEST_PAIR = 32
"""A row holds at most one pair per this many tokens, which bounds the number of sums a row gives."""
MOST_PAIRS = 64
"""And never more than this: rows beyond the standard length are there for single long pairs."""


Ints: TypeAlias = Any
"""int32 arrays: numpy on the host, jax inside a jitted pass."""


class Rows(NamedTuple):
    """A batch of packed rows; all int32. B rows, T positions, M predictions, S segments."""

    tokens: Ints
    positions: Ints
    lengths: Ints
    """[B, T] length of the sequence a position belongs to (read by length-dependent rope kinds)."""
    context_start: Ints
    context_end: Ints
    own_start: Ints
    source: Ints
    target: Ints
    segment: Ints
    """[B, M] segment of each prediction; S marks padding."""
    last: Ints
    """[B, S] position of the last content token of a chosen or rejected segment."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a pair lies in a batch: its row and its three segments."""

    pair: int
    row: int
    shared: int

    @property
    def chosen(self) -> int:
        """Segment of the chosen response's own part."""
        return self.shared + 1

    @property
    def rejected(self) -> int:
        """Segment of the rejected response's own part."""
        return self.shared + 2


def need(pair: TokenPair, length_threshold: int | None = None) -> int:
    """Positions the pair takes in a row."""
    shared = shared_tokens(pair, length_threshold)
    both = len(pair.chosen.content) + len(pair.rejected.content)
    if shared is None:
        return 2 * len(pair.prompt) + both
    return len(pair.prompt) + both - shared


def shared_tokens(pair: TokenPair, length_threshold: int | None) -> int | None:
    """The shared response prefix; None where the two sequences must be computed apart.

    Rope kinds that depend on the length of the sequence give the prompt other states in a longer sequence.
    """
    longest = len(pair.prompt) + max(len(pair.chosen.content), len(pair.rejected.content))
    if length_threshold is not None and longest > length_threshold:
        return None
    return shared_prefix(pair)


def row_length(pair: TokenPair, standard: int, length_threshold: int | None = None) -> int:
    """``standard``, or the next doubling of it that holds the pair."""
    length = standard
    while length < need(pair, length_threshold):
        length *= 2
    return length


def capacity(length: int) -> tuple[int, int, int]:
    """(pairs, predictions, segments) a row of ``length`` positions has room for."""
    pairs = max(1, min(length // SMALLEST_PAIR, MOST_PAIRS))
    return pairs, length + pairs, 3 * pairs


def assign(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Pairs to rows, first fit in falling size (ties in order): which pairs share a row.

    >>> assign([40, 20, 32], 64)
    [[0, 1], [2]]
    """
    most = capacity(length)[0]
    rows: list[list[int]] = []
    free: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fit = next((r for r, room in enumerate(free) if room >= sizes[i] and len(rows[r]) < most), None)
        if fit is None:
            rows.append([])
            free.append(length)
            fit = len(rows) - 1
        rows[fit].append(i)
        free[fit] -= sizes[i]
    return rows


def empty_rows(count: int, length: int) -> Rows:
    """Rows of padding: every position sees only itself and nothing is predicted."""
    _, predictions, segments = capacity(length)
    t, m, s = (count, length), (count, predictions), (count, segments)
    return Rows(
        tokens=np.zeros(t, np.int32),
        positions=np.zeros(t, np.int32),
        lengths=np.zeros(t, np.int32),
        context_start=np.zeros(t, np.int32),
        context_end=np.zeros(t, np.int32),
        own_start=np.broadcast_to(np.arange(length, dtype=np.int32), t).copy(),
        source=np.zeros(m, np.int32),
        target=np.zeros(m, np.int32),
        segment=np.full(m, segments, np.int32),
        last=np.zeros(s, np.int32),
    )


class _RowWriter:
    """Fills one row of a batch from left to right."""

    def __init__(self, rows: Rows, row: int):
        self.rows = rows
        self.row = row
        self.at = 0
        self.predictions = 0
        self.segments = 0

    def stretch(self, tokens: Sequence[int], start: int, total: int, context: tuple[int, int] = (0, 0)) -> int:
        """Write tokens at sequence positions ``start ...``; returns where they begin in the row."""
        r, a, b = self.row, self.at, self.at + len(tokens)
        self.rows.tokens[r, a:b] = tokens
        self.rows.positions[r, a:b] = np.arange(start, start + len(tokens))
        self.rows.lengths[r, a:b] = total
        self.rows.context_start[r, a:b], self.rows.context_end[r, a:b] = context
        self.rows.own_start[r, a:b] = a
        self.at = b
        return a

    def predict(self, sources: Sequence[int], targets: Sequence[int], segment: int) -> None:
        """Record that the states at ``sources`` predict ``targets`` and join ``segment``."""
        r, a, b = self.row, self.predictions, self.predictions + len(targets)
        self.rows.source[r, a:b] = sources[: len(targets)]
        self.rows.target[r, a:b] = targets
        self.rows.segment[r, a:b] = segment
        self.predictions = b

    def pair(self, pair: TokenPair, eos: Eos, length_threshold: int | None) -> None:
        """Write one pair, in the row's next three segments."""
        shared = shared_tokens(pair, length_threshold)
        first = self.segments
        self.segments += 3
        prompt = len(pair.prompt)
        responses = (pair.chosen, pair.rejected)
        if shared is None:
            for segment, response in enumerate(responses, first + 1):
                whole = (*pair.prompt, *response.content)
                a = self.stretch(whole, 0, len(whole))
                self.predict(range(a + prompt - 1, a + len(whole)), response.targets(eos), segment)
                self.rows.last[self.row, segment] = a + len(whole) - 1
            return
        total = prompt + max(len(r.content) for r in responses)
        common = (*pair.prompt, *pair.chosen.content[:shared])
        a = self.stretch(common, 0, total)
        end = a + len(common)
        self.predict(range(a + prompt - 1, end), pair.chosen.content[:shared], first)
        for segment, response in enumerate(responses, first + 1):
            own = response.content[shared:]
            b = self.stretch(own, len(common), total, (a, end))
            self.predict([end - 1, *range(b, b + len(own))], response.targets(eos)[shared:], segment)
            self.rows.last[self.row, segment] = b + len(own) - 1 if own else end - 1


class Arrangement(NamedTuple):
    """Which pairs make which row of a batch; known before anything is written."""

    length: int
    """Positions of a row."""
    row_count: int
    """Rows of the batch; those beyond ``rows`` are padding."""
    rows: list[list[int]]
    """Indices of the pairs of each row, in their order."""

    def places(self) -> list[Placement]:
        """The place of every pair."""
        return [Placement(i, row, 3 * k) for row, group in enumerate(self.rows) for k, i in enumerate(group)]


def arrange(
    pairs: Sequence[TokenPair],
    *,
    length: int,
    rows_per_batch: int,
    row_multiple: int = 1,
    length_threshold: int | None = None,
) -> Iterator[Arrangement]:
    """Batches in which every pair has its place exactly once; arguments of ``pack``."""
    by_length: dict[int, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_length.setdefault(row_length(pair, length, length_threshold), []).append(i)
    for row_len in sorted(by_length):
        members = by_length[row_len]
        rows_of = assign([need(pairs[i], length_threshold) for i in members], row_len)
        step = max(1, rows_per_batch * length // row_len)
        step = -(-step // row_multiple) * row_multiple
        for at in range(0, len(rows_of), step):
            yield Arrangement(row_len, step, [[members[j] for j in sorted(g)] for g in rows_of[at : at + step]])


def write_rows(
    pairs: Sequence[TokenPair],
    arrangement: Arrangement,
    eos: Eos,
    length_threshold: int | None = None,
    only: Sequence[int] | None = None,
) -> Rows:
    """The rows of an arrangement, or ``only`` those with these numbers, in this order."""
    numbers = range(arrangement.row_count) if only is None else only
    batch = empty_rows(len(numbers), arrangement.length)
    for row, number in enumerate(numbers):
        writer = _RowWriter(batch, row)
        for i in arrangement.rows[number] if number < len(arrangement.rows) else ():
            writer.pair(pairs[i], eos, length_threshold)
    return batch


def pack(
    pairs: Sequence[TokenPair],
    *,
    length: int,
    rows_per_batch: int,
    eos: Eos,
    row_multiple: int = 1,
    length_threshold: int | None = None,
) -> Iterator[tuple[Rows, list[Placement]]]:
    """Batches of packed rows with the place of every pair.

    Args:
      pairs: scorable pairs; every one is placed exactly once.
      length: standard row length; pairs that need more get rows of a doubled length (and fewer rows a batch).
      rows_per_batch: rows of a standard batch; the last batch is filled up with padding rows.
      eos: whether a terminator counts as a prediction.
      row_multiple: every batch has a multiple of so many rows (the devices they are dealt to).
      length_threshold: sequences longer than this are not shared (``RopeConfig.length_threshold``).
    """
    for arrangement in arrange(
        pairs, length=length, rows_per_batch=rows_per_batch, row_multiple=row_multiple,
        length_threshold=length_threshold,
    ):  # fmt: skip
        yield write_rows(pairs, arrangement, eos, length_threshold), arrangement.places()
