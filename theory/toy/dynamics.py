r"""Trajectories: gradient flow, discrete optimisers, what is conserved, where the probability goes.

A simulator returns every model it passed through (parameters stacked on a leading time axis); curves are computed from
those afterwards, with ``jax.vmap``. The first derivative alone can mislead: in one of the constructions the rate at
t = 0 has the wrong sign for the end.

The flow is integrated by diffrax with Tsitouras' 5(4) method and an adaptive step.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from ches_jax.displacement.changes import direction
from theory.toy.ufm import UFM

Loss = Callable[[Any], Array]
"""From parameters to the training loss."""
Kind = Literal["none", "benign", "catastrophic", "unlabelled"]
"""Of displacement, in the paper's words."""
MOST_STEPS = 100_000
"""Steps after which the integrator gives up (an error, not a wrong answer)."""


class Invariants(NamedTuple):
    """What gradient flow of any loss of the log-probabilities leaves unchanged (derived)."""

    balance: Float[Array, "D D"]
    """W^T W - sum_c h_c h_c^T: the model is homogeneous in W and in h, so they grow alike."""
    mean_unembedding: Float[Array, " D"]
    """sum_z W_z: residuals add up to 0 over the vocabulary; kept by gradient descent too."""


def gradient_flow(
    loss: Loss, start: Any, times: Float[Array, " S"], *, trainable: Any = None, tolerance: float = 1e-10
) -> Any:
    """Solves d theta/dt = -grad L(theta).

    Args:
      loss: the training loss.
      start: parameters at ``times[0]``.
      times: when to report.
      trainable: tree of booleans like the parameters (they may be traced); frozen features make a linear model.
        Default: everything moves.
      tolerance: relative and absolute error of the integrator.

    Returns:
      Parameters at every time, stacked.
    """

    def velocity(_, params, __):
        return moving(jax.tree.map(jnp.negative, jax.grad(loss)(params)), trainable)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Tsit5(),
        times[0],
        times[-1],
        None,
        start,
        saveat=diffrax.SaveAt(ts=times),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=MOST_STEPS,
        adjoint=diffrax.ForwardMode(),
    )
    return solution.ys


def optimise(
    loss: Loss, start: Any, optimiser: optax.GradientTransformation, steps: int, *, trainable: Any = None
) -> Any:
    """Runs an optimiser; returns the parameters before every step and after the last one, stacked (steps + 1)."""

    def step(carry, _):
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, moving(updates, trainable)), state), params

    with jax.numpy_dtype_promotion("standard"):  # optax's bias corrections mix a count with floats
        (last, _), before = jax.lax.scan(step, (start, optimiser.init(start)), None, length=steps)
    return jax.tree.map(lambda many, one: jnp.concatenate([many, one[None]]), before, last)


def moving(velocity: Any, trainable: Any) -> Any:
    """The velocity with zeros where ``trainable`` is False; all of it without ``trainable``."""
    if trainable is None:
        return velocity
    return jax.tree.map(lambda v, moves: jnp.where(moves, v, jnp.zeros_like(v)), velocity, trainable)


def torch_rmsprop(rate: float, decay: float = 0.99, eps: float = 1e-8) -> optax.GradientTransformation:
    r"""RMSProp as PyTorch has it: :math:`v \gets a v + (1-a) g^2`, step :math:`-\eta g / (\sqrt v + \epsilon)`.

    optax's default puts epsilon under the root.
    """
    return optax.rmsprop(rate, decay=decay, eps=eps, initial_scale=0.0, eps_in_sqrt=False)


