"""How a token is drawn: against transformers' filters, and against the exact probabilities."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from scipy import stats

from ches_jax.errors import ChesError
from ches_jax.generate.sampling import Sampling, draw, filtered, key_data, row_keys
from ches_jax.models.layers import FEW_ROWS

RULES = [
    Sampling(0.7),
    Sampling(1.3, top_k=5),
    Sampling(top_p=0.6),
    Sampling(0.5, top_k=9, top_p=0.9),
    Sampling(2.0, 1, 0.1),
    Sampling(top_p=1e-6),
    Sampling(top_k=1000, top_p=0.999),
]


def random_logits(rows: int, vocabulary: int) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(rows, vocabulary)) * 3).astype(np.float32)


def warped(logits: np.ndarray, how: Sampling) -> np.ndarray:
    """What transformers makes of the logits."""
    rules: list[Any] = [transformers.TemperatureLogitsWarper(how.temperature)]
    rules += [transformers.TopKLogitsWarper(how.top_k)] if how.top_k else []
    rules += [transformers.TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    x = torch.tensor(logits)
    for rule in rules:
        x = rule(None, x)
    return x.numpy()


@pytest.mark.parametrize("how", RULES, ids=str)
def test_filters_equal_those_of_transformers(how):
    logits = random_logits(16, 300)
    drawn, expected = np.asarray(filtered(jnp.asarray(logits), how)), warped(logits, how)
    np.testing.assert_array_equal(np.isfinite(drawn), np.isfinite(expected))
    np.testing.assert_allclose(drawn, expected, rtol=3e-7)  # a division is one rounding


def test_equal_logits_at_the_cut_stay_together():
    drawn = filtered(jnp.array([[1.0, 3.0, 3.0, 3.0]]), Sampling(top_k=2))
    assert np.isfinite(np.asarray(drawn)).tolist() == [[False, True, True, True]]


def keys_of(rows: int, seed: int = 0) -> jax.Array:
    return row_keys(jnp.asarray(np.stack([key_data(seed, f"row {i}", 0) for i in range(rows)])))


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.6, top_k=6), Sampling(1.5, top_p=0.8)], ids=str)
def test_tokens_come_as_often_as_the_exact_probabilities_say(how):
    """Chi-square over the rows of a batch, each with a key of its own."""
    n, logits = 20_000, random_logits(1, 12)
    tokens, _ = draw(keys_of(n), jnp.int32(3), jnp.broadcast_to(jnp.asarray(logits), (n, 12)), how)
    x = warped(logits.astype(np.float64), how)[0]
    p = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
    counts = np.bincount(np.asarray(tokens), minlength=12)
    assert counts[p == 0].sum() == 0
    assert stats.chisquare(counts[p > 0], n * p[p > 0]).pvalue > 1e-3


def test_successive_tokens_of_a_row_are_independent():
    """Pairs of tokens at two steps, against the product of their probabilities."""
    n, how, logits = 20_000, Sampling(), random_logits(1, 4) / 3
    wide = jnp.broadcast_to(jnp.asarray(logits), (n, 4))
    first, second = (np.asarray(draw(keys_of(n), jnp.int32(step), wide, how)[0]) for step in (0, 1))
    p = np.exp(logits[0].astype(np.float64))
    p /= p.sum()
    counts = np.bincount(4 * first + second, minlength=16)
    assert stats.chisquare(counts, n * np.outer(p, p).ravel()).pvalue > 1e-3


def test_a_row_draws_what_it_draws_alone():
    logits, keys = random_logits(8, 50), keys_of(8)
    drawn = jax.jit(lambda keys, logits: draw(keys, jnp.int32(5), logits, Sampling(top_p=0.9))[0])
    together = np.asarray(drawn(keys, logits))
    for i in (0, 3, 7):
        assert np.asarray(drawn(keys[i : i + 1], logits[i : i + 1]))[0] == together[i]
    assert (np.asarray(drawn(keys_of(8, seed=1), logits)) != together).any()


def test_log_probabilities_are_those_of_the_model_itself():
    logits = random_logits(8, 50)
    tokens, logps = draw(keys_of(8), jnp.int32(0), jnp.asarray(logits), Sampling(0.3, top_k=2))
    exact = np.take_along_axis(logits.astype(np.float64), np.asarray(tokens)[:, None], 1)[:, 0]
    exact -= np.log(np.exp(logits.astype(np.float64)).sum(1))
    np.testing.assert_allclose(np.asarray(logps), exact, atol=2e-6)


def test_greedy_takes_the_first_of_equal_logits():
    tokens, _ = draw(keys_of(2), jnp.int32(0), jnp.array([[0.0, 2.0, 2.0], [5.0, 1.0, 5.0]]), Sampling(0))
    assert tokens.tolist() == [1, 0]


@pytest.mark.parametrize("vocabulary", [257, 300, 1024])
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS, FEW_ROWS + 1])
def test_greedy_and_log_probabilities_are_those_of_every_token(rows, vocabulary):
    """However many rows there are and whatever divides the vocabulary; a largest logit comes twice, or is infinite."""
    logits = np.round(random_logits(rows, vocabulary))
    logits[0, [3, vocabulary - 1]] = 40
    logits[-1, : vocabulary - 1] = -np.inf
    tokens, logps = draw(keys_of(rows), jnp.int32(0), jnp.asarray(logits), Sampling(0))
    wide = logits.astype(np.float64)
    expected = -np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    np.testing.assert_allclose(logps, expected, atol=1e-5)


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}])
def test_numbers_that_mean_nothing_are_refused(bad):
    with pytest.raises(ChesError, match=r"expected"):
        Sampling(**bad)
