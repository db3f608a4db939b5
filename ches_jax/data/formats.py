"""Rows of one file, in order, from a position on: JSON lines, JSON, CSV, text, Parquet, Arrow and Feather.

A file is never held whole, but a ``.json`` that is one value. What cannot be read as a row, though the file goes on
behind it, is a row that says so (``Unreadable``), so that ``--on-bad-row`` decides about it as about any other.
"""

import csv
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ches_jax.data.files import DataFile
from ches_jax.errors import DataError

BATCH_ROWS = 256
_MAX_LINE = 64 << 20
"""Bytes of a line; a longer one is no row of text."""
_MAX_JSON = 4 << 30
"""Bytes of a JSON file that is one value, which is read whole."""
_BLANK = b"\xef\xbb\xbf \t\r\n"  # with the byte order mark that some editors put in front
_WIDE = (b"\xff\xfe", b"\xfe\xff")
_TOO_MANY = "\0"
"""Name of the fields that have none."""

Raw = tuple[str, Any]
"""Where a row was found ("line 17"), and what was found there."""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands for a row that could not be read."""

    why: str


def read_lines(file: DataFile, start: int) -> Iterator[Raw]:
    """JSON lines; blank ones do not count."""
    for number, line in _numbered_lines(file, start):
        yield f"line {number}", _row(line)


def read_text(file: DataFile, start: int) -> Iterator[Raw]:
    """A prompt per line."""
    for number, line in _numbered_lines(file, start):
        try:
            yield f"line {number}", {"prompt": line.decode("utf-8-sig").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield f"line {number}", Unreadable(_not_utf8(error))


def read_json(file: DataFile, start: int, split: str | None = None) -> Iterator[Raw]:
    """A JSON file: an array of rows, an object that holds them under a key, columns, or JSON lines after all."""
    if _begins_lines(file):
        yield from read_lines(file, start)
        return
    rows = _rows_of(file, _whole(file), split)
    yield from ((f"row {index}", row) for index, row in enumerate(rows[start:], start))


def read_csv(file: DataFile, start: int, delimiter: str = ",") -> Iterator[Raw]:
    """Comma- or tab-separated values with names in the first line; fields may hold line ends and be long."""
    csv.field_size_limit(_MAX_LINE)
    with file.opened() as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as text:
        try:
            for index, row in enumerate(csv.DictReader(text, restval=None, restkey=_TOO_MANY, delimiter=delimiter)):
                if index >= start:
                    few = Unreadable("more fields than the first line names")
                    yield f"row {index}", few if _TOO_MANY in row else row
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{file.path}: not a readable CSV file in UTF-8 ({error})") from None


def read_tsv(file: DataFile, start: int) -> Iterator[Raw]:
    """As ``read_csv``, with tabs."""
    yield from read_csv(file, start, "\t")


def read_parquet(file: DataFile, start: int) -> Iterator[Raw]:
    """Parquet, by row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with file.stored() as stored, pq.ParquetFile(_arrow_input(file, stored)) as parquet:
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
            first = 0
            for group, size in enumerate(sizes):
                if first + size > start:
                    yield from table_rows(parquet.iter_batches(BATCH_ROWS, row_groups=[group]), first, start)
                first += size
    except (pa.ArrowException, OSError, UnicodeError, SystemError) as error:
        raise DataError(f"{file.path}: not a readable Parquet file ({_short(error)}); write it again") from None


