"""Tables of log-probabilities: two of `ches score --logps`, or one with columns before and after."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.displacement.changes import Changes
from ches_jax.errors import RunError
from ches_jax.runs.files import read_parquet

SIDES = ("chosen", "rejected")
COUNTS = ("prompt_tokens", "chosen_tokens", "rejected_tokens")
HELD_OUT = "the pairs are taken as held-out ones; if the model was trained on them, other pairs may have fallen"
ROUNDING = 1e-3
"""Nats above 0 that the log-probability of a response may have by rounding."""
ABOUT = ("row_id", "index", "chosen_tokens", "rejected_tokens", "category")


def read_score_tables(before: Path, after: Path, *, same_tokens: bool = False) -> Changes:
    """Two score tables with log-probabilities, matched by ``row_id`` (copies of a row in their order).

    Args:
      before: directory of `ches score --logps`, or its table.
      after: the same pairs with the second model.
      same_tokens: the caller has compared the tokens of every pair, so that the tokenizers' fingerprints do not matter.

    Raises:
      RunError: not score tables, without log-probabilities, scored by different rules (a change of the convention
        would look like a change of the model), or without a pair in common.
    """
    from ches_jax.scores.table import align, read_table

    tables, metadata = zip(*(read_table(folder) for folder in (before, after)), strict=True)
    for folder, table in zip((before, after), tables, strict=True):
        _require(folder, table.column_names, ("logp_chosen", "logp_rejected"))
    _require_same_rules(before, after, *metadata, same_tokens=same_tokens)
    i, j = align(*tables)
    if not len(i):
        raise RunError(f"{before} and {after} have no pair in common")
    first, second = tables[0].take(i), tables[1].take(j)
    for name in COUNTS:
        if name in first.column_names and name in second.column_names:
            differ = np.flatnonzero(_numbers(first, name) != _numbers(second, name))
            if differ.size:
                raise RunError(
                    f"{before} and {after} count different tokens ({name}) in {differ.size} of {len(i)} pairs, first "
                    f"in row_id {first['row_id'][int(differ[0])]}: their log-probabilities are of different events. "
                    "Score both models with the same tokenizer and options"
                )
    changes = [_numbers(second, f"logp_{side}") - _numbers(first, f"logp_{side}") for side in SIDES]
    unscored = np.isnan(changes[0]) | np.isnan(changes[1])
    null = _null(first) | _null(second)
    alone = len(tables[0]) + len(tables[1]) - 2 * len(i)
    caveats = (f"{alone} rows are in one table only",) if alone else ()
    if (unscored & null).any():
        caveats = (*caveats, f"{(unscored & null).sum()} pairs were not scored (kept with a flag) and are left out")
    take = ~(unscored & null)
    rows = {name: np.array(first[name].to_pylist())[take] for name in ABOUT if name in first.column_names}
    chosen, rejected = (change[take] for change in changes)
    start = _numbers(first, "logp_chosen")[take], _numbers(first, "logp_rejected")[take]
    index = _numbers(first, "index")[take]
    caveats = (*caveats, HELD_OUT)
    source = f"{before} to {after}"
    return Changes(chosen, rejected, source, caveats, index, held_out=True, rows=rows, start=start)


def _null(table: pa.Table) -> np.ndarray:
    return np.array(table["logp_chosen"].is_null()) | np.array(table["logp_rejected"].is_null())


def _require_same_rules(
    before: Path, after: Path, one: Mapping[str, Any], other: Mapping[str, Any], *, same_tokens: bool
) -> None:
    """Refuses tables of which a response's log-probability was counted, or computed, in two ways."""
    rules = [{**m.get("convention", {}), "dtype": m.get("dtype")} for m in (one, other)]
    differ = [
        f"--{name.replace('_', '-')} is {rules[0].get(name)} and {rules[1].get(name)}"
        for name in {**rules[0], **rules[1]}
        if rules[0].get(name) != rules[1].get(name)
    ]
    if not same_tokens and one.get("tokenizer_fingerprint") != other.get("tokenizer_fingerprint"):
        differ.append(
            "the tokenizers differ; where only their padding does, ches diagnose --before MODEL --after MODEL --pairs "
            "FILE compares the tokens themselves"
        )
    if differ:
        raise RunError(
            f"{before} and {after} were scored by different rules ({'; '.join(differ)}), so their log-probabilities "
            "cannot be compared; score both models with the same options"
        )


def read_logps(path: Path) -> Changes:
    """One table with log-probabilities before (TRL's reference columns) and after.

    Raises:
      RunError: not readable, without the columns, or with numbers in them that are no log-probabilities.
    """
    file = path / "scores.parquet" if path.is_dir() else path
    table = _read(file)
    names = [n for side in SIDES for n in (f"ref_{side}_logps", f"logp_{side}")]
    if {"logp_chosen", "logp_rejected"} <= {*table.column_names} and not {*names[::2]} & {*table.column_names}:
        raise RunError(
            f"{path}: log-probabilities of one model; changes take two: ches diagnose --before {path} --after "
            "THE_SAME_PAIRS_AFTER, or columns ref_chosen_logps and ref_rejected_logps with those before"
        )
    _require(file, table.column_names, names)
    null = np.any([np.array(table[name].is_null()) for name in names], axis=0)
    caveats = (f"{null.sum()} of {len(null)} pairs lack a log-probability and are left out", HELD_OUT)[not null.any() :]
    table = table.filter(pa.array(~null))
    for name in names:
        _require_logps(file, table, name)
    chosen, rejected = (_numbers(table, f"logp_{side}") - _numbers(table, f"ref_{side}_logps") for side in SIDES)
    rows = {name: np.array(table[name].to_pylist()) for name in ABOUT if name in table.column_names}
    start = _numbers(table, "ref_chosen_logps"), _numbers(table, "ref_rejected_logps")
    records = rows.get("index")
    if records is not None and records.dtype.kind not in "iu":
        raise RunError(f"{file}: column index is {table['index'].type}; expected the row of the data, whole numbers")
    return Changes(chosen, rejected, str(path), caveats, records, held_out=True, rows=rows, start=start)


def _read(file: Path) -> pa.Table:
    """Such a table: Parquet, CSV or lines of JSON, as its name says."""
    expected = "log-probabilities before and after"
    if file.suffix not in (".csv", ".jsonl"):
        return read_parquet(file, RunError, expected)
    from pyarrow import csv, json

    try:
        return csv.read_csv(file) if file.suffix == ".csv" else json.read_json(file)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{file}: cannot be read ({error}); expected {expected}") from None


def _require_logps(file: Path, table: pa.Table, name: str) -> None:
    """Refuses a column of text, and one of losses or of probabilities: of these a fall would look like a rise."""
    kind = table[name].type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise RunError(f"{file}: column {name} is {kind}; expected numbers")
    values = _numbers(table, name)
    if (above := np.flatnonzero(values > ROUNDING)).size:
        row = int(above[0])
        raise RunError(
            f"{file}: {name} is {values[row]:g} in row {row} and above 0 in {above.size} of {len(values)}; no "
            "log-probability of a response is. Losses have the other sign; probabilities need their logarithm"
        )


def _require(file: Path, columns: Sequence[str], names: Sequence[str]) -> None:
    missing = [n for n in names if n not in columns]
    if missing:
        raise RunError(f"{file}: no column {', '.join(missing)}; score with --logps")


def _numbers(table: Any, name: str) -> np.ndarray:
    """A column as an array; null is NaN."""
    return table[name].to_numpy()
