r"""Token-level DPO and its sparse forms: log-ratios and divergences of each token, each times a mask.

.. math::
  -\ln \sigma(\beta (u - d)), \quad u = \sum_t m_t r_t(y_+) - \sum_t m_t r_t(y_-), \quad
  d = \sum_t m'_t K_t(y_-) - \sum_t m'_t K_t(y_+)

r are log-ratios of the response's tokens and :math:`K_t = KL(\pi_{ref} \| \pi)` divergences of the next-token
distributions before them, both in nats. What the masks are is the difference between these losses:

    tdpo               m = m' = 1
    mapo               m = m' from the reference's activations, between 0 and 1
    sparsepo_common    m = m' learned, 0 or more
    sparsepo           m and m' learned, each its own

>>> from ches_jax.losses import get_loss
>>> ones, zeros = jnp.ones((1, 2)), jnp.zeros((1, 2))
>>> batch = LossInputs(
...     token_logps_chosen=-ones, token_logps_rejected=-2 * ones, ref_token_logps_chosen=-ones,
...     ref_token_logps_rejected=-ones, token_mask_chosen=ones, token_mask_rejected=ones,
...     token_kl_chosen=zeros, token_kl_rejected=0.5 * ones,
... )
>>> f"{float(get_loss('tdpo', beta=1.0)(batch)[0][0]):.4f}"  # ln(1 + exp(-(2 - 1)))
'0.3133'
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array

from ches_jax.losses.inputs import LossInputs
from ches_jax.losses.metrics import Rewards, log_ratio_rewards
from ches_jax.losses.registry import at_least_zero, positive, register
from ches_jax.losses.stable import neg_log_sigmoid
from ches_jax.losses.tokens import TOKEN_LOGPS, TOKEN_MASKS, TOKEN_REFERENCE, TokenWeights, masks, weighted_sums

TOKEN_KL = frozenset({"token_kl_chosen", "token_kl_rejected"})
REWARD_MASKS = frozenset({"reward_mask_chosen", "reward_mask_rejected"})
KL_MASKS = frozenset({"kl_mask_chosen", "kl_mask_rejected"})
ACTIVATION_MASKS = frozenset({"activation_mask_chosen", "activation_mask_rejected"})
TOKEN_LEVEL = TOKEN_LOGPS | TOKEN_MASKS | TOKEN_REFERENCE | TOKEN_KL


def _given(batch: LossInputs, name: str | None) -> TokenWeights:
    """The masks of that name, 0 beyond the responses; ones for None."""
    chosen, rejected = masks(batch)
    if name is None:
        return TokenWeights(chosen, rejected)
    given = (jnp.asarray(getattr(batch, f"{name}_{side}")) for side in ("chosen", "rejected"))
    of_chosen, of_rejected = (m.astype(chosen.dtype) for m in given)
    return TokenWeights(of_chosen * chosen, of_rejected * rejected)


def _sums(batch: LossInputs, values: tuple[Array, Array], weights: TokenWeights) -> tuple[Array, Array]:
    """Weighted sums over the tokens of both responses; a weight of 0 still has a gradient."""
    chosen, rejected = (
        # where, not a product: padding may hold minus infinity
        jnp.sum(jnp.where(inside != 0, v, 0.0) * weight, axis=-1)
        for v, weight, inside in zip(values, weights[:2], masks(batch), strict=True)
    )
    return chosen, rejected


def token_level(
    batch: LossInputs, beta: float, of_reward: TokenWeights, of_kl: TokenWeights, alpha: float = 1.0
) -> Array:
    """The loss of the module's head with given masks, divergences times ``alpha``."""
    ratios = tuple(
        jnp.asarray(getattr(batch, f"token_logps_{side}")) - jnp.asarray(getattr(batch, f"ref_token_logps_{side}"))
        for side in ("chosen", "rejected")
    )
    chosen, rejected = _sums(batch, ratios, of_reward)  # type: ignore[arg-type]
    kl = jnp.asarray(batch.token_kl_chosen), jnp.asarray(batch.token_kl_rejected)
    kl_chosen, kl_rejected = _sums(batch, kl, of_kl)
    return neg_log_sigmoid(beta * (chosen - rejected - alpha * (kl_rejected - kl_chosen)))


