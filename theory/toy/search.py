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

Values = Callable[[Any], dict[str, Array]]
"""From parameters to the values that are to be maximised, each in a search of its own."""


class SearchResult(NamedTuple):
    """The largest value met at any step of any start, where the constraint held."""

    best: float
    feasible: int
    """Starts that met the constraint at some step."""


def run_once(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, compiled without the backend's optimisations: a small program that runs once.

    Compiling it takes longer than running it, and two thirds of the time so.
    """
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})(*args)


def ascend(
    values: Values,
    starts: Any,
    *,
    slack: Callable[[Any], Array] | None = None,
    steps: int = 300,
    rate: float = 0.05,
) -> dict[str, SearchResult]:
    """Maximises each of the values with Adam, from every start (leading axis of the tree).

    Args:
      values: what is maximised.
      starts: parameters to begin with.
      slack: negative where a constraint is broken.
      steps: of the optimiser.
      rate: its step size.
    """
    optimiser = optax.adam(rate)
    # jax sorts a dictionary's keys, in both places alike
    names = list(jax.eval_shape(values, jax.tree.map(lambda a: a[0], starts)))

    def climb(params, which):
        def loss(params):
            value = jnp.stack(jax.tree.leaves(values(params)))[which]
            room = jnp.zeros(()) if slack is None else slack(params)
            return PENALTY * jnp.maximum(-room, 0.0) - value, (value, room)

        def step(carry, _):
            params, state, best = carry
            gradient, (value, room) = jax.grad(loss, has_aux=True)(params)
            best = jnp.maximum(best, jnp.where((room >= 0) & jnp.isfinite(value), value, -jnp.inf))
            updates, state = optimiser.update(gradient, state)
            return (optax.apply_updates(params, updates), state, best), None

        first = (params, optimiser.init(params), jnp.asarray(-jnp.inf))
        return jax.lax.scan(step, first, None, length=steps)[0][2]

    with jax.numpy_dtype_promotion("standard"):  # Adam's bias correction raises a float to an integer count
        search_all = jax.vmap(jax.vmap(climb, in_axes=(0, None)), in_axes=(None, 0))
        best = np.asarray(run_once(search_all, starts, jnp.arange(len(names))))
    return {name: SearchResult(float(b.max()), int(np.isfinite(b).sum())) for name, b in zip(names, best, strict=True)}
