"""The score table: its columns, its provenance, and how it is written and read.

``scores.parquet`` holds one row per pair in input order; its schema metadata tells under the key
``ches_jax`` (JSON) how the numbers came to be. Tables join by ``row_id``, never by position.

A long run writes parts and merges them at its end. The bytes of the merged file depend on the rows
and the metadata alone, not on how the rows were cut into parts: row groups have a fixed size and no
time is stored.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ches_jax.errors import RunError
from ches_jax.runs.files import found_below, parquet_source, replacing
from ches_jax.runs.store import is_there, place

COLUMNS: dict[str, pa.DataType] = {
    "row_id": pa.string(),
    "index": pa.int64(),
    "chosen_candidate": pa.int32(),
    "rejected_candidate": pa.int32(),
    "ches": pa.float64(),
    "ln_ches": pa.float64(),
    "head_score": pa.float64(),
    "last_hidden_inner": pa.float64(),
    "cosine": pa.float64(),
    "edit_distance": pa.float64(),
    "inner": pa.float64(),
    "sqnorm_chosen": pa.float64(),
    "sqnorm_rejected": pa.float64(),
    "chosen_tokens": pa.int32(),
    "rejected_tokens": pa.int32(),
    "prompt_tokens": pa.int32(),
    "shared_prefix_tokens": pa.int32(),
    "logp_chosen": pa.float64(),
    "logp_rejected": pa.float64(),
    "grad_norm_chosen": pa.float64(),
    "grad_norm_rejected": pa.float64(),
    "grad_inner": pa.float64(),
    "grad_cosine": pa.float64(),
    "band_low": pa.float64(),
    "band_high": pa.float64(),
    "influence": pa.float64(),
    "from_chosen": pa.float64(),
    "from_rejected": pa.float64(),
    "flags": pa.list_(pa.string()),
    "category": pa.string(),
}
"""Every column a table can have. ``head_score``, ``logp_*`` and, of ``scores.gradients``, ``grad_*`` and ``band_*``
(null where the band has no such end) are there when asked, the ``*_candidate`` columns when
some row of the data has candidates, ``influence`` and its parts in tables of ``ches influence``; the scores of a row
that could not be scored (kept with a flag) are null."""

CANDIDATES = ("chosen_candidate", "rejected_candidate")
"""Which of the ``responses`` of row ``index`` of the data, from 0; null where that row is one pair."""

Place = tuple[int, int, int]
"""``index`` and ``CANDIDATES`` (-1 for null) of a row: they rise from row to row."""

FILE_NAME = "scores.parquet"
INFLUENCE = "influence.parquet"
"""The table of `ches influence`: the same rows, with what training on each does to others."""
FORECAST = "forecast.parquet"
"""The table of `ches forecast`."""
JOINED = {
    FORECAST: ("forecast_chosen", "forecast_rejected"),
    INFLUENCE: ("influence", "from_chosen", "from_rejected"),
}
"""Tables that may lie beside a run, and which of their columns are joined to its rows by ``row_id``."""
METADATA_KEY = b"ches_jax"
ROW_GROUP = 65_536
"""Rows of a row group: about 10 MB of numbers, so that writing and merging stay small in memory."""
BATCH = 8_192
"""Rows that are read at a time."""


def schema(columns: Iterable[str], metadata: Mapping[str, Any]) -> pa.Schema:
    """The schema of a table with ``columns`` (in the order of ``COLUMNS``) and its provenance.

    >>> schema(["index", "row_id", "ches"], {"eos": "include"}).names
    ['row_id', 'index', 'ches']
    """
    names = set(columns)
    problems = [f"unknown column {name!r}" for name in sorted(names - set(COLUMNS))]
    problems += [f"column {name!r} is missing" for name in ("row_id", "index") if name not in names]
    if problems:
        raise RunError(f"score table: {'; '.join(problems)} (columns: {', '.join(COLUMNS)})")
    text = json.dumps(dict(metadata), sort_keys=True, allow_nan=False)
    fields = [pa.field(name, kind) for name, kind in COLUMNS.items() if name in names]
    return pa.schema(fields, metadata={METADATA_KEY: text.encode()})


def metadata_of(table_schema: pa.Schema, subject: str) -> dict[str, Any]:
    """The provenance in a table's schema; ``subject`` names the file in messages."""
    raw = (table_schema.metadata or {}).get(METADATA_KEY)
    if raw is None:
        raise RunError(
            f"{subject}: not a score table (no {METADATA_KEY.decode()!r} metadata). One that another library wrote "
            "anew no longer says how it was scored: leave the table as it was, and put columns of your own into the "
            "data, where --by column:NAME reads them too"
        )
    try:
        metadata = json.loads(raw)
    except ValueError as error:
        raise RunError(f"{subject}: its metadata is damaged ({error})") from error
    if not isinstance(metadata, dict):
        raise RunError(f"{subject}: its metadata is damaged (expected a JSON object)")
    return metadata


