"""Rates and kernels: any model's are the toy model's own, and shares add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.types import Response, TokenPair
from theory.models import kernels, lmview
from theory.models.lmview import sequences_of
from theory.statements.coefficients import head_score
from theory.statements.theorems import Response as Predicted
from theory.toy import ufm

PAIRS = [
    TokenPair(row_id="a", index=0, prompt=(5, 6), chosen=Response((7, 8), 2), rejected=Response((7, 9, 10), None)),
    TokenPair(row_id="b", index=1, prompt=(5, 6, 4), chosen=Response((3,), 2), rejected=Response((11, 12), None)),
]


@pytest.fixture
def toy(x64):
    chosen, rejected = sequences_of(PAIRS)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chosen, rejected)
    view, params = lmview.toy_view(both, jax.random.key(1), vocabulary=13, width=4)
    return view, params, chosen, rejected


def loss(up, down):
    return jax.nn.softplus(down - up).sum()


def test_kernels_through_the_view_are_those_of_the_unconstrained_features_model(toy):
    view, params, chosen, rejected = toy
    grams = kernels.pair_grams(view, params, chosen, rejected, groups=lambda name: name)
    sides = []
    for side in (chosen, rejected):
        # a context is the whole sequence up to and with the position that predicts
        contexts = jnp.asarray(
            [
                [int(np.argmax((np.asarray(view.prefixes) == row_prefix(tokens, t)).all(1))) for t in range(4)]
                for tokens in np.asarray(side.tokens)
            ],
            jnp.int32,
        )
        sides.append(ufm.Responses(side.tokens[:, 1:], contexts, side.response[:, 1:]))
    kernel = jax.jit(ufm.kernel)
    k = [kernel(params, a, b) for a, b in ((sides[0], sides[0]), (sides[0], sides[1]), (sides[1], sides[1]))]
    for actual, expected in zip(grams, k, strict=True):
        np.testing.assert_allclose(actual["unembedding"], jnp.diagonal(expected.head), rtol=1e-11)
        np.testing.assert_allclose(actual["features"], jnp.diagonal(expected.body), rtol=1e-11, atol=1e-12)

    # all responses with all others
    both, every = lmview.both_sides(chosen, rejected), ufm.stack(*sides)
    whole = kernel(params, every, every)

    @jax.jit
    def through_the_view(params):
        features = kernels.pair_feature_kernels(view, params, chosen, rejected)
        return kernels.gram(view, params, both), kernels.head_gram(view, params, both), features

    gram, head_gram, (own, cross) = through_the_view(params)
    np.testing.assert_allclose(gram, whole.total, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(head_gram, whole.head, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(own, jnp.diagonal(k[0].body), rtol=1e-11)
    np.testing.assert_allclose(cross, jnp.diagonal(k[1].body), rtol=1e-11, atol=1e-12)


def row_prefix(tokens, t):
    return np.array([*tokens[: t + 1], *[-1] * (len(tokens) - t - 1)])


def test_batch_rates_of_one_pair_are_its_own_rate(toy):
    view, params, chosen, rejected = toy
    one = [jax.tree.map(lambda a: a[:1], side) for side in (chosen, rejected)]
    gap = [lmview.log_probs(view, params, side) for side in one]
    pull = float(jax.nn.sigmoid(gap[1] - gap[0])[0])
    own = kernels.pair_grams(view, params, one[0], one[1]).rates(pull, pull)
    np.testing.assert_allclose(kernels.batch_rates(view, params, one[0], one[1], loss, one[0]), own, rtol=1e-11)


def test_rates_along_signs_are_those_of_a_sign_step(toy):
    view, params, chosen, rejected = toy
    actual = jax.jit(lambda p: kernels.sign_rates(view, p, chosen, rejected, loss))(params)
    one = [jax.tree.map(lambda a: a[1:], side) for side in (chosen, rejected)]
    step = 1e-6

    @jax.jit
    def moved(params):
        velocity = jax.tree.map(jnp.sign, kernels.direction(view, params, one[0], one[1], loss))
        after = jax.tree.map(lambda p, v: p + step * v, params, velocity)
        return (lmview.log_probs(view, after, one[0]) - lmview.log_probs(view, params, one[0])) / step

    measured = moved(params)
    np.testing.assert_allclose(actual[1], measured[0], rtol=1e-4)


def test_layers_are_counted_one_by_one():
    class View:
        rows = 1

        def hidden(self, params, sequences):
            h = jnp.ones((*sequences.tokens.shape, 2))
            for layer in (params["layers"]["0"][0], params["layers"]["1"][0], params["layers"]["0"][1]):
                h = jnp.tanh(h * layer[None, None])
            return h

        def unembedding(self, params):
            return params["head"]

        def transform(self, raw):
            return raw

        def trainable(self, params):
            return jax.tree.map(lambda _: True, params)

    rng = np.random.default_rng(0)
    stacked = {"0": jnp.array(rng.normal(size=(2, 2))), "1": jnp.array(rng.normal(size=(1, 2)))}
    params = {"layers": stacked, "head": jnp.array(rng.normal(size=(13, 2)))}
    numbers = {"layers.0": (0, 2), "layers.1": (1,), "head": ()}
    chosen, rejected = sequences_of(PAIRS)
    whole = kernels.pair_grams(View(), params, chosen, rejected, lambda name: name)
    split = kernels.pair_grams(
        View(), params, chosen, rejected, lambda name: name.partition(".")[0], layers=numbers.__getitem__
    )
    assert split.cross["layers"].shape == (2, 3) and split.cross["head"].shape == (2,)
    # two stacks in one group, each layer at its own place
    np.testing.assert_allclose(split.cross["layers"][:, 1], whole.cross["layers.1"], rtol=1e-6)
    np.testing.assert_allclose(split.cross["layers"][:, 0::2].sum(1), whole.cross["layers.0"], rtol=1e-6)
    np.testing.assert_allclose(split.total()[0], whole.total()[0], rtol=1e-6)


def test_the_head_score_of_the_pipeline_is_that_of_the_coefficients(toy):
    view, params, chosen, rejected = toy
    actual = kernels.pair_head_scores(view, params, chosen, rejected)
    w = view.unembedding(params)
    for row in range(len(PAIRS)):
        sides = []
        for side in (chosen, rejected):
            hidden = view.hidden(params, jax.tree.map(lambda a, r=row: a[r : r + 1], side))[0, :-1]
            mask = side.response[row, 1:]
            sides.append(Predicted(side.tokens[row, 1:], jnp.where(mask[:, None], hidden, 0.0), mask))
        np.testing.assert_allclose(actual.score[row], head_score(w, sides[0], sides[1]), rtol=1e-11)
        np.testing.assert_allclose(actual.shares[row][:4].sum(), actual.score[row], rtol=1e-11)


def test_frozen_parameters_have_no_share_and_no_velocity(toy):
    view, params, chosen, rejected = toy

    class Frozen:
        rows, hidden, unembedding, transform = 1, view.hidden, view.unembedding, view.transform

        def trainable(self, params):
            return ufm.UFM(False, True)  # type: ignore[arg-type]

    velocity = kernels.direction(Frozen(), params, chosen, rejected, loss)
    assert not velocity.unembedding.any() and velocity.features.any()
    grams = kernels.pair_grams(Frozen(), params, chosen, rejected, groups=lambda name: name)
    assert set(grams.chosen) == {"features"}


@pytest.mark.parametrize(
    "name, group",
    [
        ("lm_head.weight", "head"),
        ("embed_tokens.weight", "embed"),
        ("layers.self_attn.q_proj.weight", "attention"),
        ("layers.attn_norm.weight", "norm"),
        ("norm.weight", "final norm"),
        ("layers.mlp.up_proj.weight", "mlp"),
    ],
)
def test_parameters_are_counted_in_their_module(name, group):
    assert kernels.by_module(name) == group
