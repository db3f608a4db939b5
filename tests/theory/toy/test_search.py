"""The search finds a maximum where there is one, and respects a constraint."""

import jax.numpy as jnp
import numpy as np

from theory.toy.search import ascend


def test_a_known_maximum_is_found_under_a_constraint(x64):
    starts = jnp.linspace(-1.0, 1.0, 4)[:, None]
    highest = ascend(lambda x: {"x": x[0], "less": 1 - x[0]}, starts, slack=lambda x: 2.0 - x[0] ** 2, steps=300)
    assert np.sqrt(2) - 0.05 < highest["x"].best <= np.sqrt(2)
    assert np.sqrt(2) - 0.05 < highest["less"].best - 1 <= np.sqrt(2)
    assert all(side.feasible == 4 for side in highest.values())


def test_nothing_feasible_is_reported(x64):
    highest = ascend(lambda x: {"x": x[0]}, jnp.zeros((2, 1)), slack=lambda x: -jnp.ones(()), steps=3)["x"]
    assert highest.feasible == 0 and highest.best == -np.inf
