"""What the training tests share: a small run."""

import pytest

from ches_jax.train.config import TrainConfig
from ches_jax.train.loop import train


@pytest.fixture(scope="session")
def small(tiny_model):
    """Options of a run of a few seconds: 12 pairs in updates of 4."""

    def config(out, **options) -> TrainConfig:
        return TrainConfig(
            **{
                "model": str(tiny_model),
                "out": str(out),
                "limit": 20,
                "holdout": 8,
                "batch_size": 4,
                "lr": 1e-4,
                "mesh": "data=1",
                **options,
            }
        )

    return config


@pytest.fixture(scope="session")
def whole_run(small, tmp_path_factory):
    """A run of two epochs that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train(small(out, epochs=2.0, eval_every=2, save_every=2), quiet=True)
