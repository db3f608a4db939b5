"""The 2 x 2 kernel: regimes, band and thresholds at cases that can be checked by hand; sweeps are claims E1 and E6."""

import jax.numpy as jnp
import numpy as np
import pytest

from theory.statements import entanglement
from theory.statements.entanglement import REGIMES, PairKernel

ONE = jnp.ones(())


def kernel(chosen, cross, rejected):
    return PairKernel(*(jnp.asarray(v, jnp.float32) for v in (chosen, cross, rejected)))


@pytest.mark.parametrize(
    "k, name", [((1, 0.5, 1), "ideal"), ((1, 2, 5), "displaced"), ((5, 2, 1), "lifted"), ((1, -1, 1), "ideal")]
)
def test_regimes(k, name):
    k = kernel(*k)
    assert REGIMES[int(entanglement.regime(k, ONE, ONE))] == name
    assert bool(entanglement.entanglement_is_ideal(k, ONE, ONE)) == (name == "ideal")


def test_the_band_of_a_kernel_and_the_ratio_in_its_middle():
    k = kernel(1, 2, 16)  # r* = 4, cosine 1/2
    low, high = entanglement.disentanglement_band(k)
    assert (float(low), float(high)) == (2, 8)
    up, down = entanglement.reward_calibration(k, ONE, ONE)
    assert float(up / down) == pytest.approx(4)
    assert float(up * down) == pytest.approx(1)  # the pull on both together is kept


def test_opposed_gradients_leave_the_band_open():
    assert [float(x) for x in entanglement.disentanglement_band(kernel(1, -1, 4))] == [0, np.inf]


def test_thresholds_of_a_displaced_pair():
    t = entanglement.thresholds(kernel(1, 2, 5), ONE, ONE)
    assert [float(x) for x in t] == [1, 2, 1, 0.5]
    assert np.isnan(entanglement.thresholds(kernel(1, -1, 4), ONE, ONE).dpo_shift)
