"""What the training tests share: quiet libraries, compiled code kept between runs, a small run."""

import jax
import pytest

from ches_jax.train.config import TrainConfig
from ches_jax.train.loop import train


def pytest_configure(config: pytest.Config) -> None:
    for module in ("torch", "transformers", "huggingface_hub"):
        for kind in ("DeprecationWarning", "FutureWarning", "UserWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{kind}:{module}")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Equal programs of several runs are compiled once, and not for speed."""
    wanted = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in wanted}
    for name, value in wanted.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def small(tiny_model):
    """Options of a run of a few seconds: 12 pairs in updates of 4."""

    def config(out, **options) -> TrainConfig:
        return TrainConfig(**{
            "model": str(tiny_model), "out": str(out), "limit": 20, "holdout": 8, "batch_size": 4, "lr": 1e-4,
            "mesh": "data=1", **options,
        })  # fmt: skip

    return config


@pytest.fixture(scope="session")
def whole_run(small, tmp_path_factory):
    """A run of two epochs that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train(small(out, epochs=2.0, eval_every=2, save_every=2), quiet=True)
