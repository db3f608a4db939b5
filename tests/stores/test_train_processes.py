"""Training by several processes whose run directory lies in a store (emulators of Google Cloud Storage and S3); slow.

All processes are killed in the middle, twice, or told to stop; another number of them continues. At the end there is
the run of one process that nothing disturbed.
"""

import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ches_jax.runs import store
from ches_jax.train.checkpoints import saved_steps
from ches_jax.train.saved_in_store import MARKER
from tests.helpers import finish
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


def go_on(out: Path, words: Sequence[str], count: int) -> None:
    """The same command again, to its end."""
    codes, said = finish(start(count, *words, "--resume"), 900)
    assert codes == [0] * count, said
    assert not store.is_there(out / ".lock")


def require_undisturbed(out: Path, undisturbed: Path, here: Path) -> None:
    """Nothing twice, nothing lost, the same numbers."""
    store.download(out, here, ("checkpoints/",))
    assert [e["step"] for e in lines(here)] == [e["step"] for e in lines(undisturbed)]
    same_to_rounding(here, undisturbed)


def whole(out: Path, step: int) -> Path:
    return out / "checkpoints" / str(step) / MARKER


@pytest.fixture(params=["gs", "s3"])
def pod(request) -> str:
    """The address of a bucket of an emulator."""
    request.getfixturevalue(request.param)
    return f"{request.param}://pod/runs"


@pytest.mark.parametrize("last", [1, 2, 4])
def test_all_killed_twice_another_number_goes_on(pod, tiny_model, undisturbed, tmp_path, last):
    out = store.place(f"{pod}/killed-{last}")
    where = ("--model", str(tiny_model), "--out", str(out))
    kill_when_there(whole(out, 2), start(2, *where))
    kill_when_there(whole(out, 6), start(2, *where, "--resume"))
    assert not store.is_there(out / "run.json"), "it was killed before its end"
    go_on(out, where, last)
    require_undisturbed(out, undisturbed, tmp_path / "run")


def test_one_process_is_killed_twice_and_comes_to_the_same_bytes(s3, tiny_model, undisturbed, tmp_path):
    out = store.place("s3://pod/runs/alone")
    where = ("--model", str(tiny_model), "--out", str(out))
    kill_when_there(whole(out, 2), start(1, *where))
    kill_when_there(whole(out, 6), start(1, *where, "--resume"))
    go_on(out, where, 1)
    here = tmp_path / "run"
    store.download(out, here, ("checkpoints/",))
    for name in ("metrics.jsonl", "displacement.parquet", "model/model.safetensors"):
        assert (here / name).read_bytes() == (undisturbed / name).read_bytes(), name


@pytest.mark.parametrize("last", [1, 4])
def test_sigterm_to_all_stops_them_at_one_step_with_a_checkpoint(pod, tiny_model, undisturbed, tmp_path, last):
    """A pod that is taken away tells every host at nearly the same time; here one hears it long after the other."""
    out = store.place(f"{pod}/stopped-{last}")
    where = ("--model", str(tiny_model), "--out", str(out))
    processes = start(2, *where)
    wait_for(whole(out, 2), *processes)
    for process in processes:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    codes, said = finish(processes, 300)
    assert codes == [143, 143], said
    (step,) = {int(text.split("after update ")[1].split()[0]) for text in said}
    assert 2 <= step < 10
    assert saved_steps(out)[-1] == step
    assert not store.is_there(out / "run.json") and not store.is_there(out / ".lock")
    go_on(out, where, last)
    require_undisturbed(out, undisturbed, tmp_path / "run")


def test_a_store_that_answers_503_for_a_while_is_waited_for(gs, gate, tiny_model, undisturbed, tmp_path):
    out = store.place("gs://pod/runs/busy")
    processes = start(2, "--model", str(tiny_model), "--out", str(out))
    wait_for(whole(out, 2), *processes)
    gate.closed = lambda path: True
    time.sleep(8)
    gate.closed = lambda path: False
    codes, said = finish(processes, 900)
    assert codes == [0, 0], said
    assert gate.refused > 0
    require_undisturbed(out, undisturbed, tmp_path / "run")


@pytest.mark.parametrize("refused", [0, 1])
def test_a_process_that_cannot_write_its_part_of_a_checkpoint_ends_all(s3, tiny_model, undisturbed, tmp_path, refused):
    app, _ = s3
    out = store.place(f"s3://pod/runs/refused-{refused}")
    where = ("--model", str(tiny_model), "--out", str(out))
    part = re.compile(rf"/checkpoints/4/[0-9a-f]{{8}}-0000{refused}-")
    app.refused, app.forbidden = 0, lambda path: part.search(path) is not None
    processes = start(2, *where)
    try:
        codes, said = finish(processes, 300)
    finally:
        app.forbidden = lambda path: False
        for process in processes:
            process.kill()
    assert app.refused > 0
    assert codes == [2, 2], said
    assert all(text.startswith("ches: ") and text.count("\n") == 1 for text in said), said
    for text in said:
        assert "the checkpoint of step 4 could not be written (" in text and "whole ones: steps 2;" in text, said
    assert said[1 - refused].startswith(f"ches: process {refused} of 2: "), said
    go_on(out, where, 2)
    require_undisturbed(out, undisturbed, tmp_path / "run")
