r"""A prompt that the responses repeat: found by what they say, and counted once.

    prompt           both responses                    what is meant
    "Q: 1+1?\nA:"    "Q: 1+1?\nA: 2"                   the response is " 2"
    [5, 6, 7, 8]     [5, 6, 7, 8, 9]                   the response is [9]
    [user]           [system, user, assistant]         the prompt is [system, user]
    [system, user]   [user, assistant]                 the response is [assistant]

Line ends, white space around a text and other keys of a message do not count. ``doubts`` says what is left of it in a
row that cannot be separated.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ches_jax.data.messages import NOT_AN_ANSWER, SYSTEM, Message, common, plain, plain_text, same, text_of

SURE_LETTERS = 40
"""A text of so many letters that both responses begin with is their prompt, repeated; so is a shorter one with the mark
of whose turn it is ("Q: 1+1 is?\\nA:"). "Good morning!" may begin two answers to itself."""
TOLD_LETTERS, TOLD_WORDS = 12, 3
"""From so many characters on, a repetition is flagged; "Hello" begins answers too often."""
ENDS_OF_MARKS = (":", "]", ">")
"""Ends of marks of whose turn it is: ``Human:``, ``[INST]``, ``<|user|>``."""
MARKS = 80
"""Letters in front of a prompt that is repeated: marks of a chat template, a system text of a few words."""
SURE_IDS = 4
"""As many token ids are their prompt, repeated."""

Parts = tuple[list[Message], list[Message], list[Message]]


def without_prompt(prompt: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Texts with the prompt once, where both responses begin with it.

    >>> without_prompt("Q: 1+1 is?\nA: ", "Q: 1+1 is?\r\nA: 2", "Q: 1+1 is?\r\nA: 3")
    ('Q: 1+1 is?\r\nA:', ' 2', ' 3')
    """
    if not _sure(prompt):
        return prompt, chosen, rejected
    if chosen.startswith(prompt) and rejected.startswith(prompt):
        return prompt, chosen[len(prompt) :], rejected[len(prompt) :]
    if (one := repeated(prompt, chosen)) is None or (other := repeated(prompt, rejected)) is None:
        return prompt, chosen, rejected
    # white space at the end of the prompt is the beginning of the responses
    written = chosen[:one] if chosen[:one] == rejected[:other] else prompt.rstrip()
    return written, chosen[one:], rejected[other:]


def ids_without_prompt(prompt: list[int], chosen: list[int], rejected: list[int]) -> tuple[list[int], ...]:
    """Token ids with the prompt once, where both responses begin with it.

    >>> ids_without_prompt([5, 6, 7, 8], [5, 6, 7, 8, 1], [5, 6, 7, 8, 2])
    ([5, 6, 7, 8], [1], [2])
    """
    n = len(prompt)
    if n >= SURE_IDS and chosen[:n] == prompt == rejected[:n]:
        return prompt, chosen[n:], rejected[n:]
    return prompt, chosen, rejected


def split_conversations(prompt: str | list[Message] | None, chosen: list[Message], rejected: list[Message]) -> Parts:
    """Prompt and responses of conversations, whose responses may repeat the prompt or hold it alone.

    A response cannot begin with a system or user message, so messages that do are whole conversations. Where these and
    the prompt contradict each other, all three are returned as they are (see ``doubts``).
    """
    if not all(m and m[0]["role"] in NOT_AN_ANSWER for m in (chosen, rejected)):
        if prompt is None:
            return _split_after_common(chosen, rejected)
        return _continued(_user(prompt), chosen, rejected)
    split = _split_after_common(chosen, rejected)
    if not prompt or (isinstance(prompt, str) and _told_in(prompt, split[0])):
        return split
    if isinstance(prompt, str):
        return _user(prompt), chosen, rejected
    return _repeating(prompt, chosen, rejected, split) or (prompt, chosen, rejected)


def doubts(content: Mapping[str, Any]) -> dict[str, str]:
    """Flags of a canonical row whose responses may repeat its prompt, with what was found.

    >>> doubts({"prompt": "Name a fruit.", "chosen": "Name a fruit. An apple.", "rejected": "No."})
    {'prompt_repeated': 'chosen begins with the prompt'}
    """
    if "prompt_ids" in content:
        names, prompt = ("chosen_ids", "rejected_ids"), content["prompt_ids"]
        if len(prompt) < SURE_IDS:
            return {}
        return _repeated_by([n.removesuffix("_ids") for n in names if _begins(prompt, content[n])])
    prompt, sides = content["prompt"], ("chosen", "rejected")
    if isinstance(prompt, str):
        if not _worth_telling(prompt):
            return {}
        found = _repeated_by([n for n in sides if repeated(prompt, content[n]) is not None])
        return found or _repeated_behind_a_mark(prompt, content["chosen"], content["rejected"])
    if not prompt:
        return {}
    whole = [n for n in sides if content[n] and content[n][0]["role"] in NOT_AN_ANSWER]
    if whole:
        roles = ", ".join(f"{n} with one of the {content[n][0]['role']}" for n in whole)
        return {"prompt_unclear": f"behind the prompt, the responses begin with messages: {roles}"}
    begun = text_of(prompt[-1]) if prompt[-1]["role"] in ("assistant", "user") else ""
    repeating = [n for n in sides if begun and content[n] and repeated(begun, text_of(content[n][0])) is not None]
    both, asked = len(repeating) == len(sides), prompt[-1]["role"] == "user"
    # one answer may well repeat the question; an answer that is begun for it is hardly begun again
    whole = "chosen" in repeating and plain(prompt[-1]) == plain(content["chosen"][0])  # a whole conversation
    doubtful = both and _worth_telling(begun) if asked else both or whole or _worth_telling(begun)
    return _repeated_by(repeating) if doubtful else {}


