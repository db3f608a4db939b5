"""Rows from files, folders and the hub: one at a time, in order, again and again.

A source never holds the data: JSON lines are read line by line, Parquet by record batches, Arrow
files are memory-mapped. Only a JSON array has to be loaded whole.
"""

import csv
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_args

from ches_jax.data.prompts import (
    CANDIDATE_COLUMNS,
    COLUMNS,
    PROMPT_COLUMNS,
    Numbers,
    canonical_prompt,
    columns_read,
    lookup,
    pair_contents,
)
from ches_jax.errors import DataError
from ches_jax.types import Pairing

_BATCH_ROWS = 256
_BLANK = b"\xef\xbb\xbf \t\r\n"  # with the byte order mark that some editors put in front
_FORMATS = (
    ".jsonl, .json, .parquet, .arrow, .csv, .txt (a prompt per line), a datasets save_to_disk folder, "
    "or owner/name on the hub"
)

Raw = tuple[str, Any]
"""Where a row was found ("line 17"), and what was found there."""


Contents = Callable[[Mapping[str, Any], Mapping[str, str]], list[tuple[Numbers, dict[str, Any]]]]
"""(row as read, names of its columns) -> content, or contents of its pairs with their numbers; raises DataError."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What the rows of a source are."""

    name: str
    """For messages."""
    columns: tuple[str, ...]
    """What is read; the row's other columns are carried along."""
    contents: Contents


PAIRS: dict[Pairing, Kind] = {
    pairing: Kind("preference pairs", COLUMNS, partial(pair_contents, pairing=pairing)) for pairing in get_args(Pairing)
}
"""By which pairs of a row's candidates are meant."""
PROMPTS = Kind("prompts", PROMPT_COLUMNS, lambda row, columns: [(None, canonical_prompt(row, columns))])


@dataclass(frozen=True, slots=True)
class Record:
    """One row as read, in canonical columns; of a row with candidates, one of its pairs."""

    index: int
    """Position of the row in the source, from 0; blank lines do not count."""
    row_id: str
    where: str
    """For messages: "line 17" (from 1) of a text file, "row 17" (from 0) of a table."""
    content: dict[str, Any]
    """Of a pair: ``prompt, chosen, rejected`` (all text or all messages; with ``tools`` and
    ``chat_template_kwargs`` where given), or ``prompt_ids, chosen_ids, rejected_ids``. Of a prompt: ``prompt`` or
    ``prompt_ids``. Where the candidates of a row make no pair: ``prompt`` and ``responses`` as they are."""
    category: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """The row's other columns, as they are: selections carry them along."""
    candidates: Numbers = None
    """Numbers of chosen and rejected among the row's ``responses``; () where these make no pair."""


@dataclass(frozen=True)
class PairSource:
    """Re-iterable rows. Made by ``open_pairs``, ``open_prompts``, ``open_rows``."""

    name: str
    kind: str
    read: Callable[[int], Iterator[Raw]]
    """Raw rows from a position on."""
    identity: Callable[[], str]
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: Kind = PAIRS["chosen-against-all"]

    def __iter__(self) -> Iterator[Record]:
        return self.iter_from(0)

    def iter_from(self, start: int) -> Iterator[Record]:
        """Rows from position ``start`` on; what lies before is skipped without being parsed."""
        return itertools.chain.from_iterable(self.rows_from(start))

    def rows_from(self, start: int) -> Iterator[list[Record]]:
        """The same, the pairs of one row of the data together; at least one for each."""
        for index, (where, raw) in enumerate(self.read(start), start):
            try:
                yield list(_rows(index, where, raw, self.columns, self.rows))
            except DataError as error:
                raise DataError(f"{self.name}, {where}: {error}") from None

    def fingerprint(self) -> str:
        """sha256 of the stored bytes (for the hub: of what identifies the revision).

        Renaming columns does not change it.
        """
        return self.identity()

    def describe(self) -> str:
        """One line: what is read, and how."""
        renamed = ", ".join(f"{name}={theirs}" for name, theirs in self.columns.items())
        return f"{self.name} ({self.kind}{'; columns ' + renamed if renamed else ''})"


