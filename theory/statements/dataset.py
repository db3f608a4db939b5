r"""Statements about a data set as a whole: mean gradients, responses that the policy itself wrote, groups.

**Three inner products.** A loss L of the log-probabilities of pairs has, under gradient flow, the velocity
:math:`-\nabla L = U_+ + U_-` with :math:`U_\pm = -\sum_j \frac{\partial L}{\partial \ln \pi(y^\pm_j)} \nabla \ln
\pi(y^\pm_j)`. The mean log-probability of any probes, whose gradient is :math:`G_P`, therefore changes at
:math:`\langle G_P, U_+ \rangle + \langle G_P, U_- \rangle`. For DPO at the reference every pair has the slope
:math:`\mp \beta / 2N`, so that :math:`U_\pm = \pm \frac{\beta}{2} G_\pm` with the mean gradients of chosen and rejected
responses.

**On-policy pairs.** Let both responses of a pair be drawn from :math:`\pi_0`, independently, and labelled in any way
that depends on nothing but the two. The unordered pair is exchangeable, so the mean of the two changes
:math:`\delta(y) = \ln \pi_t(y) - \ln \pi_0(y)` is that of one draw,

.. math:: \tfrac{1}{2} \big(E[\delta(y^+)] + E[\delta(y^-)]\big) = E_{\pi_0}[\ln \pi_t - \ln \pi_0]
          = -KL(\pi_0 \| \pi_t)

whatever the loss and the labels. With the margin :math:`m = E[\delta(y^+)] - E[\delta(y^-)]`,
:math:`E[\delta(y^+)] = m / 2 - KL`: the chosen fall if and only if KL exceeds half the margin. KL has its minimum 0 at
the start, so it is of second order: at the start the chosen rise at half the rate of the margin.

**Groups.** A policy-gradient loss :math:`-\sum_j c_j \pi(y_j) / \pi_{old}(y_j)`, clipped or not, has at
:math:`\pi = \pi_{old}` the velocity :math:`\sum_j c_j \nabla \ln \pi(y_j)`, so that
:math:`\frac{d}{dt} \ln \pi(y_i) = \sum_j c_j K_{ij}`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def inner(a: Any, b: Any) -> Array:
    """Inner product of two trees of arrays."""
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda x, y: (x * y).sum(), a, b))


def mean_rate(probe: Any, up: Any, down: Any) -> Array:
    """Rate of the probes' mean log-probability from G_P, U+ and U-."""
    return inner(probe, up) + inner(probe, down)


def dpo_mean_rate(probe: Any, chosen: Any, rejected: Any, beta: Array) -> Array:
    """The same for DPO at the reference."""
    return beta / 2 * (inner(probe, chosen) - inner(probe, rejected))


def labelled_changes(
    before: Float[Array, " Y"], change: Float[Array, " Y"], preference: Float[Array, "Y Y"]
) -> tuple[Array, Array]:
    """Mean change of the chosen and of the rejected response of on-policy pairs, over all pairs of outcomes.

    Args:
      before: ln pi_0 of every response there is.
      change: what it gains, nats.
      preference: how often the first of two is preferred; the second otherwise.
    """
    both = jnp.exp(before[:, None] + before[None, :])
    first, second = jnp.broadcast_arrays(change[:, None], change[None, :])
    chosen = (both * (preference * first + (1 - preference) * second)).sum()
    rejected = (both * (preference * second + (1 - preference) * first)).sum()
    return chosen, rejected


def divergence(before: Float[Array, " Y"], change: Float[Array, " Y"]) -> Array:
    r""":math:`KL(\pi_0 \| \pi_t) = \sum_y \pi_0(y) (e^\delta - 1 - \delta)`; no term is negative, so none cancels."""
    return (jnp.exp(before) * (jnp.expm1(change) - change)).sum()


def on_policy_chosen(kl: Array, margin: Array) -> Array:
    """Mean change of the chosen responses of on-policy pairs."""
    return margin / 2 - kl


def group_rates(kernel: Float[Array, "N N"], coefficients: Float[Array, " N"]) -> Float[Array, " N"]:
    """Rates of the responses of a group under its own loss."""
    return kernel @ coefficients
