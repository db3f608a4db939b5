"""What the tests of generation share: compiled programs, kept between engines of equal shapes."""

import jax
import pytest

from ches_jax.distributed.mesh import make_mesh


def pytest_configure(config: pytest.Config) -> None:
    for module in ("torch", "transformers", "huggingface_hub"):
        for kind in ("DeprecationWarning", "FutureWarning", "UserWarning"):
            config.addinivalue_line("filterwarnings", f"ignore::{kind}:{module}")


@pytest.fixture(scope="package", autouse=True)
def compiled(tmp_path_factory):
    """Each run makes its own engine; equal programs are compiled once."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def mesh():
    """One device."""
    return make_mesh("data=1")
