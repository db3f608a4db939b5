"""`ches diagnose` as a function: which source is read."""

import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.errors import ChesError


@pytest.mark.parametrize("options", [{}, {"before": "a"}, {"after": "a"}, {"logps": "a", "path": "b"}])
def test_one_source_is_required(options):
    with pytest.raises(ChesError, match="give one of"):
        diagnose(DiagnoseConfig(**options))


def test_before_is_before_and_after_is_after(monkeypatch):
    """The options that a table reader gets, in their order."""
    asked = []

    def read(before, after):
        asked.extend([before.name, after.name])
        raise ChesError("enough")

    monkeypatch.setattr("ches_jax.displacement.readers.logp_tables.read_score_tables", read)
    monkeypatch.setattr("ches_jax.displacement.diagnose._is_table", lambda spec: True, raising=False)
    with pytest.raises(ChesError):
        diagnose(DiagnoseConfig(before="first.parquet", after="second.parquet"))
    assert asked == ["first.parquet", "second.parquet"]
