"""The text that a model sees of a row: plain, or written by a chat template.

``prompts`` says what the prompt of a row is; this file writes it down. Each text of a response begins with the text of
its prompt, a template permitting, and what a template does to a row beyond that is found here and named.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, cast

from ches_jax.data.messages import THOUGHTS, Message, as_messages, says_nothing, text_of, texts_in
from ches_jax.data.prompts import TEXT_COLUMNS
from ches_jax.data.template import MODES, ChatTemplate, End, joined, with_template
from ches_jax.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Mode = Literal["auto", "none", "always"]
_NO_TEMPLATE = (
    "the row is a conversation and the tokenizer has no chat template: use a tokenizer "
    "with one (chat_template.jinja beside tokenizer.json), name one with --template FILE, give prompt, chosen and "
    "rejected as text, or, for single turns, --template none"
)
_NOT_ONE_TEXT = (
    "the row is a conversation of several messages, which --template none cannot write as text: use --template auto"
)
_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>(.*)", re.DOTALL)
"""A thought, and what is said after it."""
_SWITCH = re.compile(r"/(?:no_?)?think\b")
"""What some templates read in a text of the user or the system, and take out of it."""
_WORDS = re.compile(r"[A-Za-z0-9]{2,}")
"""What no way to escape a text takes apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """The texts of one pair; each response text begins with the prompt's (templates permitting)."""

    prompt: str
    chosen: str
    rejected: str
    templated: bool
    """The text comes from a chat template, which writes BOS and end-of-turn tokens itself."""
    empty: tuple[str, ...]
    """Parts (prompt, chosen, rejected) without any text of their own."""
    blank: tuple[str, ...]
    """Those whose text is white space alone."""
    said: Mapping[str, str] = field(default_factory=dict)
    """What the messages of each response say, thoughts and calls included; nothing for plain text."""
    ends: Mapping[str, End] = field(default_factory=dict)
    """How each response ends; nothing for plain text."""
    found: Mapping[str, str] = field(default_factory=dict)
    """Flags that show in the text, with what was found."""


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The text of a prompt, up to where a response begins."""

    text: str
    templated: bool
    found: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Writer:
    """How rows become text: with which chat template, and which rows."""

    chat: ChatTemplate
    mode: Mode

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        template: str = "auto",
        arguments: Mapping[str, Any] | None = None,
    ) -> "Writer":
        """The writer that ``--template`` and ``--template-args`` ask for.

        >>> from ches_jax.data.tokenize import load_tokenizer
        >>> Writer.of(load_tokenizer("bundled")).prompt({"prompt": [{"role": "user", "content": "1+1?"}]}).text
        '<bos><|user|> 1+1?<|assistant|>'

        Raises:
          DataError: no such template, or arguments that it does not read.
        """
        mode = template if template in MODES else "auto"
        return cls(ChatTemplate(with_template(tokenizer, template), arguments), cast(Mode, mode))

    def pair(self, content: Mapping[str, Any], written: dict[str, str] | None = None) -> Rendered:
        """The texts of a canonical row (not of token ids).

        Args:
          content: of ``prompts.canonical_content``.
          written: texts of conversations of other rows, which grow; for pairs that share responses.

        Raises:
          DataError: a conversation and no chat template to write it with, or the template refuses it.
        """
        texts = _plain_texts(content, self.mode)
        if texts is not None and self.mode != "always":
            return _plain(*texts)
        self._require_template()
        written = {} if written is None else written
        prompt, *sides = (as_messages(n, content[n]) for n in TEXT_COLUMNS)
        names = TEXT_COLUMNS[1:]
        whole = {n: joined(prompt, side) for n, side in zip(names, sides, strict=True)}

        def once(key: str, write: Any) -> str:
            if key not in written:
                written[key] = write()
            return written[key]

        asked = (
            once(repr(("prompt", prompt, _row(content))), lambda: self.chat.prompt(prompt, content)) if prompt else ""
        )
        full = {n: once(repr((m, _row(content))), lambda m=m: self.chat.write(m, content)) for n, m in whole.items()}
        found = dict(self._left_out(content, prompt, dict(zip(names, sides, strict=True)), full))
        if any(not text.startswith(asked) for text in full.values()):
            found["prompt_differs"] = self._difference(prompt, content)
        empty, blank = _without_words([*map(_said, (prompt, *sides))])
        return Rendered(
            prompt=asked,
            chosen=full["chosen"],
            rejected=full["rejected"],
            templated=True,
            empty=empty,
            blank=blank,
            said={n: "\n".join(texts_in(side)) for n, side in zip(names, sides, strict=True)},
            ends={n: self.chat.end(m, content) for n, m in whole.items()},
            found=found,
        )

    def prompt(self, content: Mapping[str, Any]) -> RenderedPrompt:
        """The text of a canonical prompt up to where the response starts: the same that ``pair`` puts before one.

        Raises:
          DataError: a conversation and no chat template to write it with, or the template refuses it.
        """
        prompt = content["prompt"]
        if isinstance(prompt, list) and self.mode == "none":
            if len(prompt) != 1:
                raise DataError(_NOT_ONE_TEXT)
            prompt = text_of(prompt[0])
        if isinstance(prompt, str) and self.mode != "always":
            return RenderedPrompt(prompt, False, _found_of_prompt(prompt))
        self._require_template()
        messages = as_messages("prompt", prompt)
        text = self.chat.prompt(messages, content) if messages else ""
        found = _found_of_prompt(_said(messages))
        if lost := self._lost_of_prompt(content, messages, text):
            found["left_out"] = ", ".join(lost)
        return RenderedPrompt(text, True, found)

    def _require_template(self) -> None:
        if not self.chat.exists:
            raise DataError(_NO_TEMPLATE)

    def _difference(self, prompt: Sequence[Message], content: Mapping[str, Any]) -> str:
        if opening := self.chat.opening(prompt, content):
            asked, answered = opening
            return f"an answer begins with {asked!r} in the prompt and with {answered!r} in the conversation"
        return "what stands before the answer changes with the answer"

    def _left_out(
        self,
        content: Mapping[str, Any],
        prompt: Sequence[Message],
        sides: Mapping[str, Sequence[Message]],
        texts: Mapping[str, str],
    ) -> dict[str, str]:
        lost = self._lost_of_prompt(content, prompt, texts["chosen"])
        for name, messages in sides.items():
            lost += [f"{what} of {name}" for m in messages if (what := _lost(m, texts[name], thought=True))]
        return {"left_out": ", ".join(dict.fromkeys(lost))} if lost else {}

    def _lost_of_prompt(self, content: Mapping[str, Any], messages: Sequence[Message], text: str) -> list[str]:
        """Earlier thoughts are left out where the model is asked too, so they are not missed."""
        lost = ["the tools"] if content.get("tools") and "tools" not in self.chat.source(content).variables else []
        return lost + [f"{what} of the {m['role']}" for m in messages if (what := _lost(m, text, thought=False))]


def _plain(prompt: str, chosen: str, rejected: str) -> Rendered:
    empty, blank = _without_words((prompt, chosen, rejected))
    return Rendered(
        prompt=prompt,
        chosen=prompt + chosen,
        rejected=prompt + rejected,
        templated=False,
        empty=empty,
        blank=blank,
    )


def _plain_texts(content: Mapping[str, Any], mode: Mode) -> tuple[str, str, str] | None:
    parts = tuple(content[n] for n in TEXT_COLUMNS)
    if isinstance(parts[0], str):
        return parts
    if mode != "none":
        return None
    if all(len(p) == 1 and isinstance(p[0].get("content"), str) for p in parts):
        prompt, chosen, rejected = (p[0]["content"] for p in parts)
        return prompt, chosen, rejected
    raise DataError(_NOT_ONE_TEXT)


def _row(content: Mapping[str, Any]) -> tuple[Any, ...]:
    return content.get("tools"), content.get("chat_template_kwargs")


def _said(messages: Sequence[Message]) -> str:
    """What messages say, calls of tools included."""
    return "".join("calls" if m.get("tool_calls") else text_of(m) for m in messages)


def _without_words(texts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of prompt, chosen and rejected those without a text, and those whose text is white space alone.

    >>> _without_words(("1+1?", " ", ""))
    (('rejected',), ('chosen',))
    """
    nothing = [(name, text) for name, text in zip(TEXT_COLUMNS, texts, strict=True) if says_nothing(text)]
    return tuple(name for name, text in nothing if not text), tuple(name for name, text in nothing if text)


