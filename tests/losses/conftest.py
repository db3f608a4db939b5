"""Random batches that any registered loss can read."""

import numpy as np
import pytest
from loss_batches import make_batch

from ches_jax.losses import LossInputs


@pytest.fixture
def batch() -> LossInputs:
    return make_batch()


@pytest.fixture
def batch64(x64) -> LossInputs:
    return make_batch(dtype=np.float64)
