r"""Is the reward that a policy implies as sure as it is right?

A policy trained with DPO implies the preference :math:`P(y_+ \succ y_-) = \sigma(\beta\, \Delta m)`. On held-out pairs
the share with :math:`\Delta m > 0` is its accuracy, the mean of :math:`\sigma(\beta |\Delta m|)` its confidence: what
the accuracy would be if the probabilities were right. Confidence above accuracy is over-confidence.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ches_jax.displacement.changes import Changes
from ches_jax.displacement.intervals import Interval, of_pairs
from ches_jax.displacement.ranking import preferred, right


@dataclass(frozen=True)
class Calibration:
    """Accuracy and confidence of the implied preferences, shares."""

    beta: float
    accuracy: Interval
    confidence: Interval
    excess: Interval
    """Confidence less accuracy."""

    def line(self) -> str:
        """For a person."""
        word = "not distinguished from it"
        if self.excess.known and not self.excess.low <= 0 <= self.excess.high:
            word = "over-confident" if self.excess.low > 0 else "under-confident"
        return (
            f"accuracy {self.accuracy.mean:.0%}, confidence of the implied preferences {self.confidence.mean:.0%} "
            f"(beta {self.beta:g}), confidence less accuracy {self.excess}: {word}"
        )

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        numbers = {name: getattr(self, name).to_json() for name in ("accuracy", "confidence", "excess")}
        return {"beta": self.beta, **numbers}


def calibration(changes: Changes, beta: float) -> Calibration:
    """The calibration of changes of pairs, in nats; a margin of exactly 0 is half right.

    >>> found = calibration(Changes(np.full(10, 20.0), np.zeros(10), "an example"), beta=0.1)
    >>> found.accuracy.mean, round(found.confidence.mean, 3)
    (1.0, 0.881)
    """
    margin = changes.chosen - changes.rejected
    accurate, confidence = right(margin), preferred(beta * np.abs(margin))
    return Calibration(beta, *of_pairs(np.stack([accurate, confidence, confidence - accurate]), changes.records))
