"""Items -> one packed micro-batch: rows, the place of every response, what else the objective needs.

An item is a prompt with its responses, two of them for most objectives. A micro-batch is one group of arrays whatever
its items: rows of one length, as many as are needed, and room for the predictions that are there. Numbers of rows and
predictions are fitted to the run beforehand, so that a run compiles a handful of shapes. The items themselves are never
padded: a loss sees exactly those of the batch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations, pairwise
from typing import Any, NamedTuple

import numpy as np

from ches_jax.data.packing import (
    BatchPlan,
    Item,
    PackedBatch,
    empty_batch,
    packed_length,
    plan_batches,
    responses_of,
    row_length,
    row_max_pairs,
    shared_tokens,
    write_batch,
)
from ches_jax.types import Eos


class TokenPlaces(NamedTuple):
    """Where the log-probability of each response token lies, and what the reference gives it.

    [P, R, T] with T the longest response of the run; the ends of shorter ones are padding.
    """

    at: Any
    """Index among the predictions of the item's row."""
    mask: Any
    """1 on the response's tokens, 0 on padding."""
    reference: Any
    """Nats; zeros where the objective has no reference."""


class Batch(NamedTuple):
    """P items of R responses each, in packed rows."""

    rows: PackedBatch
    """In a run of several processes, the rows that this process uploads."""
    row: Any
    """[P] row of each item."""
    shared: Any
    """[P] first of its segments; those of its responses follow."""
    counts: Any
    """[P, R] tokens of each response."""
    reference: Any
    """[P, R] the reference's log-probabilities in nats; zeros where the objective has none."""
    extra: dict[str, Any]
    """[P] other columns that the objective reads, by field of ``LossInputs``: weights, rewards, labels; [P, T] of
    tokens."""
    tokens: TokenPlaces | None = None
    """For objectives of tokens."""
    sft: "Batch | None" = None
    """Rows of another set, of which a likelihood term is taken."""


class Layout(NamedTuple):
    """How pairs become rows; the same for a whole run."""

    row_tokens: int
    """Standard row length."""
    row_multiple: int
    """Rows of a batch are a multiple of this: the devices they are sharded over."""
    eos: Eos
    length_threshold: int | None = None
    """``RopeConfig.length_threshold``: longer sequences are not shared."""
    row_counts: tuple[int, ...] = ()
    """Numbers of rows of a batch of standard rows, rising; ``fitted`` chooses them."""
    predictions: int = 0
    """Predictions of a standard row; 0: as many as the batch needs."""
    responses: int = 0
    """Room for the responses of an item, where items differ in their number; 0: they do not."""
    response_tokens: int = 0
    """Room for the tokens of a response, where the objective reads tokens; 0: it does not."""
    local_shards: tuple[int, ...] | None = None
    """Of the ``row_multiple`` equal parts of a batch's rows, those that this process fills; None: all."""


