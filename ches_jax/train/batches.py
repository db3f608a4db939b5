"""Token pairs -> one packed micro-batch: rows, the place of every pair, what else the objective needs.

A micro-batch is one group of arrays whatever its pairs: rows of one length, as many as are needed, and room for the
predictions that are there. Numbers of rows and predictions are fitted to the run beforehand, so that a run compiles a
handful of shapes. The pairs themselves are never padded: a loss sees exactly the pairs of the batch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ches_jax.data.packing import Rows, arrange, assign, empty_rows, need, row_length, shared_tokens, write_rows
from ches_jax.types import Eos, TokenPair


class TokenPlaces(NamedTuple):
    """Where the log-probability of each response token lies, and what the reference gives it.

    [P, T] with T the longest response of the run; the ends of shorter ones are padding.
    """

    chosen: Any
    """Index among the predictions of the pair's row."""
    rejected: Any
    chosen_mask: Any
    """1 on the response's tokens, 0 on padding."""
    rejected_mask: Any
    ref_chosen: Any
    """Nats; zeros where the objective has no reference."""
    ref_rejected: Any


class Batch(NamedTuple):
    """P pairs in packed rows, which are N examples of the objective (N = P but where an example has several pairs)."""

    rows: Rows
    """In a run of several processes, the rows that this process uploads."""
    row: Any
    """[P] row of each pair."""
    shared: Any
    """[P] first of its three segments."""
    chosen_tokens: Any
    rejected_tokens: Any
    ref_logp_chosen: Any
    """[P] nats; zeros where the objective has no reference."""
    ref_logp_rejected: Any
    given: dict[str, Any]
    """[N] what the data say of each example, by field of ``LossInputs``: weights, rewards, labels."""
    tokens: TokenPlaces | None = None
    """For objectives of tokens."""


class Layout(NamedTuple):
    """How pairs become rows; the same for a whole run."""

    row_tokens: int
    """Standard row length."""
    row_multiple: int
    """Rows of a batch are a multiple of this: the devices they are dealt to."""
    eos: Eos
    length_threshold: int | None = None
    """``RopeConfig.length_threshold``: longer sequences are not shared."""
    row_counts: tuple[int, ...] = ()
    """Numbers of rows of a batch of standard rows, rising; ``fitted`` chooses them."""
    predictions: int = 0
    """Predictions of a standard row; 0: as many as the batch needs."""
    response_tokens: int = 0
    """Room for the tokens of a response, where the objective reads tokens; 0: it does not."""
    held: tuple[int, ...] | None = None
    """Of the ``row_multiple`` equal parts of a batch's rows, those that this process fills; None: all."""


