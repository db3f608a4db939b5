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
from ches_jax.losses.stable import neg_log_sigmoid
from ches_jax.losses.tokens import (
    TOKEN_LOGPS,
    TOKEN_MASKS,
    TOKEN_REFERENCE,
    TOKEN_WEIGHTS,
    beyond_shared_length,
    given_weights,
    masks,
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


TOKEN_KL = frozenset({"token_kl_chosen", "token_kl_rejected", "token_kl_weights_chosen", "token_kl_weights_rejected"})


def _sparse_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    return log_ratio_rewards(weighted_sums(batch, given_weights(batch)), hyper)


@register(
    "sparsepo",
    source="arXiv:2410.05102 (form from its abstract)",
    rewards=_sparse_rewards,
    beta=positive(0.1),
    needs=TOKEN_LOGPS | TOKEN_MASKS | TOKEN_REFERENCE | TOKEN_WEIGHTS | TOKEN_KL,
)
def sparsepo(batch: LossInputs, *, beta: float) -> Array:
    r"""SparsePO: token-weighted rewards u and token-weighted divergences d; with all weights 1, token-level DPO.

    .. math::
      -\ln \sigma(u - d), \quad u = \beta \sum_t m_t r_t(y_+) - \beta \sum_t m_t r_t(y_-), \quad
      d = \beta \sum_t m'_t K_t(y_-) - \beta \sum_t m'_t K_t(y_+)

    r are log-ratios and K divergences of the next-token distributions, both in nats and given, as the weights m and m'
    are. A gradient reaches the divergences where they were computed from the policy, but not the weights: masks that
    are learned need a loss of their own.

    Defaults:
      beta 0.1.

    References:
      https://arxiv.org/abs/2410.05102; the form is not checked against its text.
    """
    sums = weighted_sums(batch, given_weights(batch))
    chosen, rejected = masks(batch)
    kl_chosen = _divergence(batch.token_kl_chosen, batch.token_kl_weights_chosen, chosen)
    kl_rejected = _divergence(batch.token_kl_rejected, batch.token_kl_weights_rejected, rejected)
    u = jnp.asarray(sums.logp_chosen) - jnp.asarray(sums.ref_logp_chosen)
    u = u - (jnp.asarray(sums.logp_rejected) - jnp.asarray(sums.ref_logp_rejected))
    return neg_log_sigmoid(beta * (u - (kl_rejected - kl_chosen)))


def _divergence(kl, weights, mask: Array) -> Array:
    weight = jnp.asarray(weights).astype(mask.dtype) * mask
    return jnp.sum(jnp.where(weight != 0, jnp.asarray(kl), 0.0) * weight, axis=-1)
