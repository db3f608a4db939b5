"""Search for a violation of a bound by gradient ascent, from many starts at once.

A random sweep rarely comes near the end of a bound; an optimiser does, and so says whether the bound is true and tight.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

PENALTY = 20.0
"""Weight of a broken constraint against the value that is maximised."""

Objective = Callable[[Any], tuple[Array, Array]]
"""From parameters to (value to be maximised, slack: negative where the constraint is broken)."""


class Found(NamedTuple):
    """The largest value met at any step of any start, where the constraint held."""

    best: float
    feasible: int
    """Starts that met the constraint at some step."""


def ascend(objective: Objective, starts: Any, *, steps: int = 300, rate: float = 0.05) -> Found:
    """Maximises the objective from every start (leading axis of the tree) with Adam."""
    optimiser = optax.adam(rate)

    def loss(params):
        value, slack = objective(params)
        return PENALTY * jnp.maximum(-slack, 0.0) - value, (value, slack)

    def climb(params):
        def step(carry, _):
            params, state, best = carry
            gradient, (value, slack) = jax.grad(loss, has_aux=True)(params)
            best = jnp.maximum(best, jnp.where((slack >= 0) & jnp.isfinite(value), value, -jnp.inf))
            updates, state = optimiser.update(gradient, state)
            return (optax.apply_updates(params, updates), state, best), None

        first = (params, optimiser.init(params), jnp.asarray(-jnp.inf))
        return jax.lax.scan(step, first, None, length=steps)[0][2]

    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction raises a float to an integer count
        best = np.asarray(jax.jit(jax.vmap(climb))(starts))
    return Found(float(best.max()), int(np.isfinite(best).sum()))
