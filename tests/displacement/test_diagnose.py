"""`ches diagnose` as a function: which source is read."""

from pathlib import Path

import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.errors import ChesError


@pytest.mark.parametrize("options", [{}, {"before": "a"}, {"after": "a"}, {"logps": "a", "path": "b"}])
def test_one_source_is_required(options):
    with pytest.raises(ChesError, match="give one of"):
        diagnose(DiagnoseConfig(**options))


def test_a_run_and_its_first_model_are_answered_with_the_command_for_both():
    with pytest.raises(ChesError, match="pair by pair: ches diagnose --before sft --after trl-out --pairs HELD-OUT"):
        diagnose(DiagnoseConfig(path="trl-out", before="sft"))


def test_a_directory_keeps_one_diagnosis(tmp_path):
    """Pairs of one source beside the verdict on another would be read as one."""
    logs = Path(__file__).parent / "logs"
    d = str(tmp_path / "d")
    diagnose(DiagnoseConfig(path=str(logs / "trl_dpo_high_rate"), out=d))
    diagnose(DiagnoseConfig(path=str(logs / "trl_dpo_high_rate"), out=d, beta=0.05))
    kept = (tmp_path / "d/diagnosis.json").read_bytes()
    with pytest.raises(ChesError, match=r"d holds the diagnosis of .*high_rate.*; give a new directory for .*tunix"):
        diagnose(DiagnoseConfig(path=str(logs / "tunix_events"), out=d))
    assert (tmp_path / "d/diagnosis.json").read_bytes() == kept
    with pytest.raises(ChesError, match="is a diagnosis already; its page: ches report"):
        diagnose(DiagnoseConfig(path=d))


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
