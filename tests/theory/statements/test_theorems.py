"""Theorems 4-9 and Propositions 1-2 at their boundary cases; the sweep over random instances is ``test_identities``."""

import jax.numpy as jnp
import numpy as np
import pytest

from theory.statements import theorems

P, M = jnp.int32(0), jnp.int32(1)
W1 = jnp.array([[1.0], [3.0], [-5.0]])


def response(tokens, hidden, mask=None):
    mask = [True] * len(tokens) if mask is None else mask
    return theorems.Response(jnp.array(tokens, jnp.int32), jnp.array(hidden), jnp.array(mask))


def test_theorem_4_in_one_dimension(x64):
    d = theorems.theorem_4(W1.astype(float), jnp.zeros(1), P, M, jnp.asarray(-1.0))
    m = sum(d.terms[name] for name in ("m_chosen_norm", "m_rejected_norm", "m_feature_norm"))
    assert float(m) == pytest.approx(11 / 3)
    assert float(d.terms["S_alignment"] + d.terms["S_others"]) == pytest.approx(-19 / 3)
    assert float(d.total) == pytest.approx(-8 / 3)


def test_the_margin_of_that_case_grows_at_a_fifth(x64):
    assert float(theorems.margin_rate(W1.astype(float), jnp.zeros(1), P, M, jnp.asarray(-0.05))) == pytest.approx(0.2)


def test_theorem_5_orders_tokens_by_the_direction(x64):
    w = jnp.array(np.random.default_rng(0).normal(size=(6, 3)))
    total = theorems.theorem_5(w, jnp.ones(3), P, M, jnp.asarray(-0.3)).total
    others = np.asarray(total)[2:]
    along = np.asarray(w @ (w[0] - w[1]))[2:]
    assert (np.argsort(others) == np.argsort(along)).all()


def test_theorem_6_of_single_tokens_is_theorem_4(x64):
    rng = np.random.default_rng(1)
    w, h = jnp.array(rng.normal(size=(5, 3))), jnp.array(rng.normal(size=3))
    pair = [response([t, 0], [h, jnp.zeros(3)], [True, False]) for t in (0, 1)]
    np.testing.assert_allclose(
        theorems.theorem_6(w, pair[0], pair[1], jnp.asarray(-0.3)).total,
        theorems.theorem_4(w, h, P, M, jnp.asarray(-0.3)).total,
        rtol=1e-13,
    )


def test_theorems_8_and_9_of_one_sample_are_4_and_5(x64):
    rng = np.random.default_rng(2)
    w, h = jnp.array(rng.normal(size=(5, 3))), jnp.array(rng.normal(size=(1, 3)))
    slope = jnp.array([-0.3])
    fourth = theorems.theorem_4(w, h[0], P, M, slope[0]).total
    fifth = theorems.theorem_5(w, h[0], P, M, slope[0]).total
    np.testing.assert_allclose(theorems.theorem_8(w, h, P[None], M[None], slope).total, fourth[None], rtol=1e-13)
    ninth = theorems.theorem_9(w, h, P[None], M[None], slope).total[0]
    np.testing.assert_allclose(ninth[2:], fifth[2:], rtol=1e-12)
    np.testing.assert_allclose(ninth[0], fourth, rtol=1e-12)


def test_the_printed_theorem_5_differs_from_the_true_one_by_the_loss(x64):
    args = (W1.astype(float), jnp.ones(1), P, M, jnp.asarray(-0.05))
    true, printed = theorems.theorem_5(*args), theorems.theorem_5(*args, loss=jnp.log(2.0), printed=True)
    np.testing.assert_allclose(printed.total / true.total, np.log(2) / -0.05, rtol=1e-12)


def test_the_printed_proposition_2_is_undefined_without_a_slope(x64):
    args = (jnp.asarray(2.0), jnp.asarray(1.0), jnp.asarray(-0.5), jnp.asarray(1.0), jnp.asarray(0.5))
    assert np.isnan(theorems.proposition_2(*args, slope=jnp.asarray(0.0), printed=True).total)
    assert float(theorems.proposition_2(*args).total) == pytest.approx(0.25 + 0.5)


def test_an_sft_term_never_pushes_the_chosen_response_down(x64):
    d = theorems.proposition_1(jnp.asarray(2.0), jnp.asarray(3.0), jnp.asarray(-0.5), jnp.asarray(0.1))
    assert float(d.terms["E"]) == -0.5 and float(d.terms["sft"]) == pytest.approx(0.2)


def test_only_the_centred_terms_are_gauge_invariant(x64):
    rng = np.random.default_rng(3)
    w, h = jnp.array(rng.normal(size=(5, 3))), jnp.array(rng.normal(size=3))
    shifted = w + jnp.array([[3.0, -1.0, 2.0]])
    slope = jnp.asarray(-1.0)
    plain = [theorems.theorem_4(x, h, P, M, slope) for x in (w, shifted)]
    centred = [theorems.theorem_4_centred(x, h, P, M, slope) for x in (w, shifted)]
    np.testing.assert_allclose(plain[0].total, plain[1].total, rtol=1e-10)
    assert abs(float(plain[0].terms["S_alignment"] - plain[1].terms["S_alignment"])) > 1
    for name, value in centred[0].terms.items():
        np.testing.assert_allclose(value, centred[1].terms[name], rtol=1e-10)
