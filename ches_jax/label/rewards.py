r"""From log-probabilities to rewards of responses, probabilities of labels, and what they say of a whole set.

.. math:: p = \sigma(s_+ - s_-)

with the rewards s of chosen and rejected response. Pure functions of numpy arrays; nats.

>>> label_probability(np.array([2.0]), np.array([2.0])).tolist()
[0.5]
"""

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
