"""Ropes that depend on the length of a sequence choose for each sequence of a row by itself."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.models.families.registry import decoder_config
from ches_jax.models.rope import tables

from .test_strict import TINY, family

LONG = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}


@pytest.mark.parametrize(
    "raw",
    [
        TINY | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8},
        TINY | {"rope_scaling": LONG, "original_max_position_embeddings": 8},
    ],
    ids=["dynamic", "longrope"],
)
def test_a_short_sequence_is_not_changed_by_a_long_neighbour(raw: dict[str, Any]):
    rope = decoder_config(raw).rope
    assert rope is not None and rope.length_threshold == 8
    short, long = jnp.arange(5, dtype=jnp.int32), jnp.arange(11, dtype=jnp.int32)
    together = jnp.concatenate([short, long])[None]
    lengths = jnp.concatenate([jnp.full_like(short, 5), jnp.full_like(long, 11)])[None]
    cos = tables(rope, together, lengths, jnp.dtype("float32"))[0]
    for part, n in ((slice(0, 5), 5), (slice(5, 16), 11)):
        alone = jnp.arange(n, dtype=jnp.int32)[None]
        expected = tables(rope, alone, jnp.full_like(alone, n), jnp.dtype("float32"))[0]
        np.testing.assert_array_equal(cos[:, part], expected)
    assert np.abs(cos[0, 4] - cos[0, 9]).max() > 1e-4  # position 4 of the short and of the long sequence


def test_the_threshold_itself_is_still_short():
    raw = family(
        "phi3",
        rope_scaling=LONG | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        original_max_position_embeddings=8,
    )
    rope = decoder_config(raw).rope
    assert rope is not None
    at = [tables(rope, jnp.array([[3]]), jnp.array([[n]]), jnp.dtype("float32"))[0] for n in (4, 8, 9)]
    np.testing.assert_array_equal(at[0], at[1])
    assert np.abs(at[1] - at[2]).max() > 1e-3
