r"""From scores to a preference dataset: which rows to keep, or how much each shall weigh.

The grammar of ``--keep`` (n counts the rows that have a score; ties keep the order of the input):

  lowest:0.05  highest:0.05   a share of n in (0, 1]: with a point, an exponent or a percent sign
  lowest:19    highest:19     a number of rows: an integer (lowest:1 is one row, lowest:1.0 all)
  window:0.5,512              512 rows around the quantile 0.5, by the paper's procedure
  quantile:0,0.25             rows between two quantiles of the score, both ends included
  below:-10    above:-10      rows strictly on one side of a value
  soft:0.5                    all rows, with a column ``weight``

A share becomes a number of rows by rounding half up, at least one: 5% of 370 rows are 19, as in the
paper.

Source of the window and of the 5%: Razin et al., Unintentional Unalignment
(https://arxiv.org/abs/2410.08847), Sections 5 and 6 and their official code.
"""

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal

import numpy as np

from ches_jax.errors import RunError
from ches_jax.stats import spearman
from ches_jax.types import Control

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_SHAPES = {
    "lowest": rf"{_NUMBER}%?",
    "highest": rf"{_NUMBER}%?",
    "window": rf"{_NUMBER},\d+",
    "quantile": rf"{_NUMBER},{_NUMBER}",
    "below": _NUMBER,
    "above": _NUMBER,
    "soft": _NUMBER,
}
_EXAMPLES = "lowest:0.05, lowest:19, highest:0.05, window:0.5,512, quantile:0,0.25, below:-10, above:-10, soft:0.5"


@dataclass(frozen=True, slots=True)
class Rule:
    """A parsed ``--keep``."""

    text: str
    kind: str
    numbers: tuple[Decimal, ...]
    is_count: bool = False
    """Whether the number of ``lowest`` and ``highest`` counts rows; otherwise it is a share."""


def parse_rule(text: str) -> Rule:
    """Reads the grammar of ``--keep`` (see the module's docstring).

    >>> parse_rule("lowest:19").is_count, parse_rule("lowest:0.05").is_count
    (True, False)
    """
    kind, _, rest = text.strip().partition(":")
    rest = rest.replace(" ", "")
    if kind not in _SHAPES or not re.fullmatch(_SHAPES[kind], rest):
        raise RunError(f"--keep {text!r} is not a rule; expected one of: {_EXAMPLES}")
    values = tuple(Decimal(part.rstrip("%")) for part in rest.split(","))
    if rest.endswith("%"):
        values = (values[0] / 100,)
    rule = Rule(text.strip(), kind, values, is_count=bool(re.fullmatch(r"[+-]?\d+", rest)))
    if problem := _out_of_range(rule):
        raise RunError(f"--keep {text!r}: {problem}")
    return rule


def _out_of_range(rule: Rule) -> str | None:
    first, last = rule.numbers[0], rule.numbers[-1]
    match rule.kind:
        case "lowest" | "highest" if rule.is_count and first < 1:
            return f"the number of rows must be at least 1, got {first}"
        case "lowest" | "highest" if not rule.is_count and not 0 < first <= 1:
            return f"the share must be above 0 and at most 1, got {first} (rows: an integer)"
        case "window" if not 0 <= first <= 1 or last < 1:
            return f"the quantile must be in [0, 1] and the width at least 1, got {first} and {last}"
        case "quantile" if not 0 <= first <= last <= 1:
            return f"the quantiles must be in [0, 1], the lower first, got {first} and {last}"
        case "soft" if not 0 <= first < 1:
            return f"the weight at the 95th percentile must be in [0, 1), got {first}"
    return None


