"""Token pairs -> rows for the model: prompt once, responses after it, many pairs in one row of fixed length.

What is packed is an *item*: a prompt and its responses, each there once. A pair is an item of two; the pairs of one row
of the data with N candidates are one item of N (``gathered``). It is written as ``[prompt + what all responses begin
with | rest of the first | rest of the second | ...]``; each rest sees the shared part and itself (see
``models.visibility``), so one pass gives the states of all sequences. Rows of one length and padding only at their
ends: one compiled shape, or two and three where single items need longer rows.

What is wanted of the states is written down as *predictions* (source position, target token, segment): the state at
``source`` predicts ``target`` and joins the sum of ``segment``. An item of N responses has 1 + N segments: shared, then
each response's own; S(y) = shared + own(y), from which all statistics of pairs come.

    row        p0 p1 p2 y1 | c2 c3 | r2          y1 is shared; EOS is predicted and never fed
    positions   0  1  2  3 |  4  5 |  4
    predictions (source -> target): shared p2->y1; chosen y1->c2, c2->c3, c3->EOS; rejected y1->r2, r2->EOS
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ches_jax.data.audit import common_prefix
from ches_jax.types import Eos, Response, TokenPair

SMALLEST_PAIR = 32
"""A row holds at most one pair per this many tokens, which bounds the number of sums a row gives."""
MOST_PAIRS = 64
"""And never more than this, but where one item has more candidates: longer rows are there for single long items."""


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
    """[B, S] position of the last content token of a response's own segment."""
    item: Ints
    """[B, S] first segment of the item that a segment belongs to."""
    preferred: Ints
    """[B, S] 1 for the segments of responses that are chosen in some pair, the shared one among them."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """The responses to one prompt that take part in scored pairs, each once: an item of N responses."""

    prompt: tuple[int, ...]
    responses: tuple[Response, ...]
    preferred: int
    """How many of them, from the first, are the chosen response of some pair."""


Item: TypeAlias = TokenPair | Candidates


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an item lies in a batch: its row and its segments, the first of which is the shared one."""

    item: int
    row: int
    shared: int
    segments: int = 3

    @property
    def pair(self) -> int:
        """The item, where items are pairs."""
        return self.item

    @property
    def chosen(self) -> int:
        """Segment of the chosen response's own part, of an item that is a pair."""
        return self.shared + 1

    @property
    def rejected(self) -> int:
        """Segment of the rejected response's own part, of an item that is a pair."""
        return self.shared + 2


class Seat(NamedTuple):
    """Which responses of which item a pair is about."""

    item: int
    chosen: int
    rejected: int


def gathered(pairs: Sequence[TokenPair]) -> tuple[list[Item], list[Seat]]:
    """The items that hold ``pairs``, and the seat of every pair.

    Pairs of one row of the data become one item where they have the same prompt tokens (they may not: tokens can merge
    across its end, see ``data.tokenize``); equal responses of a row are there once.
    """
    members: dict[tuple, list[int]] = {}
    for i, pair in enumerate(pairs):
        key = ("alone", i) if pair.candidates is None else (pair.index, pair.prompt)
        members.setdefault(key, []).append(i)
    items: list[Item] = []
    seats = [Seat(0, 0, 1)] * len(pairs)
    for group in members.values():
        first = pairs[group[0]]
        if first.candidates is None:
            seats[group[0]] = Seat(len(items), 0, 1)
            items.append(first)
            continue
        chosen = dict.fromkeys(pairs[i].chosen for i in group)
        number = {r: k for k, r in enumerate(chosen | dict.fromkeys(pairs[i].rejected for i in group))}
        for i in group:
            seats[i] = Seat(len(items), number[pairs[i].chosen], number[pairs[i].rejected])
        items.append(Candidates(first.prompt, tuple(number), len(chosen)))
    return items, seats


def responses_of(item: Item) -> tuple[Response, ...]:
    """An item's responses in the order of their segments; of a pair the chosen one first."""
    return item.responses if isinstance(item, Candidates) else (item.chosen, item.rejected)


