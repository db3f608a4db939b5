"""What the values of columns say: whether they are responses, numbers, flags, labels, lists."""

from collections.abc import Mapping, Sequence
from typing import Any

from ches_jax.data.nested import decoded
from ches_jax.data.prompts import lookup
from ches_jax.data.schema.values import are_turns, turns, word
from ches_jax.errors import DataError

Rows = Sequence[Mapping[str, Any]]
TIED = ("tie", "tied", "draw")
LONGEST_LABEL = 40
"""Most letters of a label."""


def has_any(rows: Rows, name: str) -> bool:
    return any(is_filled(lookup(row, name)) for row in rows)


def is_filled(value: Any) -> bool:
    if isinstance(value, list):
        return any(v is not None for v in value)
    return value is not None


def are_responses(rows: Rows, name: str, several: bool = False) -> bool:
    values = [v for row in rows if (v := turns(decoded(row.get(name)))) is not None]
    return (
        bool(values)
        and all(isinstance(v, str) or are_turns(v) or is_texts(v) or (several and isinstance(v, list)) for v in values)
        and not (several and all(isinstance(v, str) and is_numeric(v) for v in values))
    )


def are_lists(rows: Rows, name: str) -> bool:
    values = [v for r in rows if (v := decoded(lookup(r, name))) is not None]
    return bool(values) and all(isinstance(v, list) and not all(m is None for m in v) for v in values)


def say_something(rows: Rows, name: str) -> bool:
    """Whether a column holds texts of several words, or turns."""
    values = [decoded(r.get(name)) for r in rows if is_filled(r.get(name))]
    return any((isinstance(v, str) and len(v.split()) > 2) or (isinstance(v, list) and v) for v in values)


def are_whole(rows: Rows, name: str, many: bool = False) -> bool:
    """Whether responses are conversations with the user's turn, which hold their prompt."""
    values = [v for row in rows if (v := turns(decoded(lookup(row, name)))) is not None]
    values = [v[0] for v in values if isinstance(v, list) and v] if many else values
    return bool(values) and all(
        (isinstance(v, list) and are_turns(v) and any(m["role"] == "user" for m in v))
        or (isinstance(v, str) and v.lstrip().startswith("Human:"))
        for v in values
    )


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def is_numeric(value: Any) -> bool:
    try:
        return value is not None and not isinstance(value, list | Mapping) and float(value) == float(value)
    except (TypeError, ValueError):
        return False


def are_numbers(rows: Rows, name: str) -> bool:
    """Whether a column holds numbers, but for single cells that make their rows unreadable."""
    values = [r[name] for r in rows if r.get(name) is not None]
    return bool(values) and sum(map(is_numeric, values)) * 2 >= len(values)


def are_flags(rows: Rows, name: str) -> bool:
    values = [r[name] for r in rows if r.get(name) is not None]
    return bool(values) and all(word(v) in ("0", "1", "true", "false", "yes", "no") for v in values)


def are_labels(rows: Rows, name: str) -> bool:
    """Whether a column holds one short label a row."""
    values = [r[name] for r in rows if r.get(name) is not None]
    return bool(values) and all(
        isinstance(v, bool | int | float) or (isinstance(v, str) and len(v) <= LONGEST_LABEL) for v in values
    )


def two_readings(one: str, two: str, choice: str) -> DataError:
    return DataError(f"two readings: {one}, or {two}; choose with {choice}")
