"""Messages of a conversation: an object with a role and a text, whatever shape a data set gives them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ches_jax.data.nested import decoded
from ches_jax.data.two_prompts import prompts_in
from ches_jax.errors import DataError

Message = dict[str, Any]

NOT_AN_ANSWER = frozenset({"system", "developer", "user"})
"""Roles of messages that no response begins with."""
RESULTS = frozenset({"tool", "function", "observation", "ipython", "tool_response"})
"""Roles of what a tool answered: no response ends with one."""
SYSTEM = frozenset({"system", "developer"})
_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
"""Types of a part that is text, as chat templates and the APIs of model providers write them."""
_SEEN_OR_HEARD = ("image", "audio", "video")
_OTHER_PLACES = {
    "tool_use": ", or write it as 'tool_calls' of the message, as chat templates read it",
    "tool_result": ", or write it as a message of the role 'tool', as chat templates read it",
    "thinking": ", or write it as 'reasoning_content' of the message, as chat templates read it",
}
"""Where chat templates read what some APIs write as a part: the end of a message about it."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a thought beside a text: what chat templates read, and what some APIs call it."""
_CALLS = ("tool_calls", "function_call")
"""Keys of calls of tools; the second is the older one, of a single call."""


def as_messages(name: str, value: Any) -> list[Message]:
    """A conversation with contents as text.

    >>> as_messages("prompt", [{"role": "user", "content": [{"type": "text", "text": "1+1?"}]}])
    [{'role': 'user', 'content': '1+1?'}]

    Args:
      name: of the column; a text in ``prompt`` is the user's, any other the assistant's.
      value: text, one message, messages, or one object of lists (an older feature of ``datasets``).

    Raises:
      DataError: something else, or a message that holds more than text.
    """
    if isinstance(value, str):
        return [{"role": "user" if name == "prompt" else "assistant", "content": value}]
    if isinstance(value, Mapping) and isinstance(value.get("role"), list):
        count = len(value["role"])
        if odd := [str(k) for k, v in value.items() if not isinstance(v, list) or len(v) != count]:
            raise DataError(f"'{name}': {odd[0]!r} is no list of as many values as 'role' has ({count})")
        value = [{key: values[i] for key, values in value.items()} for i in range(count)]
    elif is_message(value):
        value = [value]
    if not isinstance(value, list) or not all(is_message(m) for m in value):
        _require_contents(name, value)
        raise DataError(
            f"'{name}' is {kind(value)}; expected text or a list of messages with 'role' and 'content' (several "
            "responses go into a column 'responses', the preferred one first)"
        )
    return [_readable(f"'{name}', message {number}", without_nulls(m)) for number, m in enumerate(value)]


def is_message(value: Any) -> bool:
    """Whether a value is an object with a role, and with a content or calls of tools."""
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("role"), str)
        and (isinstance(value.get("content"), str | list) or any(value.get(name) for name in _CALLS))
    )


def text_of(message: Message) -> str:
    """The text of a message; empty where it only calls tools."""
    return str(message.get("content") or "")


def texts_in(value: Any) -> Iterator[str]:
    """All texts of messages: what is said, thought and called, but for the roles.

    >>> list(texts_in([{"role": "assistant", "content": "2", "tool_calls": [{"name": "add"}]}]))
    ['2', 'add']
    """
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inside in value.items():
            yield from () if key == "role" else texts_in(inside)
    elif isinstance(value, list | tuple):
        for inside in value:
            yield from texts_in(inside)


def as_parts(message: Message) -> Message:
    """The message with its content as a list of one part, as some templates want it."""
    return {**message, "content": [{"type": "text", "text": text_of(message)}]} if "content" in message else message


def says_nothing(text: str) -> bool:
    r"""Whether a text is empty, or white space alone.

    >>> says_nothing(" \n"), says_nothing(" 2")
    (True, False)
    """
    return not text or text.isspace()


def same(left: Message, right: Message) -> bool:
    r"""Whether two messages say the same: role and text; line ends, outer white space and other keys do not count.

    >>> same({"role": "user", "content": "a\r\nb "}, {"role": "user", "content": "a\nb", "id": 7})
    True
    """
    return left["role"] == right["role"] and plain(left) == plain(right) and _calls(left) == _calls(right)


