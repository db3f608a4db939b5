"""Text from outside in the Markdown of a card."""

import json
import re
from collections.abc import Mapping
from typing import Any


def cell(value: Any) -> str:
    r"""One line of a table, its own marks switched off; of a record its names and values.

    >>> cell("a|b"), cell([1, 2]), cell(""), cell({"name": "sgd", "momentum": 0.5})
    ('a\\|b', '\\[1, 2\\]', '(none)', 'name sgd, momentum 0.5')
    """
    text = ", ".join(f"{k} {_text(v)}" for k, v in value.items()) if isinstance(value, Mapping) else _text(value)
    text = " ".join(text.split()) or "(none)"
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def table(rows: Mapping[str, Any]) -> list[str]:
    """The lines of a table of two columns without a heading; what is None is left out."""
    return ["| | |", "|---|---|", *(f"| {cell(k)} | {cell(v)} |" for k, v in rows.items() if v is not None)]
