"""From a score run back to what was scored: its ``run.json``, its dropped rows, the rows themselves."""

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from ches_jax.data.sources import pairs_of_run
from ches_jax.errors import RunError
from ches_jax.runs.chunks import read_lines
from ches_jax.runs.directory import CONFIG, RUN, read_json
from ches_jax.scores.table import CANDIDATES, Scores, blocks, table_path


class SourceRow(Protocol):
    """A row of the pairs as ``data.sources`` gives it."""

    @property
    def index(self) -> int: ...
    @property
    def row_id(self) -> str: ...
    @property
    def content(self) -> Mapping[str, Any]: ...
    @property
    def extra(self) -> Mapping[str, Any]: ...
    @property
    def category(self) -> str | None: ...
    @property
    def candidates(self) -> tuple[int, ...] | None: ...


Key = tuple[int, tuple[int, ...] | None]
"""What tells a pair from all others of its source: the index of its row, and which of the row's candidates it is."""


class Where(Protocol):
    """What ``source_rows`` reads of a configuration: the run, and what to use in place of what it tells."""

    @property
    def scores(self) -> Path: ...
    @property
    def pairs(self) -> str | None: ...
    @property
    def split(self) -> str | None: ...
    @property
    def columns(self) -> Mapping[str, str]: ...


def read_run(scores: Path | str) -> dict[str, Any]:
    """The ``run.json`` beside a score table, with its ``config``; empty when there is neither."""
    folder = table_path(scores).parent
    run = read_json(folder / RUN) if (folder / RUN).is_file() else {}
    if not run.get("config") and (folder / CONFIG).is_file():
        run["config"] = read_json(folder / CONFIG)
    return run


def dropped_when_scored(scores: Path | str) -> dict[Key, str]:
    """Reasons by ``Key`` of the pairs that the score run dropped (``data.audit.dropped_record``)."""
    path = table_path(scores).with_name("dropped.jsonl")
    if not path.is_file():
        return {}
    try:
        rows = read_lines(path)
        return {(int(r["index"]), _candidates(r.get("candidates"))): ", ".join(r["reasons"]) for r in rows}
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise RunError(f"{path}: is damaged ({error!r})") from None


def key_of(row: SourceRow) -> Key:
    """The key of a row of the source."""
    return row.index, row.candidates or None


def keys(table: pa.Table) -> list[Key]:
    """The key of each row of a score table, or of a table of token scores."""
    columns = [table[n].to_pylist() if n in table.schema.names else [None] * len(table) for n in CANDIDATES]
    return [
        (index, None if chosen is None else (chosen, rejected))
        for index, chosen, rejected in zip(table["index"].to_pylist(), *columns, strict=True)
    ]


def joined(
    rows: Iterable[SourceRow], table: Scores, shown: np.ndarray | None = None
) -> Iterator[tuple[SourceRow, int | None, str]]:
    """Rows of the source in their order, each with its position in the table (None where it is not) and its id there.

    Both rise by ``Key``, so that one pass over both finds every pair, whatever their number. ``shown``: the rows of the
    table that are looked for, [rows]; all when not given.
    """
    scored = _keys_with_ids(table, shown)
    at, there, row_id = next(scored, _END)
    for row in rows:
        mine = (row.index, row.candidates or ())
        while there < mine:
            at, there, row_id = next(scored, _END)
        yield (row, at, row_id) if there == mine else (row, None, "")


_END = (-1, (sys.maxsize, ()), "")
"""Behind the last row of a table."""
_BLOCK = 4096


def _keys_with_ids(table: Scores, shown: np.ndarray | None) -> Iterator[tuple[int, tuple[int, tuple[int, ...]], str]]:
    """By row, some at a time: where it stands among all, its key, and its ``row_id``."""
    read = [name for name in ("row_id", "index", *CANDIDATES) if name in table.schema.names]
    first = 0
    for many in blocks(table, read):
        for start in range(0, len(many), _BLOCK):
            block = many.slice(start, _BLOCK)
            positions = np.arange(first, first + len(block))
            if shown is not None:
                positions = positions[shown[positions]]
                block = block.take(positions - first)
            first += min(_BLOCK, len(many) - start)
            places = ((index, candidates or ()) for index, candidates in keys(block))
            yield from zip(positions.tolist(), places, block["row_id"].to_pylist(), strict=True)


def _candidates(numbers: Any) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(int(number) for number in numbers)


def source_rows(config: Where, read: Collection[str] = (), wanted: bytes | None = None) -> Iterator[SourceRow]:
    """The rows that were scored, from the source that the run or the configuration names.

    Args:
      config: names the source.
      read: columns that the caller reads itself.
      wanted: 1 at the positions of the rows that are wanted; all where it is not given.
    """
    scored = read_run(config.scores).get("config") or {}
    pairs = config.pairs or scored.get("pairs")
    if not pairs:
        raise RunError(f"{config.scores}: no run.json names the pairs that were scored; pass --pairs")
    columns = config.columns or scored.get("columns")
    how = {"pairs": pairs, "split": config.split or scored.get("split"), "columns": columns}
    # the schema of the run is not that of columns with other names
    options = {**scored, **how, **({"schema": "auto"} if columns else {})}
    return itertools.chain.from_iterable(pairs_of_run(options, read, wanted))
