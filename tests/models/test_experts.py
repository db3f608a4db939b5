"""Routed experts: every way to multiply by groups is the same product, and a token's experts are its own affair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.models.config import ExpertsConfig
from ches_jax.models.experts import _in_best_groups, _one_group_at_a_time, _ragged

SIZES = (7, 0, 20, 1)
"""Rows of each group: one is empty, and five rows belong to none."""
ROWS = 33


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(ROWS, 3))), jnp.asarray(rng.normal(size=(4, 5, 3))), jnp.array(SIZES, jnp.int32)


def by_hand(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """The definition, group by group."""
    ends = np.cumsum(SIZES)
    parts = [x[end - n : end] @ weight[g].T for g, (n, end) in enumerate(zip(SIZES, ends, strict=True))]
    return jnp.concatenate([*parts, jnp.zeros((ROWS - ends[-1], weight.shape[1]))])


@pytest.mark.parametrize("product", [_one_group_at_a_time, _ragged])
def test_grouped_products_and_their_derivatives_in_both_modes(product):
    with jax.enable_x64(True):
        x, weight, sizes = (a.astype(jnp.float64) if a.ndim > 1 else a for a in inputs())

        @jax.jit
        def all_of(x, weight):
            def one(way):
                value, tangent = jax.jvp(lambda x, w: way(x, w, sizes), (x, weight), (jnp.cos(x), jnp.cos(weight)))
                return value, tangent, jax.grad(lambda x, w: (way(x, w, sizes) ** 3).sum(), (0, 1))(x, weight)

            return one(product), one(by_hand)

        actual, expected = all_of(x, weight)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), actual, expected)


def test_experts_are_chosen_within_the_groups_whose_two_best_are_best_together():
    e = ExpertsConfig(count=6, per_token=2, width=1, groups=3, groups_kept=1)
    merit = jnp.array([[0.9, 0.0, 0.5, 0.6, 0.1, 0.2]])  # the best expert is in no group that is kept
    assert _in_best_groups(merit, e).tolist() == [[-np.inf, -np.inf, 0.5, np.float32(0.6), -np.inf, -np.inf]]
