"""Sums over segments against plain numpy."""

import jax.numpy as jnp
import numpy as np

from ches_jax.models.segment_sums import segment_sums


def test_sums_are_sums_over_the_members_of_a_segment():
    values = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
    out = segment_sums(jnp.asarray(values), jnp.array([[1, 0, 1, 9]]), 2)
    np.testing.assert_allclose(out[0], [values[0, 1], values[0, 0] + values[0, 2]])


def test_bfloat16_states_are_summed_in_float32():
    ones = jnp.ones((1, 1000, 1), jnp.bfloat16)
    out = segment_sums(ones, jnp.zeros((1, 1000), jnp.int32), 1)
    assert out.dtype == jnp.float32
    assert out.item() == 1000.0  # in bfloat16 the sum would stick at 256


def test_segments_outside_the_range_join_no_sum():
    values = jnp.asarray([[1.0, 2.0, 4.0, 8.0]])
    assert segment_sums(values, jnp.asarray([[0, 2, 0, 3]]), 3).tolist() == [[5.0, 0.0, 2.0]]
