"""Runs that train adapters: what is trained, kept and written; resuming, meshes, going on with an adapter."""

import json
import math

import numpy as np
import pyarrow.parquet as pq
import pytest

from ches_jax.cli import main
from ches_jax.hf.tensors import open_tensors
from ches_jax.models.adapters.lora import merged
from ches_jax.models.adapters.peft import WEIGHTS, read_adapter
from ches_jax.models.checkpoint.load import load_model, with_parameters
from ches_jax.models.decoder import abstract_decoder, named_parameters
from ches_jax.runs.directory import read_json
from ches_jax.train import loop
from ches_jax.train.loop import Stopped, train
from tests.helpers import starts_at_the_reference

from .test_loop import lines, same_bytes, stopping_at

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "epochs": 2.0, "eval_every": 3, "lr": 1e-3}


@pytest.fixture(scope="module")
def lora_run(small, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    return train(small(out, **LORA, save_every=2), quiet=True)


def last_logps(out):
    table = pq.read_table(out / "displacement.parquet").to_pandas()
    last = table[(table.step == table.step.max()) & (table["set"] == "held_out")]
    return last[["logp_chosen", "logp_rejected"]].to_numpy()


def test_only_adapters_are_trained_and_kept(lora_run, tiny_model):
    logged = lines(lora_run)
    assert starts_at_the_reference(logged[1])
    assert abs(logged[-1]["displacement/dlogp_chosen"]) > 0.01
    about = json.loads((lora_run / "checkpoints" / "6" / "about" / "metadata").read_text())
    arrays = [name for name in about["shapes"] if name.startswith(("params", "opt_state"))]
    assert arrays and all(name.endswith(("lora_a", "lora_b", "count")) for name in arrays)
    run = read_json(lora_run / "run.json")
    base = sum(t.read().size for t in open_tensors(tiny_model).values())
    trained = sum(np.prod(s["shape"]) for s in header(lora_run / "adapter" / WEIGHTS).values())
    assert run["parameters"] == {"trained": trained, "all": base + trained}
    assert run["lora"]["layers.mlp.up_proj"] == {"rank": 4, "scale": 2.0}


def header(path):
    raw = path.read_bytes()
    entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


def test_model_and_adapter_of_a_run_are_the_trained_policy(lora_run, tiny_model):
    adapter = read_adapter(lora_run / "adapter", tiny_model)
    base = load_model(tiny_model)
    whole = merged({**named_parameters(base), **adapter.arrays}, adapter.spec)
    expected = named_parameters(with_parameters(abstract_decoder(base.config), whole))
    for name, value in named_parameters(load_model(lora_run / "model")).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)
        changed = not np.array_equal(value, named_parameters(base)[name])
        assert changed == name.endswith("proj.weight"), name


def test_a_stopped_run_of_adapters_resumes_to_the_same_bytes(lora_run, small, tmp_path, monkeypatch):
    config = small(tmp_path / "run", **LORA, save_every=2)
    monkeypatch.setattr(loop, "JsonLines", stopping_at(3))
    with pytest.raises(Stopped):
        train(config, quiet=True)
    monkeypatch.undo()
    out = train(config, resume=True, quiet=True)
    same_bytes(out, lora_run)
    assert (out / "adapter" / WEIGHTS).read_bytes() == (lora_run / "adapter" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_meshes_accumulation_and_remat_give_the_same_adapters(small, tmp_path):
    """In float64, with plain steps, micro-batches of 3 and 2 pairs: nothing but rounding, and that of the files,
    which hold float32."""
    options = {
        "batch_size": 5,
        "lora_rank": 3,
        "lora_targets": "q,v,o,down",
        "optimizer": "sgd",
        "lr": 0.1,
        "dtype": "float64",
        "steps": 2,
        "export": False,
    }
    plain = train(small(tmp_path / "plain", **options), quiet=True)
    options |= {"mesh": "data=1,fsdp=2,tensor=2", "remat": True, "accumulate": 2}
    other = train(small(tmp_path / "other", **options), quiet=True)
    for a, b in zip(lines(plain), lines(other), strict=True):
        for name in a:
            if "accuracies" not in name:  # where the policy is the reference, the sign of a margin is rounding
                assert a[name] == pytest.approx(b[name], rel=1e-9, abs=1e-11), name
    actual, expected = load(other), load(plain)
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=1e-6, atol=1e-12, err_msg=name)
    assert max(np.abs(v).max() for n, v in expected.items() if "lora_B" in n) > 1e-3


def load(out):
    from safetensors.numpy import load_file

    return load_file(out / "adapter" / WEIGHTS)


@pytest.mark.slow
def test_bfloat16_trains_float32_adapters(small, tmp_path):
    out = train(small(tmp_path / "run", lora_rank=2, lr=1e-6, dtype="bfloat16", optimizer="adamw"), quiet=True)
    assert lines(out)[1]["loss"] == pytest.approx(math.log(2), abs=0.02)
    moved = max(np.abs(v).max() for n, v in load(out).items() if "lora_B" in n)
    assert 1e-7 < moved < 1e-5


@pytest.mark.slow
def test_a_run_goes_on_with_an_adapter(lora_run, small, tmp_path):
    options = {"adapter": str(lora_run / "adapter"), "steps": 1, "lr": 1e-3, "export": False}
    out = train(small(tmp_path / "run", **options), quiet=True)
    table = pq.read_table(out / "displacement.parquet").to_pandas()
    start = table[(table.step == 0) & (table["set"] == "held_out")]
    np.testing.assert_allclose(start[["logp_chosen", "logp_rejected"]].to_numpy(), last_logps(lora_run), rtol=1e-6)
    assert starts_at_the_reference(lines(out)[1])
    assert not (out / "model").exists() and (out / "adapter").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-alpha", "8"], "--lora-alpha: belongs to --lora-rank, which is not given"),
        (["--lora-rank", "2", "--lora-targets", "q,lm_head"], "this model has no 'lm_head'"),
        (["--lora-rank", "0"], "--lora-rank 0: expected a positive number"),
        (["--lora-rank", "2", "--adapter", "."], "give one of them"),
        (["--adapter", "."], "no adapter_model.safetensors"),
    ],
)
def test_bad_adapters_are_one_message(capsys, tiny_model, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", str(tiny_model), "--limit", "4", "--out", "run", *words]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "run").exists()