def window_range(n: int, quantile: float, width: int) -> tuple[int, int]:
    """Ranks [start, stop) of the paper's window around a quantile of n sorted rows.

    ``idx = round(q (n - 1))`` (halves to even), ``start = max(0, idx - K // 2)``, ``end = start +
    K``, shifted back where it passes the end; all rows when K exceeds n.

    >>> window_range(5000, 0.25, 512), window_range(5000, 1.0, 512)
    ((994, 1506), (4488, 5000))
    """
    middle = round(quantile * (n - 1))
    stop = max(0, middle - width // 2) + width
    if stop > n:
        return max(0, n - width), n
    return stop - width, stop


def amount(rule: Rule, n: int) -> int:
    """How many of n rows ``lowest`` or ``highest`` keeps."""
    if rule.is_count:
        if (count := int(rule.numbers[0])) > n:
            raise RunError(f"--keep {rule.text!r}: asks for {count} rows, {n} have a score")
        return count
    # In decimals, so that 0.05 of 370 is 18.5 and not a binary neighbour of it.
    return min(n, max(1, int((rule.numbers[0] * n).to_integral_value(ROUND_HALF_UP))))


def scored_order(values: np.ndarray) -> np.ndarray:
    """Positions of the rows that have a score, from the lowest score up; ties in input order."""
    scored = np.flatnonzero(np.isfinite(values))
    return scored[np.argsort(values[scored], kind="stable")]


def keep_indices(values: np.ndarray, rule: Rule | str) -> np.ndarray:
    """The positions that a rule keeps, ascending. Rows without a score (NaN) are never kept.

    >>> keep_indices(np.array([3.0, 1.0, np.nan, 2.0]), "lowest:2")
    array([1, 3])
    """
    rule = parse_rule(rule) if isinstance(rule, str) else rule
    values = np.asarray(values, dtype=np.float64)
    order = scored_order(values)
    n = len(order)
    if n == 0:
        return order
    first, last = float(rule.numbers[0]), float(rule.numbers[-1])
    match rule.kind:
        case "lowest":
            kept = order[: amount(rule, n)]
        case "highest":
            kept = order[n - amount(rule, n) :]
        case "window":
            kept = order[slice(*window_range(n, first, int(last)))]
        case "quantile":
            low, high = np.quantile(values[order], [first, last])
            kept = order[(values[order] >= low) & (values[order] <= high)]
        case "below":
            kept = order[values[order] < first]
        case "above":
            kept = order[values[order] > first]
        case _:
            kept = order
    return np.sort(kept)


def soft_weights(values: np.ndarray, target: float) -> tuple[np.ndarray, float]:
    r"""Weights that fall as the score rises: 1 up to score 0, ``target`` at the 95th percentile.

    .. math:: w = \mathrm{clip}(1 - a s, 0, 1), \qquad a = (1 - \mathrm{target}) / p_{95}(s)

    Returns:
      The weights (NaN where there is no score), and the slope a in units of 1 / score.

    Raises:
      RunError: the 95th percentile is not positive, so that no slope gives it the target.
    """
    scored = values[np.isfinite(values)]
    if scored.size == 0:
        return np.full(values.shape, np.nan), 0.0
    p95 = float(np.quantile(scored, 0.95))
    if p95 <= 0:
        raise RunError(
            f"--keep soft:{target:g}: the 95th percentile of the score is {p95:.4g}; soft weights "
            "need a positive one (a score of 0 or less weighs 1). Use lowest: or quantile: instead"
        )
    slope = (1.0 - target) / p95
    return np.clip(1.0 - slope * values, 0.0, 1.0), slope


def matched_control(values: np.ndarray, control: Control, longer_rejected: np.ndarray, seed: int) -> np.ndarray:
    """For each row, the row that takes its place in a control; -1 for rows without a score.

    The rows in order of score are set against the rows in another order, rank by rank: the row of
    rank r is replaced by the row of rank r there. So a control keeps the same number (and the same
    weights) under every rule.

    - ``random``: the other order is a seeded shuffle.
    - ``length``: it is by ``rejected_tokens - chosen_tokens``, in the direction in which that
      difference goes with the score (the sign of their Spearman correlation; rising when it is 0 or
      undefined, as plain CHES rises when the rejected response is longer). Ties are shuffled by the
      seed. Where a score is nothing but length, this control keeps the same rows, up to ties.
    """
    own = scored_order(values)
    places = np.full(len(values), -1, dtype=np.int64)
    if control == "none":
        places[own] = own
        return places
    other = np.random.default_rng(seed).permutation(own)
    if control == "length":
        direction = -1 if spearman(values, longer_rejected) < 0 else 1
        other = other[np.argsort(direction * longer_rejected[other], kind="stable")]
    places[own] = other
    return places
