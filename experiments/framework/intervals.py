"""Means with intervals over seeds."""

import math
from collections.abc import Sequence
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
