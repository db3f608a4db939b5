"""One pass over what was scored: every row, checked, to the rows that are kept or to the others."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.data.prompts import TEXT_COLUMNS
from ches_jax.data.text_rows import TextRows
from ches_jax.errors import RunError
from ches_jax.runs.json_text import json_bytes, quoted, written
from ches_jax.scores.table import CANDIDATES, Scores
from ches_jax.select.config import SelectConfig
from ches_jax.select.scored_rows import Joining, Key, Rows, dropped_when_scored, row_ids, row_keys

BUFFER = 1 << 20
"""Bytes that are written at once."""
DROPPED = "dropped when scored"


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to each row of the table."""

    values: np.ndarray
    """The score, NaN where there is none."""
    kept: np.ndarray
    """True where the row is kept."""
    weights: np.ndarray | None
    soft: dict[str, float] | None
    repeats: Mapping[int, str] = field(default_factory=dict)
    """Positions of the rows that repeat an earlier one, and how."""


def write_rows(
    folder: Path, source: Iterable[Rows], table: Scores, decision: Decision, config: SelectConfig
) -> dict[str, Any]:
    """Writes ``pairs.jsonl`` and ``kept_ids.txt``, and ``dropped.jsonl``.

    Returns:
      A fingerprint of the source, how many rows were left out and why, and which of their columns gave way to ours.

    Raises:
      RunError: the rows are not those that were scored.
    """
    changed = f"{config.scores}: the pairs file changed since it was scored"
    not_scored = dropped_when_scored(config.scores)
    control = "" if config.control == "none" else f" ({config.control} control)"
    not_chosen = f"not in {config.keep} of {config.by}{control}"

    def why(position: int) -> str:
        """Why a row of the table is not kept."""
        unscored = math.isnan(decision.values[position])
        return decision.repeats.get(position) or ("unscored" if unscored else not_chosen)

    seen = np.zeros(len(table), dtype=bool)
    reasons: Counter[str] = Counter()
    replaced: set[str] = set()
    digest = hashlib.sha256()
    joining = Joining(table)
    with (
        open(folder / "pairs.jsonl", "wb", BUFFER) as pairs,
        open(folder / "kept_ids.txt", "wb", BUFFER) as kept_ids,
        open(folder / "dropped.jsonl", "wb", BUFFER) as dropped,
    ):
        for rows in source:
            keys, ids = row_keys(rows), row_ids(rows)
            digest.update("".join([f"{key[0]} {row_id}\n" for key, row_id in zip(keys, ids, strict=True)]).encode())
            positions, scored_ids = joining.places(rows)
            if ids != scored_ids:
                _require_scored(changed, zip(keys, ids, scored_ids, positions.tolist(), strict=True), not_scored)
            there = positions >= 0
            seen[positions[there]] = True
            kept = there & decision.kept[positions]
            lines, names = _kept_lines(rows, kept, positions[kept], decision, config)
            pairs.writelines(lines)
            replaced |= names
            kept_ids.write("".join([f"{row_id}\n" for row_id in compress(ids, kept)]).encode())
            left = [*zip(*(compress(column, ~kept) for column in (keys, ids, positions.tolist())), strict=True)]
            here = [DROPPED if position < 0 else why(position) for _, _, position in left]
            reasons.update(here)
            dropped.writelines(
                [
                    _dropped_line(key, row_id, f"{DROPPED}: {not_scored[key]}" if position < 0 else reason)
                    for (key, row_id, position), reason in zip(left, here, strict=True)
                ]
            )
    if not seen.all():
        missing = int(np.flatnonzero(~seen)[0])
        raise RunError(
            f"{changed}: {int((~seen).sum())} scored rows are not in it any more, "
            f"the first is row {table['index'][missing].as_py()} (row_id {table['row_id'][missing].as_py()})"
        )
    return {
        "fingerprint": f"sha256:{digest.hexdigest()}",
        "dropped": dict(sorted(reasons.items())),
        "replaced_columns": sorted(replaced),
    }


