"""Fifty steps beside TRL's DPOTrainer: model, data, order, optimiser and precision (float64) the same."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ches_jax.inputs import Opener
from ches_jax.losses import get_loss
from ches_jax.train.data.split import make_plan, read_run_pairs
from ches_jax.train.loop import train

STEPS, PAIRS = 50, 4
OPTIMIZERS = {"adamw": ("adamw_torch", 1e-4), "rmsprop": ("rmsprop", 1e-5)}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fifty_steps_agree_with_trl(x64, small, tiny_model, tmp_path, optimizer):
    pytest.importorskip("trl")
    optim, lr = OPTIMIZERS[optimizer]
    options = {"limit": STEPS * PAIRS, "holdout": 0, "batch_size": PAIRS, "optimizer": optimizer, "lr": lr}
    config = small(tmp_path / "ours", export=False, dtype="float64", **options)
    opener = Opener()
    pairs = read_run_pairs(config, get_loss("dpo"), opener.model(tiny_model), opener).train
    plan = make_plan(config, len(pairs))
    assert plan.total == STEPS
    ordered = [pairs[i] for step in range(STEPS) for i in np.concatenate(plan.update(step))]
    rows = [
        {
            "prompt_ids": p.prompt,
            "chosen_ids": p.chosen.targets("include"),
            "rejected_ids": p.rejected.targets("include"),
        }
        for p in ordered
    ]
    job = {"model": str(tiny_model), "rows": rows, "batch_size": PAIRS, "optim": optim, "lr": lr, "beta": 0.1}
    (tmp_path / "job.json").write_text(json.dumps(job))
    script = Path(__file__).with_name("trl_steps.py")
    subprocess.run([sys.executable, str(script), str(tmp_path / "job.json"), str(tmp_path / "theirs.json")], check=True)
    theirs = json.loads((tmp_path / "theirs.json").read_text())

    train(config, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "ours" / "metrics.jsonl").read_text().splitlines()]
    ours = [e for e in lines if "loss" in e]
    assert len(ours) == len(theirs["steps"]) == STEPS
    worst = {}
    for name in ("loss", "logps/chosen", "logps/rejected"):
        a, b = (np.array([e[name] for e in side]) for side in (ours, theirs["steps"]))
        worst[name] = float((np.abs(a - b) / np.abs(b)).max())
    losses = [e["loss"] for e in theirs["steps"]]
    print(f"\nTRL {theirs['trl']}, {optimizer}: loss {losses[0]:.4f} to {losses[-1]:.4f}; relative differences {worst}")
    assert max(abs(x - np.log(2)) for x in losses) > 1e-2, "nothing was learned, so nothing was compared"
    # TRL has log-probabilities in float32, whatever the model computes in
    assert worst.pop("loss") < 2e-5 and max(worst.values()) < 1e-6, worst