def stepped(n: int) -> int:
    """The next number with three significant bits: 1 2 3 .. 8 10 12 14 16 20 24 ...; at most a quarter is added.

    >>> [stepped(n) for n in (1, 7, 9, 13, 17, 33)]
    [1, 7, 10, 14, 20, 40]
    """
    unit = 2 ** max(0, n.bit_length() - 3)
    return -(-n // unit) * unit


def fitted(layout: Layout, groups: Iterable[Sequence[Item]], most: int = 3) -> Layout:
    """The layout with at most ``most`` batch sizes: those that pad the batches of the run least.

    A short run gets fewer, since each costs a compilation.
    """
    counts: Counter[int] = Counter()
    predictions = 0
    for group in groups:
        plan = _arranged(group, layout)
        if plan.length == layout.row_tokens:
            counts[-(-len(plan.rows) // layout.row_multiple) * layout.row_multiple] += 1
            predictions = max(predictions, most_predictions(group, plan, layout))
    sizes = fewest(counts, min(most, 1 + counts.total() // 32))
    return layout._replace(row_counts=sizes, predictions=predictions)


def _arranged(items: Sequence[Item], layout: Layout) -> BatchPlan:
    """Rows of one length for all ``items``, as few as hold them."""
    length = max(row_length(item, layout.row_tokens, layout.length_threshold) for item in items)
    most = max(row_max_pairs(item, length) for item in items)
    # a row for every item is more than enough
    (plan,) = plan_batches(
        items, length=length, rows_per_batch=len(items), length_threshold=layout.length_threshold, max_pairs=most
    )
    return plan


def fewest(counts: Counter[int], most: int) -> tuple[int, ...]:
    """At most ``most`` sizes that hold all counted ones with the least padding.

    >>> fewest(Counter({1: 5, 2: 9, 3: 1, 8: 2}), 2)
    (2, 8)
    """
    if not counts:
        return ()
    sizes, top = sorted(counts), max(counts)
    if len(sizes) > 24:  # a few dozen are too many to try: every n-th
        sizes = sizes[:: -(-len(sizes) // 24)]
    below = [s for s in sizes if s < top]

    def padding(chosen: tuple[int, ...]) -> int:
        return sum(n * (next(c for c in chosen if c >= size) - size) for size, n in counts.items())

    tried = [(*c, top) for k in range(min(most - 1, len(below)) + 1) for c in combinations(below, k)]
    return min(tried, key=lambda chosen: (padding(chosen), len(chosen)))


def _counts(item: Item, layout: Layout) -> tuple[int, list[int]]:
    """Predictions that all responses of an item share, and those of each response with them."""
    shared = shared_tokens(item, layout.length_threshold) or 0
    return shared, [len(r.targets(layout.eos)) for r in responses_of(item)]


def _predictions(item: Item, layout: Layout) -> int:
    shared, counts = _counts(item, layout)
    return sum(counts) - (len(counts) - 1) * shared


def most_predictions(items: Sequence[Item], plan: BatchPlan, layout: Layout) -> int:
    """Predictions of the row of a plan that has most of them."""
    return max(sum(_predictions(items[i], layout) for i in row) for row in plan.rows)


def standard_row(items: Sequence[Item], length_threshold: int | None = None, multiple: int = 64) -> int:
    """The row length that holds the longest item, in multiples of the attention tile."""
    longest = max(packed_length(item, length_threshold) for item in items)
    return -(-longest // multiple) * multiple


def make_batch(
    items: Sequence[Item],
    layout: Layout,
    reference: Sequence[Sequence[Any]] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    dtype: Any = np.float32,
) -> Batch:
    """Pack ``items`` into one batch, in their order.

    Args:
      items: what is packed; all have the same number of responses.
      layout: how.
      reference: for each response of an item (chosen, rejected), of each item the reference's log-probability in nats,
        or for objectives of tokens the array of them.
      extra: what else the objective reads, by field of ``LossInputs``.
      dtype: of all that is no integer.
    """
    plan = _arranged(items, layout)
    used = len(plan.rows)
    standard = plan.length == layout.row_tokens
    fit = [c for c in layout.row_counts if c >= used] if standard else []
    count = fit[0] if fit else stepped(-(-used // layout.row_multiple)) * layout.row_multiple
    plan = plan._replace(row_count=count)
    rows = write_batch(items, plan, layout.eos, layout.length_threshold, local_rows(count, layout))
    rows = without_empty_room(
        rows, plan.length, most_predictions(items, plan, layout), layout.predictions if standard else 0
    )
    row, shared, first = (np.zeros(len(items), np.int32) for _ in range(3))
    for place in plan.placements():
        row[place.item], shared[place.item] = place.row, place.shared
    for group in plan.rows:
        sizes = [_predictions(items[i], layout) for i in group]
        first[group] = np.cumsum([0, *sizes[:-1]])
    return without_rows(items, layout, reference, extra, dtype, first)._replace(rows=rows, row=row, shared=shared)


def without_rows(
    items: Sequence[Item],
    layout: Layout,
    reference: Sequence[Sequence[Any]] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    dtype: Any = np.float32,
    first: np.ndarray | None = None,
) -> Batch:
    """A batch without rows: what an objective reads beside the log-probabilities.

    Arguments of ``make_batch``; ``first`` says where the predictions of each item begin in its row.
    """
    counts = _response_counts(items, layout)
    nothing = np.zeros(len(items), np.int32)
    sums = np.zeros(counts.shape)
    if reference is not None:
        sums = np.array([[np.sum(v) for v in side] for side in reference]).T
    return Batch(
        rows=empty_batch(0, 1),
        row=nothing,
        shared=nothing,
        counts=counts,
        reference=sums.astype(dtype),
        extra={k: _extra(v, layout.response_tokens, dtype) for k, v in (extra or {}).items()},
        tokens=_token_places(items, nothing if first is None else first, layout, reference, dtype)
        if layout.response_tokens
        else None,
    )


def _response_counts(items: Sequence[Item], layout: Layout) -> np.ndarray:
    """[P, R] tokens of each response; 0 where an item has fewer responses than there is room for."""
    counts = [np.array(_counts(item, layout)[1], np.int32) for item in items]
    return padded(counts, layout.responses, np.int32) if layout.responses else np.array(counts, np.int32)


def _extra(values: np.ndarray, width: int, dtype: Any) -> np.ndarray:
    """A column that an objective reads: labels as they are, numbers of tokens padded, all others as ``dtype``."""
    if values.dtype == object:
        return padded(list(values), width, dtype)
    return np.asarray(values, values.dtype if values.dtype == bool else dtype)


def local_rows(count: int, layout: Layout) -> list[int]:
    """Numbers of the rows of a batch of ``count`` that this process fills."""
    part = count // layout.row_multiple
    local = range(layout.row_multiple) if layout.local_shards is None else layout.local_shards
    return [shard * part + i for shard in local for i in range(part)]


def padded(values: Sequence[np.ndarray], width: int, dtype: Any) -> np.ndarray:
    """Rows of unequal length as one array, zeros at their ends."""
    out = np.zeros((len(values), width), dtype)
    for row, some in zip(out, values, strict=True):
        row[: len(some)] = some
    return out


def _token_places(items: Sequence[Item], first: np.ndarray, layout: Layout, reference: Any, dtype: Any) -> TokenPlaces:
    """Places of the tokens of items whose predictions begin at ``first`` in their rows."""
    places: list[list[np.ndarray]] = []
    for item, start in zip(items, first, strict=True):
        shared, counts = _counts(item, layout)
        ends = start + shared + np.cumsum([0, *(n - shared for n in counts)])
        places.append([np.concatenate([start + np.arange(shared), np.arange(a, b)]) for a, b in pairwise(ends)])
    # [R][P] of arrays, as the reference's
    sides = [list(side) for side in zip(*places, strict=True)]
    per_token = reference is not None and np.ndim(reference[0][0]) == 1
    refs = reference if per_token else [[v * 0.0 for v in side] for side in sides]
    width = layout.response_tokens

    def stacked(values: Any, kind: Any) -> np.ndarray:
        return np.stack([padded(side, width, kind) for side in values], axis=1)

    masks = [[np.ones(len(v)) for v in side] for side in sides]
    return TokenPlaces(stacked(sides, np.int32), stacked(masks, np.int32), stacked(refs, dtype))


def without_empty_room(rows: PackedBatch, length: int, used: int, room: int) -> PackedBatch:
    """The batch with room for the predictions it has (``room``, or eighths of the row): each costs a product with W."""
    part = max(1, length // 8)
    keep = min(room if room >= used else -(-used // part) * part, rows.segment.shape[1])
    return rows._replace(
        **{n: np.ascontiguousarray(getattr(rows, n)[:, :keep]) for n in ("source", "target", "segment")}
    )
