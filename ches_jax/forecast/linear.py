r"""The two linear maps that everything here is made of, for any function ln pi of the parameters.

.. math::
  \mathrm{pull}(c) = \sum_i c_i \nabla \ln \pi_i, \qquad
  \mathrm{push}(u)_i = \langle \nabla \ln \pi_i, u \rangle = \frac{d}{d\epsilon} \ln \pi_i(\theta + \epsilon u)

They are transposes of each other: :math:`\sum_i c_i\, \mathrm{push}(u)_i = \langle \mathrm{pull}(c), u \rangle`. A pull
is one backward pass and a push one forward-mode pass, whatever the number of responses; no gradient of a single
response is ever formed.

>>> import jax.numpy as jnp
>>> logps = lambda p: jnp.log(jax.nn.softmax(p))
>>> p, u = jnp.zeros(2), jnp.array([1.0, 0.0])
>>> push(logps, p, u)[1].tolist(), pull(logps, p, jnp.array([1.0, 0.0]))[1].tolist()
([0.5, -0.5], [0.5, -0.5])
"""

from collections.abc import Callable
from typing import Any

import jax

Logps = Callable[[Any], Any]
"""From parameters to log-probabilities in nats, an array of any shape (or a tree of them)."""


def push(logps: Logps, params: Any, direction: Any) -> tuple[Any, Any]:
    """Log-probabilities, and their first derivatives along a direction of the parameters.

    Args:
      logps: the function; forward mode must be able to pass it.
      params: where.
      direction: a tree like ``params``; an update in nats gives changes in nats.
    """
    return jax.jvp(logps, (params,), (direction,))


def push_twice(logps: Logps, params: Any, direction: Any) -> tuple[Any, Any, Any]:
    r"""Log-probabilities, and their first and second derivatives along a direction.

    .. math:: \ln \pi(\theta + u) \approx \ln \pi(\theta) + d_1 + d_2 / 2
    """
    (values, first), (_, second) = jax.jvp(lambda p: push(logps, p, direction), (params,), (direction,))
    return values, first, second


def pull(logps: Logps, params: Any, coefficients: Any) -> tuple[Any, Any]:
    """Log-probabilities, and the gradient of their sum with these coefficients; a tree like ``params``."""
    values, transposed = jax.vjp(logps, params)
    return values, transposed(coefficients)[0]
