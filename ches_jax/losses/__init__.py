"""Preference objectives as pure functions of log-probabilities, in a closed list of names.

>>> import jax.numpy as jnp
>>> loss = get_loss("dpo", beta=0.1)
>>> same = jnp.zeros(1)
>>> value, metrics = loss(LossInputs(same, same, same, same))
>>> f"{float(value[0]):.4f}", float(metrics["rewards/margins"][0])
('0.6931', 0.0)
"""

# these modules enter their losses in the list
from ches_jax.losses import anchored, joint, likelihood, listwise, margins, per_token, token_level, token_losses
from ches_jax.losses.anchored import kto_baseline
from ches_jax.losses.expression import from_trl, parse_loss
from ches_jax.losses.incentives import Incentives, incentives
from ches_jax.losses.inputs import LossInputs, RunningMean, swap, unpair
from ches_jax.losses.registry import Hyper, Loss, describe, distinct_losses, get_loss, loss_names, mean_loss
from ches_jax.losses.tokens import (
    TokenWeights,
    beyond_shared_length,
    differing_spans,
    every_token,
    given_weights,
    unsure_tokens,
    weighted_sums,
    with_tokens,
)
from ches_jax.losses.wrappers import (
    WRAPPERS,
    kind_of,
    label_posterior,
    log_calibration,
    moving_average,
    weighted_sum,
    with_gate,
    with_label_posterior,
    with_label_smoothing,
    with_policy_weights,
    with_reward_calibration,
    with_sft,
    with_soft_labels,
    with_unbiased_labels,
    with_weights,
)

__all__ = [
    "Hyper",
    "Loss",
    "LossInputs",
    "RunningMean",
    "get_loss",
    "parse_loss",
    "from_trl",
    "loss_names",
    "distinct_losses",
    "describe",
    "mean_loss",
    "swap",
    "unpair",
    "kto_baseline",
    "Incentives",
    "incentives",
    "WRAPPERS",
    "kind_of",
    "weighted_sum",
    "with_sft",
    "with_weights",
    "with_policy_weights",
    "with_label_smoothing",
    "with_unbiased_labels",
    "with_soft_labels",
    "with_label_posterior",
    "label_posterior",
    "with_reward_calibration",
    "log_calibration",
    "moving_average",
    "with_gate",
    "with_tokens",
    "TokenWeights",
    "every_token",
    "given_weights",
    "unsure_tokens",
    "beyond_shared_length",
    "differing_spans",
    "weighted_sums",
    "anchored",
    "joint",
    "likelihood",
    "listwise",
    "margins",
    "per_token",
    "token_level",
    "token_losses",
]
