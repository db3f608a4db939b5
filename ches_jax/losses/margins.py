r"""Objectives of one number per pair, the margin of the log-ratios to the reference.

.. math::
  r_\pm = \ln \frac{\pi(y_\pm|x)}{\pi_{ref}(y_\pm|x)}, \qquad m = r_+ - r_-, \qquad z = \beta m

Log-probabilities are summed over tokens, in nats; beta has no unit. Such a loss pushes the two responses equally hard
in opposite directions: its incentives are equal.

>>> from ches_jax.losses import get_loss, incentives
>>> logp, ref = (jnp.array([-8.0]), jnp.array([-12.0])), (jnp.array([-10.0]), jnp.array([-10.0]))
>>> batch = LossInputs(*logp, *ref)  # r+ = 2, r- = -2, m = 4
>>> value, metrics = get_loss("dpo", beta=0.5)(batch)
>>> f"{float(value[0]):.4f}", float(metrics["rewards/margins"][0])  # ln(1 + exp(-2)), 0.5 * 4
('0.1269', 2.0)
>>> push = incentives(get_loss("dpo", beta=0.5))(batch)
>>> f"{float(push.chosen[0]):.4f} {float(push.rejected[0]):.4f}"
'0.0596 0.0596'
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses.inputs import REFERENCE, REWARDS, LossInputs, log_ratios, margin
from ches_jax.losses.registry import Hyper, any_number, at_least_zero, fraction, positive, register
from ches_jax.losses.stable import capped_exp, capped_expm1, neg_log_sigmoid


@register("gpo_logistic", source="Tang et al. 2024, arXiv:2402.05749", beta=positive(0.1))
@register("sigmoid", source="Rafailov et al. 2023, arXiv:2305.18290", beta=positive(0.1))
@register("dpo", source="Rafailov et al. 2023, arXiv:2305.18290", beta=positive(0.1))
def sigmoid(batch: LossInputs, *, beta: float) -> Array:
    r"""DPO; ln 2 where policy and reference agree.

    .. math:: -\ln \sigma(\beta m)

    Defaults:
      beta 0.1.

    References:
      Rafailov et al., Direct Preference Optimization (https://arxiv.org/abs/2305.18290), eq. 7; TRL's ``sigmoid``;
      ``gpo_logistic`` of Tang et al. (https://arxiv.org/abs/2402.05749), Table 1.
    """
    return neg_log_sigmoid(beta * margin(batch))


@register(
    "cdpo", source="Mitchell 2023, note on cDPO; arXiv:2305.18290", beta=positive(0.1), label_smoothing=fraction(0.1)
)
def cdpo(batch: LossInputs, *, beta: float, label_smoothing: float) -> Array:
    r"""Conservative DPO: each label is wrong with probability e. Least at a finite margin, ln((1-e)/e)/beta.

    .. math:: -(1 - e) \ln \sigma(z) - e \ln \sigma(-z)

    Defaults:
      beta 0.1, label_smoothing e = 0.1 (0 to 0.5 in use; 0 is DPO).

    References:
      Mitchell, A note on DPO with noisy preferences (2023); TRL before 1.0: ``sigmoid`` with ``label_smoothing``.
    """
    z = beta * margin(batch)
    return (1.0 - label_smoothing) * neg_log_sigmoid(z) + label_smoothing * neg_log_sigmoid(-z)


@register(
    "robust",
    source="Chowdhury et al. 2024, arXiv:2403.00409",
    beta=positive(0.1),
    label_smoothing=Hyper(0.1, low=0.0, high=0.5, open_high=True),
)
def robust(batch: LossInputs, *, beta: float, label_smoothing: float) -> Array:
    r"""Robust DPO: an unbiased estimate of the DPO loss of clean labels when a fraction e of them is flipped.

    .. math:: \frac{-(1 - e) \ln \sigma(z) + e \ln \sigma(-z)}{1 - 2e}

    Not bounded below: it falls without end as the margin grows, so its value selects no checkpoint.

    Defaults:
      beta 0.1, label_smoothing e = 0.1 (below 0.5).

    References:
      Chowdhury et al., Provably Robust DPO (https://arxiv.org/abs/2403.00409).
    """
    z = beta * margin(batch)
    clean = (1.0 - label_smoothing) * neg_log_sigmoid(z)
    return (clean - label_smoothing * neg_log_sigmoid(-z)) / (1.0 - 2.0 * label_smoothing)


@register("ipo_sum", source="Azar et al. 2023, arXiv:2310.12036; Razin et al., arXiv:2410.08847", tau=positive(0.1))
def ipo_sum(batch: LossInputs, *, tau: float) -> Array:
    r"""IPO on summed log-probabilities, the form of the displacement paper; 1/(4 tau^2) at the reference.

    .. math:: \left(m - \frac{1}{2 \tau}\right)^2

    Defaults:
      tau 0.1 (the displacement paper: 0.01, a target margin of 50 nats). Squared nats.

    References:
      Azar et al., A General Theoretical Paradigm (https://arxiv.org/abs/2310.12036), eq. 17. The mean over tokens that
      TRL calls ``ipo`` is ``ipo_mean``.
    """
    return jnp.square(margin(batch) - 1.0 / (2.0 * tau))


@register("gpo_hinge", source="Tang et al. 2024, arXiv:2402.05749", beta=positive(0.1))
@register("hinge", source="Liu et al. 2023 (RSO), arXiv:2309.06657", beta=positive(0.1))
def hinge(batch: LossInputs, *, beta: float) -> Array:
    r"""Hinge on the scaled margin; still once it reaches 1.

    .. math:: \max(0,\ 1 - \beta m)

    Defaults:
      beta 0.1.

    References:
      Liu et al., Statistical Rejection Sampling (https://arxiv.org/abs/2309.06657); TRL's ``hinge``;
      ``gpo_hinge`` of Tang et al. (https://arxiv.org/abs/2402.05749). SLiC proper has no reference: ``slic``.
    """
    return jax.nn.relu(1.0 - beta * margin(batch))


@register("rebel", source="Gao et al. 2024, arXiv:2404.16767", needs=REFERENCE | REWARDS, eta=positive(1.0))
def rebel(batch: LossInputs, *, eta: float) -> Array:
    r"""REBEL: the scaled margin regresses on a difference of given rewards s.

    .. math:: \left(\frac{m}{\eta} - (s_+ - s_-)\right)^2

    With eta = 1/beta this is also the pairwise contrastive policy gradient loss of given rewards (arXiv:2406.19185).

    Defaults:
      eta 1, nats per unit of reward; to be chosen to the scale of the rewards.

    References:
      Gao et al., REBEL (https://arxiv.org/abs/2404.16767).
    """
    return jnp.square(margin(batch) / eta - (jnp.asarray(batch.rewards_chosen) - jnp.asarray(batch.rewards_rejected)))


@register("gpo_squared", source="Tang et al. 2024, arXiv:2402.05749", beta=positive(0.1))
def gpo_squared(batch: LossInputs, *, beta: float) -> Array:
    r"""GPO with the square, IPO in another scale: :math:`f(z) = (z - 1)^2`, with beta = 2 tau this is 4 tau^2 IPO.

    Defaults:
      beta 0.1.

    References:
      Tang et al., Generalized Preference Optimization (https://arxiv.org/abs/2402.05749), Table 1.
    """
    return jnp.square(beta * margin(batch) - 1.0)


@register("gpo_exponential", source="Tang et al. 2024, arXiv:2402.05749", beta=positive(0.1))
def gpo_exponential(batch: LossInputs, *, beta: float) -> Array:
    r"""GPO with the exponential: :math:`f(z) = e^{-z}`, continued along its tangent below z = -30.

    Defaults:
      beta 0.1.

    References:
      Tang et al., Generalized Preference Optimization (https://arxiv.org/abs/2402.05749), Table 1.
    """
    return capped_exp(-beta * margin(batch))


@register("gpo_truncated_quadratic", source="Tang et al. 2024, arXiv:2402.05749", beta=positive(0.1))
def gpo_truncated_quadratic(batch: LossInputs, *, beta: float) -> Array:
    r"""GPO with the truncated quadratic: :math:`f(z) = \max(0, 1 - z)^2`.

    Defaults:
      beta 0.1.

    References:
      Tang et al., Generalized Preference Optimization (https://arxiv.org/abs/2402.05749), Table 1.
    """
    return jnp.square(jax.nn.relu(1.0 - beta * margin(batch)))


@register("gpo_savage", source="Tang et al. 2024, arXiv:2402.05749", beta=positive(0.1))
def gpo_savage(batch: LossInputs, *, beta: float) -> Array:
    r"""GPO with the Savage function: :math:`f(z) = (1 + e^z)^{-2} = \sigma(-z)^2`; not convex, flat at both ends.

    Defaults:
      beta 0.1.

    References:
      Tang et al., Generalized Preference Optimization (https://arxiv.org/abs/2402.05749), Table 1.
    """
    return jnp.square(jax.nn.sigmoid(-beta * margin(batch)))


@register(
    "odpo",
    source="Amini et al. 2024, arXiv:2402.10571",
    needs=REFERENCE | REWARDS,
    beta=positive(0.1),
    alpha=at_least_zero(1.0),
)
def odpo(batch: LossInputs, *, beta: float, alpha: float) -> Array:
    r"""DPO with an offset: the scaled margin must exceed what the gap of given scores s asks for.

    .. math:: -\ln \sigma(z - \alpha \ln(s_+ - s_-))

    A pair whose chosen response does not score higher asks for nothing: its loss is zero (for alpha > 0).

    Defaults:
      beta 0.1, alpha 1 (0 is DPO). The scores' unit matters: a gap of 1 is no offset.

    References:
      Amini et al., DPO with an Offset (https://arxiv.org/abs/2402.10571).
    """
    gap = jnp.asarray(batch.rewards_chosen) - jnp.asarray(batch.rewards_rejected)
    offset = alpha * jnp.log(jnp.maximum(gap, jnp.finfo(gap.dtype).tiny))
    return neg_log_sigmoid(beta * margin(batch) - offset)


@register(
    "exo_pair",
    source="Ji et al. 2024, arXiv:2402.00856",
    beta=positive(0.1),
    label_smoothing=Hyper(1e-3, low=0.0, high=1.0, open_low=True, open_high=True),
)
def exo_pair(batch: LossInputs, *, beta: float, label_smoothing: float) -> Array:
    r"""EXO on pairs: the reverse divergence from the smoothed label to the policy's own preference.

    .. math:: \sigma(z) \ln\frac{\sigma(z)}{1 - e} + \sigma(-z) \ln\frac{\sigma(-z)}{e}

    Defaults:
      beta 0.1, label_smoothing e = 1e-3, strictly between 0 and 1.

    References:
      Ji et al., Towards Efficient Exact Optimization (https://arxiv.org/abs/2402.00856), eq. 16.
    """
    z = beta * margin(batch)
    right = jax.nn.sigmoid(z) * (jax.nn.log_sigmoid(z) - math.log1p(-label_smoothing))
    return right + jax.nn.sigmoid(-z) * (jax.nn.log_sigmoid(-z) - math.log(label_smoothing))


@register(
    "discopop",
    source="Lu et al. 2024, arXiv:2406.08414",
    beta=positive(0.05),
    tau=Hyper(0.05, low=0.0, high=1.0, open_low=True, open_high=True),
)
def discopop(batch: LossInputs, *, beta: float, tau: float) -> Array:
    r"""DiscoPOP, found by search: a blend of logistic and exponential losses by a gate on the margin.

    .. math:: (1 - \sigma(z/\tau)) \ln(1 + e^{-z}) + \sigma(z/\tau)\, e^{-z}

    Not convex: with a tau this small it rises around z = 0, so that at the reference it pushes the chosen response down
    and the rejected one up.

    Defaults:
      beta 0.05, tau 0.05 (TRL: beta 0.1); tau below 1 keeps the second term bounded.

    References:
      Lu et al., Discovering Preference Optimization Algorithms (https://arxiv.org/abs/2406.08414), eq. 5.
    """
    z = beta * margin(batch)
    # one exponent for the product: the exponential alone overflows where the gate has long closed
    exponential = jnp.exp(jax.nn.log_sigmoid(z / tau) - z)
    return jax.nn.sigmoid(-z / tau) * neg_log_sigmoid(z) + exponential


@register(
    "aot",
    source="Melnyk et al. 2024, arXiv:2406.05882",
    couples_rows=True,
    beta=positive(0.1),
    label_smoothing=fraction(0.0),
)
def aot(batch: LossInputs, *, beta: float, label_smoothing: float) -> Array:
    r"""Alignment by optimal transport, paired: the policy's margins dominate the reference's, quantile by quantile.

    .. math:: -\ln \sigma(\beta (u_{(i)} - u^{ref}_{(i)})), \qquad u = \ln \pi(y_+|x) - \ln \pi(y_-|x)

    with order statistics over the batch: row i of the result is the i-th quantile, not the i-th pair, and the value
    depends on how data is cut into batches.

    Defaults:
      beta 0.1, label_smoothing 0 (mixes in the flipped sign, as cDPO does).

    References:
      Melnyk et al., Distributional Preference Alignment (https://arxiv.org/abs/2406.05882); TRL's ``aot``.
    """
    u = jnp.asarray(batch.logp_chosen) - jnp.asarray(batch.logp_rejected)
    u_ref = jnp.asarray(batch.ref_logp_chosen) - jnp.asarray(batch.ref_logp_rejected)
    return _smoothed(beta * (_sorted(u) - _sorted(u_ref)), label_smoothing)


@register(
    "aot_unpaired",
    source="Melnyk et al. 2024, arXiv:2406.05882",
    couples_rows=True,
    beta=positive(0.1),
    label_smoothing=fraction(0.0),
)
def aot_unpaired(batch: LossInputs, *, beta: float, label_smoothing: float) -> Array:
    r"""Alignment by optimal transport, unpaired: log-ratios of chosen responses dominate those of rejected ones.

    .. math:: -\ln \sigma(\beta (r_{+(i)} - r_{-(i)}))

    with order statistics over the batch, as in ``aot``.

    Defaults:
      beta 0.1, label_smoothing 0.

    References:
      Melnyk et al., Distributional Preference Alignment (https://arxiv.org/abs/2406.05882); TRL's ``aot_unpaired``,
      which its releases before 1.0 named ``aot_pair``.
    """
    chosen, rejected = log_ratios(batch)
    return _smoothed(beta * (_sorted(chosen) - _sorted(rejected)), label_smoothing)


def _sorted(values: Array) -> Array:
    """The numbers of the whole batch in order, in the shape of the batch."""
    return jnp.sort(values, axis=None).reshape(values.shape)


def _smoothed(z: Array, label_smoothing: float) -> Array:
    return (1.0 - label_smoothing) * neg_log_sigmoid(z) + label_smoothing * neg_log_sigmoid(-z)


@register("fdpo_forward_kl", source="Wang et al. 2023, arXiv:2309.16240", beta=positive(0.1))
def fdpo_forward_kl(batch: LossInputs, *, beta: float) -> Array:
    r"""f-DPO with the forward Kullback-Leibler divergence: :math:`f'(t) = 1 - 1/t` stands where ln t stood.

    .. math:: -\ln \sigma(\beta (e^{-r_-} - e^{-r_+}))

    The exponentials continue along their tangent beyond a fall of 30 nats.

    Defaults:
      beta 0.1.

    References:
      Wang et al., Beyond Reverse KL (https://arxiv.org/abs/2309.16240).
    """
    chosen, rejected = log_ratios(batch)
    return neg_log_sigmoid(beta * (capped_exp(-rejected) - capped_exp(-chosen)))


@register("fdpo_js", source="Wang et al. 2023, arXiv:2309.16240", beta=positive(0.1))
def fdpo_js(batch: LossInputs, *, beta: float) -> Array:
    r"""f-DPO with the Jensen-Shannon divergence: :math:`f'(t) = \ln(2t/(1+t))`.

    .. math:: -\ln \sigma(\beta (\ln \sigma(r_+) - \ln \sigma(r_-)))

    Defaults:
      beta 0.1.

    References:
      Wang et al., Beyond Reverse KL (https://arxiv.org/abs/2309.16240).
    """
    chosen, rejected = log_ratios(batch)
    return neg_log_sigmoid(beta * (jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(rejected)))


@register("fdpo_alpha", source="Wang et al. 2023, arXiv:2309.16240", beta=positive(0.1), alpha=any_number(0.5))
def fdpo_alpha(batch: LossInputs, *, beta: float, alpha: float) -> Array:
    r"""f-DPO with an alpha divergence: :math:`f'(t) = (t^{\alpha - 1} - 1)/(\alpha - 1)`; alpha = 1 is DPO.

    .. math:: -\ln \sigma\left(\beta\, \frac{e^{(\alpha - 1) r_+} - e^{(\alpha - 1) r_-}}{\alpha - 1}\right)

    The exponentials continue along their tangent beyond an exponent of 30.

    Defaults:
      beta 0.1, alpha 0.5 (TRL's; its sign convention, which differs from the paper's).

    References:
      Wang et al., Beyond Reverse KL (https://arxiv.org/abs/2309.16240).
    """
    chosen, rejected = log_ratios(batch)
    slope = alpha - 1.0
    if abs(slope) < 1e-6:
        return neg_log_sigmoid(beta * (chosen - rejected))
    return neg_log_sigmoid(beta * (capped_expm1(slope * chosen) - capped_expm1(slope * rejected)) / slope)
