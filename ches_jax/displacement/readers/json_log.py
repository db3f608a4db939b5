"""Logs in JSON: ``trainer_state.json``, lists and lines of entries, and what a trainer prints."""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ches_jax.displacement.readers.log import Log, NotALogError, log_of, tag_of_download
from ches_jax.displacement.readers.metric_names import STEPS, metric
from ches_jax.errors import ChesError

ONE_ENTRY = "one entry"
SETTINGS = ("config", "hparams")
"""Hyper-parameters beside the metrics, in what marin and levanter write."""
PRINTED = re.compile(r"\{['\"][^{}]*\}")
"""An entry as transformers prints it to the console, among progress bars and other lines."""
NUMBER = r"[-+]?(?:\d+\.?\d*(?:[eE][-+]?\d+)?|[nN]a[nN]|[iI]nf(?:inity)?)\b"
NAMED = re.compile(rf"([A-Za-z_][\w/.-]*)\s*[:=]\s*(?:\w+\.\w+\()?({NUMBER})")
"""A metric as verl (``step:3 - val/loss:0.7``), torchtune (``Step 3 | loss:0.7 ...``) and other loops print it."""
PRINTED_STEP = re.compile(r"\b(?:global[ _])?(?:step|iter(?:ation)?)\b\W{0,3}(\d+)", re.IGNORECASE)


def read_json_log(path: Path, text: str, held_out: str | None = None) -> Log:
    """A log of JSON or of printed entries, by its content.

    - an object with ``log_history``: ``trainer_state.json`` of transformers, TRL and what is built on them;
    - an object with one list of entries, under any name;
    - a list of entries, or one object: histories of Weights & Biases or trackio, ``wandb-summary.json``;
    - an object of columns, ``{metric: [numbers]}`` or ``{metric: {row: number}}``: tables that pandas wrote;
    - an entry a line: ms-swift, LLaMA-Factory, verl, open-instruct, metrics of our own runs;
    - what a trainer printed: ``{'loss': 0.69, ...}`` or ``step:3 - loss:0.69 - ...`` among other lines.

    Raises:
      ChesError: none of these; cut off in the middle.
    """
    entries, kind, notes = _entries(path, text)
    settings = next((e[n] for e in entries for n in SETTINGS if isinstance(e.get(n), Mapping)), {})
    entries = [{n: v for n, v in e.items() if n not in SETTINGS} for e in entries]
    return log_of(f"{path} ({kind})", entries, held_out=held_out, settings=settings, notes=notes)


def _entries(path: Path, text: str) -> tuple[list[Mapping[str, Any]], str, tuple[str, ...]]:
    whole = _whole(text)
    if isinstance(whole, Mapping) and isinstance(whole.get("log_history"), list):
        return [e for e in whole["log_history"] if isinstance(e, Mapping)], "log of transformers", ()
    if isinstance(whole, Mapping) and "log_history" in whole:
        raise ChesError(f"{path}: log_history is no list of entries; is the file written by transformers?")
    if isinstance(whole, Mapping) and (columns := _columns(whole)):
        return columns, "JSON, by column", ()
    if isinstance(whole, Mapping) and (inside := _entries_inside(whole)):
        settings = {name: whole[name] for name in SETTINGS if name in whole}
        return [{**inside[0], **settings}, *inside[1:]], "JSON", ()
    if isinstance(whole, Mapping):
        return [whole], ONE_ENTRY, ()
    if isinstance(whole, list) and whole and all(map(_is_point, whole)):
        tag = tag_of_download(path)
        return [{"step": step, tag: value} for _, step, value in whole], "JSON of TensorBoard", ()
    if isinstance(whole, list):
        entries = [e for e in whole if isinstance(e, Mapping)]
        if len(entries) < len(whole):
            raise ChesError(f"{path}: a list in which {len(whole) - len(entries)} items are no objects")
        return entries, "JSON", ()
    if entries := _of_lines(path, text):
        return entries
    stream, left = _stream(text)
    if len(stream) > 1:
        notes = ("its last entry is cut off and was left out",) if left else ()
        return stream, "JSON entries", notes
    if re.match(r"\s*(\[\s*\{|\{\s*\")", text):
        more = ". An earlier checkpoint-*/trainer_state.json may be whole" if '"log_history"' in text else ""
        raise ChesError(
            f"{path}: cut off after {len(text)} characters (line {text.count(chr(10)) + 1}), or damaged: JSON that "
            f"does not end{more}"
        )
    if printed := _of_messages(text) or _printed_dicts(text) or _printed_names(text):
        return printed, "printed entries", ()
    raise NotALogError(f"{path}: neither JSON, nor CSV, nor printed entries of a trainer")


