"""The few statistics of a report: rank based, so that a heavy tail does not decide them."""

from collections.abc import Sequence

import numpy as np

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}


def quantiles(values: np.ndarray) -> list[float]:
    """The values at ``QUANTILES`` of what is finite; NaN when nothing is.

    >>> quantiles(np.array([0.0, np.nan, 1.0, 2.0]))[0::3]
    [0.0, 1.0, 2.0]
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return [float("nan")] * len(QUANTILES)
    return [float(q) for q in np.quantile(finite, list(QUANTILES.values()))]


def partial_spearman(a: np.ndarray, b: np.ndarray, given: Sequence[np.ndarray]) -> float:
    """Spearman's correlation of ``a`` and ``b`` with the ranks of ``given`` held fixed.

    The ranks of both are regressed on the ranks of ``given`` (with an intercept) and the residuals are
    correlated. NaN where nothing is left to correlate: too few rows, or a side that ``given`` explains.
    """
    finite = np.isfinite(np.stack([a, b, *given])).all(axis=0)
    if finite.sum() < len(given) + 3:
        return float("nan")
    x, y, *others = (ranks(v[finite]) for v in (a, b, *given))
    design = np.stack([np.ones_like(x), *others], axis=1)
    sides = np.stack([x, y], axis=1)
    residual = sides - design @ np.linalg.lstsq(design, sides, rcond=None)[0]
    sizes = np.linalg.norm(residual, axis=0)
    # What remains of an explained side is rounding, and its correlation would be noise.
    if (sizes <= 1e-9 * np.linalg.norm(sides, axis=0)).any():
        return float("nan")
    return float(residual[:, 0] @ residual[:, 1] / (sizes[0] * sizes[1]))


def auc(values: np.ndarray, inside: np.ndarray) -> float:
    """Chance that a row inside has the higher value than a row outside, ties counting half.

    >>> auc(np.array([1.0, 2.0, 3.0]), np.array([False, False, True]))
    1.0
    """
    finite = np.isfinite(values)
    member = inside[finite]
    n, m = int(member.sum()), int((~member).sum())
    if n == 0 or m == 0:
        return float("nan")
    return float((ranks(values[finite])[member].sum() - n * (n + 1) / 2) / (n * m))


def mean(values: np.ndarray) -> float:
    """The mean of what is finite; NaN when nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


__all__ = ["QUANTILES", "auc", "mean", "partial_spearman", "quantiles", "ranks", "spearman"]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank.

    >>> ranks(np.array([3.0, 1.0, 3.0]))
    array([2.5, 1. , 2.5])
    """
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation over the rows where both are finite; NaN when it is undefined.

    Undefined: fewer than two rows, or all values of one side the same.
    """
    both = np.isfinite(a) & np.isfinite(b)
    x, y = (ranks(v[both]) for v in (a, b))
    if x.size < 2:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")
