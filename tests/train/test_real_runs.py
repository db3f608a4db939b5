"""Real pairs and a real model: an epoch, and runs that are killed at random."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from ches_jax.diagnose import DiagnoseConfig, diagnose

pytestmark = pytest.mark.slow
KILLS = 10


def command(shared, out, *more):
    words = [
        "--model", shared / "models/hh-tiny/fp32", "--pairs", shared / "data/hh_harmless_base_test.jsonl",
        "--on-bad-row", "drop", "--out", out, "--quiet", "--lr", "2e-6", *more,
    ]  # fmt: skip
    return [sys.executable, "-m", "ches_jax", "train", *map(str, words)]


@pytest.mark.parametrize("loss", ["dpo", "ipo_sum", "rpo"])
def test_an_epoch_over_hh_pairs(shared, tmp_path, loss):
    out = tmp_path / loss
    subprocess.run(command(shared, out, "--loss", loss, "--holdout", 128, "--eval-every", 32), check=True)
    found = diagnose(DiagnoseConfig(run_dir=str(out)))
    assert found.pairs == 128
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_rewards/accuracies"] > 0.5 and last["displacement/margin"] > 0
    print(f"\n{loss}: {found.text()}")


def test_a_run_killed_ten_times_ends_as_one_that_was_not(shared, tmp_path):
    options = ("--limit", 400, "--batch-size", 8, "--save-every", 3, "--eval-every", 10, "--seed", 4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    started = time.monotonic()
    subprocess.run(command(shared, whole, *options), check=True)
    seconds = time.monotonic() - started
    rng = random.Random(0)
    kills = 0
    for _ in range(KILLS):
        process = subprocess.Popen(command(shared, killed, *options, "--resume"))
        try:
            process.wait(rng.uniform(0.1, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run(command(shared, killed, *options, "--resume"), check=True)
    assert kills >= 2
    for name in ("metrics.jsonl", "displacement.parquet", "model/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
