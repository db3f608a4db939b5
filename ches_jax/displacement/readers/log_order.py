"""The order of a log's entries: by their steps, where they have them."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ches_jax.displacement.readers.metric_names import STEPS, metric

LARGEST = 2**62
"""A step, or a whole number, beyond it is none."""
SIDES = ("chosen", "rejected", "dlogp_chosen", "dlogp_rejected")
"""Quantities of pairs."""


def in_order(entries: list[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Each entry with its step; an export whose newest entry stands first is turned round.

    Rows of a table that are in no order (``_shuffled``) are sorted. Entries without steps are counted.

    >>> in_order([{"step": 3, "a": 1}, {"step": 3, "b": 1}, {"step": 1}])
    [(1, {'step': 1}), (3, {'step': 3, 'b': 1}), (3, {'step': 3, 'a': 1})]
    """
    steps = [_step(entry) for entry in entries]
    known = [step for step in steps if step is not None]
    if not known:
        return list(zip(_counted(entries), entries, strict=True))
    if len(set(known)) > 1 and known == sorted(known, reverse=True):
        entries, steps = entries[::-1], steps[::-1]
    numbered = [(i if step is None else step, e) for i, (step, e) in enumerate(zip(steps, entries, strict=True), 1)]
    return sorted(numbered, key=lambda item: item[0]) if _shuffled(numbered) else numbered


def _shuffled(numbered: Sequence[tuple[int, Mapping[str, Any]]]) -> bool:
    """Whether entries are in no order: steps go back far more often than runs are resumed, and no metric has one twice.

    >>> _shuffled([(step, {"loss": 1.0}) for step in (50, 20, 70, 10, 60, 30, 80, 40)])
    True
    >>> _shuffled([(step, {"loss": 1.0}) for step in (50, 60, 70, 80, 10, 20, 30, 40)])
    False
    """
    back = sum(after < before for (before, _), (after, _) in itertools.pairwise(numbered))
    if back < MANY or 4 * back < len(numbered):
        return False
    cells = [(step, name) for step, entry in numbered for name in entry if metric(name) is not None]
    return len(set(cells)) == len(cells)


MANY = 3
"""Times that steps go back, from which on they may be in no order."""
EPOCH = "epoch"
"""Where in the data an entry was logged; what transformers prints has it, and no step."""


def _counted(entries: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of entries that have no steps, from 1. Where the epoch of a run goes back they go back as far.

    >>> _counted([{"epoch": 0.1, "chosen_rewards": 0}, {"epoch": 0.2, "chosen_rewards": 0}] * 2)
    [1, 2, 1, 2]
    """
    out: list[int] = []
    seen: list[tuple[float, int]] = []
    number = 0
    for entry in entries:
        number += 1
        epoch = entry.get(EPOCH)
        if isinstance(epoch, (int, float)) and not isinstance(epoch, bool) and _is_of_pairs(entry):
            if seen and epoch < seen[-1][0]:
                number = next(at for there, at in seen if there >= epoch)
                seen = [(there, at) for there, at in seen if at < number]
            seen.append((epoch, number))
        out.append(number)
    return out


def _is_of_pairs(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has rewards or changes: a file may hold the fine-tuning before, too."""
    return any((meaning := metric(name)) is not None and meaning.quantity in SIDES for name in entry)


def _step(entry: Mapping[str, Any]) -> int | None:
    """The step of an entry; ``"120/600"`` is step 120, ``"1,200"`` step 1200."""
    lower = {name.lower(): value for name, value in entry.items()}
    for name in STEPS:
        value = lower.get(name)
        if isinstance(value, str) and re.fullmatch(r"\d{1,18}/\d+", value):
            return int(value.split("/")[0])
        if isinstance(value, str) and re.fullmatch(r"\d{1,3}(,\d{3}){1,5}", value):
            return int(value.replace(",", ""))
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST:
            return int(value)
    return None
