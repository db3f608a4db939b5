"""From hidden states to logits of some tokens of the vocabulary, and back to a gradient by ``h W^T``.

>>> logits_of(jnp.ones((1, 2)), jnp.ones((3, 2)), Head(scale=0.5)).tolist()
[[1.0, 1.0, 1.0]]
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from ches_jax.distributed.mesh import LogicalMesh
from ches_jax.models.precision import accumulate, matmul_precision


class Head(NamedTuple):
    """What turns ``h W^T`` into logits, and how many at a time; static."""

    scale: float | None = None
    softcap: float | None = None
    chunk: int | None = None
    """Positions of each row computed at a time; default: by the size of the vocabulary and the platform."""
    rounded: bool = False
    """Round ``h W^T`` to the dtype of the states, as ``Decoder.logits`` does; else it stays in float32 at least."""
    logical: LogicalMesh | None = None
    """The mesh that states and W lie on."""


def logits_of(h: Array, weight: Array, head: Head) -> Array:
    """``cap(scale * h W^T)``: logits of some tokens of the vocabulary, in float32 at least."""
    acc = accumulate(h.dtype)
    contract = (((h.ndim - 1,), (1,)), ((), ()))
    out = h.dtype if head.rounded else acc
    z = lax.dot_general(h, weight, contract, precision=matmul_precision(h.dtype), preferred_element_type=out)
    return from_products(z.astype(acc), head.scale, head.softcap)


def from_products(products: Array, scale: float | None, softcap: float | None) -> Array:
    """Elementwise, from ``h W^T`` to the logits.

    >>> from_products(jnp.array([-8.0, 0.5]), 2.0, 1.0).round(3).tolist()
    [-1.0, 0.7620000243186951]
    """
    z = products
    if scale is not None:
        z = z * jnp.asarray(scale, z.dtype)
    if softcap is None:
        return z
    cap = jnp.asarray(softcap, z.dtype)
    return cap * jnp.tanh(z / cap)


def logit_gradient(z: Array, total: Array, y: Array, g: Array, head: Head, number: Array) -> Array:
    """Gradient by ``h W^T`` from the gradient g by the log-probabilities.

    Args:
      z: logits of some tokens of the vocabulary, [B, M, V].
      total: logs of the sums over all tokens, [B, M].
      y: targets, [B, M].
      g: [B, M].
      head: what made the logits.
      number: the tokens that the logits are of, [V].
    """
    at_target = y[..., None] == number.astype(y.dtype)[None, None]
    return product_gradient(g[..., None] * (at_target.astype(z.dtype) - jnp.exp(z - total[..., None])), z, head)


def product_gradient(dz: Array, z: Array, head: Head) -> Array:
    """Gradient by ``h W^T`` from the gradient dz by the logits z."""
    acc = z.dtype
    if head.softcap is not None:
        # of padding of the vocabulary the logit is minus infinity, and dz is 0
        dz = dz * (1 - jnp.square(jnp.maximum(z, -head.softcap) / jnp.asarray(head.softcap, acc)))
    return dz if head.scale is None else dz * jnp.asarray(head.scale, acc)
