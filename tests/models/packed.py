"""Packed rows whose every token occurs once, so that a sequence can be found in its row by its tokens alone."""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ches_jax.data.packing import PackedBatch, pack
from ches_jax.models.attention.mask import Visibility
from ches_jax.types import Response, TokenPair


class Packed(NamedTuple):
    """A batch of rows, and of each sequence in it: the row, and where its tokens lie."""

    rows: PackedBatch
    sequences: list[tuple[int, np.ndarray]]

    @property
    def seen(self) -> Visibility:
        return Visibility(*map(jnp.asarray, (self.rows.context_start, self.rows.context_end, self.rows.own_start)))


def packed(sizes: Sequence[Sequence[int]], length: int) -> Packed:
    """Pairs of (prompt, shared response prefix, rest of chosen, rest of rejected) tokens in one batch of rows."""
    fresh = itertools.count(1)

    def some(n: int) -> tuple[int, ...]:
        return tuple(itertools.islice(fresh, n))

    pairs = []
    for i, (prompt, shared, chosen, rejected) in enumerate(sizes):
        begin, both = some(prompt), some(shared)
        a, b = (Response((*both, *some(n)), 0) for n in (chosen, rejected))
        pairs.append(TokenPair(row_id=str(i), index=i, prompt=begin, chosen=a, rejected=b))
    ((rows, places),) = pack(pairs, length=length, rows_per_batch=64, eos="include")
    used = max(p.row for p in places) + 1
    rows = PackedBatch(*(None if a is None else a[:used] for a in rows))
    sequences = []
    for place in places:
        pair = pairs[place.item]
        here: dict[int, Any] = {int(t): at for at, t in enumerate(rows.tokens[place.row]) if t}
        for response in (pair.chosen, pair.rejected):
            sequences.append((place.row, np.array([here[t] for t in (*pair.prompt, *response.content)])))
    return Packed(rows, sequences)
