"""From a score run back to what was scored: its ``run.json``, its dropped rows, the rows themselves."""

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa

from ches_jax.data.sources import blocks_of_run, pairs_of_run
from ches_jax.data.text_rows import TextRows, Understood
from ches_jax.errors import RunError
from ches_jax.runs.chunks import read_lines
from ches_jax.runs.directory import CONFIG, RUN, read_json
from ches_jax.scores.table import CANDIDATES, Scores, blocks, table_path


class SourceRow(Understood, Protocol):
    """A row of the pairs as ``data.sources`` gives it."""

    @property
    def index(self) -> int: ...


Rows: TypeAlias = "TextRows | Sequence[SourceRow]"
"""Some rows of the source, one after another."""

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


def row_keys(rows: Rows) -> list[Key]:
    """The keys of rows of the source."""
    if isinstance(rows, TextRows):
        return [(index, None) for index in rows.index.tolist()]
    return [(row.index, row.candidates or None) for row in rows]


def row_ids(rows: Rows) -> list[str]:
    """The ids of rows of the source."""
    return rows.ids if isinstance(rows, TextRows) else [row.row_id for row in rows]


def keys(table: pa.Table) -> list[Key]:
    """The key of each row of a score table, or of a table of token scores."""
    columns = [table[n].to_pylist() if n in table.schema.names else [None] * len(table) for n in CANDIDATES]
    return [
        (index, None if chosen is None else (chosen, rejected))
        for index, chosen, rejected in zip(table["index"].to_pylist(), *columns, strict=True)
    ]


@dataclass
class _Scored:
    """Some rows of a table that are looked for."""

    positions: np.ndarray
    """Where they stand among all rows, [rows]."""
    rows: pa.Table
    """Their ``row_id`` and what their keys are made of."""

    @cached_property
    def ids(self) -> list[str]:
        return self.rows["row_id"].to_pylist()

    @cached_property
    def index(self) -> np.ndarray:
        return self.rows["index"].to_numpy()

    @cached_property
    def alone(self) -> np.ndarray:
        """Where the row of the source is one pair."""
        first = CANDIDATES[0]
        return (
            self.rows[first].is_null().to_numpy() if first in self.rows.schema.names else np.ones(len(self.index), bool)
        )

    @cached_property
    def keys(self) -> list[tuple[int, tuple[int, ...]]]:
        return [(index, candidates or ()) for index, candidates in keys(self.rows)]


_END = _Scored(np.array([-1]), pa.table({"row_id": [""], "index": [sys.maxsize]}))
"""Behind the last row of a table."""


def _scored(table: Scores, shown: np.ndarray | None) -> Iterator[_Scored]:
    read = [name for name in ("row_id", "index", *CANDIDATES) if name in table.schema.names]
    first = 0
    for block in blocks(table, read):
        positions = np.arange(first, first + len(block))
        first += len(block)
        if shown is not None:
            places = np.flatnonzero(shown[positions])
            positions, block = positions[places], block.take(places)
        if len(positions):
            yield _Scored(positions, block)


class Joining:
    """Finds rows of the source, in their order, in a table.

    Both rise by ``Key``, so that one pass over both finds every pair, whatever their number.
    """

    def __init__(self, table: Scores, shown: np.ndarray | None = None):
        """``shown``: the rows of the table that are looked for, [rows]; all when not given."""
        self._blocks = _scored(table, shown)
        self._pass()

    def _pass(self) -> None:
        """Goes to the next block."""
        self._block, self._at = next(self._blocks, _END), 0

    def places(self, rows: Rows) -> tuple[np.ndarray, list[str]]:
        """The position in the table of each row (-1 where it is not there), and its id there."""
        if isinstance(rows, TextRows):
            return self._of_texts(rows.index)
        found = [self.place(row) for row in rows]
        return np.array([-1 if at is None else at for at, _ in found], np.int64), [row_id for _, row_id in found]

    def place(self, row: SourceRow) -> tuple[int | None, str]:
        """The same of one row; None where it is not there."""
        mine = (row.index, row.candidates or ())
        while self._block.keys[self._at] < mine:
            self._at += 1
            if self._at == len(self._block.positions):
                self._pass()
        if self._block.keys[self._at] == mine:
            return int(self._block.positions[self._at]), self._block.ids[self._at]
        return None, ""

    def _of_texts(self, index: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """``places`` of rows that are one pair each."""
        positions, ids = np.full(len(index), -1), [""] * len(index)
        while True:
            block, begin = self._block, self._at
            self._at = end = max(begin, int(np.searchsorted(block.index, index[-1], "right")))
            there = block.index[begin:end]
            places = np.searchsorted(index, there)
            found = (index[places] == there) & block.alone[begin:end]
            places = places[found]
            positions[places] = block.positions[begin:end][found]
            if found.all() and len(places) and places[-1] - places[0] + 1 == len(places):
                ids[places[0] : places[-1] + 1] = block.ids[begin:end]
            else:
                for place, at in zip(places.tolist(), (np.flatnonzero(found) + begin).tolist(), strict=True):
                    ids[place] = block.ids[at]
            if end < len(block.positions):
                return positions, ids
            self._pass()


def joined(
    rows: Iterable[SourceRow], table: Scores, shown: np.ndarray | None = None
) -> Iterator[tuple[SourceRow, int | None, str]]:
    """Rows of the source in their order, each with its position in the table (None: not there) and its id there."""
    joining = Joining(table, shown)
    return ((row, *joining.place(row)) for row in rows)


def _candidates(numbers: Any) -> tuple[int, ...] | None:
    return None if numbers is None else tuple(int(number) for number in numbers)


def source_rows(config: Where, read: Collection[str] = ()) -> Iterator[SourceRow]:
    """The rows that were scored, from the source that the run or the configuration names.

    Args:
      config: names the source.
      read: columns that the caller reads itself.
    """
    return itertools.chain.from_iterable(pairs_of_run(_options(config), read))


def source_blocks(config: Where, read: Collection[str] = (), wanted: bytes | None = None) -> Iterator[Rows]:
    """The same, some rows at a time.

    Args:
      config: names the source.
      read: columns that the caller reads itself.
      wanted: 1 at the positions of the rows that are wanted; all where it is not given.
    """
    return blocks_of_run(_options(config), read, wanted)


def _options(config: Where) -> dict[str, Any]:
    """What the run says of the source, and the configuration in its place."""
    scored = read_run(config.scores).get("config") or {}
    pairs = config.pairs or scored.get("pairs")
    if not pairs:
        raise RunError(f"{config.scores}: no run.json names the pairs that were scored; pass --pairs")
    columns = config.columns or scored.get("columns")
    how = {"pairs": pairs, "split": config.split or scored.get("split"), "columns": columns}
    # the schema of the run is not that of columns with other names
    return {**scored, **how, **({"schema": "auto"} if columns else {})}
