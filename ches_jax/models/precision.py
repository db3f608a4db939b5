"""Which dtype sums accumulate in, and how precisely matrices are multiplied, by the dtype of the computation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from ches_jax.models.platform import platform


def accumulate(dtype: DTypeLike) -> np.dtype:
    """Float64 for float64, float32 for everything else."""
    return np.dtype(jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32)


def matmul_precision(dtype: DTypeLike) -> lax.Precision:
    """Full precision for float32 and float64, whose inputs accelerators would round; native for 16 bits."""
    return lax.Precision.DEFAULT if jnp.dtype(dtype).itemsize == 2 else lax.Precision.HIGHEST


def einsum(subscripts: str, a: Array, b: Array) -> Array:
    """``jnp.einsum`` of two arrays of one dtype, summed and returned in ``accumulate`` of it.

    >>> einsum("md,md->m", jnp.ones((2, 3), "bfloat16"), jnp.ones((2, 3), "bfloat16")).dtype
    dtype('float32')
    """
    acc, precision = accumulate(a.dtype), matmul_precision(a.dtype)
    if platform() == "cpu":
        # XLA's CPU backend has no 16-bit matmul with 32-bit sums for a matrix of one row; the result is the same
        a, b = a.astype(acc), b.astype(acc)
    return jnp.einsum(subscripts, a, b, preferred_element_type=acc, precision=precision)


@jax.jit
def inner(a: Any, b: Any) -> Array:
    """Inner product of two trees of arrays, summed in float32 at least.

    One program: sums of sharded arrays, each a program of its own that communicates, were seen to wait for one another
    on a CPU, forever.
    """

    def product(x: Array, y: Array) -> Array:
        wide = accumulate(x.dtype)
        return jnp.sum(x.astype(wide) * y.astype(wide))

    return jax.tree.reduce(jnp.add, jax.tree.map(product, a, b))