def row_id(content: Mapping[str, Any]) -> str:
    """Identity of a pair: a hash of its canonical content, wherever and in whatever format it lies.

    >>> row_id({"prompt": "p", "chosen": "a", "rejected": "b"})
    '8ad7972c3a7a43fe4ae5c60fb53bdb64'
    """
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def open_pairs(
    spec: str,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    pairing: Pairing | None = None,
) -> PairSource:
    """Opens preference pairs; see ``open_rows``. ``pairing``: of rows with candidates; default: chosen-against-all."""
    return open_rows(spec, split, columns, PAIRS[pairing or "chosen-against-all"])


def open_prompts(spec: str, split: str | None = None, columns: Mapping[str, str] | None = None) -> PairSource:
    """Opens prompts: ``prompt`` or ``prompt_ids``, preference pairs (their prompt is taken), lines of text."""
    return open_rows(spec, split, columns, PROMPTS)


def open_rows(spec: str, split: str | None, columns: Mapping[str, str] | None, rows: Kind) -> PairSource:
    """Opens rows of one kind and reads the first, so that a wrong file or column shows at once.

    Args:
      spec: a JSONL, JSON, Parquet, Arrow, CSV or text file, a ``save_to_disk`` folder, or ``owner/name``.
      split: which split, where the source has several (on the hub: "train" when not given).
      columns: canonical name -> name in the data, e.g. ``{"prompt": "instruction"}``; an empty name
        hides a column, a dot reaches into objects (``prompts.lookup``).
      rows: what the rows are.

    Raises:
      DataError: nothing there, an unknown format, no rows, or a first row that cannot be used.
    """
    return _source(f"{spec}:{split}" if split else spec, partial(_open, spec, split), columns, rows)


def rows_in_memory(
    rows: Any, columns: Mapping[str, str] | None = None, pairing: Pairing | None = None, name: str = "rows"
) -> PairSource:
    """Preference pairs that lie in memory; they are read as those of a file are.

    Args:
      rows: a list (or other iterable) of dicts, a ``datasets.Dataset`` or an Arrow table.
      columns: canonical name -> name in the data, as in ``open_rows``.
      pairing: of rows with candidates; default: chosen-against-all.
      name: of the rows, in messages.

    Raises:
      DataError: something else than rows, no rows, or a first row that cannot be used.
    """
    if hasattr(rows, "to_batches"):
        kind, read = "Arrow table", lambda start: _table_rows(rows.to_batches(), 0, start)
    elif hasattr(rows, "cache_files") and hasattr(rows, "features"):
        kind, read = "datasets.Dataset", lambda start: _read_dataset(rows, start)
    elif isinstance(rows, Iterable) and not isinstance(rows, str | bytes | Mapping):
        listed = list(rows)
        kind, read = "list", lambda start: ((f"row {i}", row) for i, row in enumerate(listed[start:], start))
    else:
        raise DataError(
            f"{name}: a {type(rows).__name__}; expected a list of dicts, a datasets.Dataset or an Arrow table "
            "(a file is scored with the verb score)"
        )

    def identity() -> str:
        return hashlib.sha256("\n".join(record.row_id for record in source).encode()).hexdigest()

    source = _source(name, lambda: (kind, read, identity), columns, PAIRS[pairing or "chosen-against-all"])
    return source


def _source(name: str, opened: Callable[[], "Opened"], columns: Mapping[str, str] | None, rows: Kind) -> PairSource:
    """A source whose names of columns and first row are checked."""
    columns = dict(columns or {})
    unknown = [n for n in columns if n not in rows.columns]
    if unknown:
        raise DataError(
            f"--columns {unknown[0]}={columns[unknown[0]]}: '{unknown[0]}' is not a column this "
            f"tool reads ({', '.join(rows.columns)}); write --columns prompt=NAME_IN_THE_DATA"
        )
    kind, read, identity = opened()
    source = PairSource(name, kind, read, identity, columns, rows)
    if next(iter(source), None) is None:
        raise DataError(f"{source.name}: no rows; expected {rows.name}, at least one")
    return source


