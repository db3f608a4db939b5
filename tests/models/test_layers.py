"""Products of activations with weights, trained or of few rows, are the plain product; pieces are the whole."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.models import load_model
from ches_jax.models.attention.mask import causal
from ches_jax.models.layers import FEW_ROWS, PIECE, in_pieces, matmul, trained_matmul


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 7), (7, 3), (4, 4)])
def test_the_gradient_of_a_trained_product_is_that_of_the_product(x64, inputs, outputs):
    rng = np.random.default_rng(0)
    x, weight, cotangent = (
        jnp.asarray(rng.normal(size=s)) for s in ((2, 5, inputs), (outputs, inputs), (2, 5, outputs))
    )
    actual, expected = (
        jax.value_and_grad(lambda x, w, product=product: (product(x, w) * cotangent).sum(), argnums=(0, 1))(x, weight)
        for product in (trained_matmul, matmul)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14), actual, expected)


@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_a_product_of_few_rows_is_that_of_many(x64, rows):
    """It is turned round on a CPU; values, both derivatives and maps over it are the same."""
    rng = np.random.default_rng(0)
    x, dx, weight, cotangent = (
        jnp.asarray(rng.normal(size=s)) for s in ((rows, 1, 6), (rows, 1, 6), (5, 6), (rows, 1, 5))
    )

    def plain(x, weight):
        return jnp.einsum("...i,oi->...o", x, weight)

    def found(product):
        value, tangent = jax.jvp(lambda x: product(x, weight), (x,), (dx,))
        gradients = jax.grad(lambda x, w: (product(x, w) * cotangent).sum(), argnums=(0, 1))(x, weight)
        mapped = jax.vmap(product, in_axes=(None, 0))(x, jnp.stack([weight, 2 * weight]))
        return value, tangent, gradients, mapped

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13), found(matmul), found(plain))


def test_weights_of_another_dtype_keep_it():
    x, weight = jnp.ones((2, 3), jnp.float32), jnp.ones((4, 3), jnp.bfloat16)
    assert jax.grad(lambda w: trained_matmul(x, w).sum())(weight).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(1, 2 * PIECE), (4, PIECE // 2), (3, PIECE // 4), (1, PIECE)])
def test_pieces_of_the_tokens_are_the_whole(x64, shape):
    """Values and derivatives; only rows of several whole pieces are taken apart, and only without a derivative."""
    rng = np.random.default_rng(0)
    x, dx = (jnp.asarray(rng.normal(size=(*shape, 3))) for _ in range(2))
    weights = {"up": jnp.asarray(rng.normal(size=(5, 3))), "down": jnp.asarray(rng.normal(size=(3, 5)))}

    def whole(weights, x):
        return jnp.tanh(x @ weights["up"].T) @ weights["down"].T

    def pieces(weights, x):
        return in_pieces(whole, weights, x, math.prod(shape))

    def found(f):
        gradients = jax.grad(lambda *args: (f(*args) * dx).sum(), argnums=(0, 1))(weights, x)
        return f(weights, x), gradients, jax.jvp(partial(f, weights), (x,), (dx,))

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13), found(pieces), found(whole))
    several = shape in {(1, 2 * PIECE), (4, PIECE // 2)}
    assert ("while" in str(jax.make_jaxpr(pieces)(weights, x))) == several
    assert "while" not in str(jax.make_jaxpr(jax.grad(lambda x: pieces(weights, x).sum()))(x))


@pytest.mark.parametrize(
    ("used", "pieces"), [(0, 0), (1, 1), (PIECE, 1), (PIECE + 1, 2), (3 * PIECE - 1, 3), (3 * PIECE, 3), (4 * PIECE, 4)]
)
def test_pieces_of_padding_are_left(x64, used, pieces):
    """Of two rows of two pieces each: what holds a token is computed, and nothing behind it."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2 * PIECE, 3)))
    found = jax.jit(lambda used: in_pieces(lambda w, x: w * x, 2.0, x, used))(used).reshape(-1, 3)
    cut = pieces * PIECE
    np.testing.assert_array_equal(found, np.concatenate([2 * x.reshape(-1, 3)[:cut], x.reshape(-1, 3)[cut:]]))


@pytest.mark.parametrize("real", [(10, 5), (10, 0), (PIECE, 1)])
def test_tokens_of_every_row_are_computed(tiny_model, real):
    """Two rows with padding behind their tokens: states of all tokens are those of rows that hide none."""
    model = load_model(tiny_model)
    index = jnp.broadcast_to(jnp.arange(PIECE), (2, PIECE))
    token = index < jnp.array(real)[:, None]
    tokens = jnp.where(token, index % 7, 0)

    def states(lengths):
        return model.hidden(tokens, jnp.where(token, index, 0), causal(token), lengths)[token]

    np.testing.assert_array_equal(states(jnp.where(token, PIECE, 0)), states(jnp.full_like(tokens, PIECE)))
