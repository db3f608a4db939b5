r"""Functions that stay finite, with finite gradients, a thousand nats from zero.

>>> float(neg_log_sigmoid(jnp.float32(-1000.0))), bool(jnp.isfinite(capped_exp(jnp.float32(1000.0))))
(1000.0, True)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

EXP_CAP = 30.0
"""Exponentials continue along their tangent beyond this: 1e13 is far past saturation, and its square still fits."""


def neg_log_sigmoid(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    r""":math:`-\ln \sigma(x) = \ln(1 + e^{-x})`."""
    return -jax.nn.log_sigmoid(x)


def capped_exp(x: Float[Array, "*B"], cap: float = EXP_CAP) -> Float[Array, "*B"]:
    r"""The exponential up to ``cap``, its tangent beyond: convex, increasing, once differentiable.

    .. math:: e^{\min(x, c)} (1 + \max(x - c, 0))
    """
    # where, not max: both branches are finite, and the derivative at the join is exactly exp(cap)
    low = jnp.where(x < cap, x, cap)
    return jnp.exp(low) * (1.0 + (x - low))


def capped_expm1(x: Float[Array, "*B"], cap: float = EXP_CAP) -> Float[Array, "*B"]:
    """``capped_exp(x) - 1`` without cancellation near zero."""
    low = jnp.where(x < cap, x, cap)
    return jnp.expm1(low) + jnp.exp(low) * (x - low)


def log1mexp(x: Float[Array, "*B"]) -> Float[Array, "*B"]:
    r""":math:`\ln(1 - e^x)` for log-probabilities :math:`x < 0`; at 0 the value of the nearest negative number."""
    x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
    # two forms, each away from its own cancellation; each sees only arguments that suit it
    near = x > -0.693
    small = jnp.where(near, x, -0.693)
    large = jnp.where(near, -0.693, x)
    return jnp.where(near, jnp.log(-jnp.expm1(small)), jnp.log1p(-jnp.exp(large)))
