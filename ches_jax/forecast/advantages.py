r"""What a policy-gradient loss gives the responses of a group: advantages from rewards, coefficients from advantages.

At the policy that sampled them, the update of a group moves the parameters along
:math:`\sum_j c_j \nabla \ln \pi(y_j)`, whatever is clipped later:

    objective   advantage A_j                                coefficient c_j
    grpo        (r_j - mean) / std                           A_j / (N |y_j|)
    dapo        (r_j - mean) / std                           A_j / (tokens of the group)
    dr_grpo     r_j - mean                                   A_j / N
    rloo        r_j - mean of the others' rewards            A_j / N

std is that of a sample (N - 1), as TRL and verl compute it. Dr. GRPO divides by a constant length besides, which a
learning rate absorbs. GRPO: https://arxiv.org/abs/2402.03300, DAPO: https://arxiv.org/abs/2503.14476, Dr. GRPO:
https://arxiv.org/abs/2503.20783, RLOO: https://arxiv.org/abs/2402.14740.
"""

import numpy as np

from ches_jax.types import Objective


def advantages(rewards: np.ndarray, objective: Objective) -> np.ndarray:
    """[N] advantages of the responses of a group; zeros where all rewards are equal.

    >>> advantages(np.array([1.0, 0.0, 0.0, 1.0]), "rloo").round(2).tolist()
    [0.67, -0.67, -0.67, 0.67]
    """
    centred = rewards - rewards.mean()
    if rewards.max() == rewards.min():  # by subtraction a rounding of the mean would be left, and divided by itself
        return np.zeros(len(rewards))
    if objective == "rloo":
        return centred * len(rewards) / (len(rewards) - 1)
    return centred if objective == "dr_grpo" else centred / rewards.std(ddof=1)


def coefficients(advantage: np.ndarray, tokens: np.ndarray, objective: Objective) -> np.ndarray:
    """[N] c_j of the responses of a group.

    >>> coefficients(np.array([1.0, -1.0]), np.array([2, 6]), "dapo").tolist()
    [0.125, -0.125]
    """
    if objective == "grpo":
        return advantage / (len(advantage) * tokens)
    if objective == "dapo":
        return advantage / tokens.sum()
    return advantage / len(advantage)
