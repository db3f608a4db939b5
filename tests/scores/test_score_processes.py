"""``score``, ``generate``, ``judge`` and ``diagnose`` by several processes: numbers of one, deaths, refusals."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ches_jax.distributed.mesh import mesh_of_run
from ches_jax.errors import ChesError
from ches_jax.models.checkpoint.save import save_pretrained
from ches_jax.models.decoder import Decoder
from ches_jax.models.families.registry import decoder_config
from ches_jax.scores.table import FILE_NAME, read_table
from tests.helpers import finish


def test_a_mesh_is_of_this_process_or_of_all(monkeypatch):
    """By its number of devices; of any other number both readings are named."""
    everywhere = jax.devices()
    monkeypatch.setattr(jax, "local_devices", lambda: everywhere[4:])
    assert set(mesh_of_run().devices.flat) == set(everywhere[4:])
    assert set(mesh_of_run("fsdp=2").devices.flat) == set(everywhere[4:6])
    assert set(mesh_of_run("data=2,fsdp=4").devices.flat) == set(everywhere)
    with pytest.raises(ChesError, match="a process has 4, with which it works for itself, and all 1 have 8"):
        mesh_of_run("fsdp=6")


PATIENT = " ".join(
    f"--xla_cpu_collective_{name}_seconds=1800"
    for name in ("call_warn_stuck_timeout", "call_terminate_timeout", "timeout")
)
"""Of XLA on a CPU, whose devices are threads: a loaded machine may keep one of them waiting for long."""


def start(verb, count, devices, words, cache):
    """The verb in ``count`` processes."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": PATIENT,
    }  # fmt: skip
    command = [sys.executable, "-m", "ches_jax", verb, "--quiet", *words]
    joined = [["--distributed", f"127.0.0.1:{port},{count},{i}"] if count > 1 else [] for i in range(count)]
    options = {"env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen([*command, *who], **options) for who in joined]


def same_scores(one, other, rtol=2e-4):
    a, b = (read_table(out)[0].to_pandas() for out in (one, other))
    assert a.row_id.tolist() == b.row_id.tolist() and len(a)
    for name in a.select_dtypes("float"):
        np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=5 * rtol, err_msg=name)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def words(tiny_model):
    return ["--model", str(tiny_model), "--limit", "24", "--chunk-rows", "4", "--batch-tokens", "512", "--logps"]


