"""Which file of a directory is the log, what the settings beside it tell, and what is refused."""

import json
import pickle
import zipfile

import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.displacement.readers.find import read_log
from ches_jax.displacement.readers.run_settings import find_settings
from ches_jax.errors import ChesError


def state(folder, steps, slope=-0.02, loss=0.6):
    folder.mkdir(parents=True, exist_ok=True)
    history = [
        {"step": i, "loss": loss, "rewards/chosen": slope * i, "rewards/rejected": 3 * slope * i}
        for i in range(1, steps + 1)
    ]
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"global_step": steps, "log_history": history}))
    return path


def test_the_newest_state_of_a_run_is_read(tmp_path):
    state(tmp_path / "checkpoint-9", 9)
    state(tmp_path / "checkpoint-20", 20)
    assert read_log(tmp_path).last_step == 20
    state(tmp_path, 30)
    assert read_log(tmp_path).last_step == 30
    assert read_log(tmp_path / "checkpoint-9").last_step == 9


def test_two_runs_in_one_directory_are_refused_and_listed(tmp_path):
    state(tmp_path / "a/checkpoint-9", 9)
    state(tmp_path / "b", 9)
    with pytest.raises(ChesError, match=r"holds 2 runs; give one of them:\n.*/a\n.*/b"):
        read_log(tmp_path)


def test_checkpoints_of_an_older_run_are_refused(tmp_path):
    state(tmp_path / "checkpoint-40", 40, loss=0.5)
    state(tmp_path, 20)
    with pytest.raises(ChesError, match="two runs in one directory"):
        read_log(tmp_path)


def test_two_logs_are_refused_and_one_is_taken(tmp_path):
    line = json.dumps({"step": 1, "rewards/chosen": 0.1, "rewards/rejected": 0.1}) + "\n"
    (tmp_path / "one.jsonl").write_text(line)
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}) + "\n")
    assert read_log(tmp_path).source.endswith("one.jsonl (one entry)")
    (tmp_path / "two.jsonl").write_text(line)
    with pytest.raises(ChesError, match="holds 2 runs"):
        read_log(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "trainer_state.json",
            '{"global_step": 3, "log_history": [{"step": 1, "loss": 0.',
            "cut off after 57 characters",
        ),
        ("x.json", "", "is empty"),
        ("x.json", "nothing", "neither JSON, nor CSV, nor printed entries"),
        ("x.jsonl", '{"step": 1}\n{"step"\n{"step": 3}\n{"step": 4}', "entry 2 of 4 is no JSON object"),
        ("x.json", '[{"step": 1}, 3]', "1 items are no objects"),
        ("x.csv", "Step,a - rewards/chosen,b - rewards/chosen\n1,2,3\n", r"holds 2 runs \(a, b\)"),
        ("x.jsonl", '{"step": 5, "loss": 1}\n{"step": 9, "loss": 1}\n{"step": 1, "loss": 1}\n', "two runs in one file"),
        ("x.bin", b"\xff\xfe\x00\x01", "not a text file"),
    ],
)
def test_a_file_that_is_no_whole_log_is_reported(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ChesError, match=message):
        read_log(path)


def test_nothing_there(tmp_path):
    with pytest.raises(ChesError, match="no such file or directory"):
        read_log(tmp_path / "x")
    with pytest.raises(ChesError, match="no log with rewards of chosen and rejected responses"):
        read_log(tmp_path)


def test_the_last_line_of_a_run_that_was_killed_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "rewards/chosen": 0.1, "rewards/rejected": 0.1}\n{"step": 2, "rewar')
    assert "its last line is cut off" in read_log(path).notes[0]


def test_entries_under_one_name_of_an_object_are_the_log(tmp_path):
    entries = [{"step": s, "rewards/chosen": 0.1 * s, "rewards/rejected": 0.1} for s in (1, 2)]
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"history": entries, "config": {"beta": 0.3}, "files": [{"name": "a"}]}))
    log = read_log(path)
    series = log.get("train", "chosen")
    assert series is not None and series.values.tolist() == [0.1, 0.2] and log.settings == {"beta": 0.3}
    path.write_text(json.dumps({"history": entries, "other": entries}))
    with pytest.raises(ChesError, match="has no metrics in it yet"):
        diagnose(DiagnoseConfig(path=str(path)))


def test_steps_with_marks_between_thousands_are_whole_numbers(tmp_path):
    path = tmp_path / "log.csv"
    rows = "\n".join(f'"{step:,}",{step / 1000},0.1' for step in (500, 1000, 1500, 1234567))
    path.write_text(f"step,rewards/chosen,rewards/rejected\n{rows}\n")
    series = read_log(path).get("train", "chosen")
    assert series is not None and series.steps.tolist() == [500, 1000, 1500, 1234567]


