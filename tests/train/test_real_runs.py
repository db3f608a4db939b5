"""Real pairs and a real model: an epoch, and runs that are killed at random."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose

pytestmark = pytest.mark.slow
KILLS = 10


def command(shared, out, *more):
    words = [
        "--model",
        shared / "models/hh-tiny/fp32",
        "--pairs",
        shared / "data/hh_harmless_base_test.jsonl",
        "--on-bad-row",
        "drop",
        "--out",
        out,
        "--quiet",
        "--lr",
        "2e-6",
        *more,
    ]
    return [sys.executable, "-m", "ches_jax", "train", *map(str, words)]


def lines_of(file):
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize("loss", ["dpo", "ipo_sum", "rpo"])
def test_an_epoch_over_hh_pairs(shared, tmp_path, loss):
    out = tmp_path / loss
    subprocess.run(command(shared, out, "--loss", loss, "--holdout", 128, "--eval-every", 32), check=True)
    diagnosis = diagnose(DiagnoseConfig(path=str(out)))
    assert diagnosis.pairs == 128
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval_rewards/accuracies"] > 0.5 and last["displacement/margin"] > 0
    print(f"\n{loss}: {diagnosis.text()}")


def test_a_run_killed_ten_times_ends_as_one_that_was_not(shared, tmp_path):
    options = ("--limit", 400, "--batch-size", 8, "--save-every", 3, "--eval-every", 10, "--seed", 4)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(shared, whole, *options), check=True)
    written = len((whole / "metrics.jsonl").read_text().splitlines())
    rng = random.Random(0)
    kills = 0
    # at random lines of the log: a resumed run has less time left than a whole one
    for line in sorted(rng.sample(range(1, written), KILLS)):
        process = subprocess.Popen(command(shared, killed, *options, "--resume"))
        while process.poll() is None and lines_of(killed / "metrics.jsonl") < line:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))  # anywhere in an update, or in the saving after it
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    subprocess.run(command(shared, killed, *options, "--resume"), check=True)
    assert kills >= 2
    for name in ("metrics.jsonl", "displacement.parquet", "model/model.safetensors"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
