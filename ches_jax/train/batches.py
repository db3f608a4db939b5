"""Token pairs -> one packed micro-batch: rows, the place of every pair, what else the objective needs.

A micro-batch is one group of arrays whatever its pairs: rows of one length, as many as are needed, and room for the
predictions that are there. Numbers of rows and predictions are fitted to the run beforehand, so that a run compiles a
handful of shapes. The pairs themselves are never padded: a loss sees exactly the pairs of the batch.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from ches_jax.data.audit import shared_prefix
from ches_jax.data.packing import Rows, assign, capacity, need, pack, row_length
from ches_jax.types import Eos, Response, TokenPair


class Batch(NamedTuple):
    """P pairs in packed rows."""

    rows: Rows
    row: Any
    """[P] row of each pair."""
    shared: Any
    """[P] first of its three segments."""
    chosen_tokens: Any
    rejected_tokens: Any
    ref_logp_chosen: Any
    """[P] nats; zeros where the objective has no reference."""
    ref_logp_rejected: Any
    weights: Any
    """[P] weight of each pair, for objectives that read one."""


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
        predictions = max(predictions, *(sum(_predictions(group[i], layout.eos) for i in row) for row in rows))
    part = max(1, layout.row_tokens // 8)
    # a pair whose sequences are computed apart predicts its shared tokens twice
    room = -(-predictions // part) * part if layout.length_threshold is None else 0
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


def _predictions(pair: TokenPair, eos: Eos) -> int:
    return len(pair.chosen.targets(eos)) + len(pair.rejected.targets(eos)) - shared_prefix(pair)


def standard_row(pairs: Sequence[TokenPair], length_threshold: int | None = None, multiple: int = 64) -> int:
    """The row length that holds the longest pair, in multiples of the attention tile."""
    longest = max(need(p, length_threshold) for p in pairs)
    return -(-longest // multiple) * multiple


def chosen_only(pair: TokenPair) -> TokenPair:
    """The pair without its rejected response: what supervised fine-tuning computes."""
    return TokenPair(
        row_id=pair.row_id, index=pair.index, prompt=pair.prompt, chosen=pair.chosen, rejected=Response((), None),
        flags=pair.flags, category=pair.category, detail=pair.detail,
    )  # fmt: skip


def make_batch(
    pairs: Sequence[TokenPair],
    layout: Layout,
    ref_chosen: np.ndarray | None = None,
    ref_rejected: np.ndarray | None = None,
    weights: np.ndarray | None = None,
    dtype: Any = np.float32,
) -> Batch:
    """Pack ``pairs`` into one batch, in their order."""
    length = max(row_length(p, layout.row_tokens, layout.length_threshold) for p in pairs)
    count = len(assign([need(p, layout.length_threshold) for p in pairs], length))
    standard = length == layout.row_tokens
    fit = [c for c in layout.row_counts if c >= count] if standard else []
    count = fit[0] if fit else stepped(-(-count // layout.row_multiple)) * layout.row_multiple
    # the packer doubles rows for pairs longer than its standard: here none is
    ((rows, places),) = pack(
        pairs, length=length, rows_per_batch=count, eos=layout.eos, length_threshold=layout.length_threshold
    )
    rows = _without_empty_room(rows, length, layout.predictions if standard else 0)
    row, shared = np.zeros(len(pairs), np.int32), np.zeros(len(pairs), np.int32)
    for place in places:
        row[place.pair], shared[place.pair] = place.row, place.shared
    nothing = np.zeros(len(pairs), dtype)
    return Batch(
        rows=rows,
        row=row,
        shared=shared,
        chosen_tokens=np.array([len(p.chosen.targets(layout.eos)) for p in pairs], np.int32),
        rejected_tokens=np.array([len(p.rejected.targets(layout.eos)) for p in pairs], np.int32),
        ref_logp_chosen=nothing if ref_chosen is None else np.asarray(ref_chosen, dtype),
        ref_logp_rejected=nothing if ref_rejected is None else np.asarray(ref_rejected, dtype),
        weights=np.ones(len(pairs), dtype) if weights is None else np.asarray(weights, dtype),
    )


def _without_empty_room(rows: Rows, length: int, room: int) -> Rows:
    """The batch with room for the predictions it has (``room``, or eighths of the row): each costs a product with W."""
    padding = capacity(length)[2]
    used = int((rows.segment != padding).sum(axis=1).max())
    part = max(1, length // 8)
    keep = min(room if room >= used else -(-used // part) * part, rows.segment.shape[1])
    return rows._replace(
        **{n: np.ascontiguousarray(getattr(rows, n)[:, :keep]) for n in ("source", "target", "segment")}
    )


def position_waste(batch: Batch) -> float:
    """Share of computed positions that hold nothing."""
    return 1.0 - float((batch.rows.lengths > 0).mean())
