"""Neighbouring works at cases that can be checked by hand; the sweeps are claims E2-E8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from theory.statements import related


def test_squeezing_moves_the_mass_to_the_most_probable_other_token(x64):
    pi = jnp.array([0.5, 0.3, 0.2])
    change = related.squeeze(pi, jnp.asarray(1), jnp.asarray(0.7))
    assert int(related.most_probable_other(pi, jnp.asarray(1))) == 0
    np.testing.assert_allclose((pi * jnp.exp(change)).sum(), 1, rtol=1e-14)
    assert int(change.argmax()) == 0 and change[1] < 0


def test_the_published_ranking_example():
    # a reference margin of -50 nats at beta 0.1: the loss has to come below 0.0067
    assert float(related.ranking_threshold(jnp.asarray(-50.0), jnp.asarray(0.1))) == pytest.approx(0.0067, abs=1e-4)


def test_an_even_preference_leaves_the_reference_margin():
    ref, half = jnp.array([-2.0, 3.0]), jnp.array([0.5, 0.5])
    np.testing.assert_allclose(related.idealised_log_ratio(ref, half, jnp.asarray(0.1)), ref)
    assert float(related.idealised_ranking_accuracy(ref, half, jnp.asarray(0.1))) == 0.5


@pytest.mark.parametrize("beta, diverges", [(0.5, True), (1.0, False), (2.0, False)])
def test_the_rejected_gradient_diverges_only_below_beta_one(x64, beta, diverges):
    _, down = related.probability_space_gradients(jnp.asarray(1.3), jnp.asarray(1e-12), jnp.asarray(beta))
    assert (float(down) > 1e3) == diverges


def test_the_first_order_step_keeps_probabilities_summing_to_one(x64):
    w = jnp.array(np.random.default_rng(0).normal(size=(4, 3)))
    h = jnp.array([1.0, -1.0, 0.5])
    change = related.akg_step(w, h, 2 * h, jax.nn.softmax(2 * w @ h) - jnp.eye(4)[1], jnp.asarray(0.1))
    assert abs(float((jax.nn.softmax(w @ h) * change).sum())) < 1e-15
    assert change[1] > 0


def test_dpo_shift_without_a_shift_gains_nothing():
    rewards = (jnp.asarray(0.0), jnp.asarray(0.0))
    assert float(related.dpo_shift_gap(jnp.asarray(2.0), rewards, jnp.asarray(0.1), jnp.asarray(1.0))) == 0
    shifted = related.dpo_shift_gap(jnp.asarray(2.0), rewards, jnp.asarray(0.1), jnp.asarray(0.5))
    assert float(shifted) == pytest.approx(0.05)


def test_smaugs_condition():
    assert bool(related.dpop_token_falls(jnp.asarray(0.3), jnp.asarray(0.2)))
