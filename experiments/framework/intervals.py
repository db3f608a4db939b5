"""Means with intervals: over seeds, over seeds and prompts together; p values of several comparisons."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np


class Spread(TypedDict):
    """A mean over seeds (or runs) and what surrounds it."""

    mean: float
    low: float
    """Lower end of the 95% interval of the mean (Student's t); equal to the mean for a single value."""
    high: float
    min: float
    max: float
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    """Mean, 95% interval by Student's t, smallest and largest; None without values.

    >>> s = spread([1.0, 2.0, 3.0])
    >>> s["mean"], round(s["high"] - s["mean"], 3), s["n"]
    (2.0, 2.484, 3)
    """
    v = np.asarray(values, np.float64)
    if v.size == 0:
        return None
    half = float(t_quantile(v.size - 1) * v.std(ddof=1) / math.sqrt(v.size)) if v.size > 1 else 0.0
    mean = float(v.mean())
    return {
        "mean": mean,
        "low": mean - half,
        "high": mean + half,
        "min": float(v.min()),
        "max": float(v.max()),
        "n": int(v.size),
    }


class Crossed(TypedDict):
    """A mean over draws and prompts, and how sure it is where both could have been others."""

    mean: float
    low: float
    """Lower end of its 95% interval."""
    high: float
    p: float
    """Of a mean of zero, two-sided."""


def crossed(values: np.ndarray) -> Crossed:
    r"""The mean of [draws, prompts], with draws and prompts both taken as samples.

    .. math:: s^2 = s_{draws}^2 + s_{prompts}^2

    with the standard error of the means of draws, and that of the means of prompts; Student's t with Satterthwaite's
    degrees of freedom. What one draw does to one prompt counts in both, so the interval is rather too long.

    >>> found = crossed(np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]))
    >>> found["mean"], found["low"] < 0 < found["high"]
    (2.5, True)
    """
    from scipy.special import stdtr, stdtrit

    sides = [values.mean(1), values.mean(0)]
    squares = [float(side.var(ddof=1)) / side.size if side.size > 1 else 0.0 for side in sides]
    mean, error = float(values.mean()), math.sqrt(sum(squares))
    if error == 0:
        return {"mean": mean, "low": mean, "high": mean, "p": 1.0 if mean == 0 else 0.0}
    degrees = sum(squares) ** 2 / sum(v**2 / (side.size - 1) for v, side in zip(squares, sides, strict=True) if v)
    half = float(stdtrit(degrees, 0.975)) * error
    return {"mean": mean, "low": mean - half, "high": mean + half, "p": 2 * float(stdtr(degrees, -abs(mean) / error))}


def holm(p: Sequence[float]) -> list[float]:
    """The p values of several comparisons, each so that one in twenty families has a false one (Holm 1979).

    >>> [round(v, 3) for v in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def t_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t.

    >>> round(t_quantile(2), 3), round(t_quantile(9), 3)
    (4.303, 2.262)
    """
    from scipy.special import stdtrit  # part of every installation of jax

    return float(stdtrit(degrees, 0.975))


def interval(s: Any, digits: int = 2) -> str:
    """A spread as text: mean [low, high].

    >>> interval({"mean": 0.5, "low": 0.25, "high": 0.75, "n": 3})
    '0.50 [0.25, 0.75]'
    """
    if s is None:
        return "none"
    mean, low, high = (f"{s[k]:z.{digits}f}" for k in ("mean", "low", "high"))  # z: no minus before zero
    return mean if s["n"] == 1 else f"{mean} [{low}, {high}]"


def correlation(one: Mapping[str, float | None] | None) -> str:
    """A rank correlation with its interval as text.

    >>> correlation({"rho": 0.5, "low": 0.25, "high": 0.75}), correlation(None)
    ('+0.50 [+0.25, +0.75]', 'undefined')
    """
    if one is None or one["rho"] is None:
        return "undefined"
    return f"{one['rho']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"


def signed(one: Mapping[str, float]) -> str:
    """A change with its interval as text.

    >>> signed({"mean": 0.5, "low": -0.25, "high": 1.25})
    '+0.50 [-0.25, +1.25]'
    """
    return f"{one['mean']:+.2f} [{one['low']:+.2f}, {one['high']:+.2f}]"
