r"""Intervals of mean changes: over pairs, over the steps of a log, and of a last evaluation.

pairs        the wider of bootstrap-t and Student's t over records of the data: pairs of one record (a prompt) are drawn
             together, and each resample is measured in its own standard error, so that few, dependent and skewed pairs
             are not too sure; under heavy tails Student's t is the one that holds its level
steps        batch means: the last steps of a log are cut into consecutive blocks, and Student's t is taken over the
             means of the blocks, wider by as much as blocks of this length still depend on each other, which the whole
             log tells
evaluations  the last evaluation of the same held-out pairs, with the noise of an evaluation from second differences:
             a smooth course has none

References:
  Bootstrap-t: B. Efron, Bootstrap methods, 1979; P. Hall, Theoretical comparison of bootstrap confidence intervals,
  1988. Batch means: B. Schmeiser, Batch size effects in the analysis of simulation output, 1982. The variance of a mean
  of dependent steps: M. S. Bartlett, On the theoretical specification of sampling properties of autocorrelated time
  series, 1946.
"""

from dataclasses import dataclass

import numpy as np

from ches_jax.displacement.changes import Direction, direction
from ches_jax.stats import LEVEL, student_means, studentized_means

FEWEST = 8
"""Records, steps or evaluations below which there is no interval, and so no verdict."""
BLOCKS = 10
"""Blocks that the last steps of a log are cut into, at most; each has at least two steps."""
STRONGEST = 0.9
"""Of the correlation from step to step that is reckoned with."""
SHORT = 10
"""Steps of a log that tells half as much of that correlation as it seems to."""
LOG_TAIL = 0.1
"""Of a training log, the last tenth of its steps (and at least ``FEWEST``) is its end."""


@dataclass(frozen=True)
class Interval:
    """A mean change and its interval, nats. NaN where it is not known."""

    mean: float
    low: float
    high: float

    def direction(self, tolerance: float) -> Direction:
        """``up``, ``down``, ``level`` or ``undecided``.

        >>> Interval(-0.35, -1.06, 0.41).direction(0.05)
        'undecided'
        """
        return direction(self.low, self.high, tolerance)

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    def to_json(self) -> dict[str, float | None]:
        """Numbers, ``null`` where they are not known."""
        return {name: float(v) if np.isfinite(v) else None for name, v in vars(self).items()}

    def __neg__(self) -> "Interval":
        """Of the number with the other sign."""
        return Interval(-self.mean, -self.high, -self.low)

    def __str__(self) -> str:
        """As in a line of text: ``-0.350 [-1.060, +0.410]``."""
        return (
            f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]" if self.known else f"{self.mean:+.3f} (no interval)"
        )


def of_pairs(values: np.ndarray, records: np.ndarray | None = None, seed: int = 0) -> list[Interval]:
    """Mean of each row of [quantities, pairs] with the wider of its bootstrap-t and Student's t ends over records.

    Fewer than ``FEWEST`` records have no interval.

    >>> of_pairs(np.array([[-1.0, -2.0, -3.0]]))[0]
    Interval(mean=-2.0, low=nan, high=nan)
    """
    count = values.shape[1] if records is None else len(np.unique(records))
    if count < FEWEST:
        return _without_interval(values.mean(1))
    low, high = studentized_means(values, clusters=records, seed=seed)
    student = student_means(values, clusters=records)
    low, high = np.minimum(low, student[0]), np.maximum(high, student[1])
    return [Interval(float(m), float(a), float(b)) for m, a, b in zip(values.mean(1), low, high, strict=True)]


def of_steps(values: np.ndarray) -> list[Interval]:
    """Mean of each row of [quantities, steps] over the end of a log, from the means of consecutive blocks.

    >>> found = of_steps(np.stack([np.arange(100.0)]))[0]
    >>> found.mean, round(found.low, 1), round(found.high, 1)
    (94.5, 90.6, 98.4)
    """
    last = values[:, -end(values.shape[1]) :]
    count = last.shape[1]
    if count < FEWEST:
        return _without_interval(last.mean(1))
    blocks = min(BLOCKS, count // 2)
    means = np.stack([part.mean(1) for part in np.array_split(last, blocks, axis=1)], axis=1)
    wider = [_widening(r, count, blocks) for r in dependence(values)]
    half = _t(blocks - 1) * means.std(1, ddof=1) / np.sqrt(blocks) * wider
    return [Interval(float(m), float(m - h), float(m + h)) for m, h in zip(last.mean(1), half, strict=True)]


def dependence(values: np.ndarray) -> np.ndarray:
    r"""The correlation of each row of [quantities, steps] from one step to the next, around its smooth course.

    For a course with first-order noise the correlation of neighbouring differences is :math:`-(1 - r) / 2`, whatever
    the course; the estimate is held between 0 and ``STRONGEST``, and drawn towards 0 where the log is short. A course
    without noise has none: its second differences are small beside its first (with noise they are 2 to 3 times as
    large, squared).

    >>> rng = np.random.default_rng(0)
    >>> steps = np.arange(4000.0) + rng.normal(size=(1, 4000))
    >>> bool(dependence(steps)[0] < 0.1), bool(dependence(steps[:, 1:] + steps[:, :-1])[0] > 0.4)
    (True, True)
    """
    differences = np.diff(values, axis=1)
    differences = differences - differences.mean(1, keepdims=True)
    size = (differences**2).mean(1)
    neighbours = (differences[:, 1:] * differences[:, :-1]).mean(1) / np.maximum(size, np.finfo(float).tiny)
    noisy = (np.diff(differences, axis=1) ** 2).mean(1) > size
    count = values.shape[1]
    return np.where(noisy, np.clip(1 + 2 * neighbours, 0, STRONGEST), 0) * count / (count + SHORT)


def _widening(r: float, count: int, blocks: int) -> float:
    """Standard deviation of a mean of ``count`` steps over what the spread of the means of blocks says of it."""

    def variance(steps: int) -> float:  # of a mean of steps of variance 1
        lags = np.arange(1, steps)
        return float((steps + 2 * ((steps - lags) * r**lags).sum()) / steps**2)

    whole = variance(count)
    return float(np.sqrt(whole * (blocks - 1) / (variance(count // blocks) - whole)))


def end(steps: int) -> int:
    """How many of the steps of a log are its end.

    >>> end(5), end(20), end(500)
    (5, 8, 50)
    """
    return min(steps, max(FEWEST, round(LOG_TAIL * steps)))


def of_evaluations(values: np.ndarray) -> list[Interval]:
    r"""The last of each row of [quantities, evaluations]; its noise from second differences of the course.

    .. math:: s^2 = \frac{1}{6 (n-2)} \sum_i (x_{i+1} - 2 x_i + x_{i-1})^2

    >>> of_evaluations(np.linspace(0.0, -9.0, 10)[None])[0].mean
    -9.0
    """
    count = values.shape[1]
    if count < FEWEST:
        return _without_interval(values[:, -1])
    noise = np.sqrt((np.diff(values, n=2, axis=1) ** 2).mean(1) / 6)
    half = _t((count - 2) // 2) * noise
    return [Interval(float(m), float(m - h), float(m + h)) for m, h in zip(values[:, -1], half, strict=True)]


def _without_interval(means: np.ndarray) -> list[Interval]:
    return [Interval(float(mean), float("nan"), float("nan")) for mean in means]


def _t(freedom: int) -> float:
    """The quantile of Student's t that leaves ``LEVEL`` between it and its negative."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))