def _masked_rewards(reward: str | None, kl: str | None) -> Rewards:
    """Rewards of the masked log-ratios, divergences, and what share of the tokens each mask leaves out."""

    def rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
        inside = masks(batch)
        logged = log_ratio_rewards(weighted_sums(batch, _given(batch, reward)), hyper)
        values = jnp.asarray(batch.token_kl_chosen), jnp.asarray(batch.token_kl_rejected)
        for side, total in zip(("chosen", "rejected"), _sums(batch, values, TokenWeights(*inside)), strict=True):
            logged[f"token_kl/{side}"] = total
        shown = {"reward": reward} if kl == reward else {"reward": reward, "kl": kl}
        for label, name in shown.items():
            if name is None:
                continue
            for side, mask, i in zip(("chosen", "rejected"), _given(batch, name), inside, strict=False):
                tokens = jnp.maximum(jnp.sum(i, axis=-1), 1)
                logged[f"sparsity/{label}_{side}"] = jnp.sum(jnp.where(mask == 0, i, 0.0), axis=-1) / tokens
                logged[f"mask/{label}_{side}"] = jnp.sum(mask, axis=-1) / tokens
        return logged

    return rewards


@register(
    "tdpo",
    source="Zeng et al. 2024, arXiv:2404.11999",
    needs=TOKEN_LEVEL,
    rewards=_masked_rewards(None, None),
    beta=positive(0.1),
)
def tdpo(batch: LossInputs, *, beta: float) -> Array:
    r"""Token-level DPO (TDPO1): DPO, and the difference of the two responses' sums of divergences.

    .. math::
      -\ln \sigma(\beta (u - d)), \quad u = r_+ - r_-, \quad d = \sum_t K_t(y_-) - \sum_t K_t(y_+), \quad
      K_t = KL(\pi_{ref} \| \pi)

    Defaults:
      beta 0.1.

    References:
      Zeng et al., Token-level DPO (https://arxiv.org/abs/2404.11999), method 1.
    """
    every = _given(batch, None)
    return token_level(batch, beta, every, every)


@register(
    "tdpo2",
    source="Zeng et al. 2024, arXiv:2404.11999",
    needs=TOKEN_LEVEL,
    rewards=_masked_rewards(None, None),
    beta=positive(0.1),
    alpha=at_least_zero(0.5),
)
def tdpo2(batch: LossInputs, *, beta: float, alpha: float) -> Array:
    r"""TDPO2: the chosen response's divergence carries no gradient, and the difference counts alpha.

    .. math::
      -\ln \sigma(\beta (u - \alpha d)), \quad
      d = \sum_t K_t(y_-) - \mathrm{sg}\left(\sum_t K_t(y_+)\right)

    Defaults:
      beta 0.1, alpha 0.5.

    References:
      Zeng et al., Token-level DPO (https://arxiv.org/abs/2404.11999), method 2.
    """
    every = _given(batch, None)
    return token_level(
        batch._replace(token_kl_chosen=stop_gradient(jnp.asarray(batch.token_kl_chosen))), beta, every, every, alpha
    )


