"""Training by several processes whose run directory lies in a store (an emulator of Google Cloud Storage); slow.

All processes are killed in the middle, twice; another number of them continues. At the end there is the run of one
process that nothing disturbed.
"""

import signal
import subprocess
import time
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


def test_a_store_that_answers_503_for_a_while_is_waited_for(gs, gate, tiny_model, undisturbed, tmp_path):
    address = "gs://pod/runs/busy"
    out = store.place(address)
    processes = start(2, "--model", str(tiny_model), "--out", address)
    wait_for(out / "checkpoints" / "2" / "commit_success.txt", *processes)
    gate.closed = lambda path: True
    time.sleep(8)
    gate.closed = lambda path: False
    said = [p.communicate(timeout=900)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    assert gate.refused > 0
    store.download(out, tmp_path / "run", ("checkpoints/",))
    same_to_rounding(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("refused", [0, 1])
def test_a_process_that_cannot_write_its_part_of_a_checkpoint_ends_all(
    gs, gate, tiny_model, undisturbed, tmp_path, refused
):
    """The library would have both wait for each other for ten minutes, and tell nobody why."""
    address = "gs://pod/runs/refused"
    out = store.place(address)
    where = ("--model", str(tiny_model), "--out", address)
    gate.status = 403
    gate.closed = lambda path: "uploadType" in path and f"checkpoints%2F4%2Fstate%2Focdbt.process_{refused}" in path
    processes = start(2, *where)
    try:
        said = [p.communicate(timeout=300)[1] for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert gate.refused > 0
    assert [p.returncode for p in processes] == [2, 2], said
    assert (
        "the checkpoint could not be written (" in said[refused]
        and ": Forbidden); whole ones: steps 2;" in said[refused]
    ), said
    own = ["\n".join(line for line in text.splitlines() if "GOOGLE_AUTH_TOKEN" not in line) for text in said]
    assert all(text.startswith("ches: ") and "\n" not in text and len(text) < 400 for text in own), said
    gate.closed = lambda path: False
    processes = start(2, *where, "--resume")
    said = [p.communicate(timeout=900)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    store.download(out, tmp_path / "run", ("checkpoints/",))
    same_to_rounding(tmp_path / "run", undisturbed)
