r"""Does a policy rank pairs as their labels say, what would it cost, and how good could it be?

With :math:`m = \ln \pi(y_+|x) - \ln \pi(y_-|x)` under the first model (the reference) and after training:

    ranking accuracy      share of pairs with m > 0, a tie half
    flips                 shares of pairs that became right, and wrong
    flip budget           softplus(-beta m_ref): the DPO loss below which a pair is ranked rightly
    idealised accuracy    of the policy that fits labels of which a share p is wrong: m_ref + ln((1-p)/p) / beta > 0
    calibration error     of the implied probability sigma(beta (m - m_ref)), all labels taken as right

References:
  Chen et al., Preference Learning Algorithms Do Not Learn Preference Rankings (https://arxiv.org/abs/2405.19534).

>>> reference = np.array([-1.0, 2.0]), np.array([-3.0, -1.0])
>>> ranking_summary((np.array([-1.0, -2.0]), np.array([-3.0, -1.0])), reference, 0.1)["ranking_accuracy_policy"]
0.5
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ches_jax.displacement.intervals import FEWEST, Interval, of_pairs
from ches_jax.stats import bootstrap

BINS = 10
DRAWS = 1000


def flip_budget(reference_margin: np.ndarray, beta: float) -> np.ndarray:
    r"""The DPO loss below which a pair comes to be ranked rightly.

    .. math:: -\ln \sigma(\beta c), \qquad c = \ln \pi_{ref}(y_-|x) - \ln \pi_{ref}(y_+|x)

    Below ln 2 where the reference is wrong (c > 0): the loss has to fall that far; above it where the pair is right
    already.

    Args:
      reference_margin: c, nats.
      beta: of the loss.

    >>> flip_budget(np.array([0.0]), 0.1).round(4).tolist()
    [0.6931]
    """
    return np.logaddexp(0.0, -beta * reference_margin)


def preferred(margin: np.ndarray) -> np.ndarray:
    """The probability that the chosen response is preferred, of Bradley and Terry."""
    from scipy.special import expit

    return expit(margin)


def idealised_right(reference_margin: np.ndarray, beta: float, noise: float) -> np.ndarray:
    r"""Whether the policy at DPO's optimum ranks each pair rightly, where a share ``noise`` of the labels is wrong.

    .. math:: \ln \frac{\pi_{ref}(y_+|x)}{\pi_{ref}(y_-|x)} + \frac1\beta \ln \frac{1 - p}{p} > 0

    >>> idealised_right(np.array([-3.0, -1.0, 5.0]), beta=0.5, noise=0.25).tolist()  # ln 3 / 0.5 = 2.2
    [0.0, 1.0, 1.0]
    """
    return right(reference_margin + (np.log1p(-noise) - np.log(noise)) / beta)


def calibration_error(probability: np.ndarray, bins: int = BINS) -> float:
    r"""Expected calibration error of the probabilities that the labels, all taken as right, are right.

    .. math:: \sum_b \frac{n_b}{N} \left| \mathrm{mean}_b(\hat p) - \mathrm{accuracy}_b \right|

    over equal bins of the confidence :math:`\hat p = \max(p, 1 - p)`; accuracy is the share with p above a half.

    >>> calibration_error(np.array([0.75, 0.75, 0.75, 0.25]))
    0.0
    """
    confidence, accurate = np.maximum(probability, 1 - probability), probability > 0.5
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gap = np.bincount(place, confidence - accurate, minlength=bins)
    return float(np.sum(np.abs(gap)) / len(probability))


def right(margin: np.ndarray) -> np.ndarray:
    """1 for a positive margin, 0 for a negative one, a half for none."""
    return (np.sign(margin) + 1) / 2


def _flips(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs that became right, and wrong."""
    return ((before < 0) & (after > 0)).astype(float), ((before > 0) & (after < 0)).astype(float)


Sides = tuple[np.ndarray, np.ndarray]
"""Log-probabilities of the chosen and of the rejected responses, nats."""


