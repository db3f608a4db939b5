"""Token pairs -> rows for the model: prompt once, responses after it, many pairs in one row of fixed length.

What is packed is an *item*: a prompt and its responses, each there once. A pair is an item of two; the pairs of one
record of the data with N candidates are one item of N (``group_by_prompt``). It is written as ``[prompt + what all
responses begin with | rest of the first | rest of the second | ...]``; each rest sees the shared part and itself (see
``models.attention.mask``), so one pass gives the states of all sequences. Rows have one length and padding only at
their ends: one compiled shape, or two and three where single items need longer rows, whose rest holds short ones. Items
are placed by first-fit decreasing (``first_fit_in_rows``).

What is computed from the states is listed as *predictions* (source position, target token, segment): the state at
``source`` predicts ``target`` and joins the sum of ``segment``. An item of N responses has 1 + N segments: shared, then
each response's own; S(y) = shared + own(y), from which all statistics of pairs come.

    row        p0 p1 p2 y1 | c2 c3 | r2          y1 is shared; EOS is predicted and never fed
    positions   0  1  2  3 |  4  5 |  4
    predictions (source -> target): shared p2->y1; chosen y1->c2, c2->c3, c3->EOS; rejected y1->r2, r2->EOS
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ches_jax.types import Eos, Response, TokenPair, common_prefix

SHORT_ROWS = (512, 1024)
"""Rows for few pairs, that less of them is padding: shorter than the standard ones."""
FEW_BATCHES = 4
"""How many batches of standard rows the pairs of such a job fill at most."""
TOKENS_PER_PAIR = 32
"""A row holds at most one pair per this many tokens, which bounds its segments, hence the memory of their sums."""
MAX_PAIRS = 64
"""And never more than this, unless a single item has more candidates: longer rows are for single long items."""


Ints: TypeAlias = Any
"""int32 arrays: numpy on the host, jax inside a jitted pass."""


class PackedBatch(NamedTuple):
    """A batch of packed rows; all int32. B rows, T positions, M predictions, S segments. Ranges are of keys."""

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
    own_end: Ints = None
    """[B, T] end of the own range; None: a position's key is the one with its own index."""
    keys: Ints = None
    """[B, keys] which of the keys of a prefix (``data.prefix``) and, after them, of the row each key of the row is."""


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


class PairRef(NamedTuple):
    """A pair as two responses of an item, by number."""

    item: int
    chosen: int
    rejected: int


def group_by_prompt(pairs: Sequence[TokenPair]) -> tuple[list[Item], list[PairRef]]:
    """The items that hold ``pairs``, and where every pair lies in them.

    Pairs of one record become one item where they have the same prompt tokens (they may not: tokens can merge
    across its end, see ``data.tokenize``, or each response has its own); equal responses of a record are there once.
    """
    members: dict[tuple, list[int]] = {}
    for i, pair in enumerate(pairs):
        alone = pair.candidates is None or pair.rejected_prompt is not None
        key = ("alone", i) if alone else (pair.index, pair.prompt)
        members.setdefault(key, []).append(i)
    items: list[Item] = []
    refs = [PairRef(0, 0, 1)] * len(pairs)
    for group in members.values():
        first = pairs[group[0]]
        if first.candidates is None or first.rejected_prompt is not None:
            refs[group[0]] = PairRef(len(items), 0, 1)
            items.append(first)
            continue
        chosen = dict.fromkeys(pairs[i].chosen for i in group)
        number = {r: k for k, r in enumerate(chosen | dict.fromkeys(pairs[i].rejected for i in group))}
        for i in group:
            refs[i] = PairRef(len(items), number[pairs[i].chosen], number[pairs[i].rejected])
        items.append(Candidates(first.prompt, tuple(number), len(chosen)))
    return items, refs


def responses_of(item: Item) -> tuple[Response, ...]:
    """An item's responses in the order of their segments; of a pair the chosen one first."""
    return item.responses if isinstance(item, Candidates) else (item.chosen, item.rejected)


