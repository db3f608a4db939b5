"""A model loaded in shards is the model loaded whole, also where parameters are parts of fused or turned tensors."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import named_parameters
from ches_jax.models.families.registry import FAMILIES

from .test_strict import family, weights


@pytest.mark.parametrize("kind", FAMILIES)
def test_shards_hold_what_the_whole_holds(kind: str, write_model: Any):
    raw = family(kind, vocab_size=14)
    rng = np.random.default_rng(0)
    directory: Path = write_model(raw, {k: rng.normal(size=v.shape).astype("f4") for k, v in weights(raw).items()})
    mesh = Mesh(np.array(jax.devices()[:2]), ("x",))

    def halves(name: str, shape: tuple[int, ...]) -> NamedSharding:
        """Along the first even axis of one layer's parameter."""
        start = 1 if name.startswith("layers.") else 0
        axis = next((i for i in range(start, len(shape)) if shape[i] % 2 == 0), None)
        return NamedSharding(mesh, PartitionSpec(*("x" if i == axis else None for i in range(len(shape)))))

    whole = named_parameters(load_model(directory))
    parts = named_parameters(load_model(directory, sharding=halves))
    assert any(len(value.sharding.device_set) == 2 and not value.is_fully_replicated for value in parts.values())
    for name, value in whole.items():
        np.testing.assert_array_equal(np.asarray(parts[name]), np.asarray(value), err_msg=name)
