"""Which checkpoints stay, what the best one is, and models made of them."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from ches_jax.cli import main
from ches_jax.errors import ChesError, RunError
from ches_jax.models.adapters.peft import load_merged
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import abstract_decoder, named_parameters
from ches_jax.runs.directory import read_json
from ches_jax.train import loop, saved_here
from ches_jax.train.best import Best, parse_best
from ches_jax.train.checkpoints import Checkpoints, read_trained, saved_steps
from ches_jax.train.loop import Stopped, train
from ches_jax.train.metrics import JsonLines
from ches_jax.train.policy import Policy, export_model
from ches_jax.train.restore import card_at, model_at, step_of
from ches_jax.train.state import TrainState

from .test_loop import lines, stopping_at

OPTIONS = {"epochs": 2.0, "eval_every": 1, "keep": 1, "keep_best": "eval_loss:min", "lr": 3e-4}


def state(value: float) -> TrainState:
    import jax.numpy as jnp

    return TrainState({"a.weight": jnp.full((2,), value)}, {}, {}, jnp.int32(0))


def test_the_last_and_the_best_stay(tmp_path):
    saved = Checkpoints(tmp_path, 2, Best("m", "min"))
    scores = [3.0, 1.0, math.nan, 2.0, None, 5.0]
    for step, score in enumerate(scores, 1):
        saved.save(step, state(step), {"at": step}, None if score is None else {"m": score, "other": 0.0})
        saved.wait()
        seen = [(s, i) for i, s in enumerate(scores[:step], 1) if s is not None and not math.isnan(s)]
        assert saved_steps(tmp_path) == sorted({step, max(step - 1, 1), min(seen)[1]})
    assert saved.best() == {"metric": "m", "mode": "min", "step": 2, "value": 1.0}
    saved.close()
    # a manager of its own, as after a restart, with another idea of what is best
    again = Checkpoints(tmp_path, 1, Best("m", "max"))
    assert again.best() == {"metric": "m", "mode": "max", "step": 6, "value": 5.0}
    restored, position = again.restore(2, state(0))
    assert position == {"at": 2} and float(restored.params["a.weight"][0]) == 2
    again.close()


def test_the_best_stays_when_a_better_one_cannot_be_written(tmp_path, monkeypatch):
    saved = Checkpoints(tmp_path, 1, Best("m", "max"))
    saved.save(1, state(1), {}, {"m": 1.0})
    saved.save(2, state(2), {}, {"m": 0.0})
    saved.wait()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_here.ocp.CheckpointManager, "save", full)
    with pytest.raises(RunError, match="whole ones: steps 1, 2"):
        saved.save(3, state(3), {}, {"m": 9.0})
    monkeypatch.undo()
    assert saved_steps(tmp_path) == [1, 2] and saved.best() == {"metric": "m", "mode": "max", "step": 1, "value": 1.0}
    saved.close()


def test_which_way_is_better_is_asked_where_it_is_not_plain():
    assert parse_best("eval_rewards/accuracies") == Best("eval_rewards/accuracies", "max")
    for text in ("displacement/margin", "eval_loss:least", "loss", "grad_norm:min"):
        with pytest.raises(ChesError, match="such as eval_loss:min"):
            parse_best(text)


@pytest.fixture(scope="module")
def best_run(small, tmp_path_factory):
    """A learning rate so large that the held-out loss has its least value before the end."""
    return train(small(tmp_path_factory.mktemp("best") / "run", **OPTIONS), quiet=True)


def test_a_run_keeps_and_tells_its_best_step(best_run):
    losses = {e["step"]: e["eval_loss"] for e in lines(best_run) if "eval_loss" in e and e["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best < 6, losses  # or the test shows nothing
    assert saved_steps(best_run) == [best, 6]
    recorded = read_json(best_run / "run.json")["best"]
    assert recorded == {"metric": "eval_loss", "mode": "min", "step": best, "value": losses[best]}


@pytest.mark.slow
def test_a_resumed_run_keeps_the_best_of_before(best_run, small, tmp_path, monkeypatch):
    config = small(tmp_path / "run", **OPTIONS)
    monkeypatch.setattr(loop, "JsonLines", stopping_at(4))
    with pytest.raises(Stopped):
        train(config, quiet=True)
    monkeypatch.undo()
    out = train(config, resume=True, quiet=True)
    assert saved_steps(out) == saved_steps(best_run)
    assert read_json(out / "run.json")["best"] == read_json(best_run / "run.json")["best"]
    assert (out / "metrics.jsonl").read_bytes() == (best_run / "metrics.jsonl").read_bytes()


def test_checkpoints_become_model_directories(best_run, tmp_path, capsys):
    last = tmp_path / "last"
    assert main(["convert", "--run", str(best_run), "--out", str(last)]) == 0
    assert capsys.readouterr().out == f"{last}\n"
    exported, actual = (named_parameters(load_model(d)) for d in (best_run / "model", last))
    assert exported.keys() == actual.keys()
    for name, value in exported.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)
    assert main(["convert", "--run", str(best_run), "--step", "best", "--out", str(tmp_path / "best")]) == 0
    better = named_parameters(load_model(tmp_path / "best"))
    assert not np.array_equal(better["norm.weight"], exported["norm.weight"])
    assert main(["convert", "--run", str(best_run), "--step", "77", "--out", str(tmp_path / "no")]) == 2
    assert "no step '77'; checkpoints are there of steps" in capsys.readouterr().err
    assert main(["convert", "--out", str(tmp_path / "no")]) == 2
    assert "give one of --model DIR" in capsys.readouterr().err


@pytest.mark.slow
def test_checkpoints_of_adapters_become_merged_models(small, tiny_model, tmp_path):
    options = {"lora_rank": 2, "steps": 2, "save_every": 1, "lr": 1e-3, "export": False}
    out = train(small(tmp_path / "run", **options), quiet=True)
    for step, same in (("2", True), ("1", False)):
        assert main(["convert", "--run", str(out), "--step", step, "--out", str(tmp_path / step)]) == 0
        expected = named_parameters(load_merged(tiny_model, out / "adapter"))
        actual = named_parameters(load_model(tmp_path / step))
        close = [np.allclose(actual[n], expected[n], atol=1e-6) for n in expected]
        assert all(close) == same
    assert pq.read_table(out / "displacement.parquet").num_rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep-best", "eval_loss"], "no pairs are held out"),
        (["--keep-best", "displacement/margin"], "expected a number of the evaluations and which way is better"),
        (["--keep-best", "displacement/margins:max"], "the evaluations do not give that; they give displacement/dlogp"),
    ],
)
def test_bad_metrics_are_one_message(capsys, tiny_model, tmp_path, words, message):
    options = ["--model", str(tiny_model), "--limit", "12", "--mesh", "data=1", "--batch-size", "4", "--quiet"]
    assert main(["train", *options, "--out", str(tmp_path / "run"), *words]) == 2
    assert message in capsys.readouterr().err


def damaged(folder, how):
    files = [p for p in folder.rglob("*") if p.is_file()]
    for path in files:
        if how == "empty" or (how == "no record" and "metadata" in path.name.lower()):
            path.write_bytes(b"")
        elif how == "cut" and path.stat().st_size > 1:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("how", ["empty", "no record", "cut"])
def test_a_checkpoint_that_cannot_be_read_is_skipped_for_the_one_before_it_with_a_word(tmp_path, capsys, how):
    saved = Checkpoints(tmp_path, 3)
    for step in (1, 2):
        saved.save(step, state(step), {"at": step})
    saved.wait()
    saved.close()
    damaged(tmp_path / "checkpoints" / "2", how)
    again = Checkpoints(tmp_path, 3)
    restored, step = again.resume(state(0), lambda step: {"at": step})
    assert step == 1 and float(restored.params["a.weight"][0]) == 1
    assert "2: the checkpoint cannot be read (" in capsys.readouterr().err
    again.save(2, state(2), {"at": 2})  # the run comes by again
    again.wait()
    again.close()
    assert saved_steps(tmp_path) == [1, 2] and (tmp_path / "checkpoints" / "unreadable-2").is_dir()
    last = Checkpoints(tmp_path, 3)
    assert last.resume(state(0), lambda step: {"at": step})[1] == 2
    last.close()


def test_where_no_checkpoint_can_be_read_the_run_does_not_begin_again_in_silence(tmp_path):
    saved = Checkpoints(tmp_path, 3)
    saved.save(1, state(1), {})
    saved.wait()
    saved.close()
    damaged(tmp_path / "checkpoints" / "1", "empty")
    again = Checkpoints(tmp_path, 3)
    with pytest.raises(RunError, match=r"cannot be read .*there is no other: start again with a new --out"):
        again.resume(state(0), lambda step: {})
    again.close()


def test_a_checkpoint_is_due_by_the_clock_unless_its_updates_are_counted(tmp_path, monkeypatch):
    from ches_jax.train import checkpoints

    clock = [0.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[0])
    by_clock, counted = Checkpoints(tmp_path / "a", 1), Checkpoints(tmp_path / "b", 1, every=5)
    clock[0] = checkpoints.SECONDS
    assert not by_clock.overdue()
    clock[0] += 1
    assert by_clock.overdue() and not counted.overdue() and counted.due(5, False)
    by_clock.save(1, state(1), {})
    by_clock.wait()
    assert not by_clock.overdue()
    by_clock.close()
    counted.close()


def test_a_log_is_cut_behind_its_checkpoint_and_a_damaged_line_is_reported(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": 1}\n{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    JsonLines(path, 1)
    assert path.read_text() == '{"step": 0, "a": 1}\n{"step": 1}\n'
    for line in ("{", "[1]", '{"step": "1"}', "[" * 100_000):
        path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(RunError, match=r"metrics.jsonl, line 2: damaged"):
            JsonLines(path, 1)
    for text in ("", '{"step": 1}\n', '{"step": 0}\n{"step": 2}\n'):
        path.write_text(text)
        with pytest.raises(
            RunError, match=r"no lines of [12] steps up to the checkpoint of step 1 .*remove checkpoints/1"
        ):
            JsonLines(path, 1)
    JsonLines(path)
    assert path.read_bytes() == b"" and len(list(tmp_path.iterdir())) == 1


def test_only_numbers_name_checkpoints(tmp_path):
    for name in ("3", "12", "\u00b2", "x", "4.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_steps(tmp_path) == [3, 12]
    with pytest.raises(RunError, match="no step '\u00b2'"):
        step_of(tmp_path, "\u00b2")
    (tmp_path / "scores").mkdir()
    (tmp_path / "scores/config.json").write_text('{"verb": "score"}')
    with pytest.raises(RunError, match="a run of `ches score`; only those of `ches train` have checkpoints"):
        step_of(tmp_path / "scores", "last")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({}, "shapes is missing"),
        ({"shapes": {"params.a": 3}}, "shapes.params.a is a number; expected text"),
        ({"shapes": {"params.a": "float32"}}, "'float32' is no dtype and sizes"),
        ({"shapes": {"params.a": "float31[2]"}}, "is no dtype and sizes"),
        ({"shapes": {"params.a": "float32[2, -1]"}}, "is no dtype and sizes"),
        ({"shapes": {"params.a": "float32[99999999999999]"}}, "is no dtype and sizes"),
        ({"shapes": {"params.b": "float32[2]"}}, "lacks arrays that it names"),
        ({"shapes": {"params.a.weight": "float32[200]"}}, "cannot be read .*other checkpoints: steps 1"),
    ],
)
def test_a_damaged_checkpoint_is_told_in_words_where_it_is_converted(tmp_path, about, message):
    saved = Checkpoints(tmp_path, 3)
    for step in (1, 2):
        saved.save(step, state(step), {})
    saved.wait()
    saved.close()
    assert read_trained(tmp_path, 2).keys() == {"a.weight"}
    (tmp_path / "checkpoints" / "2" / "about" / "metadata").write_text(json.dumps(about))
    with pytest.raises(RunError, match=message):
        read_trained(tmp_path, 2)


def test_what_a_stopped_run_has_exported_is_exported_again(tiny_model, tmp_path):
    """A run that has no summary yet does not take what lies in the place of its model for its own."""
    loaded = load_model(tiny_model)
    policy, params = Policy(abstract_decoder(loaded.config)), named_parameters(loaded)
    expected = export_model(policy, params, tmp_path / "new", tiny_model)
    (tmp_path / "left").mkdir()
    (tmp_path / "left" / "model.safetensors").write_bytes(b"of somebody")
    assert export_model(policy, params, tmp_path / "left", tiny_model) == expected
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert {path.name for path in (tmp_path / "left").iterdir()} == names


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"verb": "score"}, "a run of `ches score`"),
        ({"verb": "train"}, "model is missing"),
        ({"verb": "train", "model": "bundled"}, "model_fingerprint is missing"),
        ({"verb": "train", "model": "bundled", "model_fingerprint": "f", "lora_rank": "8"}, "lora_rank is text"),
        ({"verb": "train", "model": "bundled", "model_fingerprint": "f"}, "not the weights that the run"),
    ],
)
def test_a_run_that_tells_no_model_has_no_checkpoints_of_one(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=message):
        model_at(tmp_path, 1)


@pytest.mark.parametrize("summary", [{}, {"best": {"step": "1"}}, {"config": {}}, {"loss": "dpo", "counts": {}}])
def test_a_damaged_summary_makes_no_card_and_names_no_best_step(tmp_path, summary):
    (tmp_path / "run.json").write_text(json.dumps(summary))
    (tmp_path / "metrics.jsonl").write_text("")
    for read in (lambda: card_at(tmp_path, 1), lambda: step_of(tmp_path, "best")):
        with pytest.raises(RunError, match=r"run\.json: is damaged"):
            read()
