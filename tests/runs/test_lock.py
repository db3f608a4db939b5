"""One process at a time in a run directory, named to others; what the dead leave is cleared by the next."""

import functools
import json
import os
import subprocess
import sys

import pytest

from ches_jax.cli import main
from ches_jax.errors import RunError
from ches_jax.runs import files
from ches_jax.runs.lock import NAME, RunLock, require_unheld

HOLD = "import sys; from pathlib import Path; from ches_jax.runs.lock import RunLock; "
HOLD += "lock = RunLock(Path(sys.argv[1])); lock.take(); print('held', flush=True); sys.stdin.read()"


def held_elsewhere(out):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_the_second_is_told_who_the_first_is_and_a_dead_one_holds_nothing(tmp_path):
    out = tmp_path / "run"
    process = held_elsewhere(out)
    try:
        look = functools.partial(require_unheld, out)
        for act in (RunLock(out).take, RunLock(out).require_free, RunLock(out, shared=True).take, look):
            with pytest.raises(RunError, match=rf"another process works here \(process {process.pid} on .* -c"):
                act()
    finally:
        process.kill()
        process.communicate()
    assert (out / NAME).exists(), "what kill -9 leaves"
    require_unheld(out)
    with RunLock(out) as lock:
        lock.take()
        assert json.loads((out / NAME).read_text())["process"] == os.getpid()
    assert not list(out.iterdir())


def test_processes_of_one_run_share_it(tmp_path):
    with RunLock(tmp_path, shared=True) as one, RunLock(tmp_path, shared=True) as other:
        one.take()
        other.take()
        with pytest.raises(RunError, match="another process works here"):
            RunLock(tmp_path).take()


def test_nothing_is_made_before_it_is_taken(tmp_path):
    with RunLock(tmp_path / "run") as lock:
        lock.require_free()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 9_000])
def test_a_lock_that_says_nothing_readable_is_a_lock(tmp_path, text):
    with RunLock(tmp_path) as lock:
        lock.take()
        (tmp_path / NAME).write_text(text)
        with pytest.raises(RunError, match="it has not said who it is"):
            RunLock(tmp_path).take()


def test_a_lock_that_is_a_link_or_a_pipe_empties_nothing_and_holds_nobody(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    out = tmp_path / "run"
    out.mkdir()
    (out / NAME).symlink_to(precious)
    with pytest.raises(RunError, match=f"{NAME}: is no regular file"), RunLock(out) as lock:
        lock.take()
    assert precious.read_text() == "mine"
    (out / NAME).unlink()
    os.mkfifo(out / NAME)
    require_unheld(out)
    with pytest.raises(RunError, match=f"{NAME}: is no regular file"), RunLock(out) as lock:
        lock.take()


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_half_written_files_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead, host = dead_process(), files.host()
    gone = [f".scores.parquet.{host}-{dead}-0123abcd.tmp", f".config.json.{dead}.tmp"]
    stay = [f".a.{host}-{os.getpid()}-0123abcd.tmp", f".a.0badcafe-{dead}-0123abcd.tmp", ".a.tmp", "scores.parquet"]
    (tmp_path / "parts").mkdir()
    for name in (*gone, *stay, f"parts/.part-000001.jsonl.{host}-{dead}-0123abcd.tmp"):
        (tmp_path / name).write_text("half")
    with RunLock(tmp_path) as lock:
        lock.take()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*stay, "parts"])
    assert not list((tmp_path / "parts").iterdir())


def test_a_directory_half_written_by_a_dead_process_goes_with_the_next_attempt(tmp_path):
    half = tmp_path / f".out.{files.host()}-{dead_process()}-0123abcd.tmp"
    half.mkdir()
    (half / "shard").write_text("half")
    other = tmp_path / ".out2.99999999.tmp"
    other.mkdir()
    with files.new_directory(tmp_path / "out", RunError) as folder:
        (folder / "x").write_text("x")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out2.99999999.tmp", "out"]


def test_two_writers_of_one_directory_end_in_words(tmp_path):
    with (
        pytest.raises(RunError, match="exists and is not an empty directory"),
        files.new_directory(tmp_path / "out", RunError) as slow,
    ):
        (slow / "x").write_text("slow")
        with files.new_directory(tmp_path / "out", RunError) as fast:
            (fast / "x").write_text("fast")
    assert (tmp_path / "out" / "x").read_text() == "fast" and len(list(tmp_path.iterdir())) == 1


def test_temporary_names_are_never_the_same_twice(tmp_path):
    assert len({files._temporary(tmp_path / "a") for _ in range(100)}) == 100


def test_a_command_says_so_before_it_looks_at_anything_else(tmp_path, capsys):
    with RunLock(tmp_path) as lock:
        lock.take()
        for verb in ("score", "train", "forecast"):
            assert main([verb, "--model", "no-such-model", "--out", str(tmp_path)]) == 2
            assert "another process works here" in capsys.readouterr().err


def test_an_error_that_names_no_place_names_the_run(tmp_path):
    """As those of stores do, and of a disk that is full while a file is written."""
    with pytest.raises(OSError, match=r"Service Unavailable: '.*/run'$"), RunLock(tmp_path / "run"):
        raise OSError(16, "Service Unavailable")
    with pytest.raises(OSError, match=r"full: 'elsewhere'$"), RunLock(tmp_path / "run"):
        raise OSError(28, "full", "elsewhere")
