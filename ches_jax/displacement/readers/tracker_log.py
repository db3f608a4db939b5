"""Logs that trackers keep on this machine: databases of trackio and MLflow, and MLflow's folders of runs."""

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ches_jax.displacement.readers.log import Log, NotALogError, log_of, read_whole
from ches_jax.displacement.readers.metric_names import metric
from ches_jax.errors import ChesError

DATABASE = b"SQLite format 3\0"
META = "meta.yaml"
DEPTH = 3
"""Most folders between the one that is named and that of a run: ``mlruns``, one above it."""


@dataclass
class Tracked:
    """A run, as a tracker keeps it."""

    name: str
    entries: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    """(step, times that it was logged before) -> metrics, in the order of their writing."""
    written: Counter[tuple[int, str]] = field(default_factory=Counter)
    """(step, metric) -> times that it was logged."""
    settings: dict[str, Any] = field(default_factory=dict)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Metrics of a step; what is logged again is another entry, as in other logs."""
        for name, value in metrics.items():
            before = self.written[step, name]
            self.entries.setdefault((step, before), {"step": step})[name] = value
            self.written[step, name] = before + 1

    @property
    def counts(self) -> bool:
        """Whether it has rewards or log-probabilities of chosen or rejected responses."""
        found = (metric(name) for entry in self.entries.values() for name in entry)
        return any(m is not None and m.quantity in ("chosen", "rejected") for m in found)


def read_tracker_log(path: Path, held_out: str | None = None) -> Log:
    """The one run of a database that has rewards.

    Raises:
      NotALogError: a database of something else.
      ChesError: two runs with rewards.
    """
    # A journal holds what is not in the file yet. Without one nothing need be written beside the file to read it.
    journal = path.with_name(f"{path.name}-wal")
    alone = "" if journal.exists() and journal.stat().st_size else "&immutable=1"
    address = f"{path.resolve().as_uri()}?mode=ro{alone}"
    try:
        connection = sqlite3.connect(address, uri=True)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if {"metrics", "params", "runs"} <= tables:
                tracker, runs = "MLflow", _of_mlflow(connection)
            elif "metrics" in tables:
                tracker, runs = "trackio", _of_trackio(connection, "configs" in tables)
            else:
                raise NotALogError(f"{path}: a database of neither trackio nor MLflow")
        finally:
            connection.close()
    except (sqlite3.Error, OverflowError, TypeError, ValueError) as error:
        raise NotALogError(f"{path}: no readable database of trackio or MLflow ({error})") from None
    return _the_one(f"{path} ({tracker})", runs, held_out)


def read_run_folders(path: Path, held_out: str | None = None) -> Log | None:
    """The one run with rewards in MLflow's folders at a path or below; None where there is none.

    Raises:
      ChesError: two runs; a damaged file.
    """
    runs = [run for run in map(_of_folder, _folders(path)) if run.counts]
    return _the_one(f"{path} (MLflow)", runs, held_out) if runs else None


def _the_one(source: str, runs: Sequence[Tracked], held_out: str | None) -> Log:
    counted = [run for run in runs if run.counts] or list(runs[:1])
    if not counted:
        raise NotALogError(f"{source}: no run in it")
    if len(counted) > 1:
        names = ", ".join(run.name for run in counted[:8])
        raise ChesError(f"{source}: holds {len(counted)} runs ({names}); export one as CSV and give that file")
    (run,) = counted
    return log_of(source, run.entries.values(), held_out=held_out, settings=run.settings, run=run.name)


def _of_trackio(connection: sqlite3.Connection, with_configs: bool) -> list[Tracked]:
    runs: dict[str, Tracked] = {}
    for name, step, metrics in connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id"):
        runs.setdefault(name, Tracked(str(name))).add(int(step), _object(metrics))
    if with_configs:
        for name, config in connection.execute("SELECT run_name, config FROM configs ORDER BY id"):
            if name in runs:
                runs[name].settings = _object(config)
    return list(runs.values())


def _of_mlflow(connection: sqlite3.Connection) -> list[Tracked]:
    """MLflow writes 0 for NaN, and says so beside it."""
    chosen = "SELECT run_uuid, name FROM runs WHERE lifecycle_stage = 'active'"
    runs = {uuid: Tracked(str(name or uuid)) for uuid, name in connection.execute(chosen)}
    columns = "run_uuid, key, value, step, is_nan"
    for uuid, name, value, step, is_nan in connection.execute(f"SELECT {columns} FROM metrics ORDER BY timestamp"):
        if uuid in runs:
            runs[uuid].add(int(step), {name: float("nan") if is_nan else value})
    for uuid, name, value in connection.execute("SELECT run_uuid, key, value FROM params"):
        if uuid in runs:
            runs[uuid].settings[name] = _literal(value)
    return list(runs.values())


def _folders(path: Path) -> Iterator[Path]:
    """The folders of runs, at a path or up to DEPTH below it."""
    level = [path]
    for _ in range(DEPTH + 1):
        runs = [folder for folder in level if (folder / META).is_file() and (folder / "metrics").is_dir()]
        yield from runs
        level = [f for folder in level if folder not in runs for f in sorted(folder.glob("*")) if f.is_dir()]


def _of_folder(folder: Path) -> Tracked:
    """``metrics/NAME`` has a line of time, value and step for each value; ``params/NAME`` is a value."""
    run = Tracked(folder.name)
    for file in sorted((folder / "metrics").rglob("*")):
        name = file.relative_to(folder / "metrics").as_posix()
        if not file.is_file() or metric(name) is None:
            continue
        for number, line in enumerate(_text(file).splitlines(), 1):
            try:
                _, value, step = line.split()[:3]
                run.add(int(step), {name: float(value)})
            except ValueError:
                raise ChesError(
                    f"{file}: line {number} is not MLflow's time, value and step ({line[:60]!r}); is the file damaged?"
                ) from None
    run.settings = {f.name: _literal(_text(f)) for f in (folder / "params").glob("*") if f.is_file()}
    return run


def _text(file: Path) -> str:
    return read_whole(file).decode("utf-8", "replace")


def _object(text: Any) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _literal(text: str) -> Any:
    """A parameter as it was before it was written as text.

    >>> _literal("0.1"), _literal("True"), _literal("sigmoid")
    (0.1, True, 'sigmoid')
    """
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text
