r"""Objectives that treat the two log-ratios apart, so that where each ends up matters and not only their margin.

With :math:`r_\pm = \ln \pi(y_\pm|x) - \ln \pi_{ref}(y_\pm|x)`, summed over tokens, in nats, and :math:`m = r_+ - r_-`.

Two pairs of the same margin; in the second one the chosen response has fallen by 2 nats, and DPO-Positive alone minds:

>>> from ches_jax.losses import get_loss
>>> ref = jnp.array([-10.0, -10.0])
>>> batch = LossInputs(jnp.array([-8.0, -12.0]), jnp.array([-12.0, -16.0]), ref, ref)
>>> {name: [f"{v:.2f}" for v in get_loss(name, beta=0.5)(batch)[0].tolist()] for name in ("dpo", "dpop")}
{'dpo': ['0.13', '0.13'], 'dpop': ['0.13', '48.00']}
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses.inputs import REFERENCE, LossInputs, RunningMean, log_ratios
from ches_jax.losses.metrics import row_rewards
from ches_jax.losses.registry import Hyper, at_least_zero, positive, register
from ches_jax.losses.stable import capped_exp, neg_log_sigmoid


@register("dpop", source="Pal et al. 2024, arXiv:2402.13228", beta=positive(0.3), lam=at_least_zero(50.0))
def dpop(batch: LossInputs, *, beta: float, lam: float) -> Array:
    r"""DPO-Positive: a penalty, inside the sigmoid and times beta, while the chosen response is below its reference.

    .. math:: -\ln \sigma(\beta [m - \lambda \max(0, -r_+)])

    Defaults:
      beta 0.3, lam 50 (5 to 500 in the paper; 0 is DPO). lam has no unit.

    References:
      Pal et al., Smaug (https://arxiv.org/abs/2402.13228).
    """
    chosen, rejected = log_ratios(batch)
    return neg_log_sigmoid(beta * (chosen - rejected - lam * jax.nn.relu(-chosen)))


@register(
    "dpo_shift",
    source="Yang et al. 2025, arXiv:2502.07599",
    beta=positive(0.01),
    lam=Hyper(0.75, low=0.0, high=1.0, open_low=True),
)
def dpo_shift(batch: LossInputs, *, beta: float, lam: float) -> Array:
    r"""DPO-Shift: the rejected response counts for less.

    .. math:: -\ln \sigma(\beta (r_+ - \lambda r_-))

    Defaults:
      beta 0.01, lam 0.75 (the paper fixes values from 0.5 to 0.95, or moves it linearly; 1 is DPO).

    References:
      Yang et al., DPO-Shift (https://arxiv.org/abs/2502.07599).
    """
    chosen, rejected = log_ratios(batch)
    return neg_log_sigmoid(beta * (chosen - lam * rejected))


@register("flex_dpo", source="Yan et al. 2024, arXiv:2406.07327", beta=positive(0.1), beta_rejected=positive(0.1))
def flex_dpo(batch: LossInputs, *, beta: float, beta_rejected: float) -> Array:
    r"""Flex-DPO: a strength of its own for each side.

    .. math:: -\ln \sigma(\beta_+ r_+ - \beta_- r_-)

    Defaults:
      beta 0.1, beta_rejected 0.1 (equal: DPO; a smaller beta_rejected slows the fall of the rejected response).

    References:
      Yan et al., 3D-Properties (https://arxiv.org/abs/2406.07327).
    """
    chosen, rejected = log_ratios(batch)
    return neg_log_sigmoid(beta * chosen - beta_rejected * rejected)


@register("cal_dpo", source="Xiao et al. 2024, arXiv:2412.14516", beta=positive(0.001))
def cal_dpo(batch: LossInputs, *, beta: float) -> Array:
    r"""Cal-DPO: DPO on the bare margin, and each log-ratio regresses on its own target, one up and one down.

    .. math::
      -\ln \sigma(m) + \tfrac12 \left(r_+ - \tfrac{1}{2\beta}\right)^2 + \tfrac12 \left(r_- + \tfrac{1}{2\beta}\right)^2

    Defaults:
      beta 0.001: targets of plus and minus 500 nats, an initial loss of 2.5e5. Squared nats.

    References:
      Xiao et al., Cal-DPO (https://arxiv.org/abs/2412.14516).
    """
    chosen, rejected = log_ratios(batch)
    target = 1.0 / (2.0 * beta)
    calibration = 0.5 * jnp.square(chosen - target) + 0.5 * jnp.square(rejected + target)
    return neg_log_sigmoid(chosen - rejected) + calibration


@register("squaredpo", source="derived from the f of arXiv:2602.06788", beta=positive(0.1))
def squaredpo(batch: LossInputs, *, beta: float) -> Array:
    r"""SquaredPO: f-DPO with :math:`f(t) = \tfrac12 (\ln t)^2`, whose minimum at t = 1 resists displacement.

    .. math:: -\ln \sigma(\beta [r_+ e^{-r_+} - r_- e^{-r_-}])

    It pulls the chosen response to a log-ratio of 1 and pushes it back beyond. The exponential continues along its
    tangent for a fall beyond 30 nats; summed log-probabilities get there soon.

    Defaults:
      beta 0.1.

    References:
      f as published in https://arxiv.org/abs/2602.06788; the loss is derived from it here.
    """
    chosen, rejected = log_ratios(batch)
    return neg_log_sigmoid(beta * (chosen * capped_exp(-chosen) - rejected * capped_exp(-rejected)))


@register("nca", source="Chen et al. 2024, arXiv:2402.05369", beta=positive(0.01))
def nca(batch: LossInputs, *, beta: float) -> Array:
    r"""Noise contrastive alignment on pairs; with the rejected side out of play, it settles at beta r+ = ln 2.

    .. math:: -\ln \sigma(\beta r_+) - \tfrac12 \ln \sigma(-\beta r_+) - \tfrac12 \ln \sigma(-\beta r_-)

    Defaults:
      beta 0.01.

    References:
      Chen et al., Noise Contrastive Alignment (https://arxiv.org/abs/2402.05369); TRL's ``nca_pair``.
    """
    chosen, rejected = (beta * r for r in log_ratios(batch))
    return neg_log_sigmoid(chosen) + 0.5 * neg_log_sigmoid(-chosen) + 0.5 * neg_log_sigmoid(-rejected)


@register("apo_zero", source="D'Oosterlinck et al. 2024, arXiv:2408.06266", beta=positive(0.1))
def apo_zero(batch: LossInputs, *, beta: float) -> Array:
    r"""Anchored preference optimisation, zero: chosen up, rejected down, each against its own reference.

    .. math:: 1 - \sigma(\beta r_+) + \sigma(\beta r_-)

    Defaults:
      beta 0.1.

    References:
      D'Oosterlinck et al., Anchored Preference Optimization (https://arxiv.org/abs/2408.06266), eq. 7; the constant 1
      is TRL's.
    """
    chosen, rejected = log_ratios(batch)
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


@register("apo_down", source="D'Oosterlinck et al. 2024, arXiv:2408.06266", beta=positive(0.1))
def apo_down(batch: LossInputs, *, beta: float) -> Array:
    r"""Anchored preference optimisation, down: chosen down, rejected down faster. It displaces by design.

    .. math:: \sigma(\beta r_+) + 1 - \sigma(\beta m)

    Defaults:
      beta 0.1.

    References:
      D'Oosterlinck et al., Anchored Preference Optimization (https://arxiv.org/abs/2408.06266), eq. 8; the constant 1
      is TRL's.
    """
    chosen, rejected = log_ratios(batch)
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def _bco_mean(batch: LossInputs, beta: float) -> RunningMean:
    assert batch.reward_mean is not None
    return batch.reward_mean.update(beta * jnp.concatenate([jnp.ravel(r) for r in log_ratios(batch)]))


def _bco_state(batch: LossInputs, *, beta: float) -> dict[str, RunningMean]:
    return {"state/reward_mean": _bco_mean(batch, beta)}


@register(
    "bco_pair",
    source="Jung et al. 2024, arXiv:2404.04656",
    needs=REFERENCE | {"reward_mean"},
    next_state=_bco_state,
    beta=positive(0.01),
)
def bco_pair(batch: LossInputs, *, beta: float) -> Array:
    r"""Binary classifier optimisation on pairs, with the running mean of all rewards as the decision boundary.

    .. math:: -\ln \sigma(\beta r_+ - \delta) - \ln \sigma(-(\beta r_- - \delta))

    delta is the mean of beta r+ and beta r- over every batch so far and this one, without gradient. The state comes in
    as ``reward_mean`` (zeros at first) and goes out as ``aux["state/reward_mean"]``.

    Defaults:
      beta 0.01.

    References:
      Jung et al., Binary Classifier Optimization (https://arxiv.org/abs/2404.04656). TRL 1.x has delta = 0:
      ``bco_pair_unshifted``.
    """
    delta = jnp.asarray(_bco_mean(batch, beta).mean)
    chosen, rejected = (beta * r for r in log_ratios(batch))
    return neg_log_sigmoid(chosen - delta) + neg_log_sigmoid(delta - rejected)


@register("bco_pair_unshifted", source="TRL 1.16 bco_pair; after arXiv:2404.04656", beta=positive(0.1))
@register("bce", source="registry of arXiv:2604.18239", beta=positive(1.0))
def bco_pair_unshifted(batch: LossInputs, *, beta: float) -> Array:
    r"""Binary cross-entropy of the two rewards: BCO on pairs with its boundary at zero; stateless.

    .. math:: -\ln \sigma(\beta r_+) - \ln \sigma(-\beta r_-)

    Defaults:
      ``bco_pair_unshifted``: beta 0.1, TRL's. ``bce``: beta 1.

    References:
      TRL's ``bco_pair`` since it became stateless; ``bce`` in the registry of https://arxiv.org/abs/2604.18239.
    """
    chosen, rejected = (beta * r for r in log_ratios(batch))
    return neg_log_sigmoid(chosen) + neg_log_sigmoid(-rejected)


@register("sppo_hard", source="Wu et al. 2024, arXiv:2405.00675", beta=positive(0.001))
def sppo_hard(batch: LossInputs, *, beta: float) -> Array:
    r"""Self-play preference optimisation with hard win probabilities, 1 and 0.

    .. math:: \left(r_+ - \tfrac{1}{2\beta}\right)^2 + \left(r_- + \tfrac{1}{2\beta}\right)^2

    Defaults:
      beta 0.001, the paper's eta = 1000 (TRL: 0.1). Squared nats.

    References:
      Wu et al., Self-Play Preference Optimization (https://arxiv.org/abs/2405.00675), eq. 4.7.
    """
    chosen, rejected = log_ratios(batch)
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


@register("lsif", source="registry of arXiv:2604.18239")
def lsif(batch: LossInputs) -> Array:
    r"""Least-squares importance fitting of the density ratio; not bounded below.

    .. math:: -e^{r_+} + \tfrac12 e^{2 r_-}

    Integrated from its incentives, :math:`e^{r_+}` and :math:`e^{2 r_-}`. Exponentials continue along their tangent
    beyond an exponent of 30.

    Defaults:
      none.

    References:
      Incentives in https://arxiv.org/abs/2604.18239.
    """
    chosen, rejected = log_ratios(batch)
    return -capped_exp(chosen) + 0.5 * capped_exp(2.0 * rejected)


@register("ukl", source="registry of arXiv:2604.18239")
def ukl(batch: LossInputs) -> Array:
    r"""Unnormalised Kullback-Leibler fit of the density ratio: the chosen side is pushed with constant force.

    .. math:: -r_+ + e^{r_-}

    Integrated from its incentives, 1 and :math:`e^{r_-}`; tangent beyond 30 nats.

    Defaults:
      none.

    References:
      Incentives in https://arxiv.org/abs/2604.18239.
    """
    chosen, rejected = log_ratios(batch)
    return -chosen + capped_exp(rejected)


DDRO_END = math.log(1.9)
"""Log-ratio beyond which ``ddro`` follows its tangent, short of its pole at ln 2."""


@register("ddro", source="registry of arXiv:2604.18239")
def ddro(batch: LossInputs) -> Array:
    r"""Direct density ratio optimisation: the reference as the even mixture of good and bad responses.

    .. math:: -r_+ - \ln(2 - e^{r_-})

    Integrated from its incentives, 1 and :math:`t/(2 - t)` with :math:`t = e^{r_-}`. The pole at t = 2 is out of
    reach: beyond t = 1.9 the loss continues along its tangent.

    Defaults:
      none.

    References:
      Incentives in https://arxiv.org/abs/2604.18239.
    """
    chosen, rejected = log_ratios(batch)
    low = jnp.where(rejected < DDRO_END, rejected, DDRO_END)
    slope = 1.9 / (2.0 - 1.9)
    # ln(2 - t) as ln(1 - (t - 1)), exact where policy and reference agree
    return -chosen - jnp.log1p(-jnp.expm1(low)) + slope * (rejected - low)


@register(
    "kto",
    source="Ethayarajh et al. 2024, arXiv:2402.01306",
    needs=frozenset({"logp", "ref_logp", "desirable", "kl_baseline"}),
    rewards=row_rewards,
    beta=positive(0.1),
    weight_desirable=at_least_zero(1.0),
    weight_undesirable=at_least_zero(1.0),
)
def kto(batch: LossInputs, *, beta: float, weight_desirable: float, weight_undesirable: float) -> Array:
    r"""KTO, unpaired: each row is one response, good or bad, judged against a reference point z0.

    .. math::
      \lambda_D\, (1 - \sigma(\beta (r - z_0))) \ \text{if desirable}, \qquad
      \lambda_U\, (1 - \sigma(\beta (z_0 - r))) \ \text{otherwise}

    z0 comes in as ``kl_baseline``, in nats (``kto_baseline`` estimates it), and carries no gradient. ``unpair`` turns
    pairs into rows.

    Defaults:
      beta 0.1, weight_desirable 1, weight_undesirable 1.

    References:
      Ethayarajh et al., KTO (https://arxiv.org/abs/2402.01306), eq. 7.
    """
    ratio = jnp.asarray(batch.logp) - jnp.asarray(batch.ref_logp)
    surplus = beta * (ratio - jax.lax.stop_gradient(jnp.asarray(batch.kl_baseline, ratio.dtype)))
    good = weight_desirable * jax.nn.sigmoid(-surplus)
    return jnp.where(jnp.asarray(batch.desirable), good, weight_undesirable * jax.nn.sigmoid(surplus))


def _rows_mean(batch: LossInputs, beta: float) -> RunningMean:
    assert batch.reward_mean is not None
    return batch.reward_mean.update(beta * (jnp.asarray(batch.logp) - jnp.asarray(batch.ref_logp)))


def _bco_rows_state(batch: LossInputs, *, beta: float) -> dict[str, RunningMean]:
    return {"state/reward_mean": _rows_mean(batch, beta)}


@register(
    "bco",
    source="Jung et al. 2024, arXiv:2404.04656",
    needs=frozenset({"logp", "ref_logp", "desirable", "reward_mean"}),
    rewards=row_rewards,
    next_state=_bco_rows_state,
    beta=positive(0.01),
)
def bco(batch: LossInputs, *, beta: float) -> Array:
    r"""Binary classifier optimisation, unpaired: each row is one response, good or bad.

    .. math::
      -\ln \sigma(\beta r - \delta) \ \text{if desirable}, \qquad -\ln \sigma(\delta - \beta r) \ \text{otherwise}

    delta is the mean of beta r over all rows of every batch so far and this one, without gradient; its state is that of
    ``bco_pair``. Where good and bad responses are of other prompts, the paper weighs each bad row by the density ratio
    of its prompt, p(x | good) / p(x | bad), clipped to [0.5, 10]: ``weighted(bco)`` with the column of weights that
    ``ches label --by density-ratio`` writes.

    Defaults:
      beta 0.01.

    References:
      Jung et al., Binary Classifier Optimization (https://arxiv.org/abs/2404.04656), eqs. 9 to 11.
    """
    reward = beta * (jnp.asarray(batch.logp) - jnp.asarray(batch.ref_logp))
    surplus = reward - jnp.asarray(_rows_mean(batch, beta).mean)
    return neg_log_sigmoid(jnp.where(jnp.asarray(batch.desirable), surplus, -surplus))


def kto_baseline(logp: Array, ref_logp: Array) -> Array:
    r"""KTO's reference point: how far the policy is from the reference, on responses of other prompts.

    .. math:: z_0 = \max\left(0,\ \tfrac1B \sum_i \ln \pi(y_{i+1}|x_i) - \ln \pi_{ref}(y_{i+1}|x_i)\right)

    Args:
      logp: log-probabilities of mismatched prompt and response, nats; more than one row.
      ref_logp: the same under the reference.

    Returns:
      One number, without gradient, in nats.
    """
    return jax.lax.stop_gradient(jax.nn.relu(jnp.mean(logp - ref_logp)))
