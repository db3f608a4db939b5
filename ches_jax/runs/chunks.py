"""Chunks of a run: each is written whole or not at all, those that are there are not computed again, all are joined.

parts/part-000007.EXT         the chunk's rows (``.jsonl`` or ``.parquet``)
parts/NAME-000007.EXT         what belongs beside them, such as ``dropped``
parts/done-000007.json        the chunk's number of rows, and the sha256 of its files: written last, marks it as done
parts/work-000001.json        what process 1 of several cost: added up where their chunks are joined
parts/end.json                how many chunks there are: written when the data have come to their end

``ches score``, ``ches generate`` and ``ches judge`` work so: a killed run loses one chunk at most, and ends in the same
bytes as a run that nothing disturbed, because a chunk's content follows from its rows alone. A part that is damaged is
computed again; a run is joined when every chunk up to the end is there as it was written, and it is finished when its
``run.json`` is there: until then everything before that is repeated.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ches_jax.errors import RunError, many
from ches_jax.runs.files import JSON_BYTES, open_regular, read_object, replacing, sha256
from ches_jax.runs.json_text import json_bytes
from ches_jax.runs.store import is_there, make_folder, remove
from ches_jax.runs.work import total

T = TypeVar("T")
FOLDER = "parts"
DROPPED = "dropped.jsonl"
"""Rows that the run left out, each with its reason."""
LINES = ".jsonl"
END = "end.json"
_DONE = re.compile(r"done-(\d{6,18})\.json", re.ASCII)


def make_folders(out: Path) -> None:
    """Where parts will lie."""
    make_folder(out / FOLDER)


def numbered(
    rows: Iterable[T],
    size: int,
    first: int = 0,
    wanted: Callable[[int], bool] = lambda number: True,
    at_end: Callable[[int], None] = lambda number: None,
) -> Iterator[tuple[int, list[T]]]:
    """The chunks of ``size`` rows that are wanted, with their numbers.

    Args:
      rows: from the chunk ``first`` on.
      size: rows of a chunk.
      first: number of the first chunk.
      wanted: whether the chunk of a number is.
      at_end: called with the number of all chunks when the rows have come to their end.

    >>> list(numbered("abcde", 2, wanted=lambda number: number != 1, at_end=print))
    3
    [(0, ['a', 'b']), (2, ['e'])]
    """
    left = iter(rows)
    for number in itertools.count(first):
        chunk = list(itertools.islice(left, size))
        if not chunk:
            at_end(number)
            return
        if wanted(number):
            yield number, chunk


def path(out: Path, number: int, suffix: str = LINES, name: str = "part") -> Path:
    """The file of a chunk: its part, or what lies beside it by another ``name``."""
    return out / FOLDER / f"{name}-{number:06d}{suffix}"


def files(out: Path, name: str, suffix: str = LINES) -> list[Path]:
    """All files of that name, in the order of the chunks."""
    return sorted((out / FOLDER).glob(f"{name}-*{suffix}"))


def commit(out: Path, number: int, rows: int, files: Sequence[Path]) -> None:
    """Mark a chunk of ``rows`` rows, whose ``files`` are written, as done."""
    record = {"rows": rows, "sha256": {p.name: sha256(p) for p in files}}
    with replacing(path(out, number, ".json", "done")) as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")


def rows_done(out: Path, number: int) -> int | None:
    """The number of rows of a chunk that is done; None where it is not, or where a file is not as it was written."""
    return None if _problem(out, number) else _record(out, number)["rows"]


def _record(out: Path, number: int) -> dict[str, Any]:
    record = read_object(path(out, number, ".json", "done"), RunError, "the record of a chunk")
    rows, prints = record.get("rows"), record.get("sha256")
    if type(rows) is not int or not isinstance(prints, dict) or not prints:
        raise RunError(f"{path(out, number, '.json', 'done')}: not the record of a chunk")
    return record


def _problem(out: Path, number: int) -> str | None:
    """What is wrong with a chunk, if anything."""
    if not path(out, number, ".json", "done").is_file():
        return f"chunk {number} is missing"
    try:
        prints = _record(out, number)["sha256"]
    except RunError as error:
        return str(error)
    for name, digest in prints.items():
        file = out / FOLDER / Path(name).name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != digest:
            return f"{name} is not as it was written"
    return None


def done(out: Path) -> dict[str, int]:
    """The number of rows of each chunk that is done, by the number of the chunk (as JSON has keys)."""
    rows = {str(number): rows_done(out, number) for number in sorted(_marked(out))}
    return {number: count for number, count in rows.items() if count is not None}


def add_work(out: Path, process: int, work: Mapping[str, Any]) -> None:
    """Keep what one of the processes of a run cost, with what it cost when it was started before."""
    target = path(out, process, ".json", "work")
    so_far = _total_of([target] if target.is_file() else [], work)
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(so_far) + "\n", encoding="utf-8")


def work_of_all(out: Path) -> dict[str, Any]:
    """What all processes of a run cost that have left a record of it; empty where none has."""
    return _total_of(files(out, "work", ".json"))


def _total_of(paths: Sequence[Path], *more: Mapping[str, Any]) -> dict[str, Any]:
    works = [read_object(path, RunError, "what a process cost") for path in paths]
    try:
        return total([*works, *more])
    except (TypeError, AttributeError) as error:
        raise RunError(f"{paths[0].parent}: what the processes cost is damaged ({error}); remove work-*.json") from None


def end(out: Path, chunks: int) -> None:
    """The data have come to their end, after so many chunks."""
    with replacing(out / FOLDER / END) as temporary:
        temporary.write_text(json.dumps({"chunks": chunks}) + "\n", encoding="utf-8")


def end_of_data(out: Path, chunks: int, computed: Iterable[int], check: Callable[[], None]) -> None:
    """Mark the end, if the data are still what they were; chunks computed from others are not done.

    Args:
      out: the run directory.
      chunks: how many there are in all.
      computed: numbers of those that were computed since the data were opened.
      check: raises where what was opened has changed.

    Raises:
      RunError: what ``check`` raises.
    """
    try:
        check()
    except RunError:
        for number in computed:
            path(out, number, ".json", "done").unlink(missing_ok=True)
        raise
    end(out, chunks)


def require_whole(out: Path) -> int:
    """The number of chunks, every one of which is there as it was written.

    Raises:
      RunError: the data have not come to their end, a chunk is missing or damaged, or there is one too many.
    """
    folder = out / FOLDER
    numbers = _marked(out)
    if not numbers and not (folder / END).is_file():
        raise RunError(f"{out}: no parts to merge; was anything computed?")
    _require_all(out, numbers, max(numbers, default=-1) + 1)
    if not (folder / END).is_file():
        raise RunError(
            f"{out}: the run has not come to the end of its data ({len(numbers)} chunks are done): start it again with "
            "--resume"
        )
    count = read_object(folder / END, RunError, "the parts of a run").get("chunks")
    if type(count) is not int or count < 0:
        raise RunError(f"{folder / END}: expected the number of chunks")
    _require_all(out, numbers, count)
    problems = [problem for number in range(count) if (problem := _problem(out, number))]
    problems += [f"part {number} is behind the end of the data" for number in sorted(numbers) if number >= count]
    if problems:
        raise RunError(many(f"{out}: start the run again with --resume", problems, 10))
    return count


def _marked(out: Path) -> set[int]:
    """Numbers of the chunks that are marked as done; files of other names are none of ours."""
    names = (_DONE.fullmatch(path.name) for path in files(out, "done", ".json"))
    return {int(name[1]) for name in names if name}


def _require_all(out: Path, numbers: set[int], count: int) -> None:
    """Every chunk below ``count`` is among those; whatever count a damaged file tells, nothing of that size is made."""
    if missing := count - sum(number < count for number in numbers):
        first = itertools.islice((number for number in range(count) if number not in numbers), 10)
        raise RunError(
            f"{out}: {missing} parts are missing ({', '.join(map(str, first))}): start the run again with --resume"
        )


def write(out: Path, number: int, rows: Iterable[Mapping[str, Any]], dropped: Iterable[Mapping[str, Any]] = ()) -> None:
    """One chunk of JSON lines."""
    kept = list(rows)
    beside = write_dropped(out, number, dropped)
    write_lines(path(out, number), kept)
    commit(out, number, len(kept), [*beside, path(out, number)])


def write_dropped(out: Path, number: int, dropped: Iterable[Mapping[str, Any]]) -> list[Path]:
    """The rows that a chunk left out, where there are any; returns the file."""
    records, target = list(dropped), path(out, number, name="dropped")
    target.unlink(missing_ok=True)
    if not records:
        return []
    write_lines(target, records)
    return [target]


def write_lines(target: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines, whole or not at all."""
    with replacing(target) as temporary, temporary.open("wb") as f:
        f.writelines(map(json_bytes, rows))


