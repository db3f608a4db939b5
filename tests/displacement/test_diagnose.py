"""`ches diagnose` as a function: which source is read."""

import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.errors import ChesError


@pytest.mark.parametrize("options", [{}, {"before": "a"}, {"after": "a"}, {"logps": "a", "path": "b"}])
def test_one_source_is_required(options):
    with pytest.raises(ChesError, match="give one of"):
        diagnose(DiagnoseConfig(**options))
