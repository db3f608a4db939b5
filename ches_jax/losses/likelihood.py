r"""Objectives with a likelihood term of the chosen response, and those with neither pair margin nor reference.

Two units of that term are in use, and differ by the response's length: the *summed* log-probability (the official code
of the displacement paper, CPO's paper) and the mean *per token* (iterative RPO, TRL). Names tell them apart.

>>> from ches_jax.losses import get_loss
>>> logps = {"logp_chosen": jnp.array([-8.0]), "logp_rejected": jnp.array([-12.0])}
>>> logps |= {"ref_logp_chosen": jnp.array([-10.0]), "ref_logp_rejected": jnp.array([-10.0])}
>>> batch = LossInputs(**logps)
>>> value, _ = get_loss("dpo_sft_sum", beta=0.5, sft_coeff=1.0)(batch)
>>> f"{float(value[0]):.4f}"  # ln(1 + exp(-2)) of DPO, and 8 nats of the whole response
'8.1269'
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses.inputs import LENGTHS, LOGPS, REFERENCE, LossInputs, logps, margin, mean_logps
from ches_jax.losses.metrics import Rewards, logp_rewards, scale
from ches_jax.losses.registry import at_least_zero, positive, register
from ches_jax.losses.stable import neg_log_sigmoid


@register(
    "dpo_sft_sum",
    source="Razin et al., arXiv:2410.08847, official code",
    beta=positive(0.1),
    sft_coeff=at_least_zero(1.0),
)
def dpo_sft_sum(batch: LossInputs, *, beta: float, sft_coeff: float) -> Array:
    r"""DPO with a likelihood term on the summed log-probability, as in the displacement paper.

    .. math:: -\ln \sigma(\beta m) - \lambda \ln \pi(y_+|x)

    Defaults:
      beta 0.1, sft_coeff 1 (the paper: 1 for Gemma-2B, 0.1 for Llama-3-8B). Per nat of the whole response.

    References:
      Razin et al., Unintentional Unalignment (https://arxiv.org/abs/2410.08847), Appendix E eq. 4 and Section 6.
    """
    return neg_log_sigmoid(beta * margin(batch)) - sft_coeff * jnp.asarray(batch.logp_chosen)


@register(
    "ipo_sft_sum",
    source="Razin et al., arXiv:2410.08847, official code",
    tau=positive(0.01),
    sft_coeff=at_least_zero(1000.0),
)
def ipo_sft_sum(batch: LossInputs, *, tau: float, sft_coeff: float) -> Array:
    r"""IPO with a likelihood term on the summed log-probability, as in the displacement paper.

    .. math:: \left(m - \frac{1}{2\tau}\right)^2 - \lambda \ln \pi(y_+|x)

    Defaults:
      tau 0.01, sft_coeff 1000, both the paper's.

    References:
      Razin et al., Unintentional Unalignment (https://arxiv.org/abs/2410.08847), Appendix E eq. 4 and Section 6.
    """
    return jnp.square(margin(batch) - 1.0 / (2.0 * tau)) - sft_coeff * jnp.asarray(batch.logp_chosen)


@register(
    "rpo",
    source="Pang et al. 2024, arXiv:2404.19733; TRL sigmoid + sft",
    needs=REFERENCE | LENGTHS,
    beta=positive(0.1),
    alpha=at_least_zero(1.0),
)
def rpo(batch: LossInputs, *, beta: float, alpha: float) -> Array:
    r"""RPO: DPO with a likelihood term per token.

    .. math:: -\ln \sigma(\beta m) - \alpha \frac{\ln \pi(y_+|x)}{|y_+|}

    TRL averages that term over all chosen tokens of a batch at once, so that its long responses count for more; with
    one pair, or equal lengths, the two agree. ``sigmoid + sft`` does as TRL.

    Defaults:
      beta 0.1, alpha 1 (Llama 3: 0.2; 0 is DPO). Nats per token.

    References:
      Pang et al., Iterative Reasoning Preference Optimization (https://arxiv.org/abs/2404.19733).
    """
    return neg_log_sigmoid(beta * margin(batch)) - alpha * mean_logps(batch)[0]


@register(
    "cpo",
    source="Xu et al. 2024, arXiv:2401.08417",
    needs=LOGPS,
    rewards=logp_rewards,
    beta=positive(0.1),
    lam=at_least_zero(1.0),
)
def cpo(batch: LossInputs, *, beta: float, lam: float) -> Array:
    r"""CPO: DPO with a uniform reference, and the summed likelihood of the chosen response.

    .. math:: -\ln \sigma(\beta [\ln \pi(y_+|x) - \ln \pi(y_-|x)]) - \lambda \ln \pi(y_+|x)

    Defaults:
      beta 0.1, lam 1. The paper's likelihood is a sum; TRL's is a mean over the batch's chosen tokens, which is
      ``cpo(lam=0) + sft``.

    References:
      Xu et al., Contrastive Preference Optimization (https://arxiv.org/abs/2401.08417).
    """
    chosen, rejected = logps(batch)
    return neg_log_sigmoid(beta * (chosen - rejected)) - lam * chosen


@register(
    "slic",
    source="Zhao et al. 2023, arXiv:2305.10425",
    needs=LOGPS,
    rewards=logp_rewards,
    delta=positive(1.0),
    lam=at_least_zero(0.0),
)
def slic(batch: LossInputs, *, delta: float, lam: float) -> Array:
    r"""SLiC: a hinge on summed log-probabilities without reference, and a likelihood term.

    .. math:: \max(0,\ \delta - \ln \pi(y_+|x) + \ln \pi(y_-|x)) - \lambda \ln \pi(y_+|x)

    Defaults:
      delta 1 nat, lam 0: the displacement paper's form. SLiC-HF adds the term, on the chosen or an SFT response.

    References:
      Zhao et al., SLiC-HF (https://arxiv.org/abs/2305.10425); arXiv:2410.08847, Appendix B.
    """
    chosen, rejected = logps(batch)
    return jax.nn.relu(delta - chosen + rejected) - lam * chosen


def _chosen_only(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    logp = jnp.asarray(batch.logp_chosen)
    logged = {"logps/chosen": logp}
    if batch.chosen_tokens is not None:
        logged["logps_per_token/chosen"] = logp / jnp.maximum(jnp.asarray(batch.chosen_tokens).astype(logp.dtype), 1)
    return logged


@register(
    "sft_sum",
    source="cross-entropy; Razin et al., arXiv:2410.08847, official code",
    needs=frozenset({"logp_chosen"}),
    rewards=_chosen_only,
)
def sft_sum(batch: LossInputs) -> Array:
    r"""Cross-entropy on the chosen response, summed over its tokens: a long response counts for more.

    .. math:: -\ln \pi(y_+|x)

    Defaults:
      none. Nats of the whole response; as a term beside another loss, the unit of the displacement paper's code.

    References:
      Razin et al., Unintentional Unalignment (https://arxiv.org/abs/2410.08847), ``sft_coeff`` of the official code.
    """
    return -jnp.asarray(batch.logp_chosen)


@register(
    "sft_token",
    source="cross-entropy; Pang et al. 2024, arXiv:2404.19733",
    needs=frozenset({"logp_chosen", "chosen_tokens"}),
    rewards=_chosen_only,
)
def sft_token(batch: LossInputs) -> Array:
    r"""Cross-entropy on the chosen response per token: each response counts the same.

    .. math:: -\frac{\ln \pi(y_+|x)}{|y_+|}

    Defaults:
      none. Nats per token; as a term beside DPO, iterative RPO's.

    References:
      Pang et al., Iterative Reasoning Preference Optimization (https://arxiv.org/abs/2404.19733).
    """
    logp = jnp.asarray(batch.logp_chosen)
    return -logp / jnp.maximum(jnp.asarray(batch.chosen_tokens).astype(logp.dtype), 1)


@register(
    "sft",
    source="cross-entropy; TRL sft",
    needs=frozenset({"logp_chosen", "chosen_tokens"}),
    rewards=_chosen_only,
    optional=frozenset({"pairs_per_token"}),
)
def sft(batch: LossInputs) -> Array:
    r"""Cross-entropy on the chosen responses, whose mean over the pairs is the mean over the tokens of all of them.

    .. math:: -\frac{B}{\sum_{i=1}^B |y_+^{(i)}|} \ln \pi(y_+|x)

    over the B pairs of the update: of the batch, unless ``pairs_per_token`` gives that share for an update that is cut
    into several.

    Defaults:
      none. Nats per token.

    References:
      TRL's ``sft`` among the ``loss_type`` of DPO, and its SFT trainer.
    """
    logp = jnp.asarray(batch.logp_chosen)
    if batch.pairs_per_token is not None:
        return -logp * jnp.asarray(batch.pairs_per_token, logp.dtype)
    tokens = jnp.asarray(batch.chosen_tokens).astype(logp.dtype)
    return -logp * (tokens.size / jnp.maximum(jnp.sum(tokens), 1))


def _candidate_rewards(batch, hyper):
    candidates, rejected = jnp.asarray(batch.logp_candidates), jnp.asarray(batch.logp_rejected)
    ratios = jnp.mean(candidates - jnp.asarray(batch.ref_logp_candidates), axis=-1)
    return {
        "rewards/chosen": scale(hyper) * ratios,
        "rewards/rejected": hyper["alpha"] * (rejected - jnp.asarray(batch.ref_logp_rejected)),
        "logps/chosen": jnp.mean(candidates, axis=-1),
        "logps/rejected": rejected,
    }


_D2O_REWARDS: Rewards = _candidate_rewards


@register(
    "d2o",
    source="Duan et al. 2024, arXiv:2403.03419",
    rewards=_D2O_REWARDS,
    needs=frozenset({"logp_candidates", "ref_logp_candidates", "logp_rejected", "ref_logp_rejected"}),
    beta=positive(0.1),
    alpha=at_least_zero(0.1),
)
def d2o(batch: LossInputs, *, beta: float, alpha: float) -> Array:
    r"""Distributional dispreference optimisation: K samples of the policy stand where the chosen response stood.

    .. math::
      -\ln \sigma\left(\frac{\beta}{K} \sum_{i=1}^K \ln \frac{\pi(y_i|x)}{\pi_{r^-}(y_i|x)}
      - \alpha \ln \frac{\pi(y_-|x)}{\pi_{r^+}(y_-|x)}\right)

    ``ref_logp_candidates`` is under the harmful reference :math:`\pi_{r^-}`, ``ref_logp_rejected`` under the helpful
    one :math:`\pi_{r^+}`; one model may serve as both.

    Defaults:
      beta 0.1, alpha 0.1 (the paper: K = 11).

    References:
      Duan et al., Negating Negatives (https://arxiv.org/abs/2403.03419).
    """
    ratios = jnp.asarray(batch.logp_candidates) - jnp.asarray(batch.ref_logp_candidates)
    rejected = jnp.asarray(batch.logp_rejected) - jnp.asarray(batch.ref_logp_rejected)
    return neg_log_sigmoid(beta * jnp.mean(ratios, axis=-1) - alpha * rejected)