def test_a_resumed_run_counts_what_was_logged_later(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [(1, 0.1), (2, 0.2), (3, 0.3), (2, 0.5), (3, 0.6)]
    path.write_text("\n".join(json.dumps({"step": s, "rewards/chosen": v, "rewards/rejected": v}) for s, v in rows))
    series = read_log(path).get("train", "chosen")
    assert series is not None and series.values.tolist() == [0.1, 0.5, 0.6]


def test_evaluations_may_stand_behind_all_training_entries(tmp_path):
    path = tmp_path / "log.jsonl"
    rows = [{"step": s, "rewards/chosen": 0.1, "rewards/rejected": 0.1} for s in (1, 2, 3, 4)]
    rows += [{"step": s, "eval_rewards/chosen": 0.1, "eval_rewards/rejected": 0.1} for s in (2, 4)]
    path.write_text("\n".join(map(json.dumps, rows)))
    log = read_log(path)
    assert {name: s.steps.tolist() for (name, q), s in log.series.items() if q == "chosen"} == {
        "train": [1, 2, 3, 4],
        "held_out": [2, 4],
    }


def test_several_evaluation_sets_are_asked_about(tmp_path):
    path = tmp_path / "log.jsonl"
    names = [f"eval_{n}_rewards/{s}" for n in ("help", "harm") for s in ("chosen", "rejected")]
    path.write_text(json.dumps({"step": 1, **{n: i for i, n in enumerate(names)}}))
    with pytest.raises(ChesError, match=r"several evaluation sets \(harm, help\)"):
        read_log(path)
    series = read_log(path, "harm").get("held_out", "chosen")
    assert series is not None and series.values.tolist() == [2]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.json", '{"beta": 0.3, "loss_type": ["sigmoid"]}'),
        ("config.yaml", "beta:\n  value: 0.3\nloss_type:\n  value: sigmoid\n"),
        ("train.yaml", "pref_beta: 0.3\npref_loss: sigmoid\n"),
        ("config.json", '{"config": {"loss": "sigmoid", "loss_args": {"beta": 0.3}}}'),
        ("args.json", '{"beta": "0.3", "loss_type": "sigmoid", "reference_free": false, "ld_alpha": 1.0}'),
        ("train.yaml", "rl: sigmoid\nrl_beta: 0.3\ndpo_norm_loss: false\n"),
        ("config.yaml", "loss:\n  _component_: torchtune.rlhf.loss.SigmoidLoss\n  beta: 0.3\n"),
        ("README.md", "---\nbeta: 0.3\nloss_type: sigmoid\n---\nA model.\n"),
    ],
)
def test_settings_are_found_beside_the_log(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    found = find_settings([tmp_path], {})
    assert (found.beta, found.beta_from, found.loss) == (0.3, name, "sigmoid")
    assert not found.no_reference and not found.averaged


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"reference_free": True}, {"no_reference": True}),
        ({"ld_alpha": 0.5, "beta": 0.1}, {"averaged": "ld_alpha"}),
        ({"dpo": {"preference_average_log_probs": True}}, {"averaged": "preference_average_log_probs"}),
        ({"loss_type": ["sigmoid", "ipo"]}, {"loss": "sigmoid+ipo", "losses": ("sigmoid", "ipo")}),
        ({"rl": "orpo"}, {"loss": "orpo"}),
        ({"loss": {"_component_": "torchtune.rlhf.loss.SimPOLoss"}}, {"loss": "simpo"}),
    ],
)
def test_what_the_options_say_about_rewards(tmp_path, settings, expected):
    (tmp_path / "args.json").write_text(json.dumps(settings))
    found = find_settings([tmp_path], {})
    assert {name: getattr(found, name) for name in expected} == expected


class Arguments:
    """Stands for TRL's configuration, whose pickle must not be run."""

    def __reduce__(self):
        return exec, ("raise SystemExit", {"beta": 0.3, "loss_type": ["ipo"], "lr": 1e-5})


def test_a_pickle_of_arguments_is_read_and_not_run(tmp_path):
    with zipfile.ZipFile(tmp_path / "training_args.bin", "w") as archive:
        archive.writestr("training_args/data.pkl", pickle.dumps(Arguments(), protocol=2))
    found = find_settings([tmp_path], {})
    assert found.beta == 0.3 and found.loss == "ipo"


def test_each_loss_and_switch_of_a_pickle_is_read(tmp_path):
    written = {"loss_type": ["sigmoid", "sft"], "ld_alpha": 0.5, "reference_free": True, "beta": 0.3, "loss": "dpo"}
    with zipfile.ZipFile(tmp_path / "training_args.bin", "w") as archive:
        archive.writestr("training_args/data.pkl", pickle.dumps(written, protocol=2))
    found = find_settings([tmp_path], {})
    assert (found.loss, found.averaged, found.no_reference, found.beta) == ("sigmoid+sft", "ld_alpha", True, 0.3)


