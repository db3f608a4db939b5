r"""From log-probabilities to rewards of responses, probabilities of labels, and what they say of a whole set.

.. math:: p = \sigma(s_+ - s_-)

with the rewards s of chosen and rejected response. Pure functions of numpy arrays; nats.

>>> label_probability(np.array([2.0]), np.array([2.0])).tolist()
[0.5]
"""

from typing import Any

import numpy as np
from scipy.special import expit


def implicit_reward(logp: np.ndarray, reference: np.ndarray, beta: float) -> np.ndarray:
    r"""DPO's reward of a response, :math:`\beta \ln \frac{\pi(y|x)}{\pi_{ref}(y|x)}`.

    References:
      Rafailov et al. (https://arxiv.org/abs/2305.18290), eq. 5.
    """
    return beta * (logp - reference)


def label_probability(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """Bradley and Terry's probability that the chosen response is the better one."""
    return expit(chosen - rejected)


def consistency(margin: np.ndarray, previous: np.ndarray) -> float:
    r"""Share of pairs that two policies rank alike: Kendall's tau of two responses, moved to 0 to 1.

    References:
      Wang et al., CREAM (https://arxiv.org/abs/2410.12735): the weight of the self-made labels.

    >>> consistency(np.array([1.0, -2.0]), np.array([3.0, 1.0]))
    0.5
    """
    return float(np.mean((np.sign(margin) * np.sign(previous) + 1) / 2))


def flip_budget(reference_margin: np.ndarray, beta: float) -> np.ndarray:
    r"""The DPO loss at which a pair that the reference ranks wrongly comes to be ranked rightly.

    .. math:: -\ln \sigma(\beta c), \qquad c = \ln \pi_{ref}(y_-|x) - \ln \pi_{ref}(y_+|x)

    Below ln 2 where the reference is wrong (c > 0): the loss has to fall that far; above it where the pair is right
    already.

    References:
      Chen et al., Preference Learning Algorithms Do Not Learn Preference Rankings (https://arxiv.org/abs/2405.19534).

    >>> flip_budget(np.array([0.0]), 0.1).round(4).tolist()
    [0.6931]
    """
    return np.logaddexp(0.0, beta * reference_margin)


def idealised_accuracy(right: np.ndarray) -> float:
    r"""Ranking accuracy of the policy that fits labels of which each is right with probability p, :math:`E[p \ge 1/2]`.

    References:
      Chen et al. (https://arxiv.org/abs/2405.19534), of a policy that reaches DPO's optimum.
    """
    return float(np.mean(np.maximum(right, 1 - right)))


def calibration_error(probability: np.ndarray, bins: int = 10) -> float:
    r"""Expected calibration error of the probabilities that the labels, all taken as right, are right.

    .. math:: \sum_b \frac{n_b}{N} \left| \mathrm{mean}_b(\hat p) - \mathrm{accuracy}_b \right|

    over equal bins of the confidence :math:`\hat p = \max(p, 1 - p)`; accuracy is the share with p above a half.

    >>> calibration_error(np.array([0.75, 0.75, 0.75, 0.25]))
    0.0
    """
    confidence, right = np.maximum(probability, 1 - probability), probability > 0.5
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    total = 0.0
    for b in range(bins):
        mine = place == b
        if mine.any():
            total += mine.mean() * abs(confidence[mine].mean() - right[mine].mean())
    return float(total)


def ranking_summary(
    logps: tuple[np.ndarray, np.ndarray], reference: tuple[np.ndarray, np.ndarray], beta: float
) -> dict[str, Any]:
    """What two models' log-probabilities of chosen and rejected responses say of all pairs together.

    Ranking accuracy is the share of pairs whose chosen response is the likelier one; ties count half.
    """

    def accuracy(margin: np.ndarray) -> float:
        return float(np.mean((np.sign(margin) + 1) / 2))

    policy, before = logps[0] - logps[1], reference[0] - reference[1]
    probability = expit(beta * (policy - before))
    return {
        "ranking_accuracy_reference": accuracy(before),
        "ranking_accuracy_policy": accuracy(policy),
        "flipped_to_right": float(np.mean((before < 0) & (policy > 0))),
        "flipped_to_wrong": float(np.mean((before > 0) & (policy < 0))),
        "implicit_reward_accuracy": accuracy(policy - before),
        "calibration_error": calibration_error(probability),
        "idealised_accuracy": idealised_accuracy(probability),
    }
