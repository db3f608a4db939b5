"""Logs in JSON: ``trainer_state.json``, lists and lines of entries, and what a trainer prints."""

import ast
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ches_jax.displacement.readers.log import Log, log_of
from ches_jax.errors import ChesError

PRINTED = re.compile(r"\{['\"][^{}]*['\"]: [^{}]*\}")
"""An entry as transformers prints it to the console, among progress bars and other lines."""


def read_json_log(path: Path, text: str, held_out: str | None = None) -> Log:
    """A log of JSON or of printed entries, by its content.

    - an object with ``log_history``: ``trainer_state.json`` of transformers, TRL and what is built on them;
    - a list of entries, or one object: histories of Weights & Biases or trackio, ``wandb-summary.json``;
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
    if isinstance(whole, Mapping):
        return [whole], "one entry", ()
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
    if '"log_history"' in text:
        raise ChesError(
            f"{path}: cut off after {len(text)} characters (line {text.count(chr(10)) + 1}): a trainer_state.json that "
            "does not end. An earlier checkpoint-*/trainer_state.json may be whole"
        )
    if objects:
        bad = next(i for i, e in enumerate(parsed) if not isinstance(e, Mapping))
        raise ChesError(f"{path}: entry {bad + 1} of {len(lines)} is no JSON object; is the file damaged?")
    printed = [e for printed_dict in PRINTED.findall(text) if (e := _printed(printed_dict)) is not None]
    if printed:
        return printed, "printed entries", ()
    raise ChesError(f"{path}: neither JSON, nor CSV, nor printed entries of a trainer")


def _whole(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _printed(text: str) -> Mapping[str, Any] | None:
    try:
        value = ast.literal_eval(re.sub(r"\b(nan|inf)\b", "None", text))
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, dict) else None