def _rows(index: int, where: str, raw: Any, columns: Mapping[str, str], rows: Kind) -> Iterator[Record]:
    if not isinstance(raw, Mapping):
        raise DataError(f"a {type(raw).__name__} instead of an object with columns {', '.join(rows.columns[:3])}")
    category = lookup(raw, columns.get("category", "category"))
    category = None if category is None else str(category)
    for numbers, content in rows.contents(raw, columns):
        try:
            identity = row_id(content)
        except UnicodeEncodeError:
            raise DataError("a text holds half a surrogate pair (\\ud800...); expected Unicode") from None
        names = [n for n in rows.columns if numbers is not None or n not in CANDIDATE_COLUMNS]
        read = columns_read(raw, columns, names)
        extra = {str(name): value for name, value in raw.items() if name not in read}
        yield Record(index, identity, where, content, category, extra, numbers)


Opened = tuple[str, Callable[[int], Iterator[Raw]], Callable[[], str]]


def _open(spec: str, split: str | None) -> Opened:
    path = Path(spec)
    suffix = path.suffix.lower()
    if path.is_dir():
        return _open_folder(path, split)
    if not path.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", spec) and suffix not in _READERS:
            return _open_hub(spec, split or "train")
        raise DataError(f"{spec}: no such file or folder; expected {_FORMATS}")
    if suffix not in _READERS:
        raise DataError(f"{spec}: unknown format '{suffix}'; expected {_FORMATS}")
    if split is not None:
        raise DataError(f"{spec}: --split {split}, but a single file has no splits: leave --split out")
    if path.stat().st_size == 0:
        raise DataError(f"{spec}: the file is empty; expected at least one row")
    kind, read = _READERS[suffix]
    return kind, lambda start: read(path, start), lambda: _digest([path])


def _read_lines(path: Path, start: int) -> Iterator[Raw]:
    with path.open("rb") as file:
        numbered = ((n, line) for n, line in enumerate(file, 1) if line.strip(_BLANK))
        for number, line in itertools.islice(numbered, start, None):
            yield f"line {number}", _parse(path, f"line {number}", line)


