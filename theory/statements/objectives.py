r"""Losses for the theory: :math:`\ell(u)` of the margin as in Appendix B, and any loss of the library's registry.

The theorems take :math:`\ell'` as a number, so a loss enters them only through ``jax.grad`` of one of these.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses import Loss, LossInputs, get_loss, loss_names, unpair
from theory.toy.ufm import PairLoss

Margin = Callable[[Array, Array, Array], Array]
"""(u, u_ref, scale) -> ell: convex in the margin u = ln pi(y+) - ln pi(y-), decreasing near the start."""


@dataclass(frozen=True)
class MarginLoss:
    """A member of Appendix B, and what Lemmas 1 and 2 may assume about it."""

    name: str
    ell: Margin
    lipschitz_slope: bool
    """Whether ell' is locally Lipschitz: the assumption that Lemma 2 leaves unsaid."""
    always_decreasing: bool


def dpo(u: Array, ref: Array, scale: Array) -> Array:
    r""":math:`-\ln \sigma(\beta (u - u_{ref}))`."""
    return jax.nn.softplus(-scale * (u - ref))


def ipo(u: Array, ref: Array, scale: Array) -> Array:
    r""":math:`(u - u_{ref} - 1 / 2\tau)^2`."""
    return (u - ref - 0.5 / scale) ** 2


def slic(u: Array, ref: Array, scale: Array) -> Array:
    r""":math:`\max(0, \delta - u)`, with :math:`\delta = u_{ref} + 1/\beta` so that it pulls at the start."""
    return jnp.maximum(ref + 1 / scale - u, 0.0)


def rebel(u: Array, ref: Array, scale: Array) -> Array:
    r""":math:`((u - u_{ref}) / \eta - r^+ + r^-)^2`, with :math:`\eta = 1/\beta` and a reward gap of 1."""
    return (scale * (u - ref) - 1.0) ** 2


def gpo_exponential(u: Array, ref: Array, scale: Array) -> Array:
    r"""GPO with :math:`f(v) = e^{-v}`."""
    return jnp.exp(-scale * (u - ref))


def gpo_squared_hinge(u: Array, ref: Array, scale: Array) -> Array:
    r"""GPO with :math:`f(v) = \max(0, 1 - v)^2`."""
    return jnp.maximum(1 - scale * (u - ref), 0.0) ** 2


MARGIN_LOSSES = (
    MarginLoss("dpo", dpo, True, True),
    MarginLoss("ipo", ipo, True, False),
    MarginLoss("slic", slic, False, False),
    MarginLoss("rebel", rebel, True, False),
    MarginLoss("gpo_exp", gpo_exponential, True, True),
    MarginLoss("gpo_sqhinge", gpo_squared_hinge, True, False),
)


def margin_loss(which: Array, u: Array, ref: Array, scale: Array) -> Array:
    """The loss of number ``which`` among ``MARGIN_LOSSES``; ``which`` may be traced."""
    return jax.lax.switch(which, [loss.ell for loss in MARGIN_LOSSES], u, ref, scale)


def margin_slope(which: Array, u: Array, ref: Array, scale: Array) -> Array:
    """ell'(u)."""
    return jax.grad(margin_loss, argnums=1)(which, u, ref, scale)


def mean_of(ell: Callable[[Array], Array]) -> PairLoss:
    """The training loss of Equation 2: the mean of ell over the pairs' margins."""
    return lambda chosen, rejected: jax.vmap(ell)(chosen - rejected).mean()


def plus_sft(ell: Callable[[Array], Array], weight: Array | float) -> PairLoss:
    r"""Equation 4: the mean of :math:`\ell(u) - \lambda \ln \pi(y^+|x)`."""
    return lambda chosen, rejected: (jax.vmap(ell)(chosen - rejected) - weight * chosen).mean()


def weighted(ell: Callable[[Array], Array], up: Array | float, down: Array | float) -> PairLoss:
    r"""Equation 5: the mean of :math:`\ell(\lambda^+ \ln \pi(y^+|x) - \lambda^- \ln \pi(y^-|x))`."""
    return lambda chosen, rejected: jax.vmap(ell)(up * chosen - down * rejected).mean()


def dpop(ref_chosen: Array, ref_rejected: Array, beta: float, strength: Array | float) -> PairLoss:
    r"""DPOP: :math:`-\ln \sigma(\beta [u - u_{ref} - \lambda \max(0, \ln \pi_{ref}(y^+) - \ln \pi(y^+))])`."""

    def loss(chosen, rejected):
        below = jnp.maximum(ref_chosen - chosen, 0.0)
        margin = chosen - rejected - (ref_chosen - ref_rejected)
        return jax.nn.softplus(-beta * (margin - strength * below)).mean()

    return loss


TokenLoss = Callable[[Array, Array, Array], Array]
"""From the token log-probabilities of chosen, rejected and sampled responses, [N, T] each, to the loss."""


def library_losses() -> tuple[Loss, ...]:
    """Every loss of the library, with its defaults."""
    return tuple(get_loss(name) for name in loss_names())


def of_library(loss: Loss, batch: LossInputs) -> TokenLoss:
    """A loss of ``ches_jax.losses`` as a function of log-probabilities; ``batch`` gives its other inputs.

    Sampled responses (one for each pair) are the candidates of the losses that have any; a loss of lists reads chosen,
    rejected and sampled response as a list of three. Both sequences of a joint loss have the prompt that the model has,
    whose own log-probability is a constant: it is left out.
    """

    def total(chosen: Array, rejected: Array, sampled: Array) -> Array:
        sums = [side.sum(-1) for side in (chosen, rejected, sampled)]
        pairs = batch._replace(
            logp_chosen=sums[0],
            logp_rejected=sums[1],
            logp_joint_chosen=sums[0],
            logp_joint_rejected=sums[1],
            logp_candidates=sums[2][:, None],
            logp_responses=jnp.stack(sums, axis=-1),
            token_logps_chosen=chosen,
            token_logps_rejected=rejected,
        )
        return loss(unpair(pairs) if "logp" in loss.needs else pairs)[0].mean()

    return total