def read_arrow(file: DataFile, start: int) -> Iterator[Raw]:
    """Arrow's file form (also Feather) and its streaming form."""
    import pyarrow as pa

    try:
        with file.stored() as stored:
            begin = stored.read(6)
            stored.seek(0)
            if begin[:4] == b"FEA1":
                raise DataError(f"{file.path}: Feather version 1; write it again with version 2")
            source = _arrow_input(file, stored)
            if begin == b"ARROW1":
                reader = pa.ipc.open_file(source)
                batches: Iterable[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:  # datasets writes the streaming form
                batches = iter(pa.ipc.open_stream(source))
            yield from table_rows(batches, 0, start)
    except (pa.ArrowException, OSError, UnicodeError, SystemError) as error:
        raise DataError(f"{file.path}: not a readable Arrow file ({_short(error)}); write it again") from None


def table_rows(batches: Iterable[Any], first: int, start: int) -> Iterator[Raw]:
    """Rows of record batches, the first of which is row ``first``, from row ``start`` on.

    Arrow trusts offsets and lengths that a file claims, so each batch is validated before its values are used.
    """
    for batch in batches:
        if first + batch.num_rows > start:
            batch.validate(full=True)
        for offset in range(max(0, start - first), batch.num_rows, BATCH_ROWS):
            rows = batch.slice(offset, BATCH_ROWS).to_pylist()
            for index, row in enumerate(rows, first + offset):
                yield f"row {index}", row
        first += batch.num_rows


READERS: dict[str, tuple[str, Callable[[DataFile, int], Iterator[Raw]]]] = {
    ".jsonl": ("JSON lines", read_lines),
    ".ndjson": ("JSON lines", read_lines),
    ".json": ("JSON", read_json),
    ".parquet": ("Parquet", read_parquet),
    ".arrow": ("Arrow", read_arrow),
    ".arrows": ("Arrow", read_arrow),
    ".ipc": ("Arrow", read_arrow),
    ".feather": ("Feather", read_arrow),
    ".csv": ("CSV", read_csv),
    ".tsv": ("TSV", read_tsv),
    ".txt": ("text, a prompt per line", read_text),
}
"""By the suffix of the content."""


def json_splits(file: DataFile) -> list[str]:
    """The splits that a JSON file holds as lists of rows under their names; none where it holds one list."""
    if _begins_lines(file, b"["):
        return []
    value = _whole(file)
    return [k for k, v in value.items() if _is_rows(v)] if isinstance(value, Mapping) else []


def _begins_lines(file: DataFile, otherwise: bytes = b"") -> bool:
    """Whether a ``.json`` file is JSON lines: several values, or one that is a row; or begins with ``otherwise``."""
    with file.opened() as content:
        some = list(itertools.islice((line for line in _lines(file, content) if line.strip(_BLANK)), 2))
    if not some:
        return True
    first = some[0].strip(_BLANK)
    if first.startswith(b"["):
        return bool(otherwise)
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        return first[1:].lstrip()[:1] in (b"", b'"') and len(some) > 1 and _looks_like_lines(some)
    return len(some) > 1 or not _holds_rows(value)


def _looks_like_lines(some: list[bytes]) -> bool:
    """Whether the second line begins a value: then the first is a damaged row, and not the begin of a long value."""
    return some[1].lstrip().startswith(b"{") and some[0].count(b'"') > 2


def _lines(file: DataFile, content: IO[bytes]) -> Iterator[bytes]:
    while line := content.readline(_MAX_LINE + 1):
        if len(line) > _MAX_LINE:
            raise DataError(f"{file.path}: a line of more than {_MAX_LINE >> 20} MiB; expected one row per line")
        yield line


def _numbered_lines(file: DataFile, start: int) -> Iterator[tuple[int, bytes]]:
    with file.opened() as content:
        lines = _lines(file, content)
        first = next(lines, b"")
        if first.startswith(_WIDE):
            raise DataError(f"{file.path}: UTF-16; convert the file to UTF-8")
        numbered = ((n, line) for n, line in enumerate(itertools.chain([first], lines), 1) if line.strip(_BLANK))
        yield from itertools.islice(numbered, start, None)


def _row(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Unreadable(_not_utf8(error))
    except (ValueError, RecursionError) as error:
        fault = "nested too deeply" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
        return Unreadable(f"not JSON ({_short(fault)}); expected one JSON object per line")


def _whole(file: DataFile) -> Any:
    with file.opened() as content:
        data = content.read(_MAX_JSON + 1)
    if len(data) > _MAX_JSON:
        raise DataError(f"{file.path}: a JSON value of more than {_MAX_JSON >> 30} GiB; write JSON lines instead")
    if data.startswith(_WIDE):
        raise DataError(f"{file.path}: UTF-16; convert the file to UTF-8")
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{file.path}: {_not_utf8(error)}") from None
    except RecursionError:
        raise DataError(f"{file.path}: nested too deeply; expected an array of objects") from None
    except ValueError as error:
        # Inside a JSON array the line is known to the parser only.
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else ""
        raise DataError(
            f"{file.path}, {line}not JSON ({_short(getattr(error, 'msg', str(error)))}); expected one JSON object per "
            "line, or one array of objects in a .json file"
        ) from None


def _rows_of(file: DataFile, value: Any, split: str | None) -> list[Any]:
    """The rows that a JSON value holds."""
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        raise DataError(f"{file.path}: one {type(value).__name__}; expected rows")
    lists = [] if _is_row(value) and not _columns(value) else [k for k, v in value.items() if _is_rows(v)]
    if split is not None and split in lists:
        return _unwrapped(value[split])
    if split is not None:
        raise DataError(f"{file.path}: no split '{split}'; it holds {', '.join(lists) or 'one list of rows'}")
    if len(lists) > 1:
        raise DataError(f"{file.path}: rows under {' and '.join(map(repr, lists))}; choose one with --split NAME")
    if lists:
        return _unwrapped(value[lists[0]])
    if columns := _columns(value):
        return columns
    if _is_row(value):
        return [dict(value)]
    raise DataError(
        f"{file.path}: one object with the keys {', '.join(map(str, list(value)[:8]))}, none of which holds rows; "
        "expected a list of objects, alone or under a key"
    )


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value[:8]) and not any(
        isinstance(v, Mapping) and ("role" in v or "from" in v) for v in value[:8]
    )  # fmt: skip


def _is_row(value: Mapping[str, Any]) -> bool:
    """Whether an object is a row itself: it has a prompt, or sides."""
    alone = ("prompt", "instruction", "question", "query", "history", "chosen", "rejected", "messages")
    return any(value.get(k) is not None for k in alone)


def _holds_rows(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    return bool(_columns(value)) or (not _is_row(value) and any(map(_is_rows, value.values())))


def _unwrapped(rows: list[Any]) -> list[Any]:
    """Rows as the data set viewer writes them lie one object deeper."""
    if all(isinstance(r, Mapping) and isinstance(r.get("row"), Mapping) and "row_idx" in r for r in rows):
        return [r["row"] for r in rows]
    return rows


def _columns(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of an object of columns, each a list or an object by number (as pandas writes); none: it is not one."""
    lists = [list(c.values()) if isinstance(c, Mapping) else c for c in value.values()]
    if not lists or not all(isinstance(c, list) and len(c) == len(lists[0]) for c in lists) or not lists[0]:
        return []
    if any(isinstance(c, Mapping) and list(c) != [str(i) for i in range(len(c))] for c in value.values()):
        return []
    if not {"chosen", "rejected"} <= value.keys() and "responses" not in value and "prompt" not in value:
        return []
    if any(
        isinstance(c, list) and c and isinstance(c[0], Mapping) and ("role" in c[0] or "from" in c[0]) for c in lists
    ):
        return []  # one row whose cells are conversations
    return [dict(zip(value, row, strict=True)) for row in zip(*lists, strict=True)]


def _arrow_input(file: DataFile, stored: IO[bytes]) -> Any:
    import pyarrow as pa

    return pa.PythonFile(stored, "r") if file.remote else pa.memory_map(str(Path(file.path)))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.start + 1} is not UTF-8; convert the file to UTF-8"


def _short(what: object) -> str:
    return str(what).partition("\n")[0][:200]