@register(
    "mapo",
    source="Christopoulou et al. 2024, arXiv:2410.05102",
    needs=TOKEN_LEVEL | ACTIVATION_MASKS,
    rewards=_masked_rewards("activation_mask", "activation_mask"),
    beta=positive(0.1),
)
def mapo(batch: LossInputs, *, beta: float) -> Array:
    r"""SparsePO with one mask for both sums that is not learned: from the reference's activations (MaPO).

    .. math::
      -\ln \sigma(\beta (u - d)), \quad u = \sum_t m_t r_t(y_+) - \sum_t m_t r_t(y_-), \quad
      d = \sum_t m_t K_t(y_-) - \sum_t m_t K_t(y_+)

    ``train.token_masks.activation_masks`` says what m is: between 0 and 1 within each response.

    Defaults:
      beta 0.1.

    References:
      Christopoulou et al., SparsePO (https://arxiv.org/abs/2410.05102); the authors' ``mapo_trainer.py`` takes the
      outputs of attention, of MLPs, of layers and the logits together, this the outputs of layers.
    """
    given = _given(batch, "activation_mask")
    return token_level(batch, beta, given, given)


def _penalty(weights: TokenWeights) -> Array:
    """Sum of the absolute values over the tokens of both responses."""
    return jnp.sum(jnp.abs(weights.chosen), axis=-1) + jnp.sum(jnp.abs(weights.rejected), axis=-1)


@register(
    "sparsepo",
    source="Christopoulou et al. 2024, arXiv:2410.05102",
    needs=TOKEN_LEVEL | REWARD_MASKS | KL_MASKS,
    rewards=_masked_rewards("reward_mask", "kl_mask"),
    beta=positive(0.1),
    l1_reward=at_least_zero(0.0),
    l1_kl=at_least_zero(0.0),
)
def sparsepo(batch: LossInputs, *, beta: float, l1_reward: float, l1_kl: float) -> Array:
    r"""SparsePO with two learned masks, one for log-ratios and one for divergences.

    .. math::
      -\ln \sigma(\beta (u - d)) + \lambda_u \left(\|m(y_+)\|_1 + \|m(y_-)\|_1\right)
      + \lambda_d \left(\|m'(y_+)\|_1 + \|m'(y_-)\|_1\right), \\
      u = \sum_t m_t r_t(y_+) - \sum_t m_t r_t(y_-), \quad d = \sum_t m'_t K_t(y_-) - \sum_t m'_t K_t(y_+)

    The masks are linear maps of the reference's states and learned with the policy (``train.token_masks``). Logged:
    the share of tokens that a mask leaves out (``sparsity/reward_chosen``, ...), its mean (``mask/...``), the unmasked
    sums of divergences (``token_kl/...``).

    Defaults:
      beta 0.1; l1_reward and l1_kl 0, per token, as in the authors' code: without them only the ReLU makes zeros.

    References:
      Christopoulou et al., SparsePO (https://arxiv.org/abs/2410.05102); checked against the arithmetic of the authors'
      ``sparse_trainer.py``, without its dropout of masks.
    """
    of_reward, of_kl = _given(batch, "reward_mask"), _given(batch, "kl_mask")
    value = token_level(batch, beta, of_reward, of_kl)
    return value + l1_reward * _penalty(of_reward) + l1_kl * _penalty(of_kl)


@register(
    "sparsepo_common",
    source="Christopoulou et al. 2024, arXiv:2410.05102",
    needs=TOKEN_LEVEL | REWARD_MASKS,
    rewards=_masked_rewards("reward_mask", "reward_mask"),
    beta=positive(0.1),
    l1_reward=at_least_zero(0.0),
    l1_kl=at_least_zero(0.0),
)
def sparsepo_common(batch: LossInputs, *, beta: float, l1_reward: float, l1_kl: float) -> Array:
    r"""SparsePO with one learned mask for log-ratios and divergences: ``sparsepo`` with m' = m.

    .. math::
      -\ln \sigma(\beta (u - d)) + (\lambda_u + \lambda_d) \left(\|m(y_+)\|_1 + \|m(y_-)\|_1\right)

    Defaults:
      beta 0.1; l1_reward and l1_kl 0; both penalties are of the one mask, as in the authors' code.

    References:
      Christopoulou et al., SparsePO (https://arxiv.org/abs/2410.05102).
    """
    given = _given(batch, "reward_mask")
    return token_level(batch, beta, given, given) + (l1_reward + l1_kl) * _penalty(given)
