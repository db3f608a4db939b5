"""Random choices that mean the same for ever: built on ``Generator.random`` alone.

``Generator.choice`` and ``integers`` may change between numpy releases; the artefacts must not.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def stream(seed: int, name: str) -> np.random.Generator:
    """A generator of its own for each named use, so that one use does not shift another."""
    return np.random.default_rng([seed, *name.encode()])


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One item, all equally likely."""
    return items[int(rng.random() * len(items))]


def pick_other(rng: np.random.Generator, items: Sequence[T], not_this: T) -> T:
    """One item that differs from ``not_this``."""
    return pick(rng, [item for item in items if item != not_this])


def weighted(rng: np.random.Generator, weights: Mapping[T, float]) -> T:
    """One key, drawn by its weight."""
    point = rng.random() * sum(weights.values())
    for key, weight in weights.items():
        point -= weight
        if point < 0:
            return key
    return next(reversed(list(weights)))


def shuffled(rng: np.random.Generator, items: Sequence[T]) -> list[T]:
    """The items in random order."""
    return [items[i] for i in np.argsort(rng.random(len(items)), kind="stable")]


def sentence(text: str) -> str:
    """The text with a capital at its start.

    >>> sentence("a lemon is yellow.")
    'A lemon is yellow.'
    """
    return text[:1].upper() + text[1:]
