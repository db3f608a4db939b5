"""Readers of files: rows one at a time, in order, with where each stands; from any position on.

Lines are read one by one, Parquet by record batches, Arrow files are memory-mapped; only a JSON document has to be
loaded whole. A row that cannot be read is handed on as ``Unreadable``, so that the policy for bad rows decides.
"""

import contextlib
import csv
import io
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ches_jax.data.files import is_compressed, kind_of, open_bytes
from ches_jax.errors import DataError
from ches_jax.runs.arrow import python_rows

Raw = tuple[str, Any]
"""Where a row was found ("line 17"), and what was found there."""
LONGEST_LINE = 64 << 20
"""Bytes of a line; a longer one is no row but a file of another kind."""
BATCH_ROWS = 256
LINES = 1 << 20
"""Bytes of lines that are read at once."""
_BLANK = b"\xef\xbb\xbf \t\r\n"  # with the byte order mark that some editors put in front
_MAY_BE_BLANK = np.isin(np.arange(256), list(_BLANK))
"""By the first byte of a line."""
_LINE_ENDS = ("\n", "\r\n", "")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_TOO_MANY = "\0"
"""Name of the fields that have none."""
_COLUMNS_OF_A_ROW = frozenset(
    {"prompt", "chosen", "rejected", "responses", "messages", "conversations", "instruction", "question"}
)
"""An object with one of these is a row, whatever lies inside."""
ARCHIVE = "an archive of other files; unpack it and give the file that holds the rows"
_EXPECTED = "expected one JSON object per line, or one array of objects in a .json file"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands for a row that cannot be read."""

    fault: str


def read_lines(path: Path, start: int) -> Iterator[Raw]:
    """JSON lines."""
    return itertools.starmap(row_of_line, itertools.islice(_lines(path), start, None))


def row_of_line(number: int, line: bytes) -> Raw:
    """What a JSON line holds."""
    try:
        return f"line {number}", _parsed(line)
    except DataError as error:
        return f"line {number}", Unreadable(str(error))


def read_json(path: Path, start: int, split: str | None = None) -> Iterator[Raw]:
    """JSON: lines, one array, or one object that holds the rows under a key (several: a split of each)."""
    firsts = list(itertools.islice(_lines(path), 2))
    if not firsts or (len(firsts) == 2 and _is_object(firsts[0][1])):
        yield from read_lines(path, start)
        return
    with _decompressed(path) as file:
        text = file.read()
    try:
        document = _parsed(text, whole=True)
    except DataError as error:
        raise DataError(f"{path}, {error}") from None
    rows = _rows_of(path, document, split)
    for index, row in enumerate(rows[start:], start):
        yield f"row {index}", row


def json_splits(path: Path) -> list[str]:
    """Names of the splits that a JSON document holds; none where it is of rows."""
    firsts = list(itertools.islice(_lines(path), 2))
    if not firsts or (len(firsts) == 2 and _is_object(firsts[0][1])):
        return []
    with _decompressed(path) as file, contextlib.suppress(DataError):
        document = _parsed(file.read(), whole=True)
        if isinstance(document, Mapping) and len(keys := _keys_of_rows(document)) > 1:
            return list(keys)
    return []


def read_text(path: Path, start: int) -> Iterator[Raw]:
    """Text, a prompt per line."""
    for number, line in itertools.islice(_lines(path), start, None):
        try:
            yield f"line {number}", {"prompt": line.decode("utf-8-sig").rstrip("\r\n")}
        except UnicodeDecodeError as error:
            yield f"line {number}", Unreadable(_not_utf8(error))


def read_csv(path: Path, start: int) -> Iterator[Raw]:
    """A table of text with names in its first line; fields may hold line ends and be of any length.

    Fields are parted by commas; where the first line has none, by the semicolons or tabs that it has; in a .tsv file
    by its tabs in any case.
    """
    csv.field_size_limit(sys.maxsize)
    with _decompressed(path) as file:
        text = io.TextIOWrapper(_checked(path, file), encoding="utf-8-sig", newline="")
        rows: csv.DictReader[str] | None = None
        try:
            first = next(csv.reader([text.readline()]), [])
            parted = [d for d in ";\t" if len(first) == 1 and d in first[0]]
            if kind_of(path)[0] == ".tsv" and any("\t" in name for name in first):
                parted = ["\t"]
            text.seek(0)
            # without strict, a stray quotation mark makes one field of several rows
            rows = csv.DictReader(
                text, restval=None, restkey=_TOO_MANY, delimiter=parted[0] if len(parted) == 1 else ",", strict=True
            )
            _require_different(path, rows.fieldnames or ())
            for index, row in enumerate(rows):
                if index >= start:
                    many = _TOO_MANY in row
                    yield f"row {index}", Unreadable("more fields than the first line names") if many else row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not a readable CSV file in UTF-8 ({error})") from None
        except csv.Error as error:
            line = rows.reader.line_num if rows else 1
            raise DataError(
                f"{path}, about line {line}: not a readable CSV file ({error}); a field that begins with a quotation "
                "mark ends with one, and those inside are doubled: write the table so, or as JSON lines"
            ) from None


def read_parquet(path: Path, start: int) -> Iterator[Raw]:
    """Parquet, by row groups."""
    import pyarrow.parquet as pq

    with _told(path, "Parquet"), pq.ParquetFile(_seekable(path)) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        first = 0
        for group, size in enumerate(sizes):
            if first + size > start:
                batches = file.iter_batches(BATCH_ROWS, row_groups=[group])
                yield from table_rows(batches, first, start)
            first += size


def read_arrow(path: Path, start: int) -> Iterator[Raw]:
    """Arrow, as a file (Feather is one) or as a stream (``datasets`` writes it)."""
    import pyarrow as pa

    with _told(path, "Arrow"), _mapped(path) as file:
        begin = file.read(6)
        if begin[:4] == b"FEA1":
            raise DataError(f"{path}: Feather version 1; write it again with version 2")
        if begin == b"ARROW1":
            reader = pa.ipc.open_file(file)
            batches: Iterable[Any] = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = iter(pa.ipc.open_stream(file))
        yield from table_rows(batches, 0, start)


def table_rows(batches: Iterable[Any], first: int, start: int) -> Iterator[Raw]:
    """Rows of record batches, the first of which is row ``first``, from row ``start`` on.

    Every batch is validated as a whole before a value of it is read: offsets of a damaged one point anywhere.
    """
    for batch in batches:
        batch.validate(full=True)
        if len({*batch.schema.names}) < batch.num_columns:
            raise DataError(twice(batch.schema.names))
        for offset in range(max(0, start - first), batch.num_rows, BATCH_ROWS):
            rows = python_rows(batch.slice(offset, BATCH_ROWS))
            for index, row in enumerate(rows, first + offset):
                yield f"row {index}", row
        first += batch.num_rows


class _Twice(ValueError):
    """An object of JSON has a key twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose keys all differ: of two values of one key only the last would be read.

    Raises:
      _Twice: they do not.
    """
    value = dict(pairs)
    if len(value) < len(pairs):
        raise _Twice(twice([key for key, _ in pairs]))
    return value


def _require_different(path: Path, names: Sequence[str]) -> None:
    """Of two columns of one name only one would be read.

    Raises:
      DataError: there are two.
    """
    if len({*names}) < len(names):
        raise DataError(f"{path}: {twice(names)}")


def twice(names: Sequence[str]) -> str:
    name = next(n for i, n in enumerate(names) if n in names[:i])
    return f"two columns are named {name!r}, so that it is not clear which is meant; rename one"


_DECODE = json.JSONDecoder(object_pairs_hook=_once).raw_decode
READERS: dict[str, tuple[str, Callable[[Path, int], Iterator[Raw]]]] = {
    ".jsonl": ("JSON lines", read_lines),
    ".ndjson": ("JSON lines", read_lines),
    ".json": ("JSON", read_json),
    ".parquet": ("Parquet", read_parquet),
    ".arrow": ("Arrow", read_arrow),
    ".arrows": ("Arrow", read_arrow),
    ".ipc": ("Arrow", read_arrow),
    ".feather": ("Feather", read_arrow),
    ".csv": ("CSV", read_csv),
    ".tsv": ("TSV", read_csv),
    ".txt": ("text, a prompt per line", read_text),
}


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines of a file that are not blank, one behind the other."""

    text: bytes
    bounds: np.ndarray
    """Where each begins in ``text``, and the end of the last, [lines + 1]."""
    numbers: np.ndarray
    """Which lines of the file they are, from 1, [lines]."""
    positions: np.ndarray
    """Which they are of those that are not blank, from 0, [lines]."""

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Each with its number."""
        begin, *ends = self.bounds.tolist()
        for number, end in zip(self.numbers.tolist(), ends, strict=True):
            yield number, self.text[begin:end]
            begin = end

    def some(self, wanted: np.ndarray) -> "Lines":
        """Those that are wanted: true at their places, [lines]."""
        if wanted.all():
            return self
        begins, ends = self.bounds[:-1][wanted], self.bounds[1:][wanted]
        text = b"".join([self.text[begin:end] for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)])
        bounds = np.concatenate([[0], np.cumsum(ends - begins)])
        return Lines(text, bounds, self.numbers[wanted], self.positions[wanted])


def lines_of(path: Path, wanted: Sequence[int] | bytes | None = None) -> Iterator[Lines]:
    """Lines that are not blank, some at a time: those whose position is wanted (1 at its place); all when not given."""
    first, number = 0, 1
    with _decompressed(path) as file:
        file = _checked(path, file)
        while (wanted is None or first < len(wanted)) and (text := file.read(LINES)):
            if not text.endswith(b"\n"):
                text += file.readline(LONGEST_LINE)
            lines, count = _without_blank(path, text, number, first)
            number += count
            first += len(lines)
            if wanted is not None:
                some = np.zeros(len(lines), dtype=bool)
                there = bytes(wanted[first - len(lines) : first])
                some[: len(there)] = np.frombuffer(there, np.uint8) != 0
                lines = lines.some(some)
            yield lines


def _without_blank(path: Path, text: bytes, number: int, first: int) -> tuple[Lines, int]:
    """The lines of a text and how many there are with those that are blank.

    Args:
      path: of the file, for messages.
      text: whole lines; the last may lack its end.
      number: of the first line.
      first: position of the first that is not blank.
    """
    letters, ended = np.frombuffer(text, np.uint8), text.endswith(b"\n")
    ends = np.flatnonzero(letters == ord("\n")) + 1
    bounds = np.concatenate([[0], ends if ended else np.append(ends, len(text))])
    numbers = np.arange(number, number + len(bounds) - 1)
    # a line without its end is cut off there, or the last of the file
    most = np.where(bounds[1:] < len(text) + ended, LONGEST_LINE, LONGEST_LINE - 1)
    if (long := np.flatnonzero(np.diff(bounds) > most)).size:
        raise DataError(f"{path}, line {numbers[long[0]]}: longer than {LONGEST_LINE >> 20} MiB; {_EXPECTED}")
    lines = Lines(text, bounds, numbers, np.empty(0))
    may_be = np.flatnonzero(_MAY_BE_BLANK[letters[bounds[:-1]]])
    blank = [i for i in may_be.tolist() if not text[bounds[i] : bounds[i + 1]].strip(_BLANK)]
    filled = np.ones(len(lines), dtype=bool)
    filled[blank] = False
    lines = replace(lines, positions=np.cumsum(filled) - 1 + first)
    return lines.some(filled), len(filled)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, numbered from 1."""
    return itertools.chain.from_iterable(lines_of(path))


