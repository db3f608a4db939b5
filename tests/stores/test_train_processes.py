"""Training by several processes whose run directory lies in a store (an emulator of Google Cloud Storage); slow.

All processes are killed in the middle, twice; another number of them goes on. At the end there is the run of one
process that nothing disturbed.
"""

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from ches_jax.runs import store
from tests.stores.commands import TRAIN, together, wait_for
from tests.train.test_processes import lines, same_to_rounding

pytestmark = pytest.mark.slow


def start(count: int, *words: str) -> Sequence[subprocess.Popen[str]]:
    """Training over four devices in ``count`` processes."""
    return together(count, 4 // count, *TRAIN, *words)


def kill_when_there(path: Path, processes: Sequence[subprocess.Popen[str]]) -> None:
    """Every process is killed as soon as a file is there."""
    try:
        wait_for(path, *processes)
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
        for process in processes:
            process.communicate(timeout=60)


@pytest.mark.parametrize("last", [1, 2, 4])
def test_all_killed_twice_another_number_goes_on(gs, tiny_model, undisturbed, tmp_path, last):
    address = "gs://pod/runs/killed"
    out = store.place(address)
    where = ("--model", str(tiny_model), "--out", address)
    kill_when_there(out / "checkpoints" / "2" / "commit_success.txt", start(2, *where))
    kill_when_there(out / "checkpoints" / "6" / "commit_success.txt", start(2, *where, "--resume"))
    assert not store.is_there(out / "run.json"), "it was killed before its end"
    processes = start(last, *where, "--resume")
    said = [p.communicate(timeout=900)[1] for p in processes]
    assert [p.returncode for p in processes] == [0] * last, said
    assert not store.is_there(out / ".lock")
    here = tmp_path / "run"
    store.download(out, here, ("checkpoints/",))
    assert [e["step"] for e in lines(here)] == [e["step"] for e in lines(undisturbed)], "nothing twice, nothing lost"
    same_to_rounding(here, undisturbed)