def join(out: Path, name: str) -> None:
    """The parts of JSON lines as one file ``name``, and the lists of dropped rows as one.

    Raises:
      RunError: as ``require_whole``.
    """
    count = require_whole(out)
    join_dropped(out, count)
    _concatenate([path(out, n) for n in range(count)], out / name)


def join_dropped(out: Path, count: int) -> None:
    """The lists of dropped rows as ``dropped.jsonl``, where there are any."""
    lists = [p for n in range(count) if (p := path(out, n, name="dropped")).is_file()]
    if lists:
        _concatenate(lists, out / DROPPED)


def count_dropped(out: Path) -> int:
    """How many rows a joined run left out."""
    return (out / DROPPED).read_bytes().count(b"\n") if is_there(out / DROPPED) else 0


def _concatenate(paths: list[Path], target: Path) -> None:
    with replacing(target) as temporary, temporary.open("wb") as f:
        for p in paths:
            f.write(p.read_bytes())


def clear(out: Path) -> None:
    """Remove the parts of a run that is joined."""
    remove(out / FOLDER)


def read_lines(source: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines.

    Raises:
      RunError: a line that is no JSON object.
    """
    with open_regular(source, RunError, "JSON lines") as f:
        lines = iter(lambda: f.readline(JSON_BYTES), b"")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line) if len(line) < JSON_BYTES else None
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise RunError(f"{source}, line {number}: not a JSON object; the file is damaged")
            yield row
