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

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array

from ches_jax.losses.inputs import LossInputs, log_ratios
from ches_jax.losses.margins import sigmoid
from ches_jax.losses.metrics import log_ratio_rewards, mean_logp_rewards
from ches_jax.losses.per_token import simpo
from ches_jax.losses.registry import any_number, at_least_zero, fraction, positive, register
from ches_jax.losses.tokens import (
    TOKEN_LOGPS,
    TOKEN_MASKS,
    TOKEN_REFERENCE,
    TOKEN_WEIGHTS,
    beyond_shared_length,
    every_token,
    given_weights,
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


def _t_reg_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    return log_ratio_rewards(weighted_sums(batch, every_token(batch)), hyper)


@register(
    "t_reg",
    source="Zhou et al. 2024, arXiv:2412.02685, as a reading note prints it",
    needs=TOKEN_LOGPS | TOKEN_MASKS | TOKEN_REFERENCE | TOKEN_WEIGHTS,
    rewards=_t_reg_rewards,
    beta=positive(0.1),
    alpha=at_least_zero(0.25),
)
def t_reg(batch: LossInputs, *, beta: float, alpha: float) -> Array:
    r"""T-REG (DPO-REG): DPO, and a likelihood of each token times a reward that was known before.

    .. math::
      -\ln \sigma(\beta m) - \alpha\, \mathrm{sg}(\sigma(-\beta m))\, \beta \sum_{y \in \{y_+, y_-\}}
      \sum_t \hat r_t \ln \pi(y_t | x, y_{<t})

    The rewards are ``token_weights_*``: those that a model gives its own tokens when it is prompted for a better and
    for a worse answer, which ``ches label --by contrast`` writes:

    .. math:: \hat r_t = \sigma\left(\ln \pi(y_t|x_{better}, y_{<t}) - \ln \pi(y_t|x_{worse}, y_{<t})\right) - \tfrac12

    The regulariser counts as much as DPO still pushes the pair.

    Defaults:
      beta 0.1, alpha 0.25 (0.1, 0.25 and 0.5 in the paper; 0 is DPO).

    References:
      Zhou et al., T-REG (https://arxiv.org/abs/2412.02685). Neither the paper's text nor its code could be had here:
      loss, weight, rewards and values of alpha are those of a public reading note on its ACL 2025 version, compared
      with this function term by term; not checked against the paper itself.
    """
    sums = weighted_sums(batch, every_token(batch))
    rewarded = weighted_sums(batch, given_weights(batch))
    chosen, rejected = log_ratios(sums)
    push = stop_gradient(jax.nn.sigmoid(-beta * (chosen - rejected)))
    likelihood = jnp.asarray(rewarded.logp_chosen) + jnp.asarray(rewarded.logp_rejected)
    return sigmoid(sums, beta=beta) - alpha * push * beta * likelihood
