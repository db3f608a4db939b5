"""What the model tests share: reference directories."""

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Reference models with scores and log-probabilities in exact float64."""
    folder = shared / "golden"
    if not folder.is_dir():
        pytest.skip("needs the golden data in ../shared, which is not part of the checkout")
    return folder


@pytest.fixture
def write_model(tmp_path: Path):
    """Writes a model directory from a config and named arrays."""
    from safetensors.numpy import save_file

    def write(raw: dict[str, Any], tensors: dict[str, Any]) -> Path:
        tmp_path.joinpath("config.json").write_text(json.dumps(raw))
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write