class TableWriter:
    """Writes a table block by block; a context manager, the file appears when it ends well.

    Every row is checked as it passes: ``index`` (with the candidates, where a row of the data has several) strictly
    increases, so that each pair is there once, and no number is NaN or infinite (a score that could not be computed is
    null, and says so in ``flags``).
    """

    def __init__(self, path: Path | str, columns: Iterable[str], metadata: Mapping[str, Any]):
        self.path = place(path)
        self.schema = schema(columns, metadata)
        self._last = BEFORE_ALL
        self._waiting: list[pa.Table] = []

    def __enter__(self) -> "TableWriter":
        with ExitStack() as stack:
            temporary = stack.enter_context(replacing(self.path))
            # Statistics and versions are left at their defaults: none of them holds a time or a place.
            self._writer = pq.ParquetWriter(temporary, self.schema, compression="zstd")
            stack.push(self._finish)
            self._stack = stack.pop_all()
        return self

    def write(self, columns: Mapping[str, Any]) -> None:
        """Adds rows given as ``{column: list, numpy array or arrow array}``."""
        if set(columns) != set(self.schema.names):
            raise RunError(f"{self.path}: got columns {sorted(columns)}, expected {self.schema.names}")
        self.write_table(table_of(columns, self.schema))

    def write_table(self, block: pa.Table) -> None:
        """Adds the rows of an arrow table with this writer's columns."""
        self._last = check_rows(block, self._last, str(self.path))
        self._waiting.append(block)
        while sum(len(t) for t in self._waiting) >= ROW_GROUP:
            waiting = pa.concat_tables(self._waiting)
            self._flush(waiting.slice(0, ROW_GROUP))
            self._waiting = [waiting.slice(ROW_GROUP)]

    def _flush(self, rows: pa.Table) -> None:
        self._writer.write_table(rows.combine_chunks(), row_group_size=ROW_GROUP)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def _finish(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """The last rows and the end of the file; what fails here too leaves no temporary file."""
        try:
            if kind is None and sum(len(t) for t in self._waiting):
                self._flush(pa.concat_tables(self._waiting))
        finally:
            self._writer.close()


def table_of(columns: Mapping[str, Any], wanted: pa.Schema) -> pa.Table:
    """``{column: list, numpy array or arrow array}`` as a table of the given schema."""
    return pa.Table.from_arrays([_array(columns[field.name], field) for field in wanted], schema=wanted)


def _array(values: Any, field: pa.Field) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values.cast(field.type)
    try:
        return pa.array(values, type=field.type, from_pandas=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError, UnicodeEncodeError) as error:
        raise RunError(f"score table: column {field.name!r}: {error}") from error


BEFORE_ALL: Place = (-1, -1, -1)


def check_rows(block: pa.Table, last: Place, subject: str) -> Place:
    """The place of the last row of ``block``, whose rows must be finite and come after ``last``, in order."""
    places = np.full((len(block) + 1, 3), -1, np.int64)
    places[0] = last
    for k, name in enumerate(("index", *CANDIDATES)):
        if name in block.schema.names:
            places[1:, k] = block[name].fill_null(-1).to_numpy()
    steps = np.diff(places, axis=0)
    first = np.take_along_axis(steps, (steps != 0).argmax(1)[:, None], axis=1)[:, 0]  # 0 where all are equal
    if (bad := np.flatnonzero(first <= 0)).size:
        at = int(bad[0])
        here, before = (
            " ".join([str(index), *(f"(responses {c} and {r})" for _ in range(c >= 0))])
            for index, c, r in (places[at + 1].tolist(), places[at].tolist())
        )
        raise RunError(
            f"{subject}: row index {here} comes after {before}; every row must occur once, in the order of the input"
        )
    for name in block.schema.names:
        if not pa.types.is_floating(block.schema.field(name).type):
            continue
        wrong = ~np.isfinite(block[name].to_numpy()) & ~block[name].is_null().to_numpy()
        if wrong.any():
            row = block.slice(int(np.argmax(wrong)), 1).to_pylist()[0]
            raise RunError(
                f"{subject}: row index {row['index']} (row_id {row['row_id']}): "
                f"{name} is {row[name]}; a score must be finite, or null with a flag"
            )
    index, chosen, rejected = places[-1].tolist()
    return index, chosen, rejected


def write_part(path: Path | str, columns: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
    """Writes one part (or a whole small table) atomically."""
    with TableWriter(path, columns, metadata) as writer:
        writer.write(columns)


def merge_parts(parts: Sequence[Path | str], out: Path | str) -> int:
    """Joins parts, in the order given, into one table, a row group at a time.

    Returns:
      The number of rows.

    Raises:
      RunError: no parts, parts whose metadata or columns differ, a row twice or out of order.
    """
    if not parts:
        raise RunError(f"{out}: no parts to merge")
    with open_parquet(place(parts[0])) as file:
        first = file.schema_arrow
    metadata = metadata_of(first, str(parts[0]))
    rows = 0
    with TableWriter(out, [*first.names, *_candidate_columns(parts)], metadata) as writer:
        for part in parts:  # one open at a time: a long run has more parts than a process may have files
            with open_parquet(place(part)) as file:
                _check_agrees(part, file.schema_arrow, parts[0], first, metadata)
                for batch in _batches(file, part):
                    writer.write_table(with_columns(pa.Table.from_batches([batch]), writer.schema))
                rows += file.metadata.num_rows
    return rows


def _batches(file: pq.ParquetFile, path: Path | str, names: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, all when not given; what cannot be read is its damage, what its user raises is not."""
    try:
        for batch in file.iter_batches(BATCH, columns=names if names is None else [*names], use_threads=False):
            batch.validate(full=names is None)  # all of it when all of it is read, which is once
            yield batch
    except (pa.ArrowException, OSError, ValueError, SystemError) as error:
        raise RunError(f"{path}: is damaged ({error})") from error


def _candidate_columns(parts: Sequence[Path | str]) -> set[str]:
    """``CANDIDATES`` where some part has them: one without such a row does not."""
    present: set[str] = set()
    for part in parts:
        with open_parquet(place(part)) as file:
            present |= set(CANDIDATES) & set(file.schema_arrow.names)
    return present


def with_columns(block: pa.Table, wanted: pa.Schema) -> pa.Table:
    """The block with exactly the wanted columns; those it does not have are null."""
    columns = [
        block[field.name].cast(field.type) if field.name in block.schema.names else pa.nulls(len(block), field.type)
        for field in wanted
    ]
    return pa.Table.from_arrays(columns, schema=wanted)


def _check_agrees(
    part: Path | str,
    got: pa.Schema,
    reference: Path | str,
    want: pa.Schema,
    metadata: dict[str, Any],
) -> None:
    other = metadata_of(got, str(part))
    keys = sorted(k for k in {*other, *metadata} if other.get(k) != metadata.get(k))
    if keys:
        differing = "; ".join(f"{k}: {other.get(k)!r} and {metadata.get(k)!r}" for k in keys)
        raise RunError(f"{part}: was scored otherwise than {reference} ({differing})")
    # a chunk of the data without candidates has no columns for them
    mine, theirs = ([f for f in s if f.name not in CANDIDATES] for s in (got, want))
    if mine != theirs:
        raise RunError(f"{part}: has columns {got.names}, {reference} has {want.names}")


def open_parquet(path: Path) -> pq.ParquetFile:
    """A Parquet file of a run, opened and not read.

    Raises:
      RunError: it is missing, or none.
    """
    if not is_there(path):
        raise RunError(f"{path}: no such file")
    try:
        # what is read ahead is a second copy
        return pq.ParquetFile(parquet_source(path), pre_buffer=False, buffer_size=1 << 16)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: cannot be read as Parquet ({error})") from error


def table_path(run: Path | str) -> Path:
    """Where the table of a run is: the file itself, or ``scores.parquet`` or ``influence.parquet`` in its directory."""
    path = place(run)
    if not path.exists():
        raise RunError(f"{path}: no such file or directory; expected a directory of `ches score`")
    if is_there(path):
        return path
    for name in (FILE_NAME, INFLUENCE):
        if is_there(path / name):
            return path / name
    if is_there(path / FORECAST):
        raise RunError(
            f"{path}: a forecast, of what happens to each pair; what each one does to others is of `ches influence` "
            "with the same options, and its directory is read here"
        )
    there = found_below(path, FILE_NAME)
    raise RunError(f"{path}: no {FILE_NAME} in it; expected a directory of a finished `ches score`{there}")


def read_table(run: Path | str) -> tuple[pa.Table, dict[str, Any]]:
    """The score table of a run directory (or a Parquet file) in memory, and its provenance.

    Raises:
      RunError: missing, damaged, or not a table that this package wrote.
    """
    table = open_table(run)
    return pa.concat_tables([table.schema.empty_table(), *table.blocks(table.column_names)]), table.metadata


class StoredTable:
    """A score table that stays in its file: of a million rows a column is read where it is needed, and not kept.

    Made by ``open_table``. The file stays open: all columns are of one table, even where another takes its place.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = open_parquet(path)
        self.schema: pa.Schema = self._file.schema_arrow
        self.column_names: list[str] = self.schema.names
        self.metadata = metadata_of(self.schema, str(path))
        """The provenance."""

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array(
            [chunk for block in self.blocks([name]) for chunk in block[name].chunks], self.schema.field(name).type
        )

    def blocks(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """Some columns of all rows, ``BATCH`` at most at a time."""
        for batch in _batches(self._file, self._path, names):
            yield pa.Table.from_batches([batch]).select(names)

    def check(self) -> None:
        """Reads all rows of all columns once.

        Raises:
          RunError: they are damaged, or not a score table.
        """
        found, path = self.schema, self._path
        wrong = [
            f"{name} is {kind}, expected {COLUMNS[name]}"
            for name, kind in zip(found.names, found.types, strict=True)
            if name in COLUMNS and kind != COLUMNS[name]
        ]
        wrong += [f"{name} is missing" for name in ("row_id", "index") if name not in found.names]
        if wrong:
            raise RunError(f"{path}: not a score table ({'; '.join(wrong)})")
        last = BEFORE_ALL
        for batch in _batches(self._file, path):
            last = check_rows(pa.Table.from_batches([batch]), last, str(path))


Scores: TypeAlias = "pa.Table | StoredTable"
"""A score table, in memory or in its file."""


def open_table(run: Path | str) -> StoredTable:
    """The score table of a run directory (or a Parquet file), checked; its columns stay in the file.

    Raises:
      RunError: missing, damaged, or not a table that this package wrote.
    """
    table = StoredTable(table_path(run))
    table.check()
    return table


def blocks(table: Scores, names: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of all rows of a table, some rows at a time."""
    if isinstance(table, StoredTable):
        return table.blocks(names)
    some = table.select(names)
    return (some.slice(start, BATCH) for start in range(0, len(some), BATCH))


def rows_at(table: Scores, positions: Sequence[int] | np.ndarray, names: Sequence[str]) -> pa.Table:
    """Some columns of some rows, in the order of ``positions``."""
    wanted, back = np.unique(np.asarray(positions, np.int64), return_inverse=True)
    found, start = [pa.schema([table.schema.field(name) for name in names]).empty_table()], 0
    for block in blocks(table, names):
        low, high = np.searchsorted(wanted, [start, start + len(block)])
        found.append(block.take(wanted[low:high] - start))
        start += len(block)
    return pa.concat_tables(found).take(back)


def words(table: Scores, name: str) -> tuple[list[str], np.ndarray]:
    """The distinct texts of a column in order, "" for null, and for each row which of them it has, [rows].

    Of a column of lists, their texts with commas; of whole numbers, their digits.
    """
    places: dict[str, int] = {}
    codes, at = np.empty(len(table), dtype=np.int32), 0
    for block in blocks(table, [name]):
        column = block[name]
        if pa.types.is_list(column.type):
            column = pc.call_function("binary_join", [column, ", "])
        elif pa.types.is_integer(column.type):
            column = column.cast(pa.string())
        found = column.combine_chunks().dictionary_encode()
        texts = [*found.dictionary.to_pylist(), *[None][: found.null_count]]
        here = np.array([places.setdefault(text or "", len(places)) for text in texts] or [0], dtype=np.int32)
        codes[at : at + len(block)] = here[found.indices.fill_null(len(texts) - 1).to_numpy(zero_copy_only=False)]
        at += len(block)
    distinct = sorted(places)
    ordered = np.empty(len(places) or 1, dtype=np.min_scalar_type(len(places)))
    ordered[[places[text] for text in distinct]] = np.arange(len(places))
    return distinct, ordered[codes]


def align(left: pa.Table, right: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the rows that two tables share, by ``row_id``, in the order of ``left``.

    Rows with the same content have the same id: their copies are matched in order of occurrence.
    """
    if left["row_id"].equals(right["row_id"]):  # nearly always: a million ids need no table
        return np.arange(len(left)), np.arange(len(left))
    places: dict[str, list[int]] = {}
    for position, row_id in enumerate(right["row_id"].to_pylist()):
        places.setdefault(row_id, []).append(position)
    for rows in places.values():
        rows.reverse()
    pairs = [
        (position, places[row_id].pop())
        for position, row_id in enumerate(left["row_id"].to_pylist())
        if places.get(row_id)
    ]
    both = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]
