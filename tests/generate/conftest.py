"""What the tests of generation share."""

import pytest

from ches_jax.distributed.mesh import make_mesh


@pytest.fixture(scope="session")
def mesh():
    """One device."""
    return make_mesh("data=1")
