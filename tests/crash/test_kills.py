"""Killed before any one of its operations on files, a run is resumed to the same bytes and leaves nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.crash.enumerate_kills import ROW, command, verbs

ROOT = Path(__file__).parents[2]


def enumerated(*words, seconds):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *words], capture_output=True, text=True, timeout=seconds, cwd=ROOT
    )
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"\n{' '.join(words[1:2])}: killed before each of {len(found['operations'])} operations")
    return found["operations"], found["problems"]


def test_the_files_of_a_run(tmp_path):
    operations, problems = enumerated("tests.crash.small_run", str(tmp_path), seconds=120)
    kinds = {operation.split()[0] for operation in operations}
    assert len(operations) > 60 and kinds == {"open", "fsync", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
    assert not problems


@pytest.mark.parametrize("verb", ["score", "generate"])
def test_the_runs_without_a_device_are_runs(verb, tiny_model, tmp_path, monkeypatch):
    """The mocks have the signatures of what they replace."""
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text(json.dumps({k: v.format("bread") for k, v in ROW.items()}) + "\n")
    assert command(verbs(str(tiny_model))[verb]["words"])() == 0 and Path("out/run.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", [verb for verb, plan in verbs("MODEL").items() if "again" in plan])
def test_whatever_lies_in_the_place_of_a_file_a_run_is_refused_or_ends_in_the_same_bytes(verb, tiny_model):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.crash.replace_files", verb, str(tiny_model)],
        capture_output=True, text=True, timeout=7200, cwd=ROOT,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["replaced"] > 20 and not found["problems"]


@pytest.mark.slow
@pytest.mark.parametrize("verb", verbs("MODEL"))
def test_every_command(verb, tiny_model):
    operations, problems = enumerated("tests.crash.enumerate_kills", verb, str(tiny_model), seconds=7200)
    assert len(operations) >= 5 and not problems
