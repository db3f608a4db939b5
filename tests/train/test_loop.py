"""Whole runs: what they write, how they resume, what they refuse."""

import json
import math
import os
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from ches_jax import bundled
from ches_jax.cli import main
from ches_jax.data.packing import packed_length, tokens_apart
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.distributed.mesh import make_mesh
from ches_jax.errors import ChesError, RunError
from ches_jax.hf.directory import read_config
from ches_jax.hf.tensors import open_tensors
from ches_jax.inputs import Opener
from ches_jax.losses import get_loss
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.decoder import abstract_decoder, named_parameters
from ches_jax.models.families.registry import decoder_config
from ches_jax.runs import store
from ches_jax.runs.directory import read_json
from ches_jax.train import loop
from ches_jax.train.checkpoints import saved_steps
from ches_jax.train.data.batches import Layout, standard_row
from ches_jax.train.data.split import Plan, read_run_pairs
from ches_jax.train.loop import Stopped, train
from ches_jax.train.metrics import JsonLines
from ches_jax.train.observe.pair_logprobs import Evaluator
from tests.helpers import starts_at_the_reference


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_explains_itself(whole_run):
    run = read_json(whole_run / "run.json")
    assert run["status"] == "done" and run["loss"] == "dpo(beta=0.1)"
    assert run["counts"] == {
        "rows": 20,
        "train": 12,
        "held_out": 8,
        "watched": 12,
        "dropped": 0,
        "updates": 6,
    }
    logged = lines(whole_run)
    assert [e["step"] for e in logged] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    first = logged[1]
    assert starts_at_the_reference(first)
    names = {f"{a}/{b}" for a in ("rewards", "logps") for b in ("chosen", "rejected")}
    assert names | {"rewards/margins", "rewards/accuracies", "grad_norm", "learning_rate", "epoch"} <= first.keys()
    last = logged[-1]
    assert {
        "displacement/dlogp_chosen",
        "displacement/lld_rate",
        "eval_displacement/margin",
        "eval_loss",
    } <= last.keys()
    assert logged[0]["displacement/dlogp_chosen"] == 0 and logged[0]["displacement/flat_rate"] == 1
    assert sorted(p.name for p in (whole_run / "checkpoints").iterdir()) == ["4", "6"]


def test_a_function_sees_the_model_of_every_update(small, tmp_path):
    rows = []

    def observe(update, model):
        rows.append(np.asarray(model.logits(model.hidden(jnp.array([[1, 9, 4]]))))[0, -1])
        return {"own/first": float(rows[-1][0])}

    out = train(small(tmp_path / "seen", steps=2, export=False), quiet=True, observers=[observe])
    logged = [(e["step"], e["own/first"]) for e in lines(out) if "own/first" in e]
    assert logged == [(i, float(row[0])) for i, row in enumerate(rows)] and len(rows) == 3
    before = load_model(small(tmp_path).model)
    np.testing.assert_allclose(rows[0], before.logits(before.hidden(jnp.array([[1, 9, 4]])))[0, -1], atol=1e-5)
    assert np.abs(rows[1] - rows[0]).max() > 1e-5 and np.abs(rows[2] - rows[1]).max() > 1e-5


@pytest.mark.slow
def test_observers_look_on_schedules_of_their_own(small, tmp_path):
    class Seen:
        def __init__(self, every):
            self.every, self.steps, self.closed = every, [], 0

        def observe(self, step, params):
            self.steps.append(step)
            return {f"own/{self.every}": float(len(params))}

        def close(self):
            self.closed += 1

    observers = [Seen(2), Seen(None), Seen(3)]
    config = small(tmp_path / "run", limit=28, steps=5, watch=2, export=False)
    out = train(config, quiet=True, observers=observers)
    assert [one.steps for one in observers] == [[0, 2, 4, 5], [0, 5], [0, 3, 5]]
    assert all(one.closed == 1 for one in observers)
    logged = {e["step"]: e for e in lines(out) if "own/2" in e or "own/3" in e}
    assert {step: "own/None" in e for step, e in logged.items()} == {0: True, 2: False, 3: False, 4: False, 5: True}
    assert "loss" in logged[3] and "own/2" not in logged[3]


