"""Logs as trackers keep them on the machine of a run: databases of trackio and MLflow, MLflow's folders, gzip."""

import gzip
import json
import math
import sqlite3

import pytest

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.displacement.readers.find import read_log
from ches_jax.errors import ChesError

STEPS = range(10, 130, 10)
ENTRIES = [{"loss": 0.6, "eval_rewards/chosen": -0.004 * s, "eval_rewards/rejected": -0.006 * s} for s in STEPS]


def trackio(path, runs=("a",), metrics=ENTRIES):
    """The tables of trackio 0.43 that count here."""
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE metrics (id INTEGER PRIMARY KEY, run_name TEXT, step INTEGER, metrics TEXT)")
        database.execute("CREATE TABLE configs (id INTEGER PRIMARY KEY, run_name TEXT, config TEXT)")
        for run in runs:
            rows = [(run, s, json.dumps(e)) for s, e in zip(STEPS, metrics, strict=True)]
            database.executemany("INSERT INTO metrics (run_name, step, metrics) VALUES (?, ?, ?)", rows)
            database.execute("INSERT INTO configs (run_name, config) VALUES (?, ?)", (run, '{"beta": 0.1}'))
    database.close()
    return path


def mlflow(path, runs=("a",), metrics=ENTRIES):
    """The tables of MLflow 3 that count here; a deleted run lies beside the others."""
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE runs (run_uuid TEXT, name TEXT, lifecycle_stage TEXT)")
        database.execute("CREATE TABLE params (run_uuid TEXT, key TEXT, value TEXT)")
        columns = "run_uuid TEXT, key TEXT, value FLOAT, timestamp INTEGER, step INTEGER, is_nan BOOLEAN"
        database.execute(f"CREATE TABLE metrics ({columns})")
        for run in (*runs, "deleted"):
            stage = "deleted" if run == "deleted" else "active"
            database.execute("INSERT INTO runs VALUES (?, ?, ?)", (f"id-{run}", run, stage))
            database.execute("INSERT INTO params VALUES (?, 'beta', '0.1')", (f"id-{run}",))
            for s, entry in zip(STEPS, metrics, strict=True):
                for name, value in entry.items():
                    row = (f"id-{run}", name, 0.0 if math.isnan(value) else value, s, s, math.isnan(value))
                    database.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", row)
    database.close()
    return path


def mlruns(path, runs=("a",), metrics=ENTRIES):
    """MLflow's folders."""
    for run in runs:
        folder = path / "1" / run
        for name in metrics[0]:
            file = folder / "metrics" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"170000 {e[name]} {s}\n" for s, e in zip(STEPS, metrics, strict=True)))
        (folder / "params").mkdir()
        (folder / "params/beta").write_text("0.1")
        (folder / "meta.yaml").write_text(f"run_name: {run}\n")
    return path


WRITERS = {"project.db": trackio, "mlflow.db": mlflow, "mlruns": mlruns}


@pytest.mark.parametrize("name", WRITERS)
def test_a_tracked_run_is_read_from_where_it_lies(tmp_path, name):
    path = WRITERS[name](tmp_path / name)
    for given in (path, tmp_path):
        log = read_log(given)
        chosen = log.get("held_out", "chosen")
        assert chosen is not None and chosen.steps.tolist() == list(STEPS)
        assert chosen.values == pytest.approx([-0.004 * s for s in STEPS])
        found = diagnose(DiagnoseConfig(path=str(given)))  # beta is the run's own
        assert found.verdict == "displaced" and found.chosen.mean == pytest.approx(-4.8)


@pytest.mark.parametrize("name", WRITERS)
def test_two_tracked_runs_are_named_and_refused(tmp_path, name):
    path = WRITERS[name](tmp_path / name, runs=("first", "second"))
    with pytest.raises(ChesError, match=r"holds 2 runs \(first, second\); export one"):
        read_log(path)


@pytest.mark.parametrize("name", WRITERS)
def test_what_diverged_is_no_change_of_zero(tmp_path, name):
    """MLflow's database writes 0 in place of NaN."""
    metrics = [*ENTRIES[:-1], dict.fromkeys(ENTRIES[0], math.nan)]
    with pytest.raises(ChesError, match="NaN or infinite at 1 of 12 entries, first at step 120"):
        diagnose(DiagnoseConfig(path=str(WRITERS[name](tmp_path / name, metrics=metrics))))