def stepped(n: int) -> int:
    """The next number with three significant bits: 1 2 3 .. 8 10 12 14 16 20 24 ...; at most a quarter is added.

    >>> [stepped(n) for n in (1, 7, 9, 13, 17, 33)]
    [1, 7, 10, 14, 20, 40]
    """
    unit = 2 ** max(0, n.bit_length() - 3)
    return -(-n // unit) * unit


def fitted(layout: Layout, groups: Iterable[Sequence[TokenPair]], most: int = 3) -> Layout:
    """The layout with at most ``most`` batch sizes: those that pad the batches of the run least.

    A short run gets fewer, since each costs a compilation.
    """
    counts: Counter[int] = Counter()
    predictions = 0
    for group in groups:
        if max(row_length(p, layout.row_tokens, layout.length_threshold) for p in group) > layout.row_tokens:
            continue
        rows = assign([need(p, layout.length_threshold) for p in group], layout.row_tokens)
        counts[-(-len(rows) // layout.row_multiple) * layout.row_multiple] += 1
        predictions = max(predictions, *(sum(_predictions(group[i], layout) for i in row) for row in rows))
    part = max(1, layout.row_tokens // 8)
    room = -(-predictions // part) * part
    return layout._replace(row_counts=fewest(counts, min(most, 1 + counts.total() // 32)), predictions=room)


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


def _predictions(pair: TokenPair, layout: Layout) -> int:
    shared, chosen, rejected = _counts(pair, layout)
    return chosen + rejected - shared


def _counts(pair: TokenPair, layout: Layout) -> tuple[int, int, int]:
    """Predictions that both responses share, of the chosen and of the rejected one."""
    shared = shared_tokens(pair, layout.length_threshold) or 0
    return shared, len(pair.chosen.targets(layout.eos)), len(pair.rejected.targets(layout.eos))


def standard_row(pairs: Sequence[TokenPair], length_threshold: int | None = None, multiple: int = 64) -> int:
    """The row length that holds the longest pair, in multiples of the attention tile."""
    longest = max(need(p, length_threshold) for p in pairs)
    return -(-longest // multiple) * multiple


def make_batch(
    pairs: Sequence[TokenPair],
    layout: Layout,
    reference: Sequence[Any] | None = None,
    given: Mapping[str, np.ndarray] | None = None,
    dtype: Any = np.float32,
) -> Batch:
    """Pack ``pairs`` into one batch, in their order.

    Args:
      pairs: what is packed.
      layout: how.
      reference: for chosen and for rejected responses, of each pair the reference's log-probability in nats, or for
        objectives of tokens the array of them.
      given: what else the objective reads, by name.
      dtype: of all that is no integer.
    """
    length = max(row_length(p, layout.row_tokens, layout.length_threshold) for p in pairs)
    (found,) = arrange(
        pairs, length=length, rows_per_batch=len(pairs), length_threshold=layout.length_threshold
    )  # a row for every pair is more than enough
    used = len(found.rows)
    standard = length == layout.row_tokens
    fit = [c for c in layout.row_counts if c >= used] if standard else []
    count = fit[0] if fit else stepped(-(-used // layout.row_multiple)) * layout.row_multiple
    found = found._replace(row_count=count)
    rows = write_rows(pairs, found, layout.eos, layout.length_threshold, held_rows(count, layout))
    most = max(sum(_predictions(pairs[i], layout) for i in row) for row in found.rows)
    rows = _without_empty_room(rows, length, most, layout.predictions if standard else 0)
    row, shared, first = (np.zeros(len(pairs), np.int32) for _ in range(3))
    for place in found.places():
        row[place.pair], shared[place.pair] = place.row, place.shared
    for group in found.rows:
        sizes = [_predictions(pairs[i], layout) for i in group]
        first[group] = np.cumsum([0, *sizes[:-1]])
    return pair_numbers(pairs, layout, reference, given, dtype, first)._replace(rows=rows, row=row, shared=shared)


def pair_numbers(
    pairs: Sequence[TokenPair],
    layout: Layout,
    reference: Sequence[Any] | None = None,
    given: Mapping[str, np.ndarray] | None = None,
    dtype: Any = np.float32,
    first: np.ndarray | None = None,
) -> Batch:
    """A batch without rows: what an objective reads beside the log-probabilities.

    Arguments of ``make_batch``; ``first`` says where the predictions of each pair begin in its row.
    """
    nothing = np.zeros(len(pairs))
    sums = [nothing, nothing] if reference is None else [[np.sum(v) for v in side] for side in reference]
    start = nothing.astype(np.int32) if first is None else first
    return Batch(
        rows=empty_rows(0, 1),
        row=nothing.astype(np.int32),
        shared=nothing.astype(np.int32),
        chosen_tokens=np.array([len(p.chosen.targets(layout.eos)) for p in pairs], np.int32),
        rejected_tokens=np.array([len(p.rejected.targets(layout.eos)) for p in pairs], np.int32),
        ref_logp_chosen=np.array(sums[0], dtype),
        ref_logp_rejected=np.array(sums[1], dtype),
        given={k: np.asarray(v, v.dtype if v.dtype == bool else dtype) for k, v in (given or {}).items()},
        tokens=_token_places(pairs, start, layout, reference, dtype) if layout.response_tokens else None,
    )


def held_rows(count: int, layout: Layout) -> list[int]:
    """Numbers of the rows of a batch of ``count`` that this process fills."""
    part = count // layout.row_multiple
    held = range(layout.row_multiple) if layout.held is None else layout.held
    return [shard * part + i for shard in held for i in range(part)]


def padded(values: Sequence[np.ndarray], width: int, dtype: Any) -> np.ndarray:
    """Rows of unequal length as one array, zeros at their ends."""
    out = np.zeros((len(values), width), dtype)
    for row, some in zip(out, values, strict=True):
        row[: len(some)] = some
    return out


def _token_places(
    pairs: Sequence[TokenPair], first: np.ndarray, layout: Layout, reference: Any, dtype: Any
) -> TokenPlaces:
    """Places of the tokens of pairs whose predictions begin at ``first`` in their rows."""
    chosen, rejected = [], []
    for pair, start in zip(pairs, first, strict=True):
        shared, n, m = _counts(pair, layout)
        every = start + np.arange(n + m - shared)
        chosen.append(every[:n])
        rejected.append(np.concatenate([every[:shared], every[n:]]))
    width = layout.response_tokens
    none = [np.zeros(0)] * len(pairs)
    refs = [none, none] if reference is None or np.ndim(reference[0][0]) == 0 else reference
    return TokenPlaces(
        *(padded(side, width, np.int32) for side in (chosen, rejected)),
        *(padded([np.ones(len(p)) for p in side], width, np.int32) for side in (chosen, rejected)),
        *(padded(side, width, dtype) for side in refs),
    )


def _without_empty_room(rows: Rows, length: int, used: int, room: int) -> Rows:
    """The batch with room for the predictions it has (``room``, or eighths of the row): each costs a product with W."""
    part = max(1, length // 8)
    keep = min(room if room >= used else -(-used // part) * part, rows.segment.shape[1])
    return rows._replace(
        **{n: np.ascontiguousarray(getattr(rows, n)[:, :keep]) for n in ("source", "target", "segment")}
    )


def position_waste(batch: Batch) -> float:
    """Share of computed positions that hold nothing."""
    return 1.0 - float((batch.rows.lengths > 0).mean())
