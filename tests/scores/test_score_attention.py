"""Scores are the same whatever computes the attention, and the run tells which it was."""

import numpy as np
import pytest

from ches_jax.cli import main
from ches_jax.models.attention.choose import KERNELS
from ches_jax.runs.directory import read_json
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.run import score
from ches_jax.scores.table import read_table


def scored(model, out, attention: str) -> dict[str, np.ndarray]:
    config = ScoreConfig(model=str(model), out=str(out), attention=attention, limit=16)
    table = read_table(score(config, quiet=True))[0].to_pydict()
    assert read_json(out / "run.json")["attention"] == (attention if attention != "auto" else "blocks")
    return {name: np.array(table[name]) for name in ("ches", "sqnorm_chosen")}


@pytest.fixture(scope="module")
def plain(tiny_model, tmp_path_factory):
    return scored(tiny_model, tmp_path_factory.mktemp("plain") / "run", "auto")


@pytest.mark.parametrize(
    "attention", ["dense", *(pytest.param(f"{name}:interpret", marks=pytest.mark.slow) for name in KERNELS)]
)
def test_every_kernel_gives_the_same_scores(tiny_model, tmp_path, plain, attention):
    actual = scored(tiny_model, tmp_path / "run", attention)
    assert np.abs((actual["ches"] - plain["ches"]) / plain["sqnorm_chosen"]).max() < 1e-5


@pytest.mark.parametrize("verb", ["score", "train"])
@pytest.mark.parametrize("attention", ["pallas-tpu", "pallas-gpu", "flash"])
def test_a_kernel_that_cannot_run_is_one_message_and_exit_code_2(tiny_model, tmp_path, capsys, verb, attention):
    out = tmp_path / "run"
    assert main([verb, "--model", str(tiny_model), "--out", str(out), "--attention", attention]) == 2
    printed = capsys.readouterr()
    error = printed.err.splitlines()[-1]
    assert printed.out == "" and error.startswith("ches: --attention") and "blocks, dense" in error
    assert "Traceback" not in printed.err and not out.exists()
