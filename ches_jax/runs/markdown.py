"""Text from outside in the Markdown of a card."""

import json
import re
from collections.abc import Mapping
from typing import Any


def cell(value: Any) -> str:
    r"""One line of a table, its own marks switched off.

    >>> cell("a|b"), cell([1, 2]), cell("")
    ('a\\|b', '\\[1, 2\\]', '(none)')
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split()) or "(none)"
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def table(rows: Mapping[str, Any]) -> list[str]:
    """The lines of a table of two columns without a heading; what is None is left out."""
    return ["| | |", "|---|---|", *(f"| {cell(k)} | {cell(v)} |" for k, v in rows.items() if v is not None)]
