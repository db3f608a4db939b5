"""The search finds a maximum where there is one, and respects a constraint."""

import jax.numpy as jnp
import numpy as np

from theory.search import ascend


def test_a_known_maximum_is_found_under_a_constraint(x64):
    starts = jnp.linspace(-1.0, 1.0, 4)[:, None]
    found = ascend(lambda x: (x[0], 2.0 - x[0] ** 2), starts, steps=300)
    assert np.sqrt(2) - 0.05 < found.best <= np.sqrt(2)
    assert found.feasible == 4


def test_nothing_feasible_is_told(x64):
    found = ascend(lambda x: (x[0], -jnp.ones(())), jnp.zeros((2, 1)), steps=3)
    assert found.feasible == 0 and found.best == -np.inf
