"""Two models on the same pairs: the changes are those of their log-probabilities, of the same tokens."""

import json

import numpy as np
import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.errors import ChesError


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows = [{"prompt": f"Say {i}.", "chosen": f" yes {i}", "rejected": f" no, not {i}"} for i in range(10)]
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_model_does_not_differ_from_itself(tiny_model, pairs, tmp_path):
    config = DiagnoseConfig(before=str(tiny_model), after=str(tiny_model), pairs=pairs, out=str(tmp_path / "d"))
    found = diagnose(config)
    assert found.pairs == 10 and found.verdict == "not_displaced" and found.chosen.mean == 0
    assert np.allclose([row["chosen"] for row in found.worst], 0) and found.worst[0]["text"].startswith('" yes')
    assert (tmp_path / "d/before/scores.parquet").exists()
    with pytest.raises(ChesError, match="is no score table; give two models, or two score tables"):
        diagnose(DiagnoseConfig(before=str(tmp_path / "d/before"), after=str(tiny_model), pairs=pairs))
    with pytest.raises(ChesError, match="needs --pairs"):
        diagnose(DiagnoseConfig(before=str(tiny_model), after=str(tiny_model)))
    with pytest.raises(ChesError, match=r"scores of one model; changes take two"):
        diagnose(DiagnoseConfig(path=str(tmp_path / "d/before")))
