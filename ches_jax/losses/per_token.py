r"""Objectives of mean log-probabilities: a response's sum divided by its number of tokens |y|.

The length divides every incentive, so a long response moves less; beta is per token and hence larger than elsewhere.

>>> from ches_jax.losses import get_loss
>>> nats = [jnp.array([v]) for v in (-8.0, -12.0, -10.0, -10.0)]
>>> batch = LossInputs(*nats, chosen_tokens=jnp.array([4]), rejected_tokens=jnp.array([8]))
>>> float(get_loss("ipo_mean", tau=0.5)(batch)[0][0])  # (2 / 4 + 2 / 8 - 1)^2
0.0625
"""

import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses.inputs import LENGTHS, LOGPS, REFERENCE, LossInputs, mean_log_ratios, mean_logps
from ches_jax.losses.metrics import mean_logp_rewards
from ches_jax.losses.registry import any_number, at_least_zero, positive, register
from ches_jax.losses.stable import capped_expm1, log1mexp, neg_log_sigmoid


@register("ipo_mean", source="TRL ipo; after arXiv:2310.12036", needs=REFERENCE | LENGTHS, tau=positive(0.1))
def ipo_mean(batch: LossInputs, *, tau: float) -> Array:
    r"""IPO on log-probabilities per token, the form TRL calls ``ipo``.

    .. math:: \left(\frac{r_+}{|y_+|} - \frac{r_-}{|y_-|} - \frac{1}{2 \tau}\right)^2

    Defaults:
      tau 0.1. Squared nats per token.

    References:
      Azar et al. (https://arxiv.org/abs/2310.12036), eq. 17, with TRL's normalisation. Summed: ``ipo_sum``.
    """
    chosen, rejected = mean_log_ratios(batch)
    return jnp.square(chosen - rejected - 1.0 / (2.0 * tau))


@register("ln_dpo", source="arXiv:2407.15229", needs=REFERENCE | LENGTHS, beta=positive(5.0))
@register("sigmoid_norm", source="TRL 1.16 sigmoid_norm", needs=REFERENCE | LENGTHS, beta=positive(0.1))
def ln_dpo(batch: LossInputs, *, beta: float) -> Array:
    r"""Length-normalised DPO.

    .. math:: -\ln \sigma\left(\beta \left[\frac{r_+}{|y_+|} - \frac{r_-}{|y_-|}\right]\right)

    Defaults:
      ``ln_dpo``: beta 5, as in Tulu 3. ``sigmoid_norm``: beta 0.1, TRL's default, which is weak per token.

    References:
      https://arxiv.org/abs/2407.15229; TRL's ``sigmoid_norm``.
    """
    chosen, rejected = mean_log_ratios(batch)
    return neg_log_sigmoid(beta * (chosen - rejected))


@register(
    "simpo",
    source="Meng et al. 2024, arXiv:2405.14734",
    needs=LOGPS | LENGTHS,
    rewards=mean_logp_rewards,
    beta=positive(2.0),
    gamma=any_number(1.0),
)
def simpo(batch: LossInputs, *, beta: float, gamma: float) -> Array:
    r"""SimPO: no reference, mean log-probabilities, a margin to exceed.

    .. math::
      -\ln \sigma\left(\frac{\beta}{|y_+|} \ln \pi(y_+|x) - \frac{\beta}{|y_-|} \ln \pi(y_-|x) - \gamma\right)

    Defaults:
      beta 2 (to 2.5; 10 for Llama-3 v0.2), gamma 1 (the paper tunes gamma/beta, 0.3 to 0.5). gamma is in the unit of
      the scaled margin.

    References:
      Meng et al., SimPO (https://arxiv.org/abs/2405.14734).
    """
    chosen, rejected = mean_logps(batch)
    return neg_log_sigmoid(beta * (chosen - rejected) - gamma)


@register(
    "alphapo",
    source="Gupta et al. 2025, arXiv:2501.03884",
    needs=LOGPS | LENGTHS,
    rewards=mean_logp_rewards,
    beta=positive(2.5),
    gamma=any_number(0.1),
    alpha=any_number(0.25),
)
def alphapo(batch: LossInputs, *, beta: float, gamma: float, alpha: float) -> Array:
    r"""AlphaPO: SimPO with a bent reward; alpha > 0 holds probabilities up, 0 is SimPO.

    .. math::
      -\ln \sigma(\beta (s_+ - s_-) - \gamma), \qquad s = \frac{1 - \bar p^{-\alpha}}{\alpha}, \qquad
      \bar p = e^{\ln \pi(y|x)/|y|}

    The power continues along its tangent beyond an exponent of 30.

    Defaults:
      beta 2.5, gamma 0.1, alpha 0.25.

    References:
      Gupta et al., AlphaPO (https://arxiv.org/abs/2501.03884).
    """
    chosen, rejected = mean_logps(batch)
    if alpha != 0.0:
        chosen, rejected = (-capped_expm1(-alpha * mean) / alpha for mean in (chosen, rejected))
    return neg_log_sigmoid(beta * (chosen - rejected) - gamma)


@register(
    "orpo",
    source="Hong et al. 2024, arXiv:2403.07691",
    needs=LOGPS | LENGTHS,
    rewards=mean_logp_rewards,
    beta=at_least_zero(0.1),
)
def orpo(batch: LossInputs, *, beta: float) -> Array:
    r"""ORPO: likelihood of the chosen response per token, and the log odds ratio of the mean probabilities.

    .. math::
      -\frac{\ln \pi(y_+|x)}{|y_+|} - \lambda \ln \sigma\left(\ln \frac{\bar p_+}{1 - \bar p_+}
      - \ln \frac{\bar p_-}{1 - \bar p_-}\right), \qquad \bar p = e^{\ln \pi(y|x)/|y|}

    The likelihood term reads the response only; TRL's reads prompt and response.

    Defaults:
      beta (the paper's lambda) 0.1.

    References:
      Hong et al., ORPO (https://arxiv.org/abs/2403.07691), eqs. 4 and 7.
    """
    chosen, rejected = mean_logps(batch)
    log_odds_ratio = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -chosen + beta * neg_log_sigmoid(log_odds_ratio)
