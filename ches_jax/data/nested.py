"""Lists and objects in one another: how deep they may lie, and those that are written as text in a cell.

'["1+1?"]'     ["1+1?"]
"[sic]"        "[sic]"
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

_PRINTED = re.compile(r"\s*(?:array\()?\[?\s*\{'(?:role|content|from|value)'\s*:")
_OBJECTS = (dict, Mapping)
"""The type of most first: whether a value is some Mapping takes longer to tell."""
_NESTED = (dict, list, tuple, Mapping)
_FLAT = frozenset({str, int, float, bool, type(None)})
"""Types of values that hold no others."""
DEEPEST = 100
"""How deep lists and objects of a row may lie in one another: what is done with them goes down as deep."""


def decoded(value: Any) -> Any:
    """A list or an object that is written as JSON text, or turns as Python prints them; anything else as it is.

    >>> decoded('["a", "b"]'), decoded("[sic]"), decoded("[{'role': 'user', 'content': 'hi'}]")
    (['a', 'b'], '[sic]', [{'role': 'user', 'content': 'hi'}])
    """
    if isinstance(value, str) and value[:1] in "[{" and value.rstrip()[-1:] in ("]", "}"):
        read = ast.literal_eval if is_printed_conversation(value) else json.loads
        try:
            inner = read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return value
        return inner if within_depth(inner) else value
    return value


def is_printed_conversation(text: str) -> bool:
    """Whether a text begins as Python prints messages: what a table of text makes of them."""
    return _PRINTED.match(text) is not None


def within_depth(value: Any, most: int = DEEPEST) -> bool:
    """Whether lists and objects lie in one another no more than so many deep.

    >>> within_depth([[]], 2), within_depth([[[]]], 2)
    (True, False)
    """
    if type(value) in _FLAT or not isinstance(value, _NESTED):
        return True  # texts first: most values are, and asking whether one is a Mapping takes long
    inside = value.values() if isinstance(value, _OBJECTS) else value
    return most > 0 and (_FLAT.issuperset(map(type, inside)) or all(within_depth(part, most - 1) for part in inside))