def sign_descent(rate: float, level: float = 1e-9) -> optax.GradientTransformation:
    r"""Sign descent, :math:`-\eta\, \mathrm{sign}(g)`, that leaves alone what has no gradient.

    Some gradients of a symmetric model are zero in exact arithmetic and 1e-17 in floating point, with a sign that
    depends on the processor. A whole step along such a sign would be noise, so a gradient below ``level`` times the
    largest one of its array counts as zero.
    """

    def update(updates, state, params=None):
        def step(g):
            return -rate * jnp.where(jnp.abs(g) > level * jnp.abs(g).max(), jnp.sign(g), 0.0)

        return jax.tree.map(step, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def invariants(model: UFM) -> Invariants:
    """The conserved quantities at one point."""
    w, h = model
    return Invariants(w.T @ w - h.T @ h, w.sum(0))


def cumulative_prediction(log_probs: Callable[[Any], Array], trajectory: Any) -> Float[Array, "S N"]:
    r"""Sum of first-order changes along the actual updates, :math:`\sum_t \langle \nabla \ln \pi, \Delta_t \rangle`.

    The gradient is averaged over a step by Simpson's rule, which leaves an error of fifth order in the update (its
    value at the start of a step alone would leave one of second order). Works for any optimiser and any parameters.

    Args:
      log_probs: from parameters to the log-probabilities that are followed, [N].
      trajectory: parameters, stacked over time.

    Returns:
      The predicted change since the start after each step, nats; row 0 is zero.
    """

    def change(before, after):
        update = jax.tree.map(jnp.subtract, after, before)

        def rate(part):
            return jax.jvp(log_probs, (jax.tree.map(lambda p, u: p + part * u, before, update),), (update,))[1]

        first, half, last = jax.lax.map(rate, jnp.array([0.0, 0.5, 1.0]))
        return (first + 4 * half + last) / 6

    before = jax.tree.map(lambda a: a[:-1], trajectory)
    after = jax.tree.map(lambda a: a[1:], trajectory)
    steps = jax.lax.map(lambda pair: change(*pair), (before, after))
    return jnp.concatenate([jnp.zeros_like(steps[:1]), jnp.cumsum(steps, axis=0)])


def step_change(log_probs: Callable[[Any], Array], params: Any, update: Any, order: int = 1) -> Array:
    """Taylor prediction, of first or second order, of the change of log-probabilities under an update."""

    def first(p):
        return jax.jvp(log_probs, (p,), (update,))[1]

    if order == 1:
        return first(params)
    value, slope = jax.jvp(first, (params,), (update,))
    return value + slope / 2


def token_probabilities(model: UFM, context: int = 0) -> Float[Array, " V"]:
    """Next-token distribution at one context."""
    return jnp.exp(token_log_probabilities(model, context))


def token_log_probabilities(model: UFM, context: int = 0) -> Float[Array, " V"]:
    """Its logarithm, finite where a probability is smaller than any number of its dtype."""
    return jax.nn.log_softmax(model.unembedding @ model.features[context])


def mass_by_label(probabilities: Float[Array, "*S V"], labels: tuple[str, ...]) -> dict[str, Float[Array, "*S"]]:
    """Probability of each label's tokens together; ``labels`` names the label of every token."""
    return {
        name: probabilities[..., jnp.array([label == name for label in labels])].sum(-1)
        for name in dict.fromkeys(labels)
    }


def displacement_kind(
    log_prob_change: float, loss_change: float, gains: dict[str, float], same: str, opposite: str
) -> Kind:
    """Whether a run was displaced, and where the probability went (Definition 1 and the remark after it).

    Args:
      log_prob_change: change of ln pi(y+|x) over the run, nats.
      loss_change: change of the training loss.
      gains: change of the probability of each label's tokens, y+ itself not among them.
      same: label of tokens that mean what y+ means.
      opposite: label of tokens that mean the opposite.

    Returns:
      "none" unless the loss fell and so did ln pi(y+); then by the label that gained most: "benign" or "catastrophic",
      or "unlabelled" if it is neither. The changes are exact, so the tolerance is zero.
    """
    if not all(direction(change, change, 0.0) == "down" for change in (loss_change, log_prob_change)):
        return "none"
    winner = max(gains, key=lambda name: gains[name])
    if winner == same:
        return "benign"
    return "catastrophic" if winner == opposite else "unlabelled"
