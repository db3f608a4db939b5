"""Cells of a row as values: turns of any shape as messages, numbers in text.

{"from": "human", "value": "1+1?"}   {"role": "user", "content": "1+1?"}
"-2.0"                               -2.0
"""

import math
from collections.abc import Mapping
from typing import Any

from ches_jax.data.messages import kind
from ches_jax.data.nested import decoded
from ches_jax.errors import DataError

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function")},
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "llm": "assistant",
    "observation": "tool",
}
"""Words for the speaker of a turn, in small letters, -> the role."""
_TURNS = (("from", "value"), ("role", "value"), ("role", "text"))
"""Keys of a turn's speaker and of what it says, where they are not ``role`` and ``content``."""


def turns(value: Any) -> Any:
    """A turn or turns under any of the usual keys as messages; anything else as it is.

    >>> turns([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}])
    [{'role': 'user', 'content': 'hi'}, {'role': 'assistant', 'content': 'hello'}]
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return [turns(part) for part in value] if any(isinstance(part, Mapping | list) for part in value) else value
    if not isinstance(value, Mapping):
        return value
    for name in ("messages", "conversations", "conversation"):
        if set(value) == {name} and isinstance(value[name], list):
            return turns(value[name])
    for speaker, said in _TURNS:
        if isinstance(value.get(speaker), str) and said in value and "content" not in value:
            others = {k: v for k, v in value.items() if k not in (speaker, said)}
            value = {"role": value[speaker], "content": value[said], **others}
    if not isinstance(role := value.get("role"), str):
        return value
    if role == "function_call" and (calls := _calls(value.get("content"))):
        return {**{k: v for k, v in value.items() if k != "content"}, "role": "assistant", "tool_calls": calls}
    return {**value, "role": ROLES[role.lower()]} if role.lower() in ROLES else value


def _calls(content: Any) -> list[Any]:
    """Calls of tools that are the text of a turn, as sharegpt has them; none where it is something else."""
    said = decoded(content)
    listed = said if isinstance(said, list) else [said]
    if not all(isinstance(c, Mapping) and isinstance(c.get("name"), str) for c in listed):
        return []
    return [{"type": "function", "function": c} for c in listed]


def are_turns(value: Any) -> bool:
    """Whether a value is a message or a list of messages, after ``turns``."""
    parts = value if isinstance(value, list) else [value]
    return bool(parts) and all(isinstance(p, Mapping) and isinstance(p.get("role"), str) for p in parts)


def are_pairs_of_turns(value: Any) -> bool:
    """Whether a value lists pairs of texts: what was asked, and what was answered."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, list) and len(v) == 2 and all(isinstance(t, str) for t in v) for v in value)
    )


def number(name: str, value: Any) -> float:
    """A finite number, which may be written as text.

    Raises:
      DataError: it is none.
    """
    try:
        parsed = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        parsed = math.nan
    if not math.isfinite(parsed):
        raise DataError(f"'{name}' is {kind(value)}; expected a finite number")
    return parsed


def word(value: Any) -> str:
    """A label as a word: of ``1``, ``1.0``, ``"1"`` and ``" 1 "`` the same.

    >>> word(1.0), word(" Model_A "), word(True)
    ('1', 'model_a', 'true')
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower()
    try:
        return str(int(float(text))) if float(text).is_integer() else text
    except (ValueError, OverflowError):
        return text
