"""Chunks of a run: each is written whole or not at all, those that are there are not computed again, all are joined.

parts/part-000007.EXT         the chunk's rows (``.jsonl`` or ``.parquet``); its presence marks the chunk as done
parts/NAME-000007.EXT         what belongs beside them, such as ``dropped``; written before the part

``ches score``, ``ches generate`` and ``ches judge`` work so: a killed run loses one chunk at most, and ends in the same
bytes as a run that nothing disturbed, because a chunk's content follows from its rows alone.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ches_jax.errors import RunError
from ches_jax.runs.files import replacing

FOLDER = "parts"
DROPPED = "dropped.jsonl"
"""Rows that the run left out, each with its reason."""
LINES = ".jsonl"


def path(out: Path, number: int, suffix: str = LINES, name: str = "part") -> Path:
    """The file of a chunk: its part, or what lies beside it by another ``name``."""
    return out / FOLDER / f"{name}-{number:06d}{suffix}"


def files(out: Path, name: str, suffix: str = LINES) -> list[Path]:
    """All files of that name, in the order of the chunks."""
    return sorted((out / FOLDER).glob(f"{name}-*{suffix}"))


def finished(out: Path, suffix: str = LINES) -> int:
    """How many chunks from the first on are done without a gap."""
    number = 0
    while path(out, number, suffix).exists():
        number += 1
    return number


def require_whole(out: Path, suffix: str = LINES) -> int:
    """The number of chunks.

    Raises:
      RunError: there are none, or one before the last is missing.
    """
    numbers = {int(p.stem.rpartition("-")[2]) for p in files(out, "part", suffix)}
    if not numbers:
        raise RunError(f"{out}: no parts to merge; was anything scored?")
    missing = sorted(set(range(max(numbers) + 1)) - numbers)
    if missing:
        shown = ", ".join(map(str, missing[:10]))
        raise RunError(f"{out}: {len(missing)} parts are missing ({shown}): start the run again with --resume")
    return len(numbers)


def write(out: Path, number: int, rows: Iterable[Mapping[str, Any]], dropped: Iterable[Mapping[str, Any]] = ()) -> None:
    """One chunk of JSON lines; its part last."""
    write_dropped(out, number, dropped)
    write_lines(path(out, number), rows)


def write_dropped(out: Path, number: int, dropped: Iterable[Mapping[str, Any]]) -> None:
    """The rows that a chunk left out, where there are any."""
    records = list(dropped)
    if records:
        write_lines(path(out, number, name="dropped"), records)


def write_lines(target: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def join(out: Path, name: str, chunks: int) -> None:
    """The parts of JSON lines as one file ``name``, and the lists of dropped rows as one."""
    join_dropped(out)
    _concatenate([path(out, n) for n in range(chunks)], out / name)


def join_dropped(out: Path) -> int:
    """The lists of dropped rows as ``dropped.jsonl``, where there are any; returns the number of rows."""
    lists = files(out, "dropped")
    if lists:
        _concatenate(lists, out / DROPPED)
    return sum(p.read_bytes().count(b"\n") for p in lists)


def _concatenate(paths: list[Path], target: Path) -> None:
    with replacing(target) as temporary, temporary.open("wb") as f:
        for p in paths:
            f.write(p.read_bytes())


def clear(out: Path) -> None:
    """Remove the parts of a run that is joined."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def read_lines(source: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    with source.open(encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)
