"""Views: the toy model and a decoder behind one door give the log-probabilities that they give elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import Decoder
from ches_jax.types import Response, TokenPair
from theory.models import lmview
from theory.toy import ufm


def pair(prompt, chosen, rejected):
    return TokenPair(row_id="r", index=0, prompt=prompt, chosen=Response(chosen, 2), rejected=Response(rejected, None))


PAIRS = [pair((5, 6), (7, 8), (7, 9, 10)), pair((5, 6, 4), (3,), (11, 12))]


def test_sequences_hold_prompt_response_and_terminator():
    chosen, rejected = lmview.sequences_of(PAIRS)
    assert chosen.tokens[0].tolist() == [5, 6, 7, 8, 2]
    assert chosen.response[0].tolist() == [False, False, True, True, True]
    assert rejected.tokens[1].tolist() == [5, 6, 4, 11, 12] and rejected.response[1].sum() == 2
    assert chosen.real[1].tolist() == [True] * 5


def test_the_toy_view_is_the_unconstrained_features_model(x64):
    chosen, rejected = lmview.sequences_of(PAIRS)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chosen, rejected)
    view, params = lmview.toy_view(both, jax.random.key(0), vocabulary=13, width=4)
    hidden = view.hidden(params, both)
    # contexts by another road: equal prefixes of whole sequences
    contexts = ufm.share_contexts(jnp.zeros(4, jnp.int32), both.tokens)
    assert contexts[0, 3] == contexts[2, 3]  # tokens 5 6 7 come before it in both
    np.testing.assert_allclose(hidden[0, 2], hidden[2, 2])
    assert not np.allclose(hidden[0, 3], hidden[2, 3])
    logits = hidden[:, :-1] @ params.unembedding.T
    expected = jnp.take_along_axis(jax.nn.log_softmax(logits), both.tokens[:, 1:, None], axis=-1)[..., 0]
    expected = jnp.where(both.response[:, 1:], expected, 0.0).sum(1)
    np.testing.assert_allclose(lmview.log_probs(view, params, both), expected, rtol=1e-12)


def test_the_decoder_view_is_the_decoder(x64, tiny_model):
    model = load_model(tiny_model, dtype="float64", param_dtype="float64")
    view, params = lmview.decoder_view(model, remat=True)
    chosen, _ = lmview.sequences_of(PAIRS)
    actual = jax.jit(lambda p: lmview.log_probs(view, p, chosen))(params)
    alone = jax.nn.log_softmax(model.logits(model.hidden(jnp.array([[5, 6, 7, 8]]))))[0]
    expected = alone[1, 7] + alone[2, 8] + alone[3, 2]
    np.testing.assert_allclose(actual[0], expected, rtol=1e-10)
    assert view.unembedding(params).shape == (1291, 24)


def test_names_choose_what_moves(x64, tiny_model):
    model = load_model(tiny_model, dtype="float64", param_dtype="float64")
    view, params = lmview.decoder_view(model, only="lm_head")
    moving = [
        lmview.path_name(path) for path, moves in jax.tree_util.tree_leaves_with_path(view.trainable(params)) if moves
    ]
    assert moving == ["lm_head.weight"]


def test_rows_are_dealt_into_batches_and_put_together_again():
    rows = {"a": jnp.arange(5.0), "b": jnp.ones((5, 2))}
    sizes = []

    def function(batch):
        sizes.append(batch["b"].shape)
        return batch["a"][:, None] + batch["b"]

    actual = lmview.in_batches(function, rows, 2)
    assert actual[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert set(sizes) == {(2, 2)}  # one shape, the last batch filled up


@pytest.mark.parametrize("cap", [None, 3.0])
def test_the_transform_is_that_of_the_model(cap, x64):
    class Config:
        logit_scale, logit_softcap = 0.5, cap

    class Model:
        config = Config()

    view = lmview.DecoderView(None, lambda x: Decoder.logit_transform(Model(), x))  # type: ignore[arg-type]
    x = jnp.array([1.0, 40.0])
    expected = x * 0.5 if cap is None else cap * jnp.tanh(x * 0.5 / cap)
    np.testing.assert_allclose(view.transform(x), expected, rtol=1e-12)
    # E carries the transform's derivative: it is the gradient of a log-probability by h W^T
    sequence = lmview.Sequences(jnp.array([0, 1]), jnp.ones(2, bool), jnp.array([False, True]))
    w, h = jnp.array([[1.0], [2.0], [-1.0]]), jnp.array([[0.7]])
    actual = lmview.errors(view, h, w, sequence)[0] @ w
    expected = jax.grad(lambda h: lmview.response_log_prob(view, h, w, sequence))(h)[0]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)
