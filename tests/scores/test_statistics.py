"""Statistics of segments and log-probabilities against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np

from ches_jax.scores import hidden_sums
from ches_jax.scores.hidden_sums import segment_statistics, token_logps


def test_log_probabilities_equal_the_whole_log_softmax(x64, monkeypatch):
    monkeypatch.setattr(hidden_sums, "TOKENS_PER_LOGIT_CHUNK", 5)
    h = jax.random.normal(jax.random.key(0), (2, 7, 4), jnp.float64)
    w = jax.random.normal(jax.random.key(1), (11, 4), jnp.float64)
    y = jax.random.randint(jax.random.key(2), (2, 7), 0, 11)
    whole = jax.nn.log_softmax(jnp.einsum("bmd,vd->bmv", h, w), axis=-1)
    expected = np.take_along_axis(np.asarray(whole), np.asarray(y)[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_logps(lambda x: x @ w.T, h, y), expected, rtol=1e-13)


def test_padding_predictions_join_nothing():
    h = jnp.arange(8.0).reshape(1, 4, 2)
    s = segment_statistics(
        h, jnp.array([[1, 3, 0]]), jnp.array([[0, 1, 0]]), jnp.array([[0, 1, 2]]), jnp.array([[3, 2]]), lambda x: x
    )
    np.testing.assert_allclose(s.sums[0], h[0, jnp.array([1, 3])])
    np.testing.assert_allclose(s.last[0], h[0, jnp.array([3, 2])])
    assert s.logps is not None
    np.testing.assert_allclose(s.logps[0], [-np.log(1 + np.e), -np.log(1 + np.exp(-1.0))], rtol=1e-6)
