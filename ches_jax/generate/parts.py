"""Part files of JSON lines: one finished chunk each, written whole or not at all, joined in order at the end.

parts/part-000007.jsonl       the chunk's rows; its presence marks the chunk as done
parts/dropped-000007.jsonl    rows it dropped
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ches_jax.runs.files import replacing

FOLDER = "parts"
DROPPED = "dropped.jsonl"


def part(out: Path, number: int) -> Path:
    """The rows of a chunk."""
    return out / FOLDER / f"part-{number:06d}.jsonl"


def finished(out: Path) -> int:
    """How many chunks from the first on are done without a gap."""
    number = 0
    while part(out, number).exists():
        number += 1
    return number


def write(out: Path, number: int, rows: Iterable[Mapping[str, Any]], dropped: Iterable[Mapping[str, Any]] = ()) -> None:
    """One chunk; its rows last."""
    left_out = list(dropped)
    if left_out:
        _write(out / FOLDER / f"dropped-{number:06d}.jsonl", left_out)
    _write(part(out, number), rows)


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def merge(out: Path, name: str, chunks: int) -> None:
    """Join the parts into ``name``, and the lists of dropped rows."""
    lists = sorted((out / FOLDER).glob("dropped-*.jsonl"))
    if lists:
        _join(lists, out / DROPPED)
    _join([part(out, n) for n in range(chunks)], out / name)


def clear(out: Path) -> None:
    """The parts of a file that is whole are not needed any more."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def _join(paths: list[Path], target: Path) -> None:
    with replacing(target) as temporary, temporary.open("wb") as f:
        for path in paths:
            f.write(path.read_bytes())


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that was joined."""
    with path.open(encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)
