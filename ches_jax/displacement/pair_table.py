"""The pairs of a diagnosis, one a row: their changes, joined with scores of the first model, forecast and influence."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ches_jax.data.messages import side_text
from ches_jax.data.sources import pairs_of_run
from ches_jax.displacement.changes import Changes, regimes
from ches_jax.errors import ChesError, RunError
from ches_jax.runs.directory import CONFIG, read_json
from ches_jax.runs.files import read_parquet, replacing
from ches_jax.scores.table import JOINED

FILE_NAME = "pairs.parquet"
SCORES = ("head_score", "ches", "ln_ches", "last_hidden_inner", "cosine", "edit_distance")
WORST = 10
TEXT = 80
"""Characters of a text in a line of the terminal."""


def pair_table(
    changes: Changes, tolerance: float, tables: Sequence[Path] = (), texts: Mapping[str, Any] | None = None
) -> pa.Table:
    """The pairs of a diagnosis, held-out and training ones, those whose chosen response fell most first.

    Args:
      changes: of pairs, with ``rows``.
      tolerance: of the regimes, nats.
      tables: runs of `ches score` on the first model, and tables with forecasts or influences.
      texts: ``row_id`` -> prompt, chosen and rejected as text.

    Raises:
      ChesError: a table that cannot be read, or shares no pair with the changes.
    """
    columns: dict[str, list[Any]] = {}
    for part in (changes, changes.beside):
        if part is None or part.unit != "pairs":
            continue
        count = len(part.chosen)
        rows = {name: np.asarray(values).tolist() for name, values in (part.rows or {}).items()}
        rows.setdefault("index", list(range(count)))
        block = {
            "row_id": rows.pop("row_id", [None] * count),
            **rows,
            "set": ["held_out" if part.held_out else "train"] * count,
            "dlogp_chosen": part.chosen.tolist(),
            "dlogp_rejected": part.rejected.tolist(),
            "dmargin": (part.chosen - part.rejected).tolist(),
            "regime": regimes(part.chosen, part.rejected, tolerance).tolist(),
        }
        done = len(columns.get("set", []))
        for name in {**columns, **block}:
            values = columns.setdefault(name, [None] * done)
            values += block.get(name, [None] * count)
    for path in tables:
        _join(columns, path)
    for side in ("prompt", "chosen", "rejected") if texts else ():
        columns[side] = [(texts or {}).get(r, {}).get(side) for r in columns["row_id"]]
    order = np.argsort(columns["dlogp_chosen"], kind="stable")
    return pa.table({name: [values[i] for i in order] for name, values in columns.items()})


def _join(columns: dict[str, list[Any]], path: Path) -> None:
    table, names = _joined_table(path)
    if "row_id" not in table.column_names:
        raise ChesError(f"{path}: no column row_id to join by")
    ids = table["row_id"].to_pylist()
    where = {row_id: i for i, row_id in reversed(list(enumerate(ids)))}
    places = [where.get(row_id) for row_id in columns["row_id"]]
    if not any(place is not None for place in places):
        raise ChesError(f"{path}: has no pair in common with the ones that are diagnosed; was it of other pairs?")
    for name in names:
        if name in table.column_names:
            values = table[name].to_pylist()
            columns[name] = [None if place is None else values[place] for place in places]


def _joined_table(path: Path) -> tuple[pa.Table, Sequence[str]]:
    names = {"scores.parquet": SCORES, **JOINED}
    file = path
    if path.is_dir():
        file = next((path / name for name in names if (path / name).is_file()), path)
        if file == path:
            raise ChesError(f"{path}: none of {', '.join(names)} in it")
    table = read_parquet(file, ChesError, "scores, forecasts or influences")
    wanted = names.get(file.name, [*SCORES, *itertools.chain(*JOINED.values())])
    if not set(wanted) & set(table.column_names):
        raise ChesError(f"{file}: has none of the columns {', '.join(wanted)}")
    return table, wanted


def found_tables(folder: Path) -> list[Path]:
    """Forecasts and influences that lie in a run's directory."""
    return [folder / name for name in JOINED if (folder / name).is_file()]


def worst_rows(table: pa.Table) -> tuple[Mapping[str, Any], ...]:
    """The pairs that fell most, held-out ones where there are any, in a few words each."""
    held_out = np.flatnonzero(pc.call_function("equal", [table["set"], "held_out"]).to_numpy())
    shown = table.take(held_out[:WORST]) if len(held_out) else table.slice(0, WORST)
    return tuple(
        {
            "row_id": row["row_id"],
            "index": row["index"],
            "set": row["set"],
            "chosen": row["dlogp_chosen"],
            "rejected": row["dlogp_rejected"],
            "text": in_a_line(row.get("chosen") or ""),
            **{name: row[name] for name in (*SCORES, *itertools.chain(*JOINED.values())) if row.get(name) is not None},
        }
        for row in shown.to_pylist()
    )


def in_a_line(text: str) -> str:
    r"""A text as it stands in a line of the terminal: control characters as spaces, cut.

    >>> in_a_line("one\n\x1b[31mtwo")
    '"one  [31mtwo"'
    """
    if not text:
        return ""
    plain = "".join(c if c.isprintable() else " " for c in text)
    return f'"{plain[:TEXT]}{"..." if len(plain) > TEXT else ""}"'


def read_texts(source: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """``row_id`` -> texts and category of the pairs that a run's options name; empty where they cannot be read."""
    if not source.get("pairs"):
        return {}
    try:
        rows = itertools.chain.from_iterable(pairs_of_run(source))
        return {
            row.row_id: {
                **{side: side_text(row.content, side) for side in SIDES},
                "category": row.category or "",
            }
            for row in rows
        }
    except (ChesError, OSError):
        return {}


SIDES = ("prompt", "chosen", "rejected")


def source_of(folder: Path) -> Mapping[str, Any]:
    """The options of the run in a directory that name its pairs."""
    try:
        return read_json(folder / CONFIG).get("config") or read_json(folder / CONFIG)
    except (RunError, OSError, ValueError):
        return {}


def write_pairs(table: pa.Table, out: Path) -> Path:
    """``pairs.parquet`` in a directory that may be there."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / FILE_NAME) as temporary:
        pq.write_table(table, temporary, compression="zstd")
    return out / FILE_NAME
