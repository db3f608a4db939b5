r"""JSON text of rows, most of which is texts: written value by value, since ``json.dumps`` takes twice as long.

The bytes are those of ``json.dumps(..., ensure_ascii=False)``.
"""

import json
import math
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring
from typing import Any

_CONTROL = bytes(range(32))
_STRING = frozenset({str})
_SHORT = 100
"""Letters up to which the encoder of the library is the faster one."""


PLAIN_TEXT = rb'"[^"\\\x00-\x1f]*(?:\\["\\bfnrt][^"\\\x00-\x1f]*)*"'
"""A text of JSON that is written as ``quoted`` writes it, as a pattern of bytes: these are UTF-8, and the few control
characters that are written by their number are left out."""


def quoted(text: str) -> bytes:
    r"""A text as JSON has it.

    >>> quoted('a "b"\n')
    b'"a \\"b\\"\\n"'

    Raises:
      UnicodeEncodeError: it holds half a surrogate pair.
    """
    raw = text.encode().replace(b"\\", b"\\\\").replace(b'"', b'\\"').replace(b"\n", b"\\n")
    # other control characters are rare
    return b'"%b"' % raw if len(raw.translate(None, _CONTROL)) == len(raw) else encode_basestring(text).encode()


def json_bytes(row: Mapping[str, Any]) -> bytes:
    r"""A row as one line of JSON, whatever its columns hold: dates and bytes as text, NaN as null.

    >>> json_bytes({"x": float("nan"), "y": "\ud800"})
    b'{"x": null, "y": "\\ud800"}\n'
    """
    if not _STRING.issuperset(map(type, row)):
        row = {str(k): v for k, v in row.items()}
    try:
        members = [f"{encode_basestring(k)}: {written(v)}" for k, v in row.items()]
        return f"{{{', '.join(members)}}}\n".encode()
    except UnicodeEncodeError:  # half a surrogate, which JSON can hold and UTF-8 cannot
        return f"{json.dumps(json_value(row))}\n".encode()


def json_value(value: Any) -> Any:
    """A value with only what JSON knows: numpy opened, dates as text, what is not finite as null.

    >>> json_value({1: (float("inf"), 2.5)})
    {'1': [None, 2.5]}
    """
    if isinstance(value, Mapping):
        return {str(k): json_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    if isinstance(value, float):  # numpy's float64 too
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return json_value(value.tolist()) if hasattr(value, "tolist") else str(value)


def written(value: Any) -> str:
    """A value of a row as ``json_bytes`` writes it."""
    return _WRITERS.get(type(value), _value)(value)


def _value(value: Any) -> str:
    return json.dumps(json_value(value), ensure_ascii=False)


def _text(value: str) -> str:
    return encode_basestring(value) if len(value) < _SHORT else quoted(value).decode()


def _number(value: float) -> str:
    return repr(value) if math.isfinite(value) else "null"


_WRITERS: dict[type, Callable[[Any], str]] = {str: _text, int: repr, float: _number}
