"""The stages of a forecast's run: how long each took, and the direction that a stopped run finds again."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from ches_jax.distributed.processes import Process
from ches_jax.errors import ChesError, RunError
from ches_jax.forecast.metric import Tree
from ches_jax.forecast.passes import on_mesh
from ches_jax.hf.one_by_one import Writer
from ches_jax.hf.tensors import STORED, open_files
from ches_jax.runs import chunks
from ches_jax.runs.directory import write_json
from ches_jax.runs.files import read_object, replacing, sha256
from ches_jax.runs.progress import say
from ches_jax.runs.work import Work

SUFFIX = ".parquet"
"""Of the parts of a run."""
DIRECTION, START = "direction.safetensors", "direction.json"
ALONE = Process()
T = TypeVar("T")


class Clock:
    """Seconds and CPU seconds of the stages, and a bar for each."""

    def __init__(self, quiet: bool):
        self.quiet = quiet
        self.work = Work()
        self.seconds: dict[str, dict[str, float]] = {}

    def stage(self, name: str, total: int | None = None) -> "_Stage":
        """A block whose time is noted under ``name``."""
        return _Stage(self, name, total)


class _Stage:
    def __init__(self, clock: Clock, name: str, total: int | None):
        self.clock, self.name, self.total = clock, name, total

    def __enter__(self) -> tqdm:
        if self.total is None:
            say(self.name, quiet=self.clock.quiet)
        self.started = time.perf_counter(), time.process_time()
        self.bar = tqdm(total=self.total, desc=self.name, disable=self.clock.quiet or self.total is None)
        return self.bar

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        wall, cpu = time.perf_counter() - self.started[0], time.process_time() - self.started[1]
        self.clock.seconds[self.name] = {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}


def kept(
    out: Path, mesh: Any, compute: Callable[[], tuple[Tree, dict[str, Any]]], process: Process = ALONE
) -> tuple[Tree, dict[str, Any]]:
    """A direction and what is known of it: computed, or as a run that was stopped left them, undamaged.

    Only the first process reads and writes files; the others get what it found. Each has one parameter at a time in
    its memory, beside what lies on its devices.
    """
    arrays, record = (out / chunks.FOLDER / name for name in (DIRECTION, START))
    found = process.exchange(_found(arrays, record) if process.first else None)[0]
    if found is None:
        direction, found = compute()
        _write(arrays, direction, process)
        with process.sharing_errors():
            if process.first:
                write_json(record, {"sha256": sha256(arrays), "found": found, "sha256_of_found": _digest(found)})
        if process.count > 1:  # it lies where it belongs already
            return direction, found
    return _read(arrays, mesh, process), found


def _write(arrays: Path, direction: Tree, process: Process) -> None:
    """A file of the direction, one parameter after the other.

    What fails in the first process is raised in all before the next parameter is gathered, so that none waits for it.
    """
    kinds = {name: (str(values.dtype), tuple(values.shape)) for name, values in direction.items()}
    with ExitStack() as opened:
        writer = None
        with process.sharing_errors():
            if process.first:
                file = opened.enter_context(opened.enter_context(replacing(arrays)).open("wb"))
                writer = Writer(file, kinds)
        for name in kinds:
            on_host = process.on_host({name: direction[name]})
            with process.sharing_errors():
                if writer is not None:
                    writer.write(np.asarray(on_host[name]))
            del on_host  # before the next one comes
        with process.sharing_errors():
            opened.close()


def _read(arrays: Path, mesh: Any, process: Process) -> Tree:
    """The direction of a file of the first process, on the devices of all, one parameter after the other."""
    with process.sharing_errors():
        there = open_files(arrays.parent, [arrays], kinds=STORED) if process.first else {}
    direction: Tree = {}
    for name in process.exchange(sorted(there))[0]:
        with process.sharing_errors():
            values = {name: there[name].read()} if process.first else None
        direction |= on_mesh(process.from_first(values), mesh)
        del values
    return direction


def _found(arrays: Path, record: Path) -> dict[str, Any] | None:
    """What is known of the direction that is there; None where it is not, or is not as it was written."""
    try:
        written = read_object(record, RunError, "the record of a direction")
        found, undamaged = written["found"], sha256(arrays) == written["sha256"]
        return found if undamaged and _digest(found) == written["sha256_of_found"] else None
    except (OSError, ChesError, KeyError):
        return None


def _digest(found: Any) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def chunk(
    out: Path, number: int, make: Callable[[], T], write: Callable[[Path, T], int], process: Process = ALONE
) -> None:
    """A part of the table, and its number of rows, unless a run that was stopped left it whole.

    Args:
      out: the run directory.
      number: of the part.
      make: computes it, in all processes.
      write: writes it, in the first one; returns its number of rows.
      process: which of how many this is.
    """
    if not process.exchange(process.first and chunks.rows_done(out, number) is None)[0]:
        return
    with process.sharing_errors():
        made = make()
        if process.first:
            path = chunks.path(out, number, SUFFIX)
            chunks.commit(out, number, write(path, made), [path])


def whole(out: Path, count: int, check: Callable[[], None], process: Process = ALONE) -> list[Path]:
    """All parts, in order; none in a process that is not the first.

    Args:
      out: the run directory.
      count: how many there are.
      check: raises where what was opened has changed; then nothing that was computed from it stays.
      process: which of how many this is.

    Raises:
      RunError: what ``check`` raises; a part that is not as it was written.
    """
    with process.sharing_errors():
        if not process.first:
            return []
        try:
            check()
        except RunError:
            chunks.clear(out)
            raise
        chunks.end(out, count)
        chunks.require_whole(out)
    return [chunks.path(out, number, SUFFIX) for number in range(count)]


def write_table(path: Path, table: pa.Table) -> int:
    """A Parquet file, whole or not at all; returns its number of rows."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return table.num_rows