def _is_point(item: Any) -> bool:
    """Whether an item is time, step and value: a chart that TensorBoard saved is a list of these."""
    return isinstance(item, list) and len(item) == 3 and all(isinstance(n, (int, float)) for n in item)


def _of_lines(path: Path, text: str) -> tuple[list[Mapping[str, Any]], str, tuple[str, ...]] | None:
    """An object a line, among lines that are none; None where no line is an object."""
    lines = [line for line in text.splitlines() if line.lstrip().startswith('{"')]
    parsed = [_whole(line) for line in lines]
    objects = [e for e in parsed if isinstance(e, Mapping)]
    if not objects:
        return None
    if len(objects) == len(lines):
        return objects, "JSON lines", ()
    if len(objects) == len(lines) - 1 and parsed[-1] is None:
        return objects, "JSON lines", ("its last line is cut off and was left out",)
    bad = next(i for i, e in enumerate(parsed) if not isinstance(e, Mapping))
    raise ChesError(f"{path}: entry {bad + 1} of {len(lines)} is no JSON object; is the file damaged?")


def _stream(text: str) -> tuple[list[Mapping[str, Any]], str]:
    """Objects one after the other, each perhaps over several lines; and what is left behind the last whole one."""
    out: list[Mapping[str, Any]] = []
    rest = text.lstrip()
    while rest.startswith("{"):
        try:
            entry, end = json.JSONDecoder().raw_decode(rest)
        except (ValueError, RecursionError):
            break
        out.append(entry)
        rest = rest[end:].lstrip().removeprefix(",").lstrip()
    return out, rest


def _of_messages(text: str) -> list[Mapping[str, Any]]:
    """JSON objects behind the time and the name of a logger, as levanter's json_logger writes them."""
    found = [_whole(line[at:]) for line in text.splitlines() if (at := line.find('{"')) > 0]
    return [e for e in found if isinstance(e, Mapping)]


def _printed_dicts(text: str) -> list[Mapping[str, Any]]:
    return [e for found in PRINTED.findall(text) if (e := _printed(found)) is not None]


def _printed_names(text: str) -> list[Mapping[str, Any]]:
    r"""Lines of names and numbers. A line without a step belongs to the last that has one.

    >>> _printed_names("Step 3/9\n * loss: 0.7\n * Chosen reward = -0.2")
    [{'step': 3, 'loss': 0.7}]
    >>> _printed_names("(pid=7) step:4 - val/rewards/chosen:np.float64(-0.5) - lr:1e-06")
    [{'step': 4, 'pid': 7.0, 'val/rewards/chosen': -0.5, 'lr': 1e-06}]
    """
    out: list[Mapping[str, Any]] = []
    step: int | None = None
    for line in text.splitlines():
        if at := PRINTED_STEP.search(line):
            step = int(at[1])
        found = {name: float(value) for name, value in NAMED.findall(line) if name.lower() not in STEPS}
        if any(metric(name) for name in found):
            out.append(found if step is None else {"step": step, **found})
    return out


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


def _entries_inside(whole: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries that an object holds under one of its names, beside settings; empty where none or several do.

    >>> _entries_inside({"args": {"lr": 1}, "history": [{"step": 1, "loss": 0.7}], "files": [{"name": "a"}]})
    [{'step': 1, 'loss': 0.7}]
    """
    lists = [v for v in whole.values() if isinstance(v, list) and v and all(isinstance(e, Mapping) for e in v)]
    logs = [entries for entries in lists if any(metric(name) for entry in entries for name in entry)]
    return logs[0] if len(logs) == 1 else []


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