def test_of_a_step_that_was_logged_twice_the_later_value_counts(tmp_path):
    """Later by the clock, wherever the row lies."""
    path = mlflow(tmp_path / "mlflow.db")
    with sqlite3.connect(path) as database:
        for when, value in ((10**6, -0.47), (119, -0.49)):
            row = ("id-a", "eval_rewards/chosen", value, when, 120, False)
            database.execute("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", row)
    database.close()
    log = read_log(path)
    chosen = log.get("held_out", "chosen")
    assert chosen is not None and chosen.values[-1] == -0.47
    assert log.notes == ("step 120 was evaluated twice, with other values: the later ones count",)


def test_a_second_evaluation_and_a_resumed_run_in_folders_of_mlflow_are_seen(tmp_path):
    path = mlruns(tmp_path / "mlruns")
    sides = [path / f"1/a/metrics/eval_rewards/{side}" for side in ("chosen", "rejected")]
    for file, slope in zip(sides, (-0.004, -0.006), strict=True):
        with file.open("a") as lines:
            lines.write(f"170000 {slope * 40} 120\n")
    log = read_log(path)
    assert log.last_step == 40 and "ending at step 40" in log.notes[0]
    for file in sides:
        file.write_text("".join(f"170000 {step * scale} {step}\n" for scale, step in resumed()))
    log = read_log(path)
    expected = [step * (-0.01 if step <= 20 else -0.02) for step in STEPS]
    for side in ("chosen", "rejected"):
        series = log.get("held_out", side)
        assert series is not None and series.values.tolist() == pytest.approx(expected)


def resumed():
    """Scale and step of the values of a run that ended at step 80 and was resumed at 20."""
    return [(-0.01, step) for step in range(10, 90, 10)] + [(-0.02, step) for step in range(30, 130, 10)]


def test_what_stands_in_the_journal_alone_is_read(tmp_path):
    """A run that is still being written has its newest entries beside the database."""
    path = trackio(tmp_path / "project.db")
    writer = sqlite3.connect(path)
    try:
        writer.execute("PRAGMA journal_mode=WAL")
        writer.execute("PRAGMA wal_autocheckpoint=0")
        entry = json.dumps({"eval_rewards/chosen": -9.0, "eval_rewards/rejected": -9.0})
        writer.execute("INSERT INTO metrics (run_name, step, metrics) VALUES ('a', 130, ?)", (entry,))
        writer.commit()
        chosen = read_log(path).get("held_out", "chosen")
    finally:
        writer.close()
    assert chosen is not None and chosen.steps[-1] == 130 and chosen.values[-1] == -9.0


def test_a_compressed_log_is_unpacked_and_a_cut_one_is_named(tmp_path):
    text = "".join(json.dumps({"step": s, **e}) + "\n" for s, e in zip(STEPS, ENTRIES, strict=True)).encode()
    path = tmp_path / "log.jsonl.gz"
    path.write_bytes(gzip.compress(text))
    chosen = read_log(path).get("held_out", "chosen")
    assert chosen is not None and chosen.steps.tolist() == list(STEPS)
    path.write_bytes(gzip.compress(text)[:-20])
    with pytest.raises(ChesError, match="cut off or damaged"):
        read_log(path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("torn.db", b"SQLite format 3\0" + b"\0" * 200, "no readable database of trackio or MLflow"),
        ("mlruns/0/r/metrics/rewards/chosen", b"170000 -0.1\n", "line 1 is not MLflow's time, value and step"),
    ],
)
def test_a_damaged_tracker_is_named(tmp_path, name, content, words):
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    if "metrics" in name:
        (tmp_path / "mlruns/0/r/meta.yaml").write_text("run_name: r\n")
    with pytest.raises(ChesError, match=words):
        read_log(tmp_path)


def test_a_database_of_something_else_is_named(tmp_path):
    path = tmp_path / "browser.db"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE visits (id INTEGER)")
    database.close()
    with pytest.raises(ChesError, match="a database of neither trackio nor MLflow"):
        read_log(path)
