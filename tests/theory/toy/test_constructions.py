"""The named toy models start where they say; what becomes of them is claim R1."""

import jax
import numpy as np

from theory.toy.constructions import TOKENS, constructions, dpo_of, probabilities_at_start
from theory.toy.dynamics import token_probabilities


def test_constructions_start_at_their_probabilities_and_at_the_reference(x64):
    for c in constructions():
        p = token_probabilities(c.model)
        np.testing.assert_allclose(p.sum(), 1, rtol=1e-12)
        assert TOKENS[int(np.argsort(-p)[0])] == c.chosen
        np.testing.assert_allclose(jax.jit(dpo_of(c))(c.model), np.log(2), rtol=1e-12)


def test_the_two_scales_of_a_pair_are_one_model(x64):
    large, small = constructions()[:2]
    np.testing.assert_allclose(token_probabilities(large.model), token_probabilities(small.model), rtol=1e-10)


def test_labels_are_seen_from_the_chosen_token(x64):
    yes, no = constructions()[1], constructions()[3]
    at = TOKENS.index
    assert yes.labels[at("yes")] == "same" and no.labels[at("yes")] == "opposite"
    assert yes.labels[at("Yes")] == "chosen" and no.labels[at("Maybe")] == "other"


def test_a_companion_is_as_likely_as_the_chosen_token(x64):
    p = probabilities_at_start("No", "Never", "Yes")
    assert p[TOKENS.index("Yes")] / p[TOKENS.index("No")] > 0.9
