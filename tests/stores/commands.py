"""``ches`` in processes of its own, what it left in a store, and waiting for it."""

import io
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ches_jax.runs import store
from tests.helpers import finish

TRAIN = (
    "train", "--quiet", "--limit", "12", "--holdout", "4", "--batch-size", "4", "--optimizer", "sgd", "--lr", "1e-2",
    "--mesh", "data=2,fsdp=2", "--steps", "10", "--eval-every", "2", "--save-every", "2",
)  # fmt: skip
"""A training over four devices."""


def ches(*words: str, expect: int = 0, environment: dict[str, str] | None = None) -> tuple[str, str]:
    run = subprocess.run(
        [sys.executable, "-m", "ches_jax", *words], capture_output=True, text=True, timeout=900,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    assert run.returncode == expect, run.stderr[-3000:]
    return run.stdout, run.stderr


def table(path: Path) -> dict:
    return pq.read_table(io.BytesIO(path.read_bytes())).to_pydict()


def require_same_scores(found: dict, expected: dict) -> None:
    """The scores of another division of the work."""
    assert found["row_id"] == expected["row_id"]
    for name in ("ches", "logp_chosen", "logp_rejected"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name


def together(
    count: int, devices: int, *words: str, of_last: dict[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """A verb in ``count`` processes, the last one with more in its environment; alone it joins nobody."""
    port = free_port()
    environment = {**without_devices(), "JAX_NUM_CPU_DEVICES": str(devices)}
    joined = [("--distributed", f"127.0.0.1:{port},{count},{i}") if count > 1 else () for i in range(count)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "ches_jax", *words, *who],
            text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            env={**environment, **(of_last or {} if who == joined[-1] else {})},
        )
        for who in joined
    ]  # fmt: skip


PATIENCE = "--xla_cpu_collective_call_terminate_timeout_seconds=1800 --xla_cpu_collective_timeout_seconds=1800"
"""XLA ends a process of which one device waits for another; on a loaded machine that is no fault."""


def without_devices() -> dict[str, str]:
    """The environment without the devices of the tests."""
    return {**os.environ, "XLA_FLAGS": PATIENCE}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def wait_for(path: Path, *processes: subprocess.Popen[str]) -> None:
    """Until a file is there, while the processes live."""
    deadline = time.monotonic() + 600
    while not store.is_there(path):
        if time.monotonic() > deadline or any(p.poll() is not None for p in processes):
            raise AssertionError(finish(processes, 60))  # what the last one says is often the reason
        time.sleep(0.05)