def test_the_displacement_log_is_the_change_since_step_0(whole_run):
    table = pq.read_table(whole_run / "displacement.parquet").to_pandas()
    assert table.groupby(["step", "set"]).size().to_dict() == {
        (s, name): n for s in (0, 2, 4, 6) for name, n in (("held_out", 8), ("train", 12))
    }
    start = table[table.step == 0].set_index("row_id")
    for side in ("chosen", "rejected"):
        change = table[f"logp_{side}"] - start[f"logp_{side}"].loc[table.row_id].to_numpy()
        np.testing.assert_allclose(table[f"dlogp_{side}"], change)
    assert np.abs(table[table.step == 6].dlogp_chosen).max() > 0.01
    diagnosis = diagnose(DiagnoseConfig(path=str(whole_run)))
    assert diagnosis.pairs == 8 and "update 6" in diagnosis.source
    expected = table[(table.step == 6) & (table["set"] == "held_out")].dlogp_chosen.mean()
    assert diagnosis.chosen.mean == pytest.approx(expected)


def test_the_exported_model_gives_the_last_log_probabilities(whole_run, tiny_model, small, tmp_path):
    config = small(tmp_path)
    decoder, opener = decoder_config(read_config(tiny_model)), Opener()
    pairs = read_run_pairs(config, get_loss("dpo"), opener.model(tiny_model), opener)
    table = pq.read_table(whole_run / "displacement.parquet").to_pandas()
    last = table[(table.step == 6) & (table["set"] == "held_out")]
    evaluate = Evaluator(
        abstract_decoder(decoder),
        make_mesh("data=1"),
        Layout(standard_row([*pairs.train, *pairs.held_out]), 1, "include"),
    )
    actual = evaluate(named_parameters(load_model(whole_run / "model")), pairs.held_out)
    assert last.row_id.tolist() == [p.row_id for p in pairs.held_out]
    np.testing.assert_allclose(actual.chosen, last.logp_chosen, rtol=1e-5)
    work = read_json(whole_run / "run.json")["work"]  # two epochs; the held-out pairs are not counted
    held = 2 * sum(map(packed_length, pairs.train))
    assert work["shared_positions"] == 2 * tokens_apart(pairs.train) - held
    assert work["padding"] == round(1 - held / work["positions"], 4)


