"""Statistics of segments against plain numpy."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from ches_jax.models.logprobs import Head, token_logps
from ches_jax.scores.hidden_sums import segment_statistics


def test_padding_predictions_join_nothing():
    h = jnp.arange(8.0).reshape(1, 4, 2)
    logps = partial(lambda w, h, y: token_logps(h, w, y, Head()), jnp.eye(2))
    s = segment_statistics(
        h, jnp.array([[1, 3, 0]]), jnp.array([[0, 1, 0]]), jnp.array([[0, 1, 2]]), jnp.array([[3, 2]]), logps
    )
    np.testing.assert_allclose(s.sums[0], h[0, jnp.array([1, 3])])
    np.testing.assert_allclose(s.last[0], h[0, jnp.array([3, 2])])
    assert s.logps is not None
    np.testing.assert_allclose(s.logps[0], [-np.log(1 + np.e), -np.log(1 + np.exp(-1.0))], rtol=1e-6)