def prompts_of(item: Item) -> tuple[tuple[int, ...], ...]:
    """The prompt of each response of an item."""
    return (item.prompt,) * len(item.responses) if isinstance(item, Candidates) else item.prompts


def packed_length(item: Item, length_threshold: int | None = None) -> int:
    """Positions the item takes in a row."""
    shared = shared_tokens(item, length_threshold)
    responses = responses_of(item)
    contents = sum(len(r.content) for r in responses)
    if shared is None:
        return sum(map(len, prompts_of(item))) + contents
    return len(item.prompt) + contents - (len(responses) - 1) * shared


def tokens_apart(items: Iterable[Item]) -> int:
    """Positions of the items' responses if each had a prompt of its own and nothing were shared."""
    return sum(
        len(prompt) + len(response.content)
        for item in items
        for prompt, response in zip(prompts_of(item), responses_of(item), strict=True)
    )


def shared_tokens(item: Item, length_threshold: int | None) -> int | None:
    """Tokens that all responses begin with; None where the sequences must be computed apart.

    So they are where each has a prompt of its own; and rope kinds that depend on the length of the sequence give the
    prompt other states in a longer sequence.
    """
    if isinstance(item, TokenPair) and item.rejected_prompt is not None:
        return None
    contents = [r.content for r in responses_of(item)]
    if length_threshold is not None and len(item.prompt) + max(map(len, contents)) > length_threshold:
        return None
    return min([common_prefix(contents[0], c) for c in contents[1:]], default=len(contents[0]))


def row_length(item: Item, standard: int, length_threshold: int | None = None) -> int:
    """``standard``, or the next doubling of it that holds the item."""
    return doubled(standard, packed_length(item, length_threshold))


def doubled(size: int, needed: int) -> int:
    """``size``, or the next doubling of it that is as large as needed: few sizes, few compiled programs.

    >>> doubled(64, 10), doubled(64, 65)
    (64, 128)
    """
    while size < needed:
        size *= 2
    return size


def fitting_length(items: Sequence[Item], standard: int, rows: int, length_threshold: int | None = None) -> int:
    """The row length, of ``SHORT_ROWS`` and ``standard``, at which a few items take the fewest positions.

    It depends on the items alone. Where they are more than ``FEW_BATCHES`` of ``rows`` standard rows, little of those
    is padding, and they stay.
    """
    positions = [packed_length(item, length_threshold) for item in items]
    pairs = [pair_capacity_of(item) for item in items]
    if sum(positions) > FEW_BATCHES * rows * standard:
        return standard

    def computed(length: int) -> int:
        batches = -(-len(first_fit_decreasing(positions, length, pairs)) // rows)
        return max(1, batches) * rows * length

    fitting = [
        length
        for length in SHORT_ROWS
        if length < standard
        and max(positions, default=0) <= length
        and max(pairs, default=0) <= standard_max_pairs(length)
    ]
    # of equal ones the shortest, whose program compiles soonest
    return min((*fitting, standard), key=lambda length: (computed(length), length)) if fitting else standard


def pair_capacity_of(item: Item) -> int:
    """Pairs it counts for in a row's capacity: it has 1 + N segments, and N - 1 predictions more than positions."""
    return max(1, len(responses_of(item)) - 1)


def standard_max_pairs(length: int) -> int:
    """Pairs that a row of ``length`` positions has room for."""
    return max(1, min(length // TOKENS_PER_PAIR, MAX_PAIRS))


def row_max_pairs(item: Item, length: int) -> int:
    """``standard_max_pairs``, or the next doubling of it that holds the item's responses."""
    return doubled(standard_max_pairs(length), pair_capacity_of(item))


def row_capacity(length: int, max_pairs: int | None = None) -> tuple[int, int, int]:
    """(pairs, predictions, segments) that a row of ``length`` positions has room for."""
    pairs = standard_max_pairs(length) if max_pairs is None else max_pairs
    return pairs, length + pairs, 3 * pairs


def first_fit_decreasing(
    lengths: Sequence[int], row_length: int, pairs: Sequence[int] | None = None, max_pairs: int = 0
) -> list[list[int]]:
    """Which items share a row, where all rows are alike: bin packing by first-fit decreasing, ties in order.

    Args:
      lengths: packed length of each item.
      row_length: positions of a row.
      pairs: pairs that each item counts for (``pair_capacity_of``); 1 when not given.
      max_pairs: pairs a row has room for; ``standard_max_pairs(row_length)`` when not given.

    >>> first_fit_decreasing([40, 20, 32], 64)
    [[0, 1], [2]]
    """
    pairs = [1] * len(lengths) if pairs is None else pairs
    room = row_length, max_pairs or standard_max_pairs(row_length)
    return first_fit_in_rows(list(zip(lengths, pairs, strict=True)), [room] * len(lengths))


def first_fit_in_rows(sizes: Sequence[tuple[int, int]], rooms: Sequence[tuple[int, int]]) -> list[list[int]]:
    """``first_fit_decreasing`` where each item says which row it needs; the first item of a row has opened it.

    So what is left of the rows of long items holds short ones.

    Args:
      sizes: (positions, pairs) of each item.
      rooms: (positions, pairs) of the row that it opens if it fits in none that is there.

    >>> first_fit_in_rows([(40, 1), (100, 1), (20, 1)], [(64, 2), (128, 2), (64, 2)])
    [[1, 2], [0]]
    """
    rows: list[list[int]] = []
    free: list[int] = []
    free_pairs: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i][0], i)):
        length, pairs = sizes[i]
        fit = next((r for r, room in enumerate(free) if room >= length and free_pairs[r] >= pairs), None)
        if fit is None:
            rows.append([])
            free.append(rooms[i][0])
            free_pairs.append(rooms[i][1])
            fit = len(rows) - 1
        rows[fit].append(i)
        free[fit] -= length
        free_pairs[fit] -= pairs
    return rows


