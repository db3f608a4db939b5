"""Every verb against emulators of stores on loopback: S3 (moto) and Google Cloud Storage; slow.

The S3 emulator answers 503 for a while when a test asks it to.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ches_jax.runs import store
from ches_jax.train.saved_in_store import MARKER
from tests.helpers import finish
from tests.stores.commands import ches, require_same_scores, table, together, wait_for

pytestmark = pytest.mark.slow
SCORE = ("score", "--model", "s3://pod/model", "--pairs", "s3://pod/pairs.jsonl", "--limit", "12", "--chunk-rows", "4")


@pytest.fixture(scope="module")
def scored(s3) -> str:
    ches(*SCORE, "--logps", "--out", "s3://pod/runs/score")
    return "s3://pod/runs/score"


def test_scores_in_a_store_are_those_on_this_machine(scored, tmp_path):
    ches("score", "--limit", "12", "--chunk-rows", "4", "--logps", "--out", str(tmp_path / "run"))
    assert table(store.place(scored) / "scores.parquet") == table(tmp_path / "run" / "scores.parquet")
    names = {p.name for p in store.place(scored).iterdir()}
    assert names == {"config.json", "run.json", "scores.parquet"}, "no lock, no parts"


def test_the_verbs_that_read_runs_read_them_there(scored):
    ches("select", "--scores", scored, "--by", "ln_ches", "--keep", "lowest:0.5", "--out", "s3://pod/runs/kept")
    ches("report", scored)
    ches("report", "s3://pod/runs/kept", "--out", "s3://pod/pages")
    ches("show", scored, "3")
    out, _ = ches("diagnose", "--before", scored, "--after", scored, "--out", "s3://pod/runs/diagnosis", "--json")
    assert json.loads(out)["verdict"] == "not_displaced"
    for path in ("score/report.html", "kept/pairs.jsonl", "diagnosis/pairs.parquet", "diagnosis/diagnosis.json"):
        assert store.is_there(store.place("s3://pod/runs") / path), path
    assert store.is_there(store.place("s3://pod/pages/report.html"))


def test_the_verbs_that_compute_work_there(s3):
    model = ("--model", "s3://pod/model")
    ches("generate", *model, "--limit", "3", "--max-new-tokens", "4", "--out", "s3://pod/runs/generated")
    ches("judge", "--responses", "s3://pod/runs/generated", "--out", "s3://pod/runs/judged")
    ches("doctor", *model, "--pairs", "s3://pod/pairs.jsonl")
    ches("convert", *model, "--dtype", "bfloat16", "--out", "s3://pod/copy")
    pairs = ("--pairs", "s3://pod/pairs.jsonl", "--limit", "6")
    ches("diagnose", "--before", "s3://pod/model", "--after", "s3://pod/copy", *pairs, "--out", "s3://pod/runs/two")
    forecast = (
        "forecast",
        *model,
        *pairs,
        "--batch-size",
        "2",
        "--steps",
        "2",
        "--mesh",
        "data=1",
        "--out",
        "s3://pod/runs/forecast",
    )
    ches(*forecast)
    assert store.is_there(store.place("s3://pod/runs/forecast/forecast.parquet"))


def test_a_store_that_answers_503_for_a_while_is_waited_for(s3, scored):
    app, environment = s3
    run = subprocess.Popen(
        [sys.executable, "-m", "ches_jax", *SCORE, "--out", "s3://pod/runs/busy"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    config = store.place("s3://pod/runs/busy/config.json")
    deadline = time.monotonic() + 300
    while not store.is_there(config) and time.monotonic() < deadline:
        time.sleep(0.2)
    app.refused, app.busy = 0, True
    time.sleep(8)
    app.busy = False
    _, said = run.communicate(timeout=600)
    assert run.returncode == 0, said[-3000:]
    assert app.refused > 0
    without = {"logp_chosen", "logp_rejected"}
    whole = {k: v for k, v in table(store.place(scored) / "scores.parquet").items() if k not in without}
    assert table(store.place("s3://pod/runs/busy/scores.parquet")) == whole


def two_meet_503(app, address: str, mesh: str, seconds: float | None) -> tuple[list[str], list[int], list[str]]:
    """A run of two processes whose store answers 503 for so long, or to their end: its words, exit codes, messages."""
    words = [*SCORE[:-2], "--chunk-rows", "1", "--logps", "--mesh", mesh, "--out", address]
    processes = together(2, 1, *words)
    try:
        wait_for(store.place(address) / "config.json", *processes)
        app.refused, app.busy = 0, True
        if seconds is not None:
            time.sleep(seconds)
            app.busy = False
        codes, said = finish(processes, 600)
    finally:
        app.busy = False
        for process in processes:
            process.kill()
    assert app.refused > 0
    return words, codes, said


@pytest.mark.parametrize("mesh", ["data=1", "fsdp=2"])
def test_two_processes_wait_for_a_store_that_answers_503_for_a_while(s3, scored, mesh):
    """Each for itself, and together."""
    address = f"s3://pod/runs/busy-{mesh}"
    _, codes, said = two_meet_503(s3[0], address, mesh, 8)
    assert codes == [0, 0], said
    if mesh == "data=1":
        ches("merge", address)
    require_scores(address, scored)


def test_two_processes_end_when_a_store_answers_503_for_good_and_a_later_run_completes(s3, scored):
    address = "s3://pod/runs/gone"
    words, codes, said = two_meet_503(s3[0], address, "data=1", None)
    assert codes == [2, 2], said
    last = [text.strip().splitlines()[-1] for text in said]
    # on a loaded machine one of them may still be reading the model
    places = (f"ches: {address}", "ches: s3://pod/model/")
    assert all(line.startswith(places) and "Service Unavailable" in line for line in last), last
    codes, said = finish(together(2, 1, *words, "--resume"), 600)
    assert codes == [0, 0], said
    ches("merge", address)
    require_scores(address, scored)


def require_scores(address: str, scored: str) -> None:
    """Two runs in the store have the same scores."""
    require_same_scores(*(table(store.place(at) / "scores.parquet") for at in (address, scored)))


def test_a_killed_run_goes_on_after_its_last_chunk_and_takes_the_lock_of_the_dead(s3, scored):
    _, environment = s3
    words = [sys.executable, "-m", "ches_jax", *SCORE, "--logps", "--out", "s3://pod/runs/killed"]
    run = subprocess.Popen(words, stderr=subprocess.DEVNULL, env={**os.environ, **environment})
    done = store.place("s3://pod/runs/killed/parts/done-000000.json")
    deadline = time.monotonic() + 300
    while not store.is_there(done) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGKILL)
    run.wait()
    ches(*SCORE, "--logps", "--out", "s3://pod/runs/killed", "--resume")
    assert table(store.place("s3://pod/runs/killed/scores.parquet")) == table(store.place(scored) / "scores.parquet")


def test_a_process_that_is_stopped_takes_no_other_with_it(s3, scored):
    """The first one, which holds the lock for both; a third one takes up what it left."""
    words = [*SCORE[:-2], "--chunk-rows", "1", "--logps", "--out", "s3://pod/runs/turns"]
    first, second = together(2, 1, *words)
    out = store.place("s3://pod/runs/turns")
    try:
        wait_for(out / "parts" / "done-000000.json", first, second)
        first.send_signal(signal.SIGTERM)
        said = [p.communicate(timeout=600)[1] for p in (first, second)]
    finally:
        for process in (first, second):
            process.kill()
    assert [first.returncode, second.returncode] == [143, 0], said
    done = {int(p.name[5:11]) for p in (out / "parts").iterdir() if p.name.startswith("done-")}
    assert {1, 3, 5, 7, 9, 11} <= done < set(range(12)), "all of the second one's, some of the first one's"
    ches(*words, "--resume")
    require_scores("s3://pod/runs/turns", scored)


TRAIN = (
    "train", "--limit", "8", "--batch-size", "4", "--steps", "6", "--save-every", "2", "--mesh", "data=1",
    "--lora-rank", "2", "--eval-every", "2",
)  # fmt: skip


@pytest.mark.parametrize("kind", ["gs", "s3"])
def test_training_stopped_and_killed_goes_on_from_its_checkpoint_in_the_store(request, kind, tmp_path):
    request.getfixturevalue(kind)
    ches(*TRAIN, "--out", str(tmp_path / "whole"))
    out = store.place(f"{kind}://pod/runs/train")
    run = subprocess.Popen(
        [sys.executable, "-m", "ches_jax", *TRAIN, "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(out / "checkpoints" / "2" / MARKER, run)
    finally:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    ches(*TRAIN, "--out", str(out), "--resume")
    here = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    there = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(m.get("step"), m.get("loss")) for m in here] == [(m.get("step"), m.get("loss")) for m in there]
    assert table(out / "displacement.parquet") == table(tmp_path / "whole" / "displacement.parquet")
    ches("convert", "--run", str(out), "--step", "4", "--out", f"{kind}://pod/of-a-step")
    ches("report", str(out))
