r"""Objectives that read the log-probability of each token: known rules on known losses, each under a name.

LD-DPO counts what a response has beyond the shorter one's length by ``alpha``; at 1 it is DPO:

>>> from ches_jax.losses import LossInputs, get_loss
>>> chosen, rejected = jnp.array([[-1.0, -2.0, 0.0]]), jnp.array([[-3.0, -1.0, -2.0]])  # 2 and 3 tokens
>>> batch = LossInputs(
...     token_logps_chosen=chosen, token_logps_rejected=rejected,
...     ref_token_logps_chosen=jnp.zeros((1, 3)), ref_token_logps_rejected=jnp.zeros((1, 3)),
...     token_mask_chosen=jnp.array([[1, 1, 0]]), token_mask_rejected=jnp.array([[1, 1, 1]]),
... )
>>> margins = [get_loss("ld_dpo", beta=1.0, alpha=a)(batch)[1]["rewards/margins"] for a in (0.0, 1.0)]
>>> [float(m[0]) for m in margins]  # (-1 - 2) - (-3 - 1), and with the third token's -2
[1.0, 3.0]
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses.inputs import LossInputs
from ches_jax.losses.margins import sigmoid
from ches_jax.losses.metrics import log_ratio_rewards, mean_logp_rewards
from ches_jax.losses.per_token import simpo
from ches_jax.losses.registry import any_number, fraction, positive, register
from ches_jax.losses.tokens import (
    TOKEN_LOGPS,
    TOKEN_MASKS,
    TOKEN_REFERENCE,
    beyond_shared_length,
    unsure_tokens,
    weighted_sums,
)


def _confpo_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    return mean_logp_rewards(weighted_sums(batch, unsure_tokens(batch)), hyper)


@register(
    "confpo",
    source="Yoon et al. 2025, arXiv:2506.08712",
    needs=TOKEN_LOGPS | TOKEN_MASKS,
    rewards=_confpo_rewards,
    beta=positive(1.5),
    gamma=any_number(1.6),
)
def confpo(batch: LossInputs, *, beta: float, gamma: float) -> Array:
    r"""ConfPO: SimPO on the tokens the policy is less sure of than of the response's average token.

    .. math::
      -\ln \sigma(\beta (\bar\ell_+ - \bar\ell_-) - \gamma), \qquad
      \bar\ell = \mathrm{mean}\{\ln \pi_t : \pi_t < \tfrac1{|y|} \sum_s \pi_s\}

    Which tokens are kept carries no gradient. A pair with a response that keeps none (one token, say) has loss 0.

    Defaults:
      beta 1.5, gamma 1.6.

    References:
      Yoon et al., ConfPO (https://arxiv.org/abs/2506.08712).
    """
    sums = weighted_sums(batch, unsure_tokens(batch))
    some = (jnp.asarray(sums.chosen_tokens) > 0) & (jnp.asarray(sums.rejected_tokens) > 0)
    value = simpo(sums, beta=beta, gamma=gamma)
    return jnp.where(some, value, jnp.zeros_like(value))


def _ld_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    return log_ratio_rewards(weighted_sums(batch, beyond_shared_length(hyper["alpha"])(batch)), hyper)


@register(
    "ld_dpo",
    source="Liu et al. 2024, arXiv:2409.06411",
    needs=TOKEN_LOGPS | TOKEN_MASKS | TOKEN_REFERENCE,
    rewards=_ld_rewards,
    beta=positive(0.1),
    alpha=fraction(0.5),
)
def ld_dpo(batch: LossInputs, *, beta: float, alpha: float) -> Array:
    r"""LD-DPO: DPO in which tokens beyond the shorter response's length weigh alpha, in policy and reference.

    .. math::
      \ln \hat\pi(y|x) = \sum_{t \le n} \ln \pi_t + \alpha \sum_{t > n} \ln \pi_t, \qquad n = \min(|y_+|, |y_-|)

    Defaults:
      beta 0.1, alpha 0.5 (1 is DPO).

    References:
      Liu et al., Length Desensitization in DPO (https://arxiv.org/abs/2409.06411); TRL's ``ld_alpha``.
    """
    return sigmoid(weighted_sums(batch, beyond_shared_length(alpha)(batch)), beta=beta)
