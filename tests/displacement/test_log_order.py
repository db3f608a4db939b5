"""What counts where a log's entries are repeated, in no order, or without steps."""

import json
import random

import pytest

from ches_jax.displacement.readers.find import read_log
from ches_jax.errors import ChesError


def training(step, value=0.0):
    return {"step": step, "epoch": step / 50, "loss": 0.6, "rewards/chosen": value, "rewards/rejected": 0.0}


def evaluation(step, value):
    sides = {"eval_rewards/chosen": value, "eval_rewards/rejected": 2 * value}
    return {"step": step, "epoch": step / 50, "eval_loss": 0.6, **sides}


def run(first, last, every=30, scale=-0.01):
    """Entries at every tenth step after the first one, evaluations at every thirtieth."""
    for step in range(first + 10, last + 10, 10):
        yield training(step, scale * step)
        if step % every == 0:
            yield evaluation(step, scale * step)


def read(tmp_path, entries):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return read_log(path)


def values(log, name, quantity="chosen"):
    series = log.get(name, quantity)
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))


def test_a_run_may_be_resumed_before_its_first_evaluation(tmp_path):
    log = read(tmp_path, [*run(0, 80), *run(20, 120, scale=-0.02)])
    assert values(log, "held_out") == pytest.approx({30: -0.6, 60: -1.2, 90: -1.8, 120: -2.4})
    assert values(log, "train") == pytest.approx({s: (-0.01 if s <= 20 else -0.02) * s for s in range(10, 130, 10)})
    assert "resumed at step 30" in log.notes[0]


def test_evaluations_after_the_step_of_resuming_are_of_another_branch(tmp_path):
    log = read(tmp_path, [*run(0, 80), *run(20, 50, every=1000)])
    assert "eval_rewards/chosen" in log.names and log.get("held_out", "chosen") is None
    assert log.last_step == 50


def test_metrics_one_after_the_other_are_resumed_each_for_itself(tmp_path):
    steps = [*range(10, 90, 10), *range(30, 130, 10)]
    rows = [f"{step},eval_rewards/{side},{step}" for side in ("chosen", "rejected") for step in steps]
    path = tmp_path / "log.csv"
    path.write_text("step,metric,value\n" + "\n".join(rows) + "\n")
    log = read_log(path)
    assert list(values(log, "held_out", "chosen")) == list(range(10, 130, 10))
    assert values(log, "held_out", "rejected") == values(log, "held_out", "chosen")


def test_two_runs_one_after_the_other_are_refused(tmp_path):
    with pytest.raises(ChesError, match="begins again at step 10: two runs in one file"):
        read(tmp_path, [*run(0, 80), *run(0, 120)])


@pytest.mark.parametrize("from_step", [0, 20])
def test_entries_without_steps_go_back_with_their_epoch(tmp_path, from_step):
    entries = [*run(0, 80, every=10), *run(from_step, 120, every=10, scale=-0.02)]
    entries = [{name: v for name, v in entry.items() if name != "step"} for entry in entries]
    if not from_step:
        with pytest.raises(ChesError, match="two runs in one file"):
            read(tmp_path, entries)
        return
    log = read(tmp_path, [{"loss": 2.0, "epoch": 3.0}, *entries])  # a fine-tuning before is no part of it
    held_out = list(values(log, "held_out").values())
    assert held_out == pytest.approx([(-0.01 if s <= 20 else -0.02) * s for s in range(10, 130, 10)])


def test_rows_in_no_order_are_sorted(tmp_path):
    entries = list(run(0, 120, every=10))
    mixed = random.Random(0).sample(entries, len(entries))
    log = read(tmp_path, mixed)
    assert values(log, "held_out") == values(read(tmp_path, entries), "held_out") and not log.notes
    with pytest.raises(ChesError, match="two runs in one file"):
        read(tmp_path, [*mixed, mixed[0]])


def test_a_checkpoint_that_is_loaded_at_the_end_ends_the_run(tmp_path):
    log = read(tmp_path, [*run(0, 120, every=10), evaluation(120, -0.01 * 40)])
    assert log.last_step == 40 and values(log, "held_out")[40] == pytest.approx(-0.4)
    assert "the run is taken as ending at step 40" in log.notes[0]


def test_a_second_evaluation_of_the_last_step_is_of_the_same_pairs_or_refused(tmp_path):
    entries = list(run(0, 120, every=10))
    log = read(tmp_path, [*entries, evaluation(120, -1.13)])
    assert values(log, "held_out")[120] == -1.13 and "evaluated twice" in log.notes[0]
    assert read(tmp_path, [*entries, evaluation(120, -1.2)]).notes == ()
    with pytest.raises(ChesError, match=r"two evaluations at step 120 say -1.2 and 0.3 of chosen"):
        read(tmp_path, [*entries, evaluation(120, 0.3)])
