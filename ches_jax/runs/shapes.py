"""What a value of a JSON file has to look like, before anything is made of it: a run directory may come from anyone.

A shape is written as the value it describes:

    str, bool, int     of that type; an int has 64 bits
    float              a finite number
    object             anything
    (shape, None)      such a value, or null
    [shape]            a list of such values
    {str: shape}       an object of such values, under any names
    {"name": shape}    an object that has these names; ``"name?"`` may be absent or null, names beside them are free
"""

import json
import math
from pathlib import Path
from typing import Any

from ches_jax.errors import ChesError
from ches_jax.runs.files import read_text

Shape = Any


def misfit(value: Any, shape: Shape, where: str = "") -> str | None:
    """What of a value is not as its shape says, with the place; None where all is.

    >>> misfit({"counts": {"rows": "3"}}, {"counts": {str: int}, "note?": str})
    'counts.rows is text; expected a whole number'
    """
    if isinstance(shape, tuple):
        return None if value is None else misfit(value, shape[0], where)
    if isinstance(shape, list):
        if not isinstance(value, list):
            return _not(value, where, "a list")
        inner = [(shape[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            return _not(value, where, "an object")
        if str in shape:
            inner = [(shape[str], item, _below(where, name)) for name, item in value.items()]
        else:
            inner = []
            for word, kind in shape.items():
                name = word.removesuffix("?")
                if value.get(name) is not None:
                    inner.append((kind, value[name], _below(where, name)))
                elif name == word and not (name in value and isinstance(kind, tuple)):
                    return f"{_below(where, name)} is missing"
    else:
        return None if _is(value, shape) else _not(value, where, _WORDS[shape])
    return next((problem for kind, item, place in inner if (problem := misfit(item, kind, place))), None)


_WORDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    object: "anything",
}


def _is(value: Any, kind: type) -> bool:
    if kind is object:
        return True
    if kind in (str, bool):
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if kind is int:
        return isinstance(value, int) and -(2**63) <= value < 2**63
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**1023


def _not(value: Any, where: str, expected: str) -> str:
    found = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return f"{where or 'the value'} is {found.get(type(value), 'null')}; expected {expected}"


def _below(where: str, name: str) -> str:
    return f"{where}.{name[:60]}" if where else name[:60]


def require_shape(path: Path, value: Any, shape: Shape, error: type[ChesError]) -> Any:
    """The value, which was read from ``path``.

    Raises:
      error: it has another shape; names the place.
    """
    if (problem := misfit(value, shape)) is not None:
        raise error(f"{path}: is damaged, or not written by this program: {problem}")
    return value


def read_json_lines(path: Path, shape: Shape, error: type[ChesError]) -> list[Any]:
    """The objects of a file of JSON lines, each of one shape; empty lines are passed over.

    Raises:
      error: it cannot be read, or a line is of another shape; names the line.
    """
    rows = []
    for number, line in enumerate(read_text(path, error, "JSON lines").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise error(f"{path}, line {number}: not valid JSON; expected one JSON object on each line") from None
        if (problem := misfit(row, shape)) is not None:
            raise error(f"{path}, line {number}: {problem}; expected one JSON object on each line")
        rows.append(row)
    return rows
