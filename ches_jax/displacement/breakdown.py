"""Which kinds of pairs fell: the changes by category and by length."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ches_jax.displacement import TOLERANCE
from ches_jax.displacement.changes import Changes
from ches_jax.displacement.intervals import Interval, of_pairs

LENGTHS = ("shortest third", "middle third", "longest third")
MOST = 12
"""Categories that are listed, the largest."""


@dataclass(frozen=True)
class Part:
    """The pairs of one kind."""

    by: str
    """``category`` or ``length`` (tokens of the chosen response)."""
    name: str
    pairs: int
    chosen: Interval
    """Mean change of the chosen responses, nats."""
    margin: Interval
    fell: float
    """Share of the pairs whose chosen response fell by more than eps."""

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return {**vars(self), "chosen": self.chosen.to_json(), "margin": self.margin.to_json()}

    def line(self) -> str:
        """For a person."""
        return f"{self.by} {self.name}: chosen {self.chosen}, fell {self.fell:.0%} of {self.pairs}"


def breakdown(changes: Changes, tolerance: float = TOLERANCE) -> tuple[Part, ...]:
    """The pairs by category, where there are several, and by thirds of the chosen responses' lengths.

    >>> rows = {"category": np.repeat(["a", "b"], 10), "chosen_tokens": np.arange(20)}
    >>> parts = breakdown(Changes(np.repeat([-2.0, 1.0], 10), np.zeros(20), "an example", rows=rows))
    >>> [(p.name, p.chosen.mean, p.fell) for p in parts[:2]]
    [('a', -2.0, 1.0), ('b', 1.0, 0.0)]
    """
    return tuple(
        _part(changes, by, name, inside, tolerance)
        for by, names in (("category", _categories(changes)), ("length", _lengths(changes)))
        for name, inside in names.items()
    )


def _categories(changes: Changes) -> Mapping[str, np.ndarray]:
    values = (changes.rows or {}).get("category")
    if values is None:
        return {}
    words = np.array([str(v or "") for v in values])
    names, counts = np.unique(words, return_counts=True)
    if len(names) < 2:
        return {}
    largest = [str(names[i]) for i in np.argsort(-counts, kind="stable")[:MOST]]
    return {name or "(none)": words == name for name in largest}


def _lengths(changes: Changes) -> Mapping[str, np.ndarray]:
    values = (changes.rows or {}).get("chosen_tokens")
    if values is None or len(np.unique(values)) < len(LENGTHS):
        return {}
    tokens = np.asarray(values, float)
    third = np.searchsorted(np.quantile(tokens, [1 / 3, 2 / 3]), tokens, side="left")
    found = {}
    for k, name in enumerate(LENGTHS):
        inside = third == k
        if inside.any():
            found[f"{name} ({tokens[inside].min():.0f} to {tokens[inside].max():.0f} tokens)"] = inside
    return found


def _part(changes: Changes, by: str, name: str, inside: np.ndarray, tolerance: float) -> Part:
    chosen, rejected = changes.chosen[inside], changes.rejected[inside]
    records = None if changes.records is None else changes.records[inside]
    of_chosen, of_margin = of_pairs(np.stack([chosen, chosen - rejected]), records)
    return Part(by, name, int(inside.sum()), of_chosen, of_margin, float((chosen < -tolerance).mean()))