def plain(message: Message) -> str:
    """The text of a message for comparison."""
    return plain_text(text_of(message))


def plain_text(text: str) -> str:
    r"""A text for comparison: line ends as \\n, no white space at ends of lines and text."""
    return "\n".join(line.rstrip() for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n")).strip()


def common(left: Sequence[Message], right: Sequence[Message]) -> int:
    """Number of leading messages that say the same."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if not same(a, b)), min(len(left), len(right)))


def as_text(value: Any) -> str:
    """A prompt or response of any shape as text for a person: turns with their roles, token ids as numbers.

    >>> as_text([{"role": "user", "content": "Hello"}]), as_text((1, 2))
    ('[user] Hello', 'token ids 1 2')
    """
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False, default=str)
    parts = list(value)
    if all(isinstance(m, Mapping) for m in parts):
        return "\n".join(f"[{m.get('role', '?')}] {as_text(m.get('content'))}" for m in parts)
    return "token ids " + " ".join(map(str, parts))


def side_text(content: Mapping[str, Any], side: str) -> str:
    r"""The prompt (of two, both, one under the other) or a response of a canonical row, as text for a person.

    >>> side_text({"chosen_prompt": "1+1?", "rejected_prompt": "1+2?", "chosen": " 2", "rejected": " 2"}, "prompt")
    '1+1?\n\n1+2?'
    """
    values = prompts_in(content) if side == "prompt" else [content.get(side, content.get(f"{side}_ids"))]
    return "\n\n".join(map(as_text, values))


def without_nulls(value: Any) -> Any:
    """Arrow fills the fields a message does not have with nulls; JSON leaves them out."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [without_nulls(v) for v in value]
    return value


def kind(value: Any) -> str:
    """A few words for messages: the type and the beginning of a value."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _calls(message: Message) -> Any:
    return message.get("tool_calls") or []


def require_answer(name: str, messages: Sequence[Message]) -> None:
    """Messages of a response end with what the assistant says.

    Raises:
      DataError: there are none, or the last one is of somebody else.
    """
    if not messages:
        raise DataError(f"'{name}' is an empty list; expected a response")
    if (role := messages[-1]["role"]) in NOT_AN_ANSWER | RESULTS:
        raise DataError(
            f"'{name}' ends with a message of the {role}, which is no response; expected one of the assistant at its "
            "end: leave out what stands behind that, or the row"
        )


def _require_contents(name: str, value: Any) -> None:
    """Raises where messages are what they should be but for one without content."""
    for number, message in enumerate(value if isinstance(value, list) else ()):
        if isinstance(message, Mapping) and isinstance(message.get("role"), str) and message.get("content") is None:
            raise DataError(
                f"'{name}', message {number} (of the {message['role']}) has no content; expected text: leave the "
                "message out, or the row"
            )


def _readable(where: str, message: Message) -> Message:
    """The message with its content as text and its calls of tools as a list of objects."""
    message = _with_calls(where, message) if any(name in message for name in _CALLS) else message
    parts = message.get("content")
    if not isinstance(parts, list):
        return message
    return {**message, "content": "".join(_part_text(where, part) for part in parts)}


def _with_calls(where: str, message: Message) -> Message:
    calls, one = (decoded(v.strip() if isinstance(v := message.get(name), str) else v) for name in _CALLS)
    if not calls and isinstance(one, Mapping):
        calls = [{"type": "function", "function": one}]
    rest = {k: v for k, v in message.items() if k not in _CALLS}
    if not calls:
        return rest
    if not isinstance(calls, list) or not all(isinstance(c, Mapping) for c in calls):
        raise DataError(f"{where}: its calls of tools are {kind(calls)}; expected a list of objects with a 'function'")
    return {**rest, "tool_calls": calls}


def _part_text(where: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise DataError(f"{where}: its content holds {kind(part)}; expected text, or a list of parts of type 'text'")
    named = part.get("type", "text" if "text" in part else "unknown")
    if named in _TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    why = " (no model here sees images or hears sound)" if any(w in str(named) for w in _SEEN_OR_HEARD) else ""
    raise DataError(
        f"{where}: its content has a part of type '{named}', and only text can be read{why}: leave the row out, or the "
        f"part{_OTHER_PLACES.get(named, '')}"
    )
