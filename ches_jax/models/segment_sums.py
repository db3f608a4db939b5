"""Sums over the segments of packed rows."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.precision import accumulate


def segment_sums(values: Float[Array, "B M *n"], segment: Int[Array, "B M"], segments: int) -> Float[Array, "B S *n"]:
    """Sum of ``values`` over the predictions of each segment of each row; ids outside 0 .. S-1 join no sum.

    A product with a 0/1 matrix, so that the order of the additions is fixed on every backend. In float32 at least.

    >>> segment_sums(jnp.ones((1, 3)), jnp.array([[0, 0, 2]]), 2).tolist()
    [[2.0, 0.0]]
    """
    acc = accumulate(values.dtype)
    member = (segment[:, None, :] == jnp.arange(segments, dtype=segment.dtype)[None, :, None]).astype(acc)
    return jnp.einsum("bsm,bm...->bs...", member, values.astype(acc), precision=lax.Precision.HIGHEST)
