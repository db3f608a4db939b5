r"""Objectives of a whole list of scored responses to one prompt, the best first.

.. math:: s_i = \beta \ln \frac{\pi(y_i|x)}{\pi_{ref}(y_i|x)}, \qquad \psi_1 \ge \psi_2 \ge \dots \ge \psi_K

with the scores psi of the data. Rows may have different numbers of responses. With two responses LiPO's losses are
those of pairs:

>>> from ches_jax.losses import get_loss
>>> zeros, one = jnp.zeros((1, 2)), jnp.ones((1, 2))
>>> batch = LossInputs(
...     logp_responses=jnp.array([[-8.0, -12.0]]), ref_logp_responses=zeros - 10.0, response_mask=one,
...     scores=jnp.array([[1.0, 0.0]]),
... )
>>> f"{float(get_loss('list_mle', beta=0.5)(batch)[0][0]):.4f}"  # ln(1 + exp(-2)), DPO of the pair
'0.1269'
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from ches_jax.losses.inputs import LossInputs
from ches_jax.losses.registry import at_least_zero, positive, register
from ches_jax.losses.stable import neg_log_sigmoid

LISTS = frozenset({"logp_responses", "response_mask", "scores"})
LIST_REFERENCE = LISTS | {"ref_logp_responses"}
LOWEST = -1e30
"""Stands for minus infinity where there is no response: a difference of two of them is still a number."""


def _mask(batch: LossInputs) -> Bool[Array, "*B K"]:
    return jnp.asarray(batch.response_mask) != 0


def _scaled(batch: LossInputs, beta: float) -> Float[Array, "*B K"]:
    """The s_i, 0 where there is no response."""
    ratios = jnp.asarray(batch.logp_responses) - jnp.asarray(batch.ref_logp_responses)
    return beta * jnp.where(_mask(batch), ratios, 0.0)


def _list_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    """Of the best response, and the mean of the others."""
    logps = jnp.asarray(batch.logp_responses)
    values = logps if batch.ref_logp_responses is None else logps - jnp.asarray(batch.ref_logp_responses)
    others = _mask(batch).at[..., 0].set(False)
    count = jnp.maximum(jnp.sum(others, axis=-1), 1).astype(logps.dtype)

    def sides(a: Array) -> tuple[Array, Array]:
        return a[..., 0], jnp.sum(jnp.where(others, a, 0.0), axis=-1) / count

    beta = hyper.get("beta", 1.0)
    rewards, logged = sides(beta * values), sides(logps)
    return {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "logps/chosen": logged[0],
        "logps/rejected": logged[1],
    }


def _later_logsumexp(values: Float[Array, "*B K"], mask: Bool[Array, "*B K"]) -> Float[Array, "*B K"]:
    """For each place the logarithm of the sum of exponentials from there on."""
    kept = jnp.where(mask, values, LOWEST)
    later = jnp.triu(jnp.ones((kept.shape[-1],) * 2, bool))
    return jax.nn.logsumexp(jnp.where(later, kept[..., None, :], LOWEST), axis=-1)


@register(
    "list_mle",
    source="Plackett-Luce; arXiv:2305.18290, Appendix A.3; arXiv:2402.01878",
    needs=LIST_REFERENCE,
    rewards=_list_rewards,
    beta=positive(0.1),
)
def list_mle(batch: LossInputs, *, beta: float) -> Array:
    r"""ListMLE: the likelihood of the whole order under Plackett and Luce's model; of two responses DPO.

    .. math:: -\sum_{k=1}^{K-1} \ln \frac{e^{s_k}}{\sum_{i \ge k} e^{s_i}}

    Equal scores are taken in the order of the data.

    Defaults:
      beta 0.1.

    References:
      Rafailov et al. (https://arxiv.org/abs/2305.18290), Appendix A.3; ``list_mle`` of Liu et al., LiPO
      (https://arxiv.org/abs/2402.01878).
    """
    s, mask = _scaled(batch, beta), _mask(batch)
    return jnp.sum(jnp.where(mask, _later_logsumexp(s, mask) - s, 0.0), axis=-1)


@register(
    "list_softmax",
    source="ListNet; arXiv:2402.01878",
    needs=LIST_REFERENCE,
    rewards=_list_rewards,
    beta=positive(0.1),
    temperature=positive(1.0),
)
def list_softmax(batch: LossInputs, *, beta: float, temperature: float) -> Array:
    r"""Softmax: cross-entropy from the distribution that the scores make to the policy's.

    .. math:: -\sum_i \frac{e^{\psi_i / T}}{\sum_j e^{\psi_j / T}} \ln \frac{e^{s_i}}{\sum_j e^{s_j}}

    Defaults:
      beta 0.1, temperature T 1, in the unit of the scores: near 0 only the best response counts.

    References:
      Cao et al., ListNet (ICML 2007); the softmax loss of Liu et al., LiPO (https://arxiv.org/abs/2402.01878).
    """
    s, mask = _scaled(batch, beta), _mask(batch)
    labels = jax.nn.softmax(jnp.where(mask, jnp.asarray(batch.scores) / temperature, LOWEST), axis=-1)
    policy = jax.nn.log_softmax(jnp.where(mask, s, LOWEST), axis=-1)
    return -jnp.sum(jnp.where(mask, labels * policy, 0.0), axis=-1)


@register(
    "lipo_lambda",
    source="Liu et al. 2024, arXiv:2402.01878",
    needs=LIST_REFERENCE,
    rewards=_list_rewards,
    beta=positive(0.1),
)
def lipo_lambda(batch: LossInputs, *, beta: float) -> Array:
    r"""LiPO-lambda: all pairs of the list, each weighted by what exchanging the two would change of its DCG.

    .. math::
      \sum_{\psi_i > \psi_j} \Delta_{ij} \ln(1 + e^{-(s_i - s_j)}), \qquad
      \Delta_{ij} = |2^{\psi_i} - 2^{\psi_j}| \left|\frac{1}{\ln(1 + \tau(i))} - \frac{1}{\ln(1 + \tau(j))}\right|

    tau is the rank, from 1, that the policy's s give a response; the weights carry no gradient.

    Defaults:
      beta 0.1 (the paper: 0.05). Scores are meant between 0 and 1: their gains are powers of 2.

    References:
      Liu et al., LiPO (https://arxiv.org/abs/2402.01878), eqs. 9 and 10; ``pairwise_logistic_loss`` of Rax 0.4 with
      ``dcg_lambdaweight`` is this times K ln 2.
    """
    s, mask = _scaled(batch, beta), _mask(batch)
    scores = jnp.asarray(batch.scores).astype(s.dtype)
    kept = stop_gradient(jnp.where(mask, s, LOWEST))
    # ties of s keep the order of the list
    rank = 1 + jnp.argsort(jnp.argsort(-kept, axis=-1, stable=True), axis=-1, stable=True)
    discount = 1.0 / jnp.log1p(rank.astype(s.dtype))
    gain = jnp.exp2(scores)
    delta = jnp.abs(_differences(gain)) * jnp.abs(_differences(discount))
    counted = (_differences(scores) > 0) & mask[..., :, None] & mask[..., None, :]
    return jnp.sum(jnp.where(counted, delta * neg_log_sigmoid(_differences(s)), 0.0), axis=(-2, -1))


def _differences(a: Float[Array, "*B K"]) -> Float[Array, "*B K K"]:
    """a_i - a_j."""
    return a[..., :, None] - a[..., None, :]


@register(
    "pro",
    source="Song et al. 2023, arXiv:2306.17492",
    needs=LISTS | {"response_tokens"},
    rewards=_list_rewards,
    sft_coeff=at_least_zero(0.05),
)
def pro(batch: LossInputs, *, sft_coeff: float) -> Array:
    r"""PRO: each response against all worse ones, by mean log-probability, with temperatures from the score gaps.

    .. math::
      -\sum_{k=1}^{K-1} \ln \frac{e^{r_k / T_k^k}}{e^{r_k / T_k^k} + \sum_{i > k} e^{r_i / T_k^i}}
      - \lambda (K-1)^2 \ln \pi(y_1|x), \\
      r = \frac{\ln \pi(y|x)}{|y|}, \quad T_k^i = \frac{1}{\psi_k - \psi_i}, \quad T_k^k = \min_{i > k} T_k^i

    Without a reference; the last term is the likelihood of the best response, in nats of the whole response. A response
    is not set against one of the same score; the authors' code adds a constant 1 to the denominator for it.

    Defaults:
      sft_coeff lambda 0.05. r in nats per token; temperatures are in the unit of one over the scores.

    References:
      Song et al., Preference Ranking Optimization (https://arxiv.org/abs/2306.17492); checked against the arithmetic of
      its public code (``process_manager.py``), where the likelihood is the sum over the tokens, times lambda and the
      square of the number of worse responses.
    """
    mask = _mask(batch)
    lengths = jnp.maximum(jnp.asarray(batch.response_tokens), 1)
    logps = jnp.where(mask, jnp.asarray(batch.logp_responses), 0.0)
    r = logps / lengths.astype(logps.dtype)
    gaps = _differences(jnp.asarray(batch.scores).astype(r.dtype))
    worse = (gaps > 0) & mask[..., :, None] & mask[..., None, :]
    gaps = jnp.where(worse, gaps, 0.0)
    own = r * jnp.max(gaps, axis=-1)
    against = jnp.where(worse, r[..., None, :] * gaps, LOWEST)
    every = jnp.concatenate([own[..., None], against], axis=-1)
    ranking = jnp.where(jnp.any(worse, axis=-1), jax.nn.logsumexp(every, axis=-1) - own, 0.0)
    count = jnp.sum(mask, axis=-1).astype(r.dtype)
    return jnp.sum(ranking, axis=-1) - sft_coeff * jnp.square(count - 1) * logps[..., 0]
