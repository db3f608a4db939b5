"""The benchmarks' own arithmetic: what they time is what the product computes."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ches_jax import embedded
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.pipeline import score
from experiments.benchmarks.__main__ import commands
from experiments.benchmarks.measure import medians
from experiments.benchmarks.score_scaling import write_pairs
from experiments.benchmarks.scoring import measure


def test_the_timed_pass_computes_the_scores_of_the_command(tiny_model, tmp_path):
    """Checksum of CHES, positions and the number of pairs are those of ``ches score`` on the same rows."""
    file = write_pairs(tmp_path / "pairs.jsonl", 6, 32)
    found = measure(str(tiny_model), str(file), 6, head=False, mesh="data=1", repeat=1)
    out = score(ScoreConfig(model=str(tiny_model), pairs=str(file), out=str(tmp_path / "run"), mesh="data=1"))
    table = pq.read_table(out / "scores.parquet" if out.is_dir() else out)
    assert found["pairs"] == 6
    np.testing.assert_allclose(found["ches_sum"], np.sum(table["ches"].to_numpy()), rtol=1e-6)
    # prompt once, both responses: 24 + 8 + 8 tokens of every pair hold a position
    assert found["used_positions"] == 6 * 40 <= found["positions"]


def test_rows_of_the_curves_have_the_lengths_they_are_named_after(tmp_path):
    rows = [json.loads(line) for line in write_pairs(tmp_path / "p.jsonl", 3, 64).read_text().splitlines()]
    assert [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows] == [(48, 16, 16)] * 3
    assert rows[0] != rows[1]


def test_without_peers_only_what_needs_none_runs():
    assert set(commands(None, None, None, 1)) == {"scan_layers", "load_model", "stream_rows"}


def test_medians_take_numbers_only():
    assert medians([{"a": 1, "b": "x"}, {"a": 5, "b": "x"}, {"a": 2, "b": "x"}]) == {"a": 2, "b": "x"}


@pytest.mark.slow
def test_the_timed_trainer_times_every_update_but_the_first(monkeypatch):
    from ches_jax.train import loop
    from experiments.benchmarks.train_speed import ours

    monkeypatch.setattr(loop, "Step", loop.Step)  # put back afterwards
    found = ours(str(embedded.model_dir()), pairs=2, prompt=24, response=8, steps=2)
    assert found["steps"] == 2 and found["cpu_s_per_step_median"] > 0
