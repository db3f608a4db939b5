"""What the tests of forecasts share: a run that is not made, in float64."""

import jax
import pytest

from ches_jax.forecast.config import ForecastConfig, training
from ches_jax.forecast.setup import Passes
from ches_jax.train.setup import prepare


@pytest.fixture(scope="session")
def passes_of(tiny_model, tmp_path_factory):
    """Options of a forecast to its passes; 12 training pairs in updates of 4, 8 probes."""

    def make(**options) -> Passes:
        small = {"limit": 20, "holdout": 8, "batch_size": 4, "lr": 1e-4, "mesh": "data=1", "dtype": "float64"}
        config = ForecastConfig(model=str(tiny_model), **{**small, **options})
        return Passes.of(prepare(training(config, str(tmp_path_factory.mktemp("forecast") / "run"))))

    return make


@pytest.fixture(scope="session")
def exact(passes_of):
    """One of them in double precision, with its frozen updates: (passes, direction, start)."""
    with jax.enable_x64(True):
        passes = passes_of(epochs=2.0)
        return passes, *passes.frozen_updates()
