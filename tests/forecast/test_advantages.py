"""Advantages and coefficients of groups, as arithmetic."""

import numpy as np
import pytest

from ches_jax.forecast.advantages import advantages, coefficients

REWARDS, TOKENS = np.array([1.0, 0.0, 0.0, 3.0]), np.array([2, 4, 6, 8])
STD = np.sqrt((0 + 1 + 1 + 4) / 3)  # of a sample


@pytest.mark.parametrize(
    ("objective", "advantage", "coefficient"),
    [
        ("grpo", [0, -1 / STD, -1 / STD, 2 / STD], [0, -1 / STD / 16, -1 / STD / 24, 2 / STD / 32]),
        ("dapo", [0, -1 / STD, -1 / STD, 2 / STD], [0, -1 / STD / 20, -1 / STD / 20, 2 / STD / 20]),
        ("dr_grpo", [0, -1, -1, 2], [0, -1 / 4, -1 / 4, 2 / 4]),
        ("rloo", [1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3], [0, -1 / 3, -1 / 3, 2 / 3]),
    ],
)
def test_every_objective(objective, advantage, coefficient):
    found = advantages(REWARDS, objective)
    np.testing.assert_allclose(found, advantage, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(coefficients(found, TOKENS, objective), coefficient, rtol=1e-12, atol=1e-15)
    for equal in ([0.1] * 3, [0.3], [7.0, 7.0]):  # 0.1 three times has another mean
        assert not advantages(np.array(equal), objective).any()