@pytest.fixture(scope="module")
def alone(words, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    codes, said = finish(start("score", 1, 1, [*words, "--out", str(out)], cache))
    assert codes == [0], said
    return out


@pytest.mark.slow
def test_a_model_over_two_processes_scores_as_on_one_and_the_first_one_alone_writes(words, cache, alone, tmp_path):
    """They see no disk in common: each is given a folder of its own."""
    folders = [tmp_path / "first", tmp_path / "second"]
    processes = []
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    for i, folder in enumerate(folders):
        who = ["--mesh", "fsdp=4", "--out", str(folder), "--distributed", f"127.0.0.1:{port},2,{i}"]
        processes += start("score", 1, 2, [*words, *who], cache)
    codes, said = finish(processes)
    assert codes == [0, 0], said
    same_scores(folders[0], alone)
    assert not folders[1].exists()
    record = json.loads((folders[0] / "run.json").read_text())
    assert record["processes"] == 2 and record["mesh"]["fsdp"] == 4


@pytest.mark.slow
def test_a_death_ends_all_and_two_processes_go_on_where_four_were(words, cache, alone, tmp_path):
    out = tmp_path / "run"
    four = start("score", 4, 1, [*words, "--mesh", "fsdp=2,data=2", "--out", str(out)], cache)
    deadline = time.monotonic() + 300
    while not list(out.glob("parts/done-*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    four[2].send_signal(signal.SIGKILL)
    died = time.monotonic()
    codes, said = finish(four)
    assert time.monotonic() - died < 60 and 0 not in codes, said
    done = len(list(out.glob("parts/done-*.json")))
    assert 0 < done < 6 and not (out / FILE_NAME).exists()
    codes, said = finish(start("score", 2, 2, [*words, "--mesh", "fsdp=4", "--out", str(out), "--resume"], cache))
    assert codes == [0, 0], said
    same_scores(out, alone)
    assert json.loads((out / "run.json").read_text())["scored_this_time"] == 24 - 4 * done


@pytest.mark.slow
def test_processes_that_run_something_else_are_refused_by_name(words, cache, tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for i, eos in enumerate(("include", "exclude")):
        who = ["--mesh", "fsdp=2", "--out", str(tmp_path / "run"), "--distributed", f"127.0.0.1:{port},2,{i}"]
        processes += start("score", 1, 1, [*words, "--eos", eos, *who], cache)
    codes, said = finish(processes)
    assert codes == [2, 2] and "runs something else" in said[0] and "exclude" in said[0], said
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def seventy(tiny_model, tmp_path_factory):
    """80 layers, 64 query and 8 key heads, as Llama-3-70B has them, a tiny width, random weights."""
    raw = json.loads((tiny_model / "config.json").read_text())
    shape = {"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 4}
    raw |= {**shape, "hidden_size": 64, "intermediate_size": 128}
    out = tmp_path_factory.mktemp("models") / "seventy"
    save_pretrained(Decoder(decoder_config(raw), rngs=nnx.Rngs(3)), out, config=raw)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, out / name)
    return out


@pytest.mark.slow
def test_eighty_layers_over_four_processes_score_as_on_one(seventy, cache, tmp_path):
    """Each process holds a quarter of the weights, and the first one's devices could not hold them all."""
    words = ["--model", str(seventy), "--limit", "8", "--chunk-rows", "8", "--batch-tokens", "256", "--logps"]
    codes, said = finish(start("score", 1, 1, [*words, "--out", str(tmp_path / "alone")], cache), 900)
    assert codes == [0], said
    four = start("score", 4, 4, [*words, "--mesh", "fsdp=16", "--out", str(tmp_path / "run")], cache)
    codes, said = finish(four, 1500)
    assert codes == [0] * 4, said
    same_scores(tmp_path / "run", tmp_path / "alone")
    one, other = (json.loads((tmp_path / n / "run.json").read_text()) for n in ("run", "alone"))
    assert one["processes"] == 4 and one["mesh"]["fsdp"] == 16
    (whole,) = other["work"]["weight_bytes"]
    parts = one["work"]["weight_bytes"]
    assert len(parts) == 4 and max(parts) < 1.02 * whole / 4 and sum(parts) >= whole


def texts(out):
    return [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [["--mesh", "data=2,tensor=2"], []])
def test_two_processes_continue_prompts_as_one_does(tiny_model, cache, tmp_path, mesh):
    """Together on one mesh, and each its own chunks."""
    words = ["--model", str(tiny_model), "--limit", "6", "--chunk-rows", "2", "--batch-size", "4"]
    words += ["--max-new-tokens", "6", "--temperature", "0"]
    alone, out = tmp_path / "alone", tmp_path / "run"
    assert finish(start("generate", 1, 1, [*words, "--out", str(alone)], cache))[0] == [0]
    codes, said = finish(start("generate", 2, 2, [*words, *mesh, "--out", str(out)], cache))
    assert codes == [0, 0], said
    if not mesh:
        assert not (out / "run.json").exists()
        assert finish(start("merge", 1, 1, [str(out)], cache))[0] == [0]
    for one, other in zip(texts(out), texts(alone), strict=True):
        assert one["token_ids"] == other["token_ids"]
        assert one["logp"] == pytest.approx(other["logp"], rel=1e-4)
    assert json.loads((out / "run.json").read_text())["counts"]["texts"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [["--mesh", "fsdp=2,tensor=2"], []])
def test_two_processes_judge_as_one_does(tiny_model, cache, tmp_path, mesh):
    """The judge says nothing of use; what it says is in the file, whose bytes are compared."""
    rows = [{"prompt": f"How {i}?", "text": f"So {i}.", "sample": 0} for i in range(5)]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "question.txt").write_text("{prompt} {response} ?")
    words = ["--responses", str(tmp_path / "responses.jsonl"), "--by", "model", "--judge", str(tiny_model)]
    words += ["--judge-template", str(tmp_path / "question.txt"), "--max-new-tokens", "4", "--chunk-rows", "2"]
    alone, out = tmp_path / "alone", tmp_path / "run"
    assert finish(start("judge", 1, 1, [*words, "--out", str(alone)], cache))[0] == [0]
    codes, said = finish(start("judge", 2, 2, [*words, *mesh, "--out", str(out)], cache))
    assert codes == [0, 0], said
    if not mesh:
        assert not (out / "run.json").exists()
        codes, said = finish(start("merge", 1, 1, [str(out)], cache))
        assert codes == [0], said
    assert (out / "judgments.jsonl").read_bytes() == (alone / "judgments.jsonl").read_bytes()
    one, other = (json.loads((folder / "run.json").read_text())["summary"] for folder in (out, alone))
    assert one == other and one["undecided"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=4", "data=4"])
def test_gradients_over_two_processes_are_those_of_one(tiny_model, cache, tmp_path, mesh):
    words = ["--model", str(tiny_model), "--limit", "5", "--gradients", "full", "--dtype", "float64"]
    codes, said = finish(start("score", 1, 1, [*words, "--out", str(tmp_path / "alone")], cache))
    assert codes == [0], said
    codes, said = finish(start("score", 2, 2, [*words, "--mesh", mesh, "--out", str(tmp_path / "run")], cache))
    assert codes == [0, 0], said
    same_scores(tmp_path / "run", tmp_path / "alone", rtol=1e-9)


@pytest.mark.slow
def test_two_processes_diagnose_as_one_does(tiny_model, cache, tmp_path):
    """The second one does not see the texts that are made; a gate closes on both."""
    model = shutil.copytree(tiny_model, tmp_path / "after")
    weights = load_file(model / "model.safetensors")
    weights = {n: w * np.float32(1.5) if n == "model.norm.weight" else w for n, w in weights.items()}
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {i}?"}) + "\n" for i in range(4)))
    words = ["--before", str(tiny_model), "--after", str(model), "--pairs", "bundled", "--limit", "12"]
    words += ["--generate", str(prompts), "--want", "answer", "--fail-if", "lld_rate>=0"]
    codes, said = finish(start("diagnose", 1, 1, [*words, "--out", str(tmp_path / "alone")], cache))
    assert codes == [1], said
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for i in range(2):
        who = ["--mesh", "fsdp=2,tensor=2", "--out", str(tmp_path / f"run{i}"), "--distributed"]
        processes += start("diagnose", 1, 2, [*words, *who, f"127.0.0.1:{port},2,{i}"], cache)
    codes, said = finish(processes)
    assert codes == [1, 1], said
    assert not (tmp_path / "run1").exists() and "process 0 has the diagnosis" in said[1]
    one, other = (json.loads((tmp_path / n / "diagnosis.json").read_text()) for n in ("run0", "alone"))
    assert one["verdict"] == other["verdict"] and one["pairs"] == other["pairs"] == 12
    for name in ("chosen", "rejected", "margin"):
        assert one[name]["mean"] == pytest.approx(other[name]["mean"], rel=1e-4, abs=1e-4)
    assert one["on_policy"]["kl"]["mean"] == pytest.approx(other["on_policy"]["kl"]["mean"], rel=1e-3, abs=1e-3)