def same_bytes(a, b):
    for name in ("metrics.jsonl", "displacement.parquet", "model/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def stopping_at(update):
    """A tracker that sends SIGTERM while an update is logged."""

    class Stopping(JsonLines):
        def log(self, step, values):
            super().log(step, values)
            if step == update and "loss" in values:
                os.kill(os.getpid(), signal.SIGTERM)

    return Stopping


def test_a_stopped_run_in_a_store_resumes_to_the_same_bytes(whole_run, small, tmp_path, monkeypatch):
    out = store.place("memory://stopped-training")
    config = small(out, epochs=2.0, eval_every=2, save_every=2)
    monkeypatch.setattr(loop, "JsonLines", stopping_at(3))
    with pytest.raises(Stopped, match="memory://stopped-training: stopped by SIGTERM after update 3 of 6"):
        train(config, quiet=True)
    assert saved_steps(out) == [2, 3] and not store.is_there(out / "run.json")
    monkeypatch.undo()
    assert train(config, resume=True, quiet=True) == out
    assert saved_steps(out)[-1] == 6
    store.download(out, tmp_path / "run", ("checkpoints/",))
    same_bytes(tmp_path / "run", whole_run)
    store.remove(out)


def test_a_stopped_run_resumes_to_the_same_bytes(whole_run, small, tmp_path, monkeypatch):
    config = small(tmp_path / "run", epochs=2.0, eval_every=2, save_every=2)
    for step in (3, 5):
        monkeypatch.setattr(loop, "JsonLines", stopping_at(step))
        with pytest.raises(Stopped, match=f"after update {step} of 6; continue with --resume"):
            train(config, resume=step > 3, quiet=True)
    monkeypatch.undo()
    with pytest.raises(RunError, match="add --resume"):
        train(config, quiet=True)
    with pytest.raises(RunError, match=r"another run; give a new directory with --out: lr: 0.0001 there, 0.5 now"):
        train(replace(config, lr=0.5), resume=True, quiet=True)
    out = train(config, resume=True, quiet=True)
    same_bytes(out, whole_run)
    last, whole = (read_json(folder / "run.json") for folder in (out, whole_run))
    assert last["updates_this_time"] == 1
    # a resumed run counts its own update alone: one row of four pairs, where the whole run had six
    assert 0 < last["work"]["positions"] < whole["work"]["positions"] / 4
    assert 0 < last["work"]["shared_positions"] < whole["work"]["shared_positions"] / 4
    assert train(config, resume=True, quiet=True) == out  # nothing left to do


class Killed(BaseException):
    """As good as kill -9: nothing is tidied up."""


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_checkpoint(whole_run, small, tmp_path, monkeypatch):
    class Dying(JsonLines):
        def log(self, step, values):
            super().log(step, values)
            if step == 4 and "loss" in values:
                with self.path.open("a") as file:
                    file.write('{"step": 5, "lo')
                raise Killed

    config = small(tmp_path / "run", epochs=2.0, eval_every=2, save_every=2)
    monkeypatch.setattr(loop, "JsonLines", Dying)
    with pytest.raises(Killed):
        train(config, quiet=True)
    monkeypatch.undo()
    same_bytes(train(config, resume=True, quiet=True), whole_run)


def test_a_run_killed_before_its_summary_ends_as_one_that_was_not(whole_run, small, tmp_path, monkeypatch):
    def die(*_):
        raise Killed

    config = small(tmp_path / "run", epochs=2.0, eval_every=2, save_every=2)
    monkeypatch.setattr(loop, "_write_summary", die)
    with pytest.raises(Killed):
        train(config, quiet=True)
    monkeypatch.undo()
    out = train(config, resume=True, quiet=True)
    same_bytes(out, whole_run)
    summaries = [read_json(o / "run.json")["displacement"] for o in (out, whole_run)]
    assert summaries[0] == summaries[1]


@pytest.mark.slow
def test_a_run_resumes_on_another_mesh(small, tmp_path, monkeypatch):
    options = {"optimizer": "sgd", "lr": 1e-2, "epochs": 2.0}
    plain = train(small(tmp_path / "plain", **options), quiet=True)
    monkeypatch.setattr(loop, "JsonLines", stopping_at(3))
    with pytest.raises(Stopped):
        train(small(tmp_path / "run", **options), quiet=True)
    monkeypatch.undo()
    out = train(small(tmp_path / "run", **{**options, "mesh": "data=2,fsdp=2"}), resume=True, quiet=True)
    expected = {n: t.read() for n, t in open_tensors(plain / "model").items()}
    for name, tensor in open_tensors(out / "model").items():
        np.testing.assert_allclose(tensor.read(), expected[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"mesh": "data=2,fsdp=2"},
        pytest.param({"mesh": "data=2,fsdp=2,tensor=2"}, marks=pytest.mark.slow),
        pytest.param({"remat": True, "row_tokens": 256}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_meshes_and_layouts_give_the_same_run_to_rounding(small, tmp_path, options):
    # plain steps: the first ones of RMSProp are signs, which rounding turns over
    runs = [
        train(small(tmp_path / str(i), optimizer="sgd", lr=1e-2, **o), quiet=True) for i, o in enumerate([{}, options])
    ]
    plain, other = ({n: t.read() for n, t in open_tensors(out / "model").items()} for out in runs)
    for name, value in plain.items():
        np.testing.assert_allclose(other[name], value, rtol=0, atol=3e-6, err_msg=name)


@pytest.mark.slow
def test_accumulation_equals_the_large_batch(small, tmp_path):
    """Micro-batches of 3 and 2 pairs, in float64: nothing but rounding. Fast: the same of a run of adapters."""
    options = {"optimizer": "sgd", "lr": 1e-2, "dtype": "float64", "steps": 2, "batch_size": 5, "export": False}
    logs = [lines(train(small(tmp_path / str(n), accumulate=n, **options), quiet=True)) for n in (1, 2)]
    for a, b in zip(*logs, strict=True):
        for name in a:
            # where the policy is the reference, the sign of a margin is rounding
            if "accuracies" not in name:
                assert a[name] == pytest.approx(b[name], rel=1e-9, abs=1e-11), name


@pytest.mark.slow
def test_bfloat16_computes_with_float32_master_weights(small, tiny_model, tmp_path):
    out = train(small(tmp_path / "run", dtype="bfloat16", lr=1e-6, optimizer="adamw"), quiet=True)
    start = {n: t.read() for n, t in open_tensors(tiny_model).items()}
    moved = [np.abs(t.read() - start[n]).max() for n, t in open_tensors(out / "model").items()]
    # steps that a weight of 16 bits would not feel
    assert 1e-7 < max(moved) < 1e-5
    assert lines(out)[1]["loss"] == pytest.approx(math.log(2), abs=0.02)
    shapes = json.loads((out / "checkpoints" / "3" / "about" / "metadata").read_text())["shapes"]
    assert all(s.startswith("float32") for n, s in shapes.items() if n.startswith("params"))


@pytest.mark.parametrize("loss", ["sft", pytest.param("sft_sum", marks=pytest.mark.slow)])
def test_supervised_training_is_cross_entropy_on_the_chosen_response(small, tmp_path, loss):
    logs = [
        lines(train(small(tmp_path / f"{loss}{n}", loss=loss, accumulate=n, steps=2, export=False), quiet=True))
        for n in (1, 2)
    ]
    table = pq.read_table(tmp_path / f"{loss}1" / "displacement.parquet").to_pandas()
    start = table[(table.step == 0) & (table["set"] == "train")].reset_index()
    first_batch = start.iloc[np.concatenate(Plan(12, 4, 1, 2, 0).update(0))]
    unit = first_batch.chosen_tokens.sum() if loss == "sft" else len(first_batch)
    assert logs[0][1]["loss"] == pytest.approx(-first_batch.logp_chosen.sum() / unit, rel=1e-5)
    assert logs[1][1]["loss"] == pytest.approx(logs[0][1]["loss"], rel=1e-6)
    assert logs[0][2]["loss"] == pytest.approx(logs[1][2]["loss"], rel=1e-4)
    assert logs[0][-1]["displacement/dlogp_chosen"] > 0


def test_the_plan_shows_every_pair_once_an_epoch():
    plan = Plan(pairs=22, batch_size=8, accumulate=3, total=6, seed=5)
    for epoch in range(2):
        updates = [plan.update(epoch * 3 + i) for i in range(3)]
        assert [[len(g) for g in u] for u in updates] == [[3, 3, 2], [3, 3, 2], [3, 3]]
        assert sorted(np.concatenate([g for u in updates for g in u])) == list(range(22))
    assert not np.array_equal(plan.update(0)[0], plan.update(3)[0])
    assert plan.position(4) == {"epoch": 1, "pair": 8, "seed": 5, "pairs": 22}


def test_a_loss_that_is_no_number_stops_the_run(small, tmp_path):
    config = small(tmp_path / "run", optimizer="sgd", lr=1e30, save_every=1)
    with pytest.raises(ChesError) as stderr:
        train(config, quiet=True)
    message = str(stderr.value)
    assert "update 2: loss is nan on rows " in message or "update 2: grad_norm" in message
    assert "the last good checkpoint is " in message and message.count("(") >= 4


def test_a_checkpoint_of_another_architecture_is_refused(whole_run):
    from ches_jax.train.checkpoints import Checkpoints
    from ches_jax.train.state import TrainState

    saved = Checkpoints(whole_run, 2)
    like = TrainState({"a.weight": jnp.zeros(3)}, (), {}, jnp.zeros((), jnp.int32))
    with pytest.raises(RunError, match="a checkpoint of another architecture or optimiser") as stderr:
        saved.restore(6, like)
    assert "params.a.weight: not there, the run has float32[3]" in str(stderr.value)
    saved.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "dpoo"], "no loss is named 'dpoo'"),
        (["--loss", "dpo", "--loss-args", "tau=1"], "no hyper-parameter 'tau'"),
        (["--optimizer", "adam"], "no optimiser is named 'adam'; the names are: rmsprop"),
        (["--mesh", "data=8", "--batch-size", "4"], "sharded over 8 devices"),
        (["--mesh", "fsdp=7"], "--mesh fsdp=7: divides no parameter"),
        (["--reference", "none"], "compares with a reference"),
        (["--reference", "columns"], "--reference columns needs numbers in ref_chosen_logps"),
        (["--accumulate", "99"], "more micro-batches than"),
        (["--loss", "sparsepo", "--reference", "ref.parquet"], "reads the states of the reference model too"),
        (["--loss", "tdpo", "--reference", "columns"], "reads more of the reference"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(capsys, tiny_model, tmp_path, words, message):
    options = ["--model", str(tiny_model), "--limit", "20", "--out", str(tmp_path / "run")]
    assert main(["train", *options, *words]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "run").exists()


def test_the_command_line_trains_and_diagnoses(capsys, tiny_model, tmp_path):
    out = str(tmp_path / "run")
    words = ["--model", str(tiny_model), "--limit", "12", "--batch-size", "4", "--lr", "1e-4", "--mesh", "data=1"]
    assert main(["train", *words, "--loss", "ipo_sum", "--loss-args", "tau=0.05", "--out", out, "--quiet"]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert main(["diagnose", out, "--fail-if", "lld_rate>1"]) == 0
    assert capsys.readouterr().out.startswith("verdict: ")


def test_rows_of_weight_zero_do_not_train(small, tmp_path):
    """One row of four counts; where none does, nothing would be learned, which is refused."""
    rows = [json.loads(line) for line in bundled.pairs_file().read_text().splitlines()[:4]]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({**r, "weight": float(i == 2), "none": 0}) + "\n" for i, r in enumerate(rows)))
    options = {"pairs": str(path), "weights": "weight", "holdout": 0, "limit": None, "batch_size": 4, "steps": 1}
    out = train(small(tmp_path / "run", **options), quiet=True)
    assert lines(out)[1]["loss"] == pytest.approx(math.log(2) / 4, rel=1e-5)
    assert read_json(out / "run.json")["loss"] == "weighted(dpo(beta=0.1))"
    for column, message in (("other", "line 1: --weights other needs numbers in other"), ("none", "in none are all 0")):
        with pytest.raises(ChesError, match=message):
            train(small(tmp_path / column, **{**options, "weights": column}), quiet=True)


def test_held_out_pairs_without_weights_count_alike(small, tiny_model, tmp_path):
    """A soft selection writes weights of the pairs it was made of; the held-out pairs are another file."""
    rows = [json.loads(line) for line in bundled.pairs_file().read_text().splitlines()[:6]]
    weighted = [{**r, "weight": 0.25 + i / 4} for i, r in enumerate(rows[:4])]
    for name, some in (("train", weighted), ("plain", rows[4:]), ("both", weighted), ("torn", [weighted[0], rows[5]])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in some))
    options = {"pairs": str(tmp_path / "train.jsonl"), "weights": "weight", "holdout": 0, "limit": None}
    loss = get_loss("dpo")

    def held_out(name):
        opener = Opener()
        config = small(tmp_path / "run", **options, eval_pairs=str(tmp_path / f"{name}.jsonl"))
        return read_run_pairs(config, loss, opener.model(tiny_model), opener)

    assert held_out("plain").held_out_extra["weights"].tolist() == [1.0, 1.0]
    assert held_out("plain").extra["weights"].tolist() == [0.25, 0.5, 0.75, 1.0]
    assert held_out("both").held_out_extra["weights"].tolist() == [0.25, 0.5, 0.75, 1.0]
    with pytest.raises(ChesError, match=r"torn\.jsonl, line 2: --weights weight needs numbers in weight"):
        held_out("torn")


def test_stateful_losses_carry_their_state(small, tmp_path):
    config = small(tmp_path / "run", loss="bco_pair", loss_args={"beta": 0.1}, save_every=1)
    out = train(replace(config, steps=2), quiet=True)
    about = json.loads((out / "checkpoints" / "2" / "about" / "metadata").read_text())
    assert "loss_state.reward_mean.seen" in about["shapes"]
    assert jax.device_count() == 8
