"""Logs in JSON: ``trainer_state.json``, lists and lines of entries, and what a trainer prints."""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ches_jax.displacement.readers.log import Log, log_of
from ches_jax.displacement.readers.metric_names import metric
from ches_jax.errors import ChesError

ONE_ENTRY = "one entry"
PRINTED = re.compile(r"\{['\"][^{}]*\}")
"""An entry as transformers prints it to the console, among progress bars and other lines."""


def read_json_log(path: Path, text: str, held_out: str | None = None) -> Log:
    """A log of JSON or of printed entries, by its content.

    - an object with ``log_history``: ``trainer_state.json`` of transformers, TRL and what is built on them;
    - a list of entries, or one object: histories of Weights & Biases or trackio, ``wandb-summary.json``;
    - an object of columns, ``{metric: [numbers]}`` or ``{metric: {row: number}}``: tables that pandas wrote;
    - an entry a line: ms-swift, LLaMA-Factory, verl, open-instruct, metrics of our own runs;
    - what a trainer printed: ``{'loss': 0.69, ...}`` among other lines.

    Raises:
      ChesError: none of these; cut off in the middle.
    """
    entries, kind, notes = _entries(path, text)
    settings = next((e["config"] for e in entries if isinstance(e.get("config"), Mapping)), {})
    return log_of(f"{path} ({kind})", entries, held_out=held_out, settings=settings, notes=notes)


def _entries(path: Path, text: str) -> tuple[list[Mapping[str, Any]], str, tuple[str, ...]]:
    whole = _whole(text)
    if isinstance(whole, Mapping) and isinstance(whole.get("log_history"), list):
        return [e for e in whole["log_history"] if isinstance(e, Mapping)], "trainer_state.json", ()
    if isinstance(whole, Mapping) and "log_history" in whole:
        raise ChesError(f"{path}: log_history is no list of entries; is the file written by transformers?")
    if isinstance(whole, Mapping) and (columns := _columns(whole)):
        return columns, "JSON, by column", ()
    if isinstance(whole, Mapping):
        return [whole], ONE_ENTRY, ()
    if isinstance(whole, list):
        entries = [e for e in whole if isinstance(e, Mapping)]
        if len(entries) < len(whole):
            raise ChesError(f"{path}: a list in which {len(whole) - len(entries)} items are no objects")
        return entries, "JSON", ()
    lines = [line for line in text.splitlines() if line.strip()]
    parsed = [_whole(line) for line in lines]
    objects = [e for e in parsed if isinstance(e, Mapping)]
    if objects and len(objects) >= len(lines) - 1:
        if len(objects) == len(lines):
            return objects, "JSON lines", ()
        if not isinstance(parsed[-1], Mapping):
            return objects, "JSON lines", ("its last line is cut off and was left out",)
    if objects:
        bad = next(i for i, e in enumerate(parsed) if not isinstance(e, Mapping))
        raise ChesError(f"{path}: entry {bad + 1} of {len(lines)} is no JSON object; is the file damaged?")
    if re.match(r"\s*(\[\s*\{|\{\s*\")", text):
        more = ". An earlier checkpoint-*/trainer_state.json may be whole" if '"log_history"' in text else ""
        raise ChesError(
            f"{path}: cut off after {len(text)} characters (line {text.count(chr(10)) + 1}), or damaged: JSON that "
            f"does not end{more}"
        )
    printed = [e for printed_dict in PRINTED.findall(text) if (e := _printed(printed_dict)) is not None]
    if printed:
        return printed, "printed entries", ()
    raise ChesError(f"{path}: neither JSON, nor CSV, nor printed entries of a trainer")


def _columns(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of an object of columns; empty where it is none.

    >>> _columns({"step": [1, 2], "loss": {"0": 0.7, "1": 0.6}})
    []
    >>> _columns({"step": {"0": 1, "1": 2}, "loss": {"1": 0.6}})
    [{'step': 1}, {'step': 2, 'loss': 0.6}]
    """
    columns: dict[str, Mapping[Any, Any]] = {}
    for name, column in table.items():
        if isinstance(column, list):
            column = dict(enumerate(column))
        if not isinstance(column, Mapping) or any(isinstance(cell, (Mapping, list)) for cell in column.values()):
            return []
        columns[name] = column
    rows = dict.fromkeys(row for column in columns.values() for row in column)
    if len({type(row) for row in rows}) > 1:  # a list beside an object
        return []
    if not rows or not any(metric(name) for name in columns):
        return []
    return [{name: column[row] for name, column in columns.items() if row in column} for row in rows]


def _whole(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _printed(text: str) -> Mapping[str, Any] | None:
    try:
        value = ast.literal_eval(_literal(text))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, dict) else None


def _literal(text: str) -> str:
    """A printed entry with NaN, infinity and scalars of numpy and torch in words that Python reads back.

    >>> _literal("{'loss': nan, 'a': np.float64(0.5), 'b': tensor(0.25, device='cuda:0'), 'c': -inf}")
    "{'loss': 'nan', 'a': 0.5, 'b': 0.25, 'c': -1e999}"
    """
    text = re.sub(r"\b(?:np|numpy|jnp)\.\w+\(([^(),]*)\)|\b(?:tensor|Array)\(([^(),]*)(?:,[^()]*)?\)", r"\1\2", text)
    text = re.sub(r"(?<=[\s:(])nan\b", "'nan'", text)
    return re.sub(r"(?<=[\s:(-])inf\b", "1e999", text)
