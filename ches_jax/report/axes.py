"""Axes that outliers do not flatten, and numbers a person can read."""

import math
from dataclasses import dataclass

import numpy as np

FENCE = 4.0
"""Values further from the middle half than so many times its width, and outside the middle nine tenths, are drawn on
the frame and counted."""


@dataclass(frozen=True, slots=True)
class Axis:
    """What is shown of some values, with its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def outside(self, values: np.ndarray) -> tuple[int, int]:
        """How many values lie below and above the frame."""
        return int((values < self.low).sum()), int((values > self.high).sum())


def axis(values: np.ndarray, *, zero: bool = False, count: int = 5, whole: bool = False, pad: float = 0.0) -> Axis:
    """The axis of some values: all of them, or what lies within ``FENCE`` of the middle half.

    Args:
      values: any numbers; those that are not finite are left out.
      zero: whether 0 is on the axis in any case.
      count: about how many ticks.
      whole: all values, however far they lie.
      pad: so much of the width is added where the frame would touch the outermost value.

    >>> axis(np.array([0.0, 1.0, 2.0, 3.0, 1000.0])).high < 20
    True
    >>> axis(np.array([0.0, 1.0, 2.0, 3.0, 10.0])).labels
    ('0', '2', '4', '6', '8', '10')
    """
    finite = values[np.isfinite(values)].astype(np.float64, copy=False)  # a copy, whose order is free
    if not finite.size:
        finite = np.zeros(1)
    least, greatest = low, high = float(finite.min()), float(finite.max())
    q25, q75 = (float(q) for q in np.quantile(finite, [0.25, 0.75], overwrite_input=True))
    width = q75 - q25
    if not whole and width > 0:
        q05 = float(np.quantile(finite, 0.05, method="higher", overwrite_input=True))
        q95 = float(np.quantile(finite, 0.95, method="lower", overwrite_input=True))
        low, high = max(low, min(q05, q25 - FENCE * width)), min(high, max(q95, q75 + FENCE * width))
    del finite
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        half = 0.5 * max(1.0, abs(low) * 1e-3)
        low, high = low - half, high + half
    room = pad * (high - low)
    low, high = low - room * float(low == least), high + room * float(high == greatest)
    ticks, digits = _ticks(low, high, count)
    return Axis(low, high, ticks, tuple(readable(t, digits) for t in ticks))


def _ticks(low: float, high: float, count: int) -> tuple[tuple[float, ...], int]:
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((f * power for f in (1, 2, 2.5, 5) if f * power >= raw * (1 - 1e-9)), 10 * power)
    digits = max(0, -math.floor(math.log10(step) + 1e-9) + (abs(step / power - 2.5) < 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(k * step + 0.0 for k in range(first, last + 1)), digits


def digits_of(values: np.ndarray) -> int:
    """Decimals that show about three significant digits of a typical value, at most 6.

    >>> digits_of(np.array([12345.6])), digits_of(np.array([0.0123]))
    (0, 4)
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if not sizes.size:
        return 0
    return int(min(6, max(0, 2 - math.floor(math.log10(float(np.median(sizes, overwrite_input=True)))))))


def readable(value: float, digits: int = 2, *, signed: bool = False) -> str:
    """A number with so many decimals, thousands set apart; a dash where there is none.

    >>> readable(-12345.6, 0), readable(0.5, 2, signed=True), readable(float("nan")), readable(2.5e12)
    ('-12,346', '+0.50', '–', '2.5 × 10^12')
    """
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size >= 1e9 or 0 < size < 0.5 * 10.0 ** -max(digits, 4):
        power = math.floor(math.log10(size))
        return f"{value / 10.0**power:{'+' if signed else ''}.3g} × 10^{power}"
    rounded = round(value, digits) + 0.0
    return f"{rounded:{'+' if signed and rounded else ''},.{digits}f}"


def nats(value: float) -> str:
    """A change in nats, with its sign.

    >>> nats(-0.1234), nats(12.34), nats(0.0)
    ('-0.12', '+12.3', '0.00')
    """
    return readable(value, 2 if abs(value) < 10 else 1, signed=True)


def percent(share: float) -> str:
    """A share in per cent, without decimals unless it is small.

    >>> percent(0.66), percent(0.004), percent(float("nan"))
    ('66 %', '0.4 %', '–')
    """
    if not math.isfinite(share):
        return "–"
    return f"{100 * share:.1f} %" if 0 < share < 0.01 or 0.99 < share < 1 else f"{100 * share:.0f} %"