def test_files_that_contradict_each_other_tell_nothing(tmp_path):
    (tmp_path / "args.json").write_text('{"beta": 0.3}')
    (tmp_path / "hparams.json").write_text('{"beta": 0.1}')
    assert find_settings([tmp_path], {}).beta is None


@pytest.mark.parametrize(
    ("settings", "beta"),
    [
        ({"optimizer": {"beta": 0.9}}, None),
        ({"ema": {"beta": 0.999}, "dpo": {"beta": 0.1}}, 0.1),
        ({"policy": {"beta": 0.5}, "dpo": {"beta": 0.1}}, None),
        ({"policy": {"beta": 0.5}, "dpo": {"beta": 0.1, "more": {"beta": 0.1}}}, None),
        ({"beta": 0.1, "policy": {"beta": 0.5}}, 0.1),
        ({"policy": {"beta": 0.1}, "dpo": {"beta": 0.1}}, 0.1),
    ],
)
def test_a_beta_of_something_else_is_not_taken(tmp_path, settings, beta):
    (tmp_path / "args.json").write_text(json.dumps(settings))
    assert find_settings([tmp_path], {}).beta == beta


def test_a_directory_is_diagnosed_without_an_option(tmp_path):
    state(tmp_path / "checkpoint-200", 200)
    (tmp_path / "args.json").write_text('{"beta": 0.1}')
    found = diagnose(DiagnoseConfig(path=str(tmp_path)))
    assert found.verdict == "displaced" and found.pairs == 200 and found.chosen.mean == pytest.approx(-0.2 * 190.5)


def test_folders_of_events_are_one_run_where_they_hold_other_sets_or_nothing(tmp_path):
    from tensorboardX import SummaryWriter

    for name, slope in (("train", 0.01), ("validation", -0.01)):
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step in range(1, 12):
                writer.add_scalar("rewards/chosen", slope * step, step)
                writer.add_scalar("rewards/rejected", -0.02 * step, step)
    with SummaryWriter(str(tmp_path / "train/hparams.1")) as writer:
        writer.add_text("hparams", "no numbers")
    found = diagnose(DiagnoseConfig(path=str(tmp_path), beta=0.1))
    assert found.held_out and found.chosen.mean == pytest.approx(-1.1) and found.beside is not None


@pytest.mark.parametrize("name", ["checkpoint-20", "best", "last-checkpoint", "global_step_20"])
def test_folders_of_checkpoints_belong_to_the_run_above_them(tmp_path, name):
    state(tmp_path / name, 20)
    state(tmp_path, 30)
    assert read_log(tmp_path).last_step == 30


def test_a_directory_with_one_log_says_what_is_wrong_with_it(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "log.jsonl").write_text(json.dumps({f"eval_{s}_rewards/chosen": 0.1 for s in "ab"}))
    with pytest.raises(ChesError, match=r"log.jsonl .*: has several evaluation sets"):
        read_log(tmp_path)


def evaluated(named):
    """Evaluations of two sets as TRL writes them: only the loss is named after the set."""
    for step in range(1, 11):
        for name, slope in (("train", 0.1), ("test", -0.1)):
            loss = {f"eval_{name}_loss" if named else "eval_loss": 0.6}
            yield {"step": step, **loss, "eval_rewards/chosen": slope * step, "eval_rewards/rejected": -0.3 * step}


def test_sets_that_only_their_losses_name_are_told_apart_or_refused(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": list(evaluated(named=True))}))
    with pytest.raises(ChesError, match=r"several evaluation sets \(test, train\)"):
        read_log(path)
    assert diagnose(DiagnoseConfig(path=str(path), held_out="test", beta=1.0)).chosen.mean == pytest.approx(-1)
    assert diagnose(DiagnoseConfig(path=str(path), held_out="train", beta=1.0)).chosen.mean == pytest.approx(1)
    path.write_text(json.dumps({"log_history": list(evaluated(named=False))}))
    with pytest.raises(ChesError, match="two values at step 2, as at an earlier one: several evaluation sets by"):
        read_log(path)


def test_sets_by_one_name_in_events_are_refused(tmp_path):
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for entry in evaluated(named=False):
            for side in ("chosen", "rejected"):
                writer.add_scalar(f"eval/rewards/{side}", entry[f"eval_rewards/{side}"], entry["step"])
    with pytest.raises(ChesError, match="several evaluation sets by one name"):
        read_log(tmp_path)