def ranking_summary(logps: Sides, reference: Sides, beta: float) -> dict[str, float]:
    """What two models' log-probabilities of chosen and rejected responses say of all pairs together."""
    after, before = logps[0] - logps[1], reference[0] - reference[1]
    to_right, to_wrong = _flips(before, after)
    return {
        "ranking_accuracy_reference": float(np.mean(right(before))),
        "ranking_accuracy_policy": float(np.mean(right(after))),
        "flipped_to_right": float(np.mean(to_right)),
        "flipped_to_wrong": float(np.mean(to_wrong)),
        "implicit_reward_accuracy": float(np.mean(right(after - before))),
        "calibration_error": calibration_error(preferred(beta * (after - before))),
    }


def ranking_rates(start: Sides, now: Sides, beta: float | None) -> dict[str, float]:
    """``ranking/*`` of a training log: since step 0; pairs of one response (the other is NaN) do not count.

    Args:
      start: log-probabilities at step 0, nats.
      now: the same after some updates.
      beta: of a loss of log-ratios to the model of step 0: then the calibration error is known.
    """
    both = np.isfinite(start[0] - start[1] + now[0] - now[1])
    if not both.any():
        return {}
    found = ranking_summary((now[0][both], now[1][both]), (start[0][both], start[1][both]), beta or 1.0)
    names = {"accuracy": "ranking_accuracy_policy", "accuracy_start": "ranking_accuracy_reference"}
    names |= {name: name for name in ("flipped_to_right", "flipped_to_wrong")}
    names |= {} if beta is None else {"calibration_error": "calibration_error"}
    return {f"ranking/{name}": found[key] for name, key in names.items()}


@dataclass(frozen=True)
class Ranking:
    """Shares of pairs with their intervals."""

    numbers: Mapping[str, Interval]
    """By the names of ``NAMES``."""
    beta: float | None
    noise: float | None

    def line(self) -> str:
        """For a person."""
        n = self.numbers
        parts = [
            f"ranked rightly {n['policy'].mean:.0%}, by the first model {n['reference'].mean:.0%}",
            f"became right {n['to_right'].mean:.0%}, wrong {n['to_wrong'].mean:.0%}",
        ]
        if "flip_budget" in n:
            parts.append(f"flip budget {n['flip_budget'].mean:.3f} (DPO starts at 0.693)")
        if "idealised" in n:
            parts.append(f"with {self.noise:.0%} wrong labels the optimum ranks {n['idealised'].mean:.0%} rightly")
        if "calibration_error" in n:
            parts.append(f"calibration error {n['calibration_error']}")
        return "; ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        numbers = {name: interval.to_json() for name, interval in self.numbers.items()}
        return {"beta": self.beta, "label_noise": self.noise, **numbers}


def ranking(
    before: Sides, after: Sides, beta: float | None, noise: float | None = None, records: np.ndarray | None = None
) -> Ranking:
    """The ranking of pairs under two models; what needs beta only where it is known.

    Args:
      before: log-probabilities under the first model, nats.
      after: under the second.
      beta: of the loss, from which rewards, budgets and the optimum follow.
      noise: share of the labels that is wrong, 0 to 1, for the idealised accuracy.
      records: the record of each pair; pairs of one record are resampled together.

    >>> sides = np.full(10, -1.0), np.full(10, -2.0)
    >>> ranking(sides, (np.full(10, -1.0), np.full(10, -3.0)), 0.1).numbers["policy"].mean
    1.0
    """
    first, second = before[0] - before[1], after[0] - after[1]
    to_right, to_wrong = _flips(first, second)
    values = {"reference": right(first), "policy": right(second), "to_right": to_right, "to_wrong": to_wrong}
    if beta is not None:
        values["flip_budget"] = flip_budget(first, beta)
        if noise is not None:
            values["idealised"] = idealised_right(first, beta, noise)
    numbers = dict(zip(values, of_pairs(np.stack(list(values.values())), records), strict=True))
    if beta is not None:
        numbers["calibration_error"] = _error_interval(preferred(beta * (second - first)), records)
    return Ranking(numbers, beta, noise)


def _error_interval(probability: np.ndarray, records: np.ndarray | None) -> Interval:
    """The calibration error with its bootstrap interval over records; none for few of them."""
    count = len(probability) if records is None else len(np.unique(records))
    mean = calibration_error(probability)
    if count < FEWEST:
        return Interval(mean, np.nan, np.nan)
    low, high = bootstrap(
        lambda rows: calibration_error(probability[rows]), len(probability), draws=DRAWS, clusters=records
    )
    return Interval(mean, float(low), float(high))