def empty_batch(count: int, length: int, max_pairs: int | None = None) -> PackedBatch:
    """Rows of padding: every position sees only itself and nothing is predicted."""
    _, predictions, segments = row_capacity(length, max_pairs)
    t, m, s = (count, length), (count, predictions), (count, segments)
    return PackedBatch(
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

    def __init__(self, rows: PackedBatch, row: int):
        self.rows = rows
        self.row = row
        self.at = 0
        self.predictions = 0
        self.segments = 0

    def write_tokens(self, tokens: Sequence[int], start: int, total: int, context: tuple[int, int] = (0, 0)) -> int:
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
        if shared is None:
            for segment, (prompt, response) in enumerate(zip(prompts_of(item), responses, strict=True), first + 1):
                whole = (*prompt, *response.content)
                a = self.write_tokens(whole, 0, len(whole))
                self.predict(range(a + len(prompt) - 1, a + len(whole)), response.targets(eos), segment)
                self.rows.last[self.row, segment] = a + len(whole) - 1
            return
        prompt = len(item.prompt)
        total = prompt + max(len(r.content) for r in responses)
        common = (*item.prompt, *responses[0].content[:shared])
        a = self.write_tokens(common, 0, total)
        end = a + len(common)
        self.predict(range(a + prompt - 1, end), responses[0].content[:shared], first)
        for segment, response in enumerate(responses, first + 1):
            own = response.content[shared:]
            b = self.write_tokens(own, len(common), total, (a, end))
            self.predict([end - 1, *range(b, b + len(own))], response.targets(eos)[shared:], segment)
            self.rows.last[self.row, segment] = b + len(own) - 1 if own else end - 1


class BatchPlan(NamedTuple):
    """Which items make which row of a batch; known before anything is written."""

    length: int
    """Positions of a row."""
    row_count: int
    """Rows of the batch; those beyond ``rows`` are padding."""
    rows: list[list[int]]
    """Indices of the items of each row, in their order."""
    segments: list[list[int]]
    """How many segments each of them has."""
    max_pairs: int
    """Pairs a row has room for."""

    def placements(self) -> list[Placement]:
        """Where every item lies."""
        return [
            Placement(i, row, first, count)
            for row, (group, counts) in enumerate(zip(self.rows, self.segments, strict=True))
            for i, first, count in zip(group, accumulate(counts, initial=0), counts, strict=False)
        ]


def plan_batches(
    items: Sequence[Item],
    *,
    length: int,
    rows_per_batch: int,
    row_multiple: int = 1,
    length_threshold: int | None = None,
    max_pairs: int = 1,
) -> Iterator[BatchPlan]:
    """Which items make which row of which batch, every item once; arguments of ``pack``.

    ``max_pairs``: room that every row has at least, so that items of many and of few responses share a shape.
    """
    lengths = [packed_length(item, length_threshold) for item in items]
    row_lengths = _tightened([doubled(length, n) for n in lengths], lengths, length)
    rooms = [(n, max(max_pairs, row_max_pairs(item, n))) for n, item in zip(row_lengths, items, strict=True)]
    pairs = [pair_capacity_of(item) for item in items]
    by_shape: dict[tuple[int, int], list[list[int]]] = {}
    for row in first_fit_in_rows(list(zip(lengths, pairs, strict=True)), rooms):
        by_shape.setdefault(rooms[row[0]], []).append(sorted(row))
    for row_len, most_pairs in sorted(by_shape):
        rows_of = by_shape[row_len, most_pairs]
        count = max(1, rows_per_batch * length // row_len)
        count = -(-count // row_multiple) * row_multiple
        for at in range(0, len(rows_of), count):
            rows = rows_of[at : at + count]
            segments = [[1 + len(responses_of(items[i])) for i in group] for group in rows]
            yield BatchPlan(row_len, count, rows, segments, most_pairs)


def _tightened(row_lengths: Sequence[int], lengths: Sequence[int], standard: int) -> list[int]:
    """Rows of three quarters of a doubled length, where all items of such rows fit: no more shapes than before.

    >>> _tightened([2048, 4096, 4096, 8192], [700, 2500, 3000, 8000], 2048)
    [2048, 3072, 3072, 8192]
    """
    most: dict[int, int] = {}
    for row, n in zip(row_lengths, lengths, strict=True):
        most[row] = max(n, most.get(row, 0))
    # blocks of attention divide them still
    fitting = {row: row * 3 // 4 for row, n in most.items() if standard < row and n <= row * 3 // 4 and row % 512 == 0}
    return [fitting.get(row, row) for row in row_lengths]


def write_batch(
    items: Sequence[Item],
    plan: BatchPlan,
    eos: Eos,
    length_threshold: int | None = None,
    only: Sequence[int] | None = None,
) -> PackedBatch:
    """The rows of a plan, or ``only`` those with these numbers, in this order."""
    numbers = range(plan.row_count) if only is None else only
    batch = empty_batch(len(numbers), plan.length, plan.max_pairs)
    for row, number in enumerate(numbers):
        writer = _RowWriter(batch, row)
        for i in plan.rows[number] if number < len(plan.rows) else ():
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
) -> Iterator[tuple[PackedBatch, list[Placement]]]:
    """Batches of packed rows with the place of every item.

    Args:
      items: scorable pairs, or what ``group_by_prompt`` makes of them; every one is placed exactly once.
      length: standard row length; longer items get rows of a doubled length, or three quarters of it (fewer a batch).
      rows_per_batch: rows of a standard batch; the last batch is filled up with padding rows.
      eos: whether a terminator counts as a prediction.
      row_multiple: the rows of a batch are a multiple of this (the devices they are sharded over).
      length_threshold: sequences longer than this are not shared (``RopeConfig.length_threshold``).
    """
    for plan in plan_batches(
        items,
        length=length,
        rows_per_batch=rows_per_batch,
        row_multiple=row_multiple,
        length_threshold=length_threshold,
    ):
        yield write_batch(items, plan, eos, length_threshold), plan.placements()
