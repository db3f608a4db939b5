"""Coefficients: the scalar formula, the bound, and the sums they belong to."""

import jax.numpy as jnp
import numpy as np

from theory.statements import theorems
from theory.statements.coefficients import coefficients, head_score, pair_coefficient, positivity


def case(seed=0, tokens=(1, 3, 1)):
    rng = np.random.default_rng(seed)
    hidden = jnp.array(rng.normal(size=(len(tokens), 3)))
    mask = jnp.array([True] * (len(tokens) - 1) + [False])
    return theorems.Response(jnp.array(tokens, jnp.int32), jnp.where(mask[:, None], hidden, 0.0), mask)


W = np.random.default_rng(9).normal(size=(6, 3))


def test_the_scalar_formula_gives_every_coefficient(x64):
    w, a, b = jnp.array(W), case(0), case(1, (2, 1, 0))
    c = coefficients(w, a, b)
    for k in range(2):
        for m in range(2):
            left, right = (theorems.probabilities(w, r.hidden[i]) for r, i in ((a, k), (b, m)))
            np.testing.assert_allclose(
                c.alpha[k, m], pair_coefficient(left, a.tokens[k], right, b.tokens[m]), rtol=1e-12
            )
            assert abs(c.alpha[k, m]) <= c.bound[k, m]
    assert c.same_token[0, 1] and not c.same_token[0, 0]
    assert not c.real[2].any()


def test_the_head_score_is_minus_the_alpha_terms_of_theorem_6(x64):
    w, a, b = jnp.array(W), case(0), case(1, (2, 1, 0))
    terms = theorems.theorem_6(w, a, b, jnp.asarray(-1.0)).terms
    np.testing.assert_allclose(head_score(w, a, b), -terms["alpha_minus"] - terms["alpha_plus"], rtol=1e-12)


def test_a_responses_products_with_itself_are_counted_among_real_positions(x64):
    a = case(0)
    seen = positivity(coefficients(jnp.array(W), a, a))
    assert all(0 <= float(s) <= 1 for s in seen)
    assert float(seen.similarity) >= 0.5  # the two squared norms among four products
