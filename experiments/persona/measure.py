"""What the single-prompt runs are measured by: pure functions of their logs.

The log of one run (``Trace``) has one entry per number of updates done, 0 to T: entry t is the model after t updates.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

STANCES = ("agree", "disagree", "open", "other")


class Decrease(NamedTuple):
    """The largest fall of a probability within a run."""

    size: float
    start: float
    end: float
    start_step: int
    end_step: int


def is_monotone(losses: Sequence[float]) -> bool:
    """Whether the loss never rose between consecutive updates: only such runs are counted.

    >>> is_monotone([0.7, 0.5, 0.5]), is_monotone([0.7, 0.5, 0.6])
    (True, False)
    """
    return bool(np.all(np.diff(np.asarray(losses, np.float64)) <= 0))


def largest_decrease(values: Sequence[float]) -> Decrease:
    r"""The largest :math:`v_t - v_{t'}` over :math:`t < t'`; its size is not positive where the values never fall.

    >>> largest_decrease([0.2, 0.9, 0.5, 0.6])
    Decrease(size=0.4, start=0.9, end=0.5, start_step=1, end_step=2)
    """
    v = np.asarray(values, np.float64)
    if v.size < 2:
        raise ValueError("a decrease needs two values")
    best_start = np.maximum.accumulate(v[:-1])
    falls = best_start - v[1:]
    end = int(np.argmax(falls)) + 1
    start = int(np.argmax(v[:end]))
    return Decrease(float(v[start] - v[end]), float(v[start]), float(v[end]), start, end)


def top_gains(before: np.ndarray, now: np.ndarray, count: int = 3) -> list[tuple[int, float]]:
    """The tokens whose probability grew most since the start, with their gain; ties by token id.

    >>> top_gains(np.array([0.5, 0.5, 0.0]), np.array([0.2, 0.5, 0.3]), 2)
    [(2, 0.3), (1, 0.0)]
    """
    gains = now.astype(np.float64) - before.astype(np.float64)
    order = np.argsort(-gains, kind="stable")[:count]
    return [(int(i), float(gains[i])) for i in order]


class Gain(NamedTuple):
    """A token among the largest gains of some runs."""

    token: str
    gain: float
    """Mean over the runs that have it among theirs."""
    runs: int


def gains_over_runs(runs: Sequence[Sequence[tuple[str, float]]]) -> list[Gain]:
    """The union of the runs' lists: how often each token is there and its mean gain there; the commonest first.

    >>> gains_over_runs([[("a", 0.2), ("b", 0.1)], [("a", 0.4), ("c", 0.1)]])[0]
    Gain(token='a', gain=0.30000000000000004, runs=2)
    """
    found: dict[str, list[float]] = {}
    for run in runs:
        for token, gain in run:
            found.setdefault(token, []).append(gain)
    gains = [Gain(token, float(np.mean(v)), len(v)) for token, v in found.items()]
    return sorted(gains, key=lambda g: (-g.runs, -g.gain, g.token))


def stance_of(text: str, words: Mapping[str, Sequence[str]]) -> str:
    """Meaning of a token by its letters alone: case, spaces and quotes around it do not count.

    >>> stance_of('"Yes', {"agree": ["Yes"]}), stance_of("rope", {"agree": ["Yes"]})
    ('agree', 'other')
    """
    bare = text.strip(" \t\n\"'“”‘’`.!,").lower()
    return next((stance for stance, some in words.items() if bare in {w.lower() for w in some}), "other")


def stance_masses(probabilities: np.ndarray, stances: np.ndarray) -> dict[str, float]:
    """Probability of each stance; ``stances`` holds the index into ``STANCES`` of every token."""
    sums = np.bincount(stances, weights=probabilities.astype(np.float64), minlength=len(STANCES))
    return {name: float(v) for name, v in zip(STANCES, sums, strict=True)}


class Norms(NamedTuple):
    """Table 13: the direction W_{y+} - W_{y-} along W_{y+} and across it."""

    projection: float
    """Signed length along W_{y+}."""
    orthogonal: float
    difference: float
    """Norm of W_{y+} - W_{y-}; the square of it is the sum of the squares of the other two."""


def norms(chosen: np.ndarray, rejected: np.ndarray) -> Norms:
    r"""Parts of :math:`W_{y^+} - W_{y^-}` along and across :math:`W_{y^+}`, computed in float64.

    .. math::
      \|W_+\| - \langle W_+, W_- \rangle / \|W_+\|, \qquad
      \| W_- - (\langle W_+, W_- \rangle / \|W_+\|^2) W_+ \|

    >>> norms(np.array([3.0, 0.0]), np.array([1.0, 2.0]))
    Norms(projection=2.0, orthogonal=2.0, difference=2.8284271247461903)
    """
    a, b = chosen.astype(np.float64), rejected.astype(np.float64)
    inner, square = float(a @ b), float(a @ a)
    length = float(np.sqrt(square))
    across = float(np.linalg.norm(b - inner / square * a))
    return Norms(length - inner / length, across, float(np.linalg.norm(a - b)))
