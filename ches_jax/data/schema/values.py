"""Cells of a data set as text or messages: JSON text, ``from``/``value`` messages, one message instead of a list."""

import json
from collections.abc import Mapping
from typing import Any

from ches_jax.data.prompts import lookup
from ches_jax.errors import DataError

ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant",
    "chatgpt": "assistant", "bot": "assistant", "model": "assistant", "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function": "function",
}  # fmt: skip
"""Names of the speakers in published data -> the role that chat templates know."""
_MAX_JSON = 1 << 24


def cell(row: Mapping[str, Any], path: str) -> Any:
    """The value at ``path`` of a row, as text, messages, numbers or lists of these."""
    return normal(lookup(row, path))


def normal(value: Any) -> Any:
    """A value with its messages brought to ``role`` and ``content``; JSON text that holds messages is parsed.

    >>> normal('[{"from": "human", "value": "hi"}]')
    [{'role': 'user', 'content': 'hi'}]
    """
    if isinstance(value, str) and value[:1] in "[{" and value[-1:] in "]}":
        parsed = parse_json(value)
        return value if parsed is None or not _all_messages(parsed) else normal(parsed)
    if isinstance(value, Mapping):
        return _message(value)
    if isinstance(value, list):
        return [normal(part) if isinstance(part, Mapping | list) else part for part in value]
    return value


def parse_json(text: str) -> Any:
    """A list or an object that a text holds; None where it holds none."""
    if not 2 <= len(text) <= _MAX_JSON or text.strip()[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def as_conversation(name: str, value: Any) -> list[dict[str, Any]]:
    """Text or messages as messages; a text is the user's in ``prompt`` and the assistant's elsewhere.

    Raises:
      DataError: something else.
    """
    if isinstance(value, str):
        return [{"role": "user" if name == "prompt" else "assistant", "content": value}]
    if is_message(value):
        return [dict(value)]
    if isinstance(value, list) and value and all(is_message(m) for m in value):
        return [dict(m) for m in value]
    raise DataError(f"'{name}' is a {type(value).__name__}; expected text or messages")


def is_message(value: Any) -> bool:
    """Whether a value is a message, in either of the two ways of writing one."""
    return isinstance(value, Mapping) and (("role" in value and _has_content(value)) or {"from", "value"} <= value.keys())


def is_conversation(value: Any) -> bool:
    """Whether a value is a list of messages with more than an assistant's answer in it."""
    return isinstance(value, list) and bool(value) and all(is_message(m) for m in value) and (
        len(value) > 1 or normal(value[0]).get("role") != "assistant"
    )  # fmt: skip


def is_text(value: Any) -> bool:
    """Whether a value can be a prompt or a response: text, a message, messages, or JSON text of these."""
    if isinstance(value, str):
        return True
    return is_message(value) or (isinstance(value, list) and bool(value) and all(is_message(m) for m in value))


def is_number(value: Any) -> bool:
    """Whether a value is a number, or a text that writes one."""
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) or (isinstance(value, str) and number(value) is not None)


def number(value: Any) -> float | None:
    """The finite number a value is or writes; None where it is none."""
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return result if abs(result) < float("inf") else None


def _has_content(value: Mapping[str, Any]) -> bool:
    return isinstance(value.get("content"), str | list) or bool(value.get("tool_calls"))


def _all_messages(value: Any) -> bool:
    return is_message(value) or (isinstance(value, list) and bool(value) and all(is_message(m) for m in value))


def _message(value: Mapping[str, Any]) -> dict[str, Any]:
    if "role" not in value and {"from", "value"} <= value.keys():
        rest = {k: v for k, v in value.items() if k not in ("from", "value")}
        value = {"role": value["from"], "content": value["value"], **rest}
    role = value.get("role")
    if isinstance(role, str):
        return {**value, "role": ROLES.get(role.lower(), role)}
    return dict(value)