def _require_scored(changed: str, rows: Iterable[tuple[Key, str, str, int]], not_scored: Mapping[Key, str]) -> None:
    """Rows of the source, each with its id, its id in the table and its position there: all must be what was scored.

    Raises:
      RunError: names the first that is not.
    """
    for key, row_id, scored_id, position in rows:
        if position < 0 and key not in not_scored:
            raise RunError(
                f"{changed}: row {key[0]} (row_id {row_id}) was not in it; if rows were taken out of the table, select "
                "from the whole one"
            )
        if position >= 0 and scored_id != row_id:
            raise RunError(f"{changed}: row {key[0]} is {row_id}, the table has {scored_id}")


def _dropped_line(key: Key, row_id: str, reason: str) -> bytes:
    """The line of a row that is not kept."""
    index, numbers = key
    if numbers is None and row_id.isascii() and row_id.isalnum():  # nearly always
        return b'{"row_id": "%b", "index": %d, %b' % (row_id.encode(), index, _end(reason))
    return json_bytes({"row_id": row_id, "index": index, **_candidates(numbers), "reason": reason})


@lru_cache(64)
def _end(reason: str) -> bytes:
    return json_bytes({"reason": reason})[1:]


def _candidates(numbers: Sequence[int] | None) -> dict[str, int]:
    return dict(zip(CANDIDATES, numbers, strict=False)) if numbers else {}


def _kept_lines(
    rows: Rows, kept: np.ndarray, positions: np.ndarray, decision: Decision, config: SelectConfig
) -> tuple[Iterable[bytes], set[str]]:
    """The lines of those rows that are ``kept``, and which of their columns gave way to ours.

    Args:
      rows: the rows.
      kept: true where a row is kept, [rows].
      positions: where the kept ones stand in the table.
      decision: their scores and weights.
      config: names the score.
    """
    values = decision.values[positions].tolist()
    weights = None if decision.weights is None else decision.weights[positions].tolist()
    ours = {"row_id", config.by, *(["weight"] if weights is not None else [])}
    if isinstance(rows, TextRows):
        if ours.isdisjoint(rows.names):
            return _lines_of_texts(rows, kept, config.by, values, weights), set()
        some = _decoded(rows, kept)
    else:
        some = [
            (row.row_id, {**row.extra, **row.content}, row.category, row.candidates) for row in compress(rows, kept)
        ]
    lines, replaced = [], set()
    for at, (row_id, theirs, category, candidates) in enumerate(some):
        added = {"row_id": row_id, config.by: values[at], **_candidates(candidates)}
        if category is not None:
            added["category"] = category
        if weights is not None:
            added["weight"] = weights[at]
        replaced |= added.keys() & theirs.keys()
        lines.append(json_bytes({**theirs, **added}))
    return lines, replaced


def _carried(rows: TextRows) -> list[str]:
    """The columns of a line that is kept: what is carried along stands first."""
    return [*(name for name in rows.names if name not in (*TEXT_COLUMNS, "category")), *TEXT_COLUMNS]


def _lines_of_texts(
    rows: TextRows, kept: np.ndarray, by: str, values: Sequence[float], weights: Sequence[float] | None
) -> Iterator[bytes]:
    """The same of texts that have no column of ours: as they stand in their lines."""
    names = _carried(rows)
    members = b", ".join(b"%b: %%b" % quoted(name).replace(b"%", b"%%") for name in (*names, "row_id", by))
    ends = [b"}\n"] * len(values)
    if weights is not None:
        ends = [b', "weight": %b}\n' % written(weight).encode() for weight in weights]
    if "category" in rows.names:
        labels = rows.column("category", kept)
        ends = [end if c == b"null" else b', "category": %b%b' % (c, end) for c, end in zip(labels, ends, strict=True)]
    columns = [rows.column(name, kept) for name in names]
    columns.append([b'"%b"' % row_id.encode() for row_id in compress(rows.ids, kept)])
    columns.append([written(value).encode() for value in values])
    return map((b"{%b%%b" % members).__mod__, zip(*columns, ends, strict=True))


def _decoded(rows: TextRows, kept: np.ndarray) -> Iterator[tuple[str, dict[str, Any], str | None, None]]:
    """Texts that are kept, as values: id, columns, category and no candidates."""
    for row_id, row in zip(compress(rows.ids, kept), compress(rows.values, kept), strict=True):
        values = dict(zip(rows.names, map(json.loads, row), strict=True))
        yield row_id, {name: values[name] for name in _carried(rows)}, values.get("category"), None