@contextlib.contextmanager
def _decompressed(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file; a damaged compression is an error in words."""
    import lzma
    import zlib

    with open_bytes(path) as file:
        try:
            yield file
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            what = f"a readable {kind_of(path)[1]} file" if is_compressed(path) else "readable"
            raise DataError(f"{path}: not {what}, or cut off ({error})") from None


def _checked(path: Path, file: BinaryIO) -> BinaryIO:
    """The same file where it can be UTF-8."""
    buffered = file if hasattr(file, "peek") else io.BufferedReader(file)  # type: ignore[type-var]
    begin: bytes = buffered.peek(512)  # type: ignore[attr-defined]
    if begin[257:262] == b"ustar" or begin.startswith(b"PK\x03\x04"):
        raise DataError(f"{path}: {ARCHIVE}")
    if begin[:2] in _UTF16:
        raise DataError(f"{path}: the text is UTF-16; convert the file to UTF-8 (iconv -f UTF-16 -t UTF-8)")
    return buffered  # type: ignore[return-value]


def _parsed(text: bytes, whole: bool = False) -> Any:
    """A JSON value; of a whole document the fault names its line."""
    try:
        line = text.decode()
        value, end = _DECODE(line)
        if line[end:] in _LINE_ENDS:  # nearly always; json.loads looks for white space and takes twice as long
            return value
    except (ValueError, RecursionError):
        pass  # said below
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_once)
    except _Twice as error:
        raise DataError(str(error)) from None
    except UnicodeDecodeError as error:
        raise DataError(("line 1: " if whole else "") + _not_utf8(error)) from None
    except RecursionError:
        raise DataError(
            ("line 1: " if whole else "") + f"not JSON that can be read (nested too deep); {_EXPECTED}"
        ) from None
    except ValueError as error:
        line = f"line {error.lineno}: " if isinstance(error, json.JSONDecodeError) else "line 1: "
        fault = getattr(error, "msg", str(error))
        raise DataError((line if whole else "") + f"not JSON ({fault}); {_EXPECTED}") from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.start + 1} is not UTF-8; convert the file to UTF-8"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(_parsed(line), dict)
    except DataError:
        # a broken line among lines; a document continues in the next line
        return line.strip(_BLANK).startswith(b"{") and line.strip(_BLANK).endswith(b"}")


def _rows_of(path: Path, document: Any, split: str | None) -> list[Any]:
    """The rows of a JSON document."""
    if isinstance(document, list):
        rows = document
    elif not isinstance(document, Mapping):
        rows = [document]
    elif keys := _keys_of_rows(document):
        key = split or next(iter(keys))
        if key not in keys or (len(keys) > 1 and split is None):
            raise DataError(f"{path}: rows under {' and '.join(map(repr, keys))}; choose one with --split")
        rows = keys[key]
    elif rows_by_name := _rows_by_name(document):
        rows = rows_by_name
    elif columns := _columns(document):
        rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
    else:
        rows = [document]
    wrapped = rows and all(isinstance(r, Mapping) and isinstance(r.get("row"), Mapping) for r in rows)
    return [r["row"] for r in rows] if wrapped else rows


def _keys_of_rows(document: Mapping[str, Any], deeper: int = 2) -> dict[str, list[Any]]:
    """Rows by the key under which they are listed (``data.train``): objects that are no turns of a conversation."""
    found = {
        k: v
        for k, v in document.items()
        if isinstance(v, list)
        and v
        and all(isinstance(r, Mapping) and not {"role", "from"} & r.keys() for r in v)
        and k not in ("features", "completions", "answers")
    }
    if found or not deeper or _COLUMNS_OF_A_ROW & document.keys():
        return found
    inside = {k: _keys_of_rows(v, deeper - 1) for k, v in document.items() if isinstance(v, Mapping)}
    return {f"{k}.{name}": rows for k, some in inside.items() for name, rows in some.items()}


def _rows_by_name(document: Mapping[str, Any]) -> list[Any]:
    """Rows that are written as one object each under a name of their own; none where the names are those of columns."""
    rows = list(document.values())
    alike = len(rows) > 1 and all(isinstance(r, Mapping) and r.keys() == rows[0].keys() for r in rows)
    return rows if alike and rows[0] and not all(k.isdigit() for k in rows[0]) else []


def _columns(document: Mapping[str, Any]) -> Mapping[str, list[Any]]:
    """Columns of equal length that are written one after another; empty where the document is something else."""
    if document and all(isinstance(v, Mapping) for v in document.values()):  # as pandas writes: {"0": ..., "1": ...}
        document = {k: list(v.values()) for k, v in document.items()}
    lists = [v for v in document.values() if isinstance(v, list)]
    same = len(lists) == len(document) > 1 and len({len(v) for v in lists}) == 1
    texts = same and any(lists[0]) and any(all(isinstance(c, str) for c in v) for v in lists)
    return document if texts else {}


def _seekable(path: Path) -> Any:
    return path if not is_compressed(path) else io.BytesIO(_all_bytes(path))


def _mapped(path: Path) -> Any:
    import pyarrow as pa

    return pa.BufferReader(_all_bytes(path)) if is_compressed(path) else pa.memory_map(str(path))


def _all_bytes(path: Path) -> bytes:
    with _decompressed(path) as file:
        return file.read()


@contextlib.contextmanager
def _told(path: Path, name: str) -> Iterator[None]:
    """Whatever the library raises about a damaged file, as one message."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: not a readable {name} file ({reason}); write it again") from None