def repeated(prompt: str, response: str) -> int | None:
    """How much of a response repeats the prompt that it begins with, in letters; None: it does not."""
    said, answered = prompt.strip(), response.lstrip()
    if not said or answered[:4] != said[:4]:
        return None
    first, *others = (line.strip(" \t") for line in re.split(r"\r\n|\r|\n", said))
    if not answered.startswith(first):
        return None
    if not others:
        return len(response) - len(answered) + len(first)
    lines = map(re.escape, (first, *others))
    match = re.match(r"\s*" + r"[ \t]*(?:\r\n|\r|\n)[ \t]*".join(lines), response)
    return match.end() if match else None


def _repeated_behind_a_mark(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    """A flag where both responses are whole conversations as text: the same few letters, and the prompt behind them."""
    said = prompt.strip()
    at = chosen.find(said, 0, MARKS + len(said))
    sure = len(said) >= SURE_LETTERS or chosen[: max(at, 0)].rstrip().endswith(ENDS_OF_MARKS)
    if at <= 0 or not sure or chosen[: at + len(said)] != rejected[: at + len(said)]:
        return {}
    return {"prompt_repeated": f"chosen and rejected begin with {chosen[:at].strip()!r} and the prompt"}


def _sure(text: str) -> bool:
    """Whether a text is too much, or too much of a prompt, to begin two answers by chance."""
    said = text.strip()
    return len(said) >= SURE_LETTERS or (len(said) >= TOLD_LETTERS and ("\n" in said or said.endswith(ENDS_OF_MARKS)))


def _worth_telling(text: str) -> bool:
    return len(text.strip()) >= TOLD_LETTERS and len(text.split()) >= TOLD_WORDS


def _begins(prompt: Sequence[int], response: Sequence[int]) -> bool:
    """Whether ids begin with a prompt's, with or without the token that begins a text."""
    return any(response[: len(way)] == way for way in (prompt, prompt[1:]))


def _repeated_by(sides: list[str]) -> dict[str, str]:
    if not sides:
        return {}
    return {"prompt_repeated": f"{' and '.join(sides)} begin{'s' * (len(sides) == 1)} with the prompt"}


def _user(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _split_after_common(chosen: list[Message], rejected: list[Message]) -> Parts:
    n = common(chosen[:-1], rejected[:-1])  # the last message is the response, also where both are the same
    return chosen[:n], chosen[n:], rejected[n:]


def _continued(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Parts:
    """An answer that the prompt begins and both responses repeat is theirs once."""
    begun = text_of(prompt[-1]) if prompt and prompt[-1]["role"] == "assistant" else ""
    if not _sure(begun) or not (chosen and rejected):
        return prompt, chosen, rejected
    _, *texts = without_prompt(begun, text_of(chosen[0]), text_of(rejected[0]))
    sides = [
        [{**side[0], "content": text}, *side[1:]] if text != text_of(side[0]) else side
        for side, text in zip((chosen, rejected), texts, strict=True)
    ]
    return prompt, sides[0], sides[1]


def _told_in(prompt: str, head: Sequence[Message]) -> bool:
    """Whether a text is what one of the messages says, a part of it, or a rendering of them all."""
    said, texts = plain_text(prompt), [plain(m) for m in head]
    return not said or any(said in text for text in texts) or (bool(texts) and all(text in said for text in texts))


def _repeating(prompt: list[Message], chosen: list[Message], rejected: list[Message], split: Parts) -> Parts | None:
    """Prompt and responses where whole conversations repeat a prompt of messages; None: they contradict it."""
    systems, turns = zip(*map(_system_apart, (prompt, chosen, rejected)), strict=True)
    systems_written = [s for s in systems if s]
    if any(len(s) != len(systems_written[0]) or common(s, systems_written[0]) < len(s) for s in systems_written):
        return None  # another system message
    if bool(systems[1]) != bool(systems[2]) and not systems[0]:
        return None
    asked, *sides = turns
    n = len(asked)
    if all(len(side) > n and common(side, asked) == n for side in sides):
        return [*(systems_written[0] if systems_written else []), *asked], sides[0][n:], sides[1][n:]
    head, *_ = split
    leading = _system_apart(head)[1]
    if n and len(leading) >= n and all(map(same, leading[-n:], asked)):
        return split  # the prompt holds the last turn only
    for n in range(min(len(asked), *(len(side) - 1 for side in sides)), 0, -1):
        if all(common(side, asked[-n:]) == n and side[n]["role"] not in NOT_AN_ANSWER for side in sides):
            return prompt, sides[0][n:], sides[1][n:]  # the responses repeat the last turns only
    return None


def _system_apart(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    n = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM), len(messages))
    return list(messages[:n]), list(messages[n:])
