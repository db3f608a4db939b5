"""Statements of neighbouring works that need more than a 2 x 2 kernel: one function each, source in its docstring."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def akg_step(
    w: Float[Array, "V D"],
    observed: Float[Array, " D"],
    other: Float[Array, " D"],
    residual: Float[Array, " V"],
    rate: Array,
) -> Float[Array, " V"]:
    r"""First-order change of :math:`\ln \pi(\cdot|other)` from a step on the prompt ``observed``.

    .. math:: \Delta \ln \pi = -\eta A K G, \quad A = I - 1 \pi^\top, \; K = \langle h_o, h_u \rangle I, \; G = dL/dz

    (Ren and Sutherland, arXiv 2407.10490; only W is trained here, features are fixed.)

    Args:
      w: unembedding.
      observed: feature of the prompt that was probed.
      other: feature of the prompt that was trained on.
      residual: G, the derivative of the loss by the logits (SFT: pi - e_y).
      rate: the step size.
    """
    pi = jax.nn.softmax(w @ observed)
    g = (observed @ other) * residual
    return -rate * (g - pi @ g)


def squeeze(pi: Float[Array, " V"], pushed: Array, step: Array) -> Float[Array, " V"]:
    r"""Change of ln pi by one step of ascent on :math:`-\ln \pi(y^-)` with fixed features.

    The logits move by ``step`` times (pi - e_y). The squeezing effect of arXiv 2407.10490: y- falls, and of the others
    the most probable one rises most.
    """
    delta = step * (pi - jax.nn.one_hot(pushed, pi.shape[0], dtype=pi.dtype))
    return delta - jax.nn.logsumexp(jnp.log(pi) + delta)


def most_probable_other(pi: Float[Array, " V"], pushed: Array) -> Array:
    """The token that squeezing moves the mass to."""
    is_pushed = jnp.arange(pi.shape[0], dtype=jnp.asarray(pushed).dtype) == pushed
    return jnp.argmax(jnp.where(is_pushed, -jnp.inf, pi))


def probability_space_gradients(x_chosen: Array, x_rejected: Array, beta: Array) -> tuple[Array, Array]:
    r"""DPO's derivatives by the probability ratios :math:`x = \pi / \pi_{ref}` themselves.

    .. math::
      L = -\ln \frac{x_+^\beta}{x_+^\beta + x_-^\beta}, \qquad
      \frac{|\partial L / \partial x_-|}{|\partial L / \partial x_+|} = \frac{x_+}{x_-}

    (3D-properties, arXiv 2406.07327.) A statement about coordinates: by log-probabilities the two are equal in
    size. The derivative by x- diverges as x- goes to 0 only for beta below 1.
    """
    share = jax.nn.sigmoid(beta * (jnp.log(x_rejected) - jnp.log(x_chosen)))
    return -beta * share / x_chosen, beta * share / x_rejected


def ranking_threshold(ref_margin: Array, beta: Array) -> Array:
    r"""DPO loss below which a pair is ranked rightly: :math:`-\ln \sigma(-\beta u_{ref})`.

    (Chen et al., arXiv 2405.19534: c = -u_ref, and the policy prefers y+ iff the loss is at most -ln sigma(beta c).)
    """
    return jax.nn.softplus(beta * ref_margin)


def idealised_log_ratio(ref_margin: Array, preference: Array, beta: Array) -> Array:
    r"""Margin of the policy that attains DPO's optimum for a preference probability p, arXiv 2405.19534.

    .. math:: u = u_{ref} + \frac{1}{\beta} \ln \frac{p}{1-p}
    """
    return ref_margin + (jnp.log(preference) - jnp.log1p(-preference)) / beta


def idealised_ranking_accuracy(ref_margin: Float[Array, " N"], preference: Float[Array, " N"], beta: Array) -> Array:
    """Share of pairs that the optimum of DPO ranks rightly."""
    return (idealised_log_ratio(ref_margin, preference, beta) > 0).mean()


def dpo_shift_loss(reward_chosen: Array, reward_rejected: Array, beta: Array, factor: Array) -> Array:
    r"""DPO-Shift (Yang et al., arXiv 2502.07599): :math:`-\ln \sigma(\beta r^+ - f \beta r^-)`."""
    return jax.nn.softplus(-beta * (reward_chosen - factor * reward_rejected))


def dpo_shift_gap(cross: Array, rewards: tuple[Array, Array], beta: Array, factor: Array) -> Array:
    r"""First-order gain in ln pi(y+), per step size, of DPO-Shift over DPO, as its Theorem 2.1 states it.

    .. math:: (1 - f) \, \beta \sigma(\beta (r^- - r^+)) K_{+-}

    Exact at the reference (both rewards 0); elsewhere the two losses have different sigmoids.
    """
    pull = beta * jax.nn.sigmoid(beta * (rewards[1] - rewards[0]))
    return (1 - factor) * pull * cross


def dpop_token_falls(chosen_prefix: Array, rejected_prefix: Array) -> Array:
    """Smaug's condition (arXiv 2402.13228), for pairs that differ in one early token.

    A later, shared token is pushed down after y+ if it is more probable there than after y-. Exact where the two
    prefixes have the same feature; otherwise it can fail.
    """
    return chosen_prefix > rejected_prefix