def need(item: Item, length_threshold: int | None = None) -> int:
    """Positions the item takes in a row."""
    shared = shared_tokens(item, length_threshold)
    responses = responses_of(item)
    contents = sum(len(r.content) for r in responses)
    if shared is None:
        return len(responses) * len(item.prompt) + contents
    return len(item.prompt) + contents - (len(responses) - 1) * shared


def shared_tokens(item: Item, length_threshold: int | None) -> int | None:
    """Tokens that all responses begin with; None where the sequences must be computed apart.

    Rope kinds that depend on the length of the sequence give the prompt other states in a longer sequence.
    """
    contents = [r.content for r in responses_of(item)]
    if length_threshold is not None and len(item.prompt) + max(map(len, contents)) > length_threshold:
        return None
    return min([common_prefix(contents[0], c) for c in contents[1:]], default=len(contents[0]))


def row_length(item: Item, standard: int, length_threshold: int | None = None) -> int:
    """``standard``, or the next doubling of it that holds the item."""
    length = standard
    while length < need(item, length_threshold):
        length *= 2
    return length


def seats_of(item: Item) -> int:
    """How many pairs' room the item takes in a row: 1 + N segments, and N - 1 predictions more than positions."""
    return max(1, len(responses_of(item)) - 1)


def standard_seats(length: int) -> int:
    """Pairs that a row of ``length`` positions has room for."""
    return max(1, min(length // SMALLEST_PAIR, MOST_PAIRS))


def row_seats(item: Item, length: int) -> int:
    """``standard_seats``, or the next doubling of it that holds the item's responses."""
    seats = standard_seats(length)
    while seats < seats_of(item):
        seats *= 2
    return seats


def capacity(length: int, seats: int | None = None) -> tuple[int, int, int]:
    """(pairs, predictions, segments) a row of ``length`` positions has room for."""
    pairs = standard_seats(length) if seats is None else seats
    return pairs, length + pairs, 3 * pairs


def assign(sizes: Sequence[int], length: int, seats: Sequence[int] | None = None, most: int = 0) -> list[list[int]]:
    """Items to rows, first fit in falling size (ties in order): which items share a row.

    Args:
      sizes: positions of each item.
      length: positions of a row.
      seats: pairs' room each item takes; 1 when not given.
      most: pairs' room of a row; ``standard_seats(length)`` when not given.

    >>> assign([40, 20, 32], 64)
    [[0, 1], [2]]
    """
    seats = [1] * len(sizes) if seats is None else seats
    rows: list[list[int]] = []
    free: list[int] = []
    free_seats: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fit = next((r for r, room in enumerate(free) if room >= sizes[i] and free_seats[r] >= seats[i]), None)
        if fit is None:
            rows.append([])
            free.append(length)
            free_seats.append(most or standard_seats(length))
            fit = len(rows) - 1
        rows[fit].append(i)
        free[fit] -= sizes[i]
        free_seats[fit] -= seats[i]
    return rows


def empty_rows(count: int, length: int, seats: int | None = None) -> Rows:
    """Rows of padding: every position sees only itself and nothing is predicted."""
    _, predictions, segments = capacity(length, seats)
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
        item=np.zeros(s, np.int32),
        preferred=np.zeros(s, np.int32),
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

    def item(self, item: Item, eos: Eos, length_threshold: int | None) -> None:
        """Write one item, in the row's next segments."""
        shared = shared_tokens(item, length_threshold)
        responses = responses_of(item)
        first = self.segments
        self.segments += 1 + len(responses)
        self.rows.item[self.row, first : self.segments] = first
        chosen = item.preferred if isinstance(item, Candidates) else 1
        self.rows.preferred[self.row, first : first + 1 + chosen] = 1
        prompt = len(item.prompt)
        if shared is None:
            for segment, response in enumerate(responses, first + 1):
                whole = (*item.prompt, *response.content)
                a = self.stretch(whole, 0, len(whole))
                self.predict(range(a + prompt - 1, a + len(whole)), response.targets(eos), segment)
                self.rows.last[self.row, segment] = a + len(whole) - 1
            return
        total = prompt + max(len(r.content) for r in responses)
        common = (*item.prompt, *responses[0].content[:shared])
        a = self.stretch(common, 0, total)
        end = a + len(common)
        self.predict(range(a + prompt - 1, end), responses[0].content[:shared], first)
        for segment, response in enumerate(responses, first + 1):
            own = response.content[shared:]
            b = self.stretch(own, len(common), total, (a, end))
            self.predict([end - 1, *range(b, b + len(own))], response.targets(eos)[shared:], segment)
            self.rows.last[self.row, segment] = b + len(own) - 1 if own else end - 1


class Arrangement(NamedTuple):
    """Which items make which row of a batch; known before anything is written."""

    length: int
    """Positions of a row."""
    row_count: int
    """Rows of the batch; those beyond ``rows`` are padding."""
    rows: list[list[int]]
    """Indices of the items of each row, in their order."""
    segments: list[list[int]]
    """How many segments each of them has."""
    seats: int
    """Pairs' room of a row."""

    def places(self) -> list[Placement]:
        """The place of every item."""
        return [
            Placement(i, row, first, count)
            for row, (group, counts) in enumerate(zip(self.rows, self.segments, strict=True))
            for i, first, count in zip(group, accumulate(counts, initial=0), counts, strict=False)
        ]


def arrange(
    items: Sequence[Item],
    *,
    length: int,
    rows_per_batch: int,
    row_multiple: int = 1,
    length_threshold: int | None = None,
) -> Iterator[Arrangement]:
    """Batches in which every item has its place exactly once; arguments of ``pack``."""
    by_shape: dict[tuple[int, int], list[int]] = {}
    for i, item in enumerate(items):
        positions = row_length(item, length, length_threshold)
        by_shape.setdefault((positions, row_seats(item, positions)), []).append(i)
    for row_len, seats in sorted(by_shape):
        members = by_shape[row_len, seats]
        sizes = [need(items[i], length_threshold) for i in members]
        rows_of = assign(sizes, row_len, [seats_of(items[i]) for i in members], seats)
        step = max(1, rows_per_batch * length // row_len)
        step = -(-step // row_multiple) * row_multiple
        for at in range(0, len(rows_of), step):
            rows = [[members[j] for j in sorted(group)] for group in rows_of[at : at + step]]
            segments = [[1 + len(responses_of(items[i])) for i in group] for group in rows]
            yield Arrangement(row_len, step, rows, segments, seats)


def write_rows(
    items: Sequence[Item],
    arrangement: Arrangement,
    eos: Eos,
    length_threshold: int | None = None,
    only: Sequence[int] | None = None,
) -> Rows:
    """The rows of an arrangement, or ``only`` those with these numbers, in this order."""
    numbers = range(arrangement.row_count) if only is None else only
    batch = empty_rows(len(numbers), arrangement.length, arrangement.seats)
    for row, number in enumerate(numbers):
        writer = _RowWriter(batch, row)
        for i in arrangement.rows[number] if number < len(arrangement.rows) else ():
            writer.item(items[i], eos, length_threshold)
    return batch


def pack(
    items: Sequence[Item],
    *,
    length: int,
    rows_per_batch: int,
    eos: Eos,
    row_multiple: int = 1,
    length_threshold: int | None = None,
) -> Iterator[tuple[Rows, list[Placement]]]:
    """Batches of packed rows with the place of every item.

    Args:
      items: scorable pairs, or what ``gathered`` makes of them; every one is placed exactly once.
      length: standard row length; items that need more get rows of a doubled length (and fewer rows a batch).
      rows_per_batch: rows of a standard batch; the last batch is filled up with padding rows.
      eos: whether a terminator counts as a prediction.
      row_multiple: every batch has a multiple of so many rows (the devices they are dealt to).
      length_threshold: sequences longer than this are not shared (``RopeConfig.length_threshold``).
    """
    for arrangement in arrange(
        items, length=length, rows_per_batch=rows_per_batch, row_multiple=row_multiple,
        length_threshold=length_threshold,
    ):  # fmt: skip
        yield write_rows(items, arrangement, eos, length_threshold), arrangement.places()
