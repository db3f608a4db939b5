"""What a chat template does to conversations, found by letting it write a few, and said in words.

None of it makes a row wrong, and all of it decides what a model sees: ``ches doctor`` tells it.
"""

import contextlib

from ches_jax.data.messages import Message
from ches_jax.data.template import MARK, ChatTemplate
from ches_jax.data.template_source import CLOCK
from ches_jax.errors import DataError

HABITS: dict[str, str] = {
    "no_end": "writes nothing behind an answer; the tokenizer's end-of-text token is put there",
    "no_header": "ignores add_generation_prompt and never begins an answer; what it writes before one counts to the "
    "prompt",
    "always_header": "ignores add_generation_prompt and begins another answer behind every conversation; a response is "
    "cut before that",
    "opens_otherwise": "begins an answer in one way in the prompt and in another when it is written",
    "clock": "writes today's date: rows are refused until a day is named with --template-args",
    "strips": "takes off white space around the text of a message",
    "drops_thoughts": "leaves out the thoughts (<think>...</think>) of earlier answers",
    "drops_last_thought": "leaves out the thought of the last answer",
    "no_system": "refuses system messages",
    "drops_system": "leaves out system messages",
    "system_in_user": "writes a system message into a message of the user",
    "alternates": "demands that user and assistant take turns",
    "parts": "reads a message as a list of parts; texts are given to it so",
}
"""Habit -> what the template does."""

_ASKED, _RULE, _THOUGHT = "zqxAskedxqz", "zqxRulexqz", "zqxThoughtxqz"
_USER: Message = {"role": "user", "content": _ASKED}
_SYSTEM: Message = {"role": "system", "content": _RULE}
_ANSWER: Message = {"role": "assistant", "content": MARK}
_THOUGHTFUL: Message = {"role": "assistant", "content": f"<think>{_THOUGHT}</think>{MARK}"}


def habits(template: ChatTemplate) -> list[str]:
    """Names of ``HABITS`` that a template has, in their order.

    >>> from ches_jax.data.tokenize import load_tokenizer
    >>> habits(ChatTemplate(load_tokenizer("bundled")))
    ['strips', 'no_system']

    Raises:
      DataError: it cannot write a question with its answer.
    """
    observed = {"clock"} if template.reads_clock([_USER]) else set()
    if observed:  # the rest is found on one day
        template = ChatTemplate(template.tokenizer, {**template.arguments, CLOCK: "2024-07-26"})

    def written(*messages: Message) -> str | None:
        with contextlib.suppress(DataError):
            return template.write(messages)
        return None

    exchange = template.write([_USER, _ANSWER])
    if not template.end([_USER, _ANSWER]).ids:
        observed.add("no_end")
    if template.wants_parts(template.source()):
        observed.add("parts")
    if template.header([_USER]):
        observed.add("no_header")
    elif template.write([_USER], ask=True) == template.write([_USER]):
        with contextlib.suppress(DataError):
            observed.add("always_header" if template.begins_another([_USER]) else "")
    if template.opening([_USER]):
        observed.add("opens_otherwise")
    padded = written(_USER, {"role": "assistant", "content": f"  {MARK}  "})
    if padded is not None and MARK in padded and f"  {MARK}  " not in padded:
        observed.add("strips")
    for name, text in (
        ("drops_thoughts", written(_USER, _THOUGHTFUL, _USER, _ANSWER)),
        ("drops_last_thought", written(_USER, _THOUGHTFUL)),
    ):
        if text is not None and MARK in text and _THOUGHT not in text:
            observed.add(name)
    ruled = written(_SYSTEM, _USER, _ANSWER)
    if ruled is None:
        observed.add("no_system")
    elif _RULE not in ruled:
        observed.add("drops_system")
    elif ruled.startswith(exchange.partition(_ASKED)[0]):
        observed.add("system_in_user")
    if written(_USER, _USER, _ANSWER) is None:
        observed.add("alternates")
    return [name for name in HABITS if name in observed]


def describe(template: ChatTemplate) -> str:
    """In one line: how the template ends an answer, and its habits.

    Raises:
      DataError: as ``habits``.
    """
    names = habits(template)
    end = template.end([_USER, _ANSWER]) if "clock" not in names else None
    ends = [f"ends an answer with {template.tokenizer.decode(list(end.ids[:1]))!r}"] if end and end.ids else []
    if end and end.in_pieces:
        ends = [f"ends an answer with {end.in_pieces!r}, which is no token of the tokenizer"]
    return "; ".join([*ends, *(HABITS[name] for name in names)]) or "does nothing unusual"