def _parse(path: Path, where: str, text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, {where}: byte {error.start + 1} is not UTF-8; convert the file to UTF-8") from None
    except ValueError as error:
        fault = getattr(error, "msg", str(error))
        # Inside a JSON array the line is known to the parser only.
        line = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else where
        raise DataError(
            f"{path}, {where or line}: not JSON ({fault}); expected one JSON object per line, or "
            "one array of objects in a .json file"
        ) from None


def _read_json(path: Path, start: int) -> Iterator[Raw]:
    with path.open("rb") as file:
        first = next((line for line in file if line.strip(_BLANK)), b"")
    if not first.strip(_BLANK).startswith(b"["):
        yield from _read_lines(path, start)
        return
    rows = _parse(path, "", path.read_bytes())
    for index, row in enumerate(rows[start:], start):
        yield f"row {index}", row


def _read_text(path: Path, start: int) -> Iterator[Raw]:
    with path.open("rb") as file:
        numbered = ((n, line) for n, line in enumerate(file, 1) if line.strip(_BLANK))
        for number, line in itertools.islice(numbered, start, None):
            try:
                yield f"line {number}", {"prompt": line.decode("utf-8-sig").rstrip("\r\n")}
            except UnicodeDecodeError as error:
                fault = f"byte {error.start + 1} is not UTF-8; convert the file to UTF-8"
                raise DataError(f"{path}, line {number}: {fault}") from None


def _read_csv(path: Path, start: int) -> Iterator[Raw]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            for index, row in enumerate(csv.DictReader(file, restval=None, restkey=_TOO_MANY)):
                if _TOO_MANY in row:
                    raise DataError(f"{path}, row {index}: more fields than the first line names")
                if index >= start:
                    yield f"row {index}", row
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: not a readable CSV file in UTF-8 ({error})") from None


_TOO_MANY = "\0"
"""Name of the fields that have none."""


def _read_parquet(path: Path, start: int) -> Iterator[Raw]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            first = 0
            for group, size in enumerate(sizes):
                if first + size > start:
                    batches = file.iter_batches(_BATCH_ROWS, row_groups=[group])
                    yield from _table_rows(batches, first, start)
                first += size
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again") from None


def _read_arrow(path: Path, start: int) -> Iterator[Raw]:
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:  # datasets writes the streaming form
                file.seek(0)
                batches = iter(pa.ipc.open_stream(file))
            yield from _table_rows(batches, 0, start)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Arrow file ({error}); write it again") from None


def _table_rows(batches: Iterable[Any], first: int, start: int) -> Iterator[Raw]:
    """Rows of record batches, the first of which is row ``first``, from row ``start`` on."""
    for batch in batches:
        for offset in range(max(0, start - first), batch.num_rows, _BATCH_ROWS):
            rows = batch.slice(offset, _BATCH_ROWS).to_pylist()
            for index, row in enumerate(rows, first + offset):
                yield f"row {index}", row
        first += batch.num_rows


_READERS: dict[str, tuple[str, Callable[[Path, int], Iterator[Raw]]]] = {
    ".jsonl": ("JSON lines", _read_lines),
    ".ndjson": ("JSON lines", _read_lines),
    ".json": ("JSON", _read_json),
    ".parquet": ("Parquet", _read_parquet),
    ".arrow": ("Arrow", _read_arrow),
    ".csv": ("CSV", _read_csv),
    ".txt": ("text, a prompt per line", _read_text),
}


def _open_folder(path: Path, split: str | None) -> Opened:
    splits_file = path / "dataset_dict.json"
    if splits_file.exists():
        splits = json.loads(splits_file.read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            fault = f"no split '{split}'" if split else "several splits"
            raise DataError(f"{path}: {fault}; choose one with --split: {', '.join(splits)}")
        path = path / str(split)
    elif split is not None:
        raise DataError(f"{path}: --split {split}, but the folder holds one split: leave --split out")
    if not (path / "state.json").exists():
        raise DataError(
            f"{path}: a folder without dataset_dict.json or state.json; expected one written by "
            "datasets' save_to_disk, or name a file in it"
        )
    import datasets

    try:
        dataset = datasets.Dataset.load_from_disk(str(path))
    except Exception as error:
        raise DataError(f"{path}: datasets cannot load the folder ({error})") from error
    files = sorted(Path(f["filename"]) for f in dataset.cache_files)
    return (
        "save_to_disk folder",
        lambda start: _read_dataset(dataset, start),
        lambda: _digest(files),
    )


def _open_hub(name: str, split: str) -> Opened:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split)
    except Exception as error:
        raise DataError(
            f"{name}: no such file, and split '{split}' of a hub dataset of that name could not be "
            f"reached ({type(error).__name__}: {str(error).partition(chr(10))[0]}); give "
            " the path of a local file or folder"
        ) from error
    identity = f"{name}\n{split}\n{getattr(dataset, '_fingerprint', '')}"
    return (
        "hub dataset",
        lambda start: _read_dataset(dataset, start),
        lambda: hashlib.sha256(identity.encode()).hexdigest(),
    )


def _read_dataset(dataset: Any, start: int) -> Iterator[Raw]:
    for first in range(start, len(dataset), _BATCH_ROWS):
        batch = dataset[first : first + _BATCH_ROWS]  # a mapping of lists, decoded by its features
        for index, values in enumerate(zip(*batch.values(), strict=True), first):
            yield f"row {index}", dict(zip(batch, values, strict=True))


def _digest(files: Iterable[Path]) -> str:
    """sha256 of one file, or of the digests of several in order; streamed."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
