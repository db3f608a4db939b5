"""The product that is trained has the gradient of the product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.models.layers import matmul, trained_matmul


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


def test_weights_of_another_dtype_keep_it():
    x, weight = jnp.ones((2, 3), jnp.float32), jnp.ones((4, 3), jnp.bfloat16)
    assert jax.grad(lambda w: trained_matmul(x, w).sum())(weight).dtype == jnp.bfloat16
