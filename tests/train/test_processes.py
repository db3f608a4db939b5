"""Runs of two real processes: the numbers of one process, errors reported by both, deaths that are detected."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from ches_jax import bundled
from ches_jax.distributed import processes
from ches_jax.distributed.processes import Process
from ches_jax.errors import RunError
from ches_jax.hf.tensors import open_tensors
from ches_jax.runs.directory import read_json
from ches_jax.train.loop import train
from tests.helpers import finish

OPTIONS = {"limit": 12, "holdout": 4, "batch_size": 4, "optimizer": "sgd", "lr": 1e-2}
SHARDED = {**OPTIONS, "mesh": "data=2,fsdp=2"}


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(model, out, cache, count=2, devices=2, words=(), **options):
    """``ches train`` in ``count`` processes."""
    port = free_port()
    settings = {**SHARDED, "model": str(model), "out": str(out), **options}
    flags = [w for k, v in settings.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    joined = [("--distributed", f"127.0.0.1:{port},{count},{i}") if count > 1 else () for i in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "ches_jax", "train", "--quiet", *flags, *words, *who],
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for who in joined
    ]


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_to_rounding(a, b):
    for one, other in zip(lines(a), lines(b), strict=True):
        assert one.keys() == other.keys()
        for name in one:
            # where the policy is the reference, the sign of a margin is rounding
            if "accuracies" not in name:
                assert one[name] == pytest.approx(other[name], rel=1e-5, abs=2e-5), name
    tables = [pq.read_table(out / "displacement.parquet").to_pandas() for out in (a, b)]
    assert tables[0].row_id.tolist() == tables[1].row_id.tolist()
    np.testing.assert_allclose(tables[0].logp_chosen, tables[1].logp_chosen, rtol=1e-5)
    expected = {n: t.read() for n, t in open_tensors(b / "model").items()}
    for name, tensor in open_tensors(a / "model").items():
        np.testing.assert_allclose(tensor.read(), expected[name], rtol=0, atol=3e-6, err_msg=name)


@pytest.mark.parametrize("error", [RunError("runs/a: full"), OSError(28, "full", "runs/a")])
def test_what_fails_in_one_process_is_raised_in_the_others(error):
    """Also an error of the system: the others would otherwise learn only that somebody has gone."""
    sent = []

    class Two(Process):
        def exchange(self, value, error=None):
            sent.append(error)
            return [value] * 2

    with pytest.raises(type(error)), Two(0, 2).sharing_errors():
        raise error
    assert sent == ["runs/a: full"]
    with Two(0, 2).sharing_errors():
        pass
    assert sent == ["runs/a: full", None]


def test_an_exchange_that_breaks_says_that_somebody_has_stopped(monkeypatch):
    """Over CPUs it comes as ``ValueError`` from the call and as the runtime's error from what is waited for."""
    monkeypatch.setattr(processes, "several_processes", lambda: True)
    broken = "UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:38312"
    for error in (ValueError(broken), jax.errors.JaxRuntimeError(broken)):
        assert "one of them has stopped" in (processes.peer_failure(error) or "")
    assert processes.peer_failure(ValueError("shapes differ")) is None


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def one_process(small, tmp_path_factory):
    """The same four devices in one process."""
    return train(small(tmp_path_factory.mktemp("one") / "run", **SHARDED), quiet=True)


@pytest.mark.slow
def test_two_processes_give_the_run_of_one(tiny_model, one_process, cache, tmp_path):
    out = tmp_path / "run"
    codes, errors = finish(start(tiny_model, out, cache))
    assert codes == [0, 0], errors
    same_to_rounding(out, one_process)
    both, one = (read_json(folder / "run.json") for folder in (out, one_process))
    assert both["processes"] == 2
    counted = ("positions", "shared_positions", "padding")  # of the rows of both
    assert [both["work"][n] for n in counted] == [one["work"][n] for n in counted]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        # in float64: what float32 rounds off a change moves its share of a small margin by more than the bound
        {"loss": "kto", "dtype": "float64"},
        {"loss": "ld_dpo"},
        {"accumulate": 2, "mesh": "data=2,tensor=2"},
        {"lora_rank": 2},
        {"mesh": "tensor=4"},
        {"probes": "bundled"},
    ],
    ids=str,
)
def test_other_runs_of_two_processes(small, tiny_model, cache, tmp_path, options):
    with jax.enable_x64(options.get("dtype") == "float64"):
        one = train(small(tmp_path / "one", **{**SHARDED, **options}), quiet=True)
    codes, errors = finish(start(tiny_model, tmp_path / "two", cache, **options))
    assert codes == [0, 0], errors
    same_to_rounding(tmp_path / "two", one)


@pytest.mark.slow
def test_an_error_of_one_process_is_reported_by_both(tiny_model, cache, tmp_path):
    """The bad row lies in the chunk that process 1 tokenises, the second of 256 rows; both read all rows' flags."""
    rows = [json.loads(line) for line in bundled.pairs_file().read_text().splitlines()]
    rows = (rows * (300 // len(rows) + 1))[:300]
    ids = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [99999]}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, ids]))
    codes, errors = finish(start(tiny_model, tmp_path / "run", cache, pairs=path, limit=400))
    assert codes == [2, 2]
    assert all("token id 99999" in t and "Traceback" not in t for t in errors), errors
    assert errors[0] == errors[1] and "row 300 " in errors[0] and not (tmp_path / "run").exists()


def wait_for(condition, processes, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and all(p.poll() is None for p in processes)
        time.sleep(0.2)


def long_run(tiny_model, out, cache):
    processes = start(tiny_model, out, cache, steps=2000, save_every=2, words=("--no-export",))
    wait_for(lambda: (out / "checkpoints" / "4").exists(), processes)
    return processes


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_makes_the_other_exit_within_a_minute(tiny_model, cache, tmp_path, victim):
    processes = long_run(tiny_model, tmp_path / "run", cache)
    os.kill(processes[victim].pid, signal.SIGKILL)
    started = time.monotonic()
    other = processes[1 - victim]
    try:
        assert other.wait(60) == 2
    finally:
        said = finish(processes)[1][1 - victim]
    assert said.startswith("ches: ") and said.count("\n") == 1, said
    print(f"\nprocess {1 - victim} ended {time.monotonic() - started:.1f} s later with {other.returncode}")


@pytest.mark.slow
def test_sigterm_to_one_process_stops_all_and_another_number_resumes(small, tiny_model, cache, tmp_path):
    out = tmp_path / "run"
    processes = start(tiny_model, out, cache, epochs=60.0, save_every=50)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(lines(out)) > 3, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, errors = finish(processes)
    assert codes == [143, 143], errors
    (step,) = {int(t.split("after update ")[1].split()[0]) for t in errors}
    assert 0 < step < 120
    assert finish(start(tiny_model, out, cache, count=1, devices=4, words=("--resume",), epochs=60.0, save_every=50))[
        0
    ] == [0]
    whole = train(small(tmp_path / "whole", **{**SHARDED, "epochs": 60.0, "save_every": 50}), quiet=True)
    last = [lines(o)[-1] for o in (out, whole)]
    assert last[0]["eval_loss"] == pytest.approx(last[1]["eval_loss"], rel=1e-3)
    assert [e["step"] for e in lines(out)] == [e["step"] for e in lines(whole)]