def _found_of_prompt(text: str) -> dict[str, str]:
    return {"blank": "prompt"} if text and says_nothing(text) else {}


def _lost(message: Message, text: str, *, thought: bool) -> str:
    """What of a message the template did not write; empty: nothing. Results of tools may be written as JSON."""
    said = text_of(message).strip()
    names = [
        str(c.get("function", c).get("name", "")) for c in message.get("tool_calls") or () if isinstance(c, Mapping)
    ]
    if any(name not in text for name in names):
        return "the calls of tools"
    thoughts = [str(message[key]).strip() for key in THOUGHTS if message.get(key)]
    if message["role"] not in ("system", "developer", "user", "assistant"):
        return "" if said in text or _in_other_letters(said, text) else "the text"
    if any(part.strip() not in text for part in _SWITCH.split(said)):
        parts = _THOUGHT.match(said) if message["role"] == "assistant" else None
        if parts is None or parts[2].strip() not in text:
            return "the text"
        thoughts.append(parts[1].strip())
    return "the thought" if thought and any(t not in text for t in thoughts) else ""


def _in_other_letters(said: str, text: str) -> bool:
    """Whether a text holds what was said as JSON, escaped or not, or at least its words.

    >>> _in_other_letters("'warm'", "it is u0027warmu0027"), _in_other_letters("warm", "cold")
    (True, False)
    """
    if any(json.dumps(said, ensure_ascii=ascii_alone)[1:-1] in text for ascii_alone in (True, False)):
        return True
    words = _WORDS.findall(said)
    return bool(words) and all(word in text for word in words)
