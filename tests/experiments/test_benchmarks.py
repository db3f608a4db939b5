"""The benchmarks' own arithmetic: what they time is what the product computes."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ches_jax import bundled
from ches_jax.scores.config import ScoreConfig
from ches_jax.scores.run import score
from experiments.benchmarks import training
from experiments.benchmarks.__main__ import commands
from experiments.benchmarks.costs import top_costs
from experiments.benchmarks.measure import medians
from experiments.benchmarks.score_scaling import write_pairs
from experiments.benchmarks.score_scaling_page import write_page
from experiments.benchmarks.scoring import measure
from experiments.benchmarks.train_speed import commands as trainers
from experiments.benchmarks.train_speed import first_steps
from experiments.benchmarks.training import needed_gflop


@pytest.mark.slow
def test_the_timed_pass_computes_the_scores_of_the_command(tiny_model, tmp_path):
    """Checksum of CHES, positions and the number of pairs are those of ``ches score`` on the same rows."""
    file = write_pairs(tmp_path / "pairs.jsonl", 6, 32)
    timed = measure(str(tiny_model), str(file), 6, head=False, mesh="data=1", repeat=1)
    out = score(ScoreConfig(model=str(tiny_model), pairs=str(file), out=str(tmp_path / "run"), mesh="data=1"))
    table = pq.read_table(out / "scores.parquet" if out.is_dir() else out)
    assert timed["pairs"] == 6
    np.testing.assert_allclose(timed["ches_sum"], np.sum(table["ches"].to_numpy()), rtol=1e-6)
    # prompt once, both responses: 24 + 8 + 8 tokens of every pair hold a position
    assert timed["used_positions"] == 6 * 40 <= timed["positions"]


def test_rows_of_the_curves_have_the_lengths_they_are_named_after(tmp_path):
    rows = [json.loads(line) for line in write_pairs(tmp_path / "p.jsonl", 3, 64).read_text().splitlines()]
    assert [(len(r["prompt_ids"]), len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows] == [(48, 16, 16)] * 3
    assert rows[0] != rows[1]


def test_the_page_of_the_curves_shows_what_was_measured(tmp_path):
    row = {"pairs": 4, "cpu_seconds": 1.0, "seconds": 2.0, "others": 0.0}
    share = [row | {"share_of_matmul_peak": s, "positions": 45056} for s in (0.61, 0.07)]
    whole = [row | {"largest_process_mb": mb, "others": 0.9} for mb in (400.0, 512.0)]
    table = {
        "length": dict(zip(("128", "16384"), share, strict=True)),
        "pairs": dict(zip(("1000", "10000"), whole, strict=True)),
    }
    page = write_page({"environment": {"cpu": "<x>", "cores": 2}, "table": table}, tmp_path / "p.html").read_text()
    for text in (
        "Length, 128 to 16384: share of the peak 0.61 to 0.07",
        "MB 400 to 512",
        "45,056",
        "pairs 1000, pairs 10000",
        "&lt;x&gt;",
    ):
        assert text in page, text


def test_without_peers_only_what_needs_none_runs():
    assert set(commands(None, {}, 1)) == {"scan_layers", "load_model", "stream_rows"}


def test_medians_take_numbers_only():
    assert medians([{"a": 1, "b": "x"}, {"a": 5, "b": "x"}, {"a": 2, "b": "x"}]) == {"a": 2, "b": "x"}


def test_what_a_step_needs_is_counted_by_hand():
    """6 FLOP a weight and a position; the unembedding only where a response is predicted."""
    model = bundled.model_dir()
    raw = json.loads((model / "config.json").read_text())
    d, f, h = raw["hidden_size"], raw["intermediate_size"], raw["head_dim"]
    heads, kv = raw["num_attention_heads"], raw["num_key_value_heads"]
    layers = raw["num_hidden_layers"] * d * (2 * h * heads + 2 * h * kv + 3 * f)
    expected = 6 * 3 * (layers * (10 + 2 * 4) + 2 * 4 * raw["vocab_size"] * d) / 1e9
    np.testing.assert_allclose(needed_gflop(str(model), [[10, 4, 4]] * 3), expected, rtol=1e-12)
    uneven = [[10, 2, 6], [12, 4, 4], [8, 7, 1]]
    np.testing.assert_allclose(needed_gflop(str(model), uneven), expected, rtol=1e-12)
    np.testing.assert_allclose(needed_gflop(str(model), uneven, adapters=True), expected * 4 / 6, rtol=1e-12)


@pytest.mark.slow
def test_the_timed_trainer_times_every_update_but_the_first_and_the_profiled_one(tmp_path):
    model = str(bundled.model_dir())
    timed = training.measure(model, [[24, 8, 8]] * 2, steps=2, trace=str(tmp_path))
    assert timed["steps"] == 2 and timed["cpu_s_per_step_median"] > 0
    costs = timed["top_costs"]
    assert 0 < sum(c["share"] for c in costs) <= 1.001 and costs[0]["seconds"] > 0
    assert [c["share"] for c in costs] == sorted((c["share"] for c in costs), reverse=True)


def test_a_folder_without_a_trace_is_reported(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.trace\.json\.gz below it"):
        top_costs(tmp_path)


def test_every_trainer_is_given_the_lengths_it_can_take(tmp_path):
    """Ours, TRL and EasyDeL the lengths themselves, tunix the longest of all; adapters only where both have them."""
    file = tmp_path / "lengths.json"
    file.write_text("[[30, 5, 7], [20, 9, 1]]")
    peers = {"tunix": "T", "trl": "R", "easydel": "E"}
    able = trainers("ultrafeedback", "M", tmp_path, 2, 3, peers, file)
    assert all(str(file) in able[name] for name in ("ours", "trl", "easydel")) and str(file) not in able["tunix"]
    assert {"30", "9"} <= set(able["tunix"])
    assert set(trainers("lora", "M", tmp_path, 2, 3, peers, file)) == {"ours", "trl"}


def test_first_steps_stand_beside_those_of_the_earlier_result():
    before = {"environment": {"commit": "a", "cpu": "b"}, "lengths": {"x": {"table": {"ours": {"first_step_s": 9.0}}}}}
    now = {"x": {"table": {"ours": {"first_step_s": 3.0, "first_step_cpu_s": 4.0}}}, "y": {"table": {"ours": {}}}}
    both = first_steps(before, now)
    assert both["x"]["before"]["first_step_s"] == 9.0 and both["x"]["now"]["first_step_cpu_s"] == 4.0
    assert "y" not in both
