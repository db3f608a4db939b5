r"""A chat template: the text that it writes, and what is learned from it by letting it write a probe.

Where an answer ends is not guessed from the names of tokens. A conversation is written with an unmistakable text, *,
in the place of its last answer:

    <|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n*<|im_end|>\n
                                                               ^^^^^^^^^^^^   what stands behind it is the tail,
                                                               ^^^^^^^^^^     and its first token ends an answer

White space at the beginning of a tail belongs to the answer where a token follows that ends a turn in the middle of a
conversation too (Llama 2 writes "* </s>"). What was learned holds for all conversations with the same roles.
"""

import contextlib
import copy
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ches_jax.data.file_tokenizer import is_blank, token_ids
from ches_jax.data.messages import SYSTEM, Message, as_parts, kind, text_of
from ches_jax.data.nested import within_depth
from ches_jax.data.template_source import CLOCK, PINNED, Source, day, read_source
from ches_jax.data.time_limit import TooLong, time_limit
from ches_jax.errors import DataError, TemplateError, did_you_mean
from ches_jax.runs.files import read_object
from ches_jax.runs.store import here
from ches_jax.types import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = tuple[int, ...]
Row = Mapping[str, Any]
"""What a row brings beside its messages: ``tools`` and ``chat_template_kwargs``."""

MODES = ("auto", "none", "always")
"""Values of ``--template`` that say which rows a template writes, and not which one."""
MARK = "zqxMarkxqz"
"""The unmistakable text: letters only, so that no template strips, splits or escapes it."""
SECONDS = 20.0
"""How long a template may take for one conversation."""
LETTERS = 16_000_000
"""How much it may write."""
RESERVED = frozenset(
    {
        *("conversation", "tools", "documents", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
        *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "self", "kwargs", "messages", PINNED),
        *("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"),
        *("strftime_now", "raise_exception", "namespace", "range", "dict"),
    }
)
"""Names that neither a row nor an option sets: what rendering takes, and what this tool or the tokenizer sets."""
_NEXT = {"role": "user", "content": MARK[::-1]}
_EXCHANGE = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
_CALL = {"id": "zqxCall01", "type": "function", "function": {"name": "zqxToolxqz", "arguments": {MARK: MARK}}}
"""A call of a tool to probe a template with; one wants ids of nine letters."""
_NO_TEXT: tuple[Message, ...] = ({}, {"content": ""})
"""Ways of a message to have no text; transformers takes null away."""
_NO_ROW: Row = {}


@dataclass(frozen=True, slots=True)
class End:
    """How a template ends an answer."""

    text: str
    """What it writes behind the answer's text; empty: nothing."""
    ids: Ids
    """Its tokens, from the one that ends the answer on; (): nothing is written there."""
    in_pieces: str = ""
    """What ends the answer, where that is no token of its own but several that are letters; else empty."""


class ChatTemplate:
    """A tokenizer's chat template with its arguments.

    >>> from ches_jax.data.tokenize import load_tokenizer
    >>> template = ChatTemplate(load_tokenizer("bundled"))
    >>> asked = [{"role": "user", "content": "1+1?"}]
    >>> template.prompt(asked)
    '<bos><|user|> 1+1?<|assistant|>'
    >>> template.end([*asked, {"role": "assistant", "content": "2"}])
    End(text='<eos>', ids=(2,), in_pieces='')
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", arguments: Mapping[str, Any] | None = None):
        """``arguments``: variables of the template for every row; ``now`` pins the clock.

        Raises:
          DataError: an argument that the template does not read, or a ``now`` that is no date.
        """
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self._learned: dict[str, Any] = {}
        if self.arguments:
            self._check_arguments()

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has a template at all."""
        return bool(self.tokenizer.chat_template)

    def source(self, row: Row = _NO_ROW) -> Source:
        """The template that is used for a row: of several, ``tool_use`` for one with tools, else ``default``.

        Raises:
          DataError: there are several and none is the default one, or it cannot be parsed.
        """
        try:
            return read_source(self.tokenizer.get_chat_template(None, row.get("tools")))
        except ValueError:
            names = ", ".join(self.tokenizer.chat_template or ())
            raise TemplateError(
                f"the tokenizer has several chat templates: choose one with --template ({names})"
            ) from None

    def write(self, messages: Sequence[Message], row: Row = _NO_ROW, *, ask: bool = False, go_on: bool = False) -> str:
        """The text of a conversation.

        Args:
          messages: the conversation, contents as text.
          row: the row that it belongs to.
          ask: with the beginning of an answer behind it.
          go_on: without what ends its last message, which is to be continued.

        Raises:
          DataError: the template refuses the conversation, or writes today's date.
        """
        try:
            text = self._written(messages, row, ask=ask, go_on=go_on)
        except TemplateError:
            raise
        except DataError as error:
            raise DataError(f"{error}{self._why_refused(messages, row)}") from error.__cause__
        if self.reads_clock(messages, row):
            raise TemplateError(self._clock_message(row))
        return text

    def prompt(self, messages: Sequence[Message], row: Row = _NO_ROW) -> str:
        """The text up to where an answer begins; or up to where it continues, if the last message is its beginning.

        Raises:
          DataError: as ``write``.
        """
        if continues(messages):
            return self.write(messages, row, go_on=True)
        asked = self.write(messages, row, ask=True)
        return asked + self._once("header", messages, row, lambda: self._learn_header(messages, row, asked))

    def end(self, messages: Sequence[Message], row: Row = _NO_ROW) -> End:
        """How the last message of a conversation ends.

        Raises:
          DataError: as ``write``; or the end cannot be separated from the text.
        """
        learned = self._once("end", messages, row, lambda: self._learn_end(messages, row))
        if messages[-1].get("tool_calls"):
            return self._end_of_call(self.write(messages, row), learned)
        return learned

    def answer_end(self) -> int | None:
        """The token that ends an answer to a question, on any day; None where none is known."""
        if not self.exists:
            return None
        chat = ChatTemplate(self.tokenizer, {CLOCK: "2024-07-26", **self.arguments})
        with contextlib.suppress(DataError):
            end = chat.end(_EXCHANGE)
            return end.ids[0] if end.ids and not end.in_pieces else None
        return None

    def opening(self, messages: Sequence[Message], row: Row = _NO_ROW) -> tuple[str, str] | None:
        """How an answer begins in the prompt, and how when it is written, where these differ.

        Templates of reasoning models open a thought when they ask, and leave it out of an answer that has none.

        Raises:
          DataError: as ``write``.
        """
        return self._once("opening", messages, row, lambda: self._learn_opening(messages, row))

    def header(self, messages: Sequence[Message], row: Row = _NO_ROW) -> str:
        """What stands before an answer and is not written by the generation prompt; nothing in most templates.

        Raises:
          DataError: as ``write``.
        """
        asked = self.write(messages, row, ask=True)
        return self._once("header", messages, row, lambda: self._learn_header(messages, row, asked))

    def begins_another(self, messages: Sequence[Message], row: Row = _NO_ROW) -> bool:
        """Whether every conversation ends with the beginning of another answer, behind an answer as behind a question.

        It does so where both end alike and an answer before a question does not: "A.</end><bot>", "A.</end><user>".

        Raises:
          DataError: as ``write``; or no conversation continues behind an answer.
        """
        whole = [*messages, {"role": "assistant", "content": MARK}]
        asked, last, middle = self.write(messages, row), self.write(whole, row), self.write([*whole, _NEXT], row)
        behind, followed = (text[text.rfind(MARK) + len(MARK) :] for text in (last, middle))
        alike = behind[len(behind) - common_prefix(behind[::-1], asked[::-1]) :]
        return bool(alike.strip()) and not followed.startswith(behind)

    def encode(self, text: str) -> Ids:
        """Tokens of a text that the template wrote; it writes the special ones itself."""
        try:
            ids = token_ids(self.tokenizer, text, add_special_tokens=False)
        except TypeError as error:  # how the tokenizer answers to half of a surrogate pair
            raise DataError("the chat template writes letters that the tokenizer cannot encode") from error
        return tuple(ids)

    def _once(self, what: str, messages: Sequence[Message], row: Row, learn: Callable[[], Any]) -> Any:
        """What was learned from a conversation with the same roles, or is learned now."""
        roles = [m["role"] + "+calls" * bool(m.get("tool_calls")) for m in messages]
        key = json.dumps([what, roles, bool(row.get("tools")), row.get("chat_template_kwargs")], sort_keys=True)
        if key not in self._learned:
            self._learned[key] = learn()
        return self._learned[key]

    def _why_refused(self, messages: Sequence[Message], row: Row) -> str:
        """What about a conversation a template may not take, as the end of a message; empty: not known."""
        others = [m for m in messages if m["role"] not in SYSTEM]
        if others and len(others) < len(messages):
            with contextlib.suppress(DataError):
                self._written(others, row)
                return "; it takes no system message: put its text in front of the first message of the user"
        if any(a["role"] == b["role"] for a, b in itertools.pairwise(others)):
            return "; two messages of one role follow each other, and it may want user and assistant to take turns"
        return ""

    def _learn_end(self, messages: Sequence[Message], row: Row) -> End:
        probe = [*messages[:-1], {"role": messages[-1]["role"], "content": MARK}]
        text = self.write(probe, row)
        if MARK not in text:
            raise DataError("the chat template does not write the text of an answer")
        behind = self._behind_mark(text)
        try:
            middle = self._behind_mark(self.write([*probe, _NEXT], row))
        except DataError:
            middle = behind  # no conversation continues here
        first = next((i for i in range(common_prefix(behind, middle)) if not is_blank(self.tokenizer, behind[i])), 0)
        return End(text[text.rfind(MARK) + len(MARK) :], behind[first:], self._in_pieces(behind[first:]))

    def _in_pieces(self, ids: Ids) -> str:
        """The letters that ids begin with, where they are several tokens: a mark that the vocabulary does not have."""
        own, eos = frozenset(self.tokenizer.added_tokens_decoder), self.tokenizer.eos_token_id
        letters = list(
            itertools.takewhile(lambda i: i not in own and i != eos and not is_blank(self.tokenizer, i), ids)
        )
        return str(self.tokenizer.decode(letters)) if len(letters) > 1 else ""

    def _behind_mark(self, text: str) -> Ids:
        """Tokens of what follows the mark."""
        at = text.rfind(MARK) + len(MARK)
        whole, head = self.encode(text), self.encode(text[:at])
        if whole[: len(head)] != head:
            raise DataError(
                "the tokenizer makes one token of the last letter of an answer and of what the chat template writes "
                f"behind it ({text[at:][:20]!r}), so that the end of an answer is not known"
            )
        return whole[len(head) :]

    def _end_of_call(self, text: str, learned: End) -> End:
        """A message that calls a tool may end with a token of its own (``<|call|>``), or in part as a text does.

        What both have at their end, which may be the header of the next answer, ends it; else the last token that was
        added.
        """
        if text.endswith(learned.text):
            return learned
        ids = self.encode(text)
        shared = common_prefix(ids[::-1], learned.ids[::-1])
        if not all(is_blank(self.tokenizer, i) for i in ids[len(ids) - shared :]):
            end = ids[len(ids) - shared :]
            return End(str(self.tokenizer.decode(list(end))), end)
        added = self.tokenizer.added_tokens_decoder
        last = next((i for i in reversed(range(len(ids))) if ids[i] in added), None)
        if last is None or not all(is_blank(self.tokenizer, i) for i in ids[last + 1 :]):
            raise DataError(
                "the chat template ends a call of a tool otherwise than a text, and in a way that is not known"
            )
        return End(str(self.tokenizer.decode(list(ids[last:]))), ids[last:])

    def _learn_opening(self, messages: Sequence[Message], row: Row) -> tuple[str, str] | None:
        if continues(messages):
            return None
        written = self.write([*messages, {"role": "assistant", "content": MARK}], row)
        asked = self.prompt(messages, row)
        if written.startswith(asked):
            return None
        equal = self._between_marks(common_prefix(asked, written), asked, written)
        return asked[equal:], written[equal : max(written.rfind(MARK), equal)]

    def _between_marks(self, at: int, *texts: str) -> int:
        """A place in texts, or where the added token begins that one of them has there: <think> and </think>."""
        words = [str(token.content) for token in self.tokenizer.added_tokens_decoder.values()]
        starts = (text.find(w, max(at - len(w) + 1, 0), at + len(w) - 1) for text in texts for w in words)
        return min((start for start in starts if start >= 0), default=at)

    def _learn_header(self, messages: Sequence[Message], row: Row, asked: str) -> str:
        if asked != self.write(messages, row):
            return ""
        try:
            written = self.write([*messages, {"role": "assistant", "content": MARK}], row)
        except DataError:
            return ""
        if not written.startswith(asked):
            return ""
        with contextlib.suppress(DataError):
            if self.begins_another(messages, row):
                return ""
        header = written[len(asked) : written.rfind(MARK)]
        # white space alone begins the text of the answer: Mistral and Llama 2 write "[/INST] text"
        return header.rstrip(" ") if header.strip() else ""

    def _written(
        self, messages: Sequence[Message], row: Row, *, ask: bool = False, go_on: bool = False, **more: Any
    ) -> str:
        source = self.source(row)
        messages = [self._with_calls(source, m) if m.get("tool_calls") else m for m in messages]
        if self.wants_parts(source):
            messages = [as_parts(m) for m in messages]
        return self._apply(source, messages, row.get("tools"), self._arguments(source, row) | more, ask, go_on)

    def _apply(
        self,
        source: Source,
        messages: Sequence[Message],
        tools: Any,
        arguments: Mapping[str, Any],
        ask: bool,
        go_on: bool = False,
    ) -> str:
        try:
            with time_limit(SECONDS):
                text = self.tokenizer.apply_chat_template(
                    list(messages),
                    tools=tools,
                    chat_template=source.pinned() if PINNED in arguments else source.text,
                    tokenize=False,
                    add_generation_prompt=ask,
                    continue_final_message=go_on,
                    **arguments,
                )
        except TooLong:
            raise DataError(
                f"the tokenizer's chat template has not come to an end within {SECONDS:g} seconds"
            ) from None
        except Exception as error:  # a template is a program: it may fail in any way
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise DataError(
                f"the tokenizer's chat template refuses the row: {reason}; its roles are "
                f"{', '.join(m['role'] for m in messages)}"
            ) from error
        assert isinstance(text, str)
        if len(text) > LETTERS:
            raise DataError(f"the tokenizer's chat template writes {len(text)} letters; expected at most {LETTERS}")
        return text

    def wants_parts(self, source: Source) -> bool:
        """Whether the template writes the text of a message only where its content is a list of parts."""
        key = f"parts {source.text}"
        if key not in self._learned:
            user = {"role": "user", "content": MARK}
            arguments = self._arguments(source, _NO_ROW)
            writes_mark = []
            for message in (user, as_parts(user)):
                try:
                    writes_mark.append(MARK in self._apply(source, [message], None, arguments, ask=True))
                except DataError:
                    writes_mark.append(False)
            # a list that is printed as one holds the mark too, in quotes
            self._learned[key] = not writes_mark[0] and writes_mark[1]
        return self._learned[key]

    def _with_calls(self, source: Source, message: Message) -> Message:
        """A message that calls tools, with the arguments and without a text as the template takes them.

        Some escape what is text already, and some take nothing but text; some need a text, if an empty one.
        """
        calls = message["tool_calls"]
        texts = all(isinstance(c.get("function", c).get("arguments"), str) for c in calls)
        forms = self._call_forms(source)
        if not forms:
            return message
        if texts not in forms:
            texts = not texts
            calls = [with_arguments(c, as_text=texts) for c in calls]
        return {**forms[texts], **message, "tool_calls": calls}

    def _call_forms(self, source: Source) -> dict[bool, Message]:
        """What a message without a text says of it, where arguments are text (true) and objects (false).

        An entry is missing where the template does not write such calls rightly.
        """
        key = f"calls {source.text}"
        if key not in self._learned:
            forms: dict[bool, Message] = {}
            for as_text, no_text in itertools.product((True, False), _NO_TEXT):
                call = with_arguments(_CALL, as_text=as_text)
                if as_text not in forms and self._writes_call(source, {**no_text, "tool_calls": [call]}):
                    forms[as_text] = no_text
            self._learned[key] = forms
        return self._learned[key]

    def _writes_call(self, source: Source, message: Message) -> bool:
        arguments = self._arguments(source, _NO_ROW)
        messages = [_NEXT, {"role": "assistant", **message}]
        try:
            text = self._apply(source, messages, None, arguments, ask=False)
        except DataError:
            return False
        escaped, printed = f'\\"{MARK}', f"'{MARK}'"
        return MARK in text and not any(wrong in text for wrong in (escaped, printed, "None"))

    def _arguments(self, source: Source, row: Row) -> dict[str, Any]:
        """Values for those variables that the template reads: of the row, and for all rows."""
        own = row.get("chat_template_kwargs") or {}
        if ours := sorted(set(own) & RESERVED):
            raise DataError(
                f"'chat_template_kwargs' sets {ours[0]!r}, which is not the row's to say: it may set variables of the "
                "chat template, and this tool decides what is written with which template"
            )
        for name in sorted(set(own) & set(self.arguments)):
            if own[name] != self.arguments[name]:
                raise DataError(
                    f"{name!r} is {own[name]!r} in the row's 'chat_template_kwargs' and {self.arguments[name]!r} in "
                    "--template-args: leave one of them out"
                )
        values = {name: value for name, value in {**self.arguments, **own}.items() if name in source.variables}
        if CLOCK in self.arguments and source.reads_clock:
            pinned = day(self.arguments[CLOCK])
            values[PINNED] = {form: pinned.strftime(form) for form in source.dates}
        return values

    def reads_clock(self, messages: Sequence[Message], row: Row = _NO_ROW) -> bool:
        """Whether the text of such a conversation depends on the time of day."""
        return self._once("clock", messages, row, lambda: self._asks_the_time(messages, row))

    def _asks_the_time(self, messages: Sequence[Message], row: Row) -> bool:
        """A template that asks for the time fails when the clock is taken away."""
        source = self.source(row)
        if not source.reads_clock or CLOCK in self.arguments:
            return False
        try:
            self._written(messages, row, ask=True, strftime_now=0)
        except DataError:
            return True
        return False

    def _clock_message(self, row: Row) -> str:
        source, example = self.source(row), day("2024-07-26")
        names = sorted(name for name in source.variables if "date" in name.lower())
        ways = [f"{CLOCK}={example:%Y-%m-%d}"]
        ways += [f'{name}="{example.strftime(form)}"' for name in names for form in sorted(source.dates)[:1]]
        return (
            "the chat template writes today's date into every prompt, so that the same run would give other numbers on "
            f"another day: say which day it shall be with --template-args {' or '.join(ways)}"
        )

    def _check_arguments(self) -> None:
        texts = self.tokenizer.chat_template
        texts = list(texts.values()) if isinstance(texts, dict) else [texts] if texts else []
        if not texts:
            raise DataError("--template-args: the tokenizer has no chat template, so that nothing reads them")
        known = sorted(frozenset().union(*(read_source(text).variables for text in texts)) - RESERVED)
        for name, value in self.arguments.items():
            if name == CLOCK:
                day(value)
            elif name not in known:
                raise DataError(
                    f"--template-args {name}: the chat template reads nothing of this name"
                    f"{did_you_mean(name, known) or '; it reads ' + (', '.join(known) or 'nothing')}"
                )


def continues(messages: Sequence[Message]) -> bool:
    """Whether a prompt ends with the beginning of an answer, which is to be continued."""
    return bool(messages) and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls")


def with_arguments(call: Mapping[str, Any], *, as_text: bool) -> dict[str, Any]:
    """A call of a tool with its arguments as JSON text, or as the object that this text is.

    >>> with_arguments({"name": "find", "arguments": '{"x": 1}'}, as_text=False)
    {'name': 'find', 'arguments': {'x': 1}}
    """
    inner = call.get("function", call)
    given = inner.get("arguments")
    if as_text and not isinstance(given, str):
        given = json.dumps({} if given is None else given, ensure_ascii=False)
    elif not as_text and isinstance(given, str):
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(given or "{}")
            given = said if within_depth(said) else given
    with_given = {**inner, "arguments": given}
    return {**call, "function": with_given} if "function" in call else with_given


def joined(prompt: Sequence[Message], response: Sequence[Message]) -> list[Message]:
    """The conversation of a prompt and a response, which continues with an answer that the prompt begins.

    >>> joined([{"role": "assistant", "content": "An ap"}], [{"role": "assistant", "content": "ple."}])
    [{'role': 'assistant', 'content': 'An apple.'}]
    """
    if not continues(prompt) or not response or response[0]["role"] != "assistant":
        return [*prompt, *response]
    begun, rest = prompt[-1], response[0]
    return [*prompt[:-1], {**begun, **rest, "content": text_of(begun) + text_of(rest)}, *response[1:]]


def template_in(path: Path) -> str:
    """The ``chat_template`` of a JSON file: of a processor (``chat_template.json``), or of a tokenizer's settings.

    Raises:
      DataError: the file has none, or several.
    """
    text = read_object(path, DataError, "a chat template").get("chat_template")
    if not isinstance(text, str):
        raise DataError(f"{path}: 'chat_template' is {kind(text)}; expected one template as text")
    return text


def with_template(tokenizer: "PreTrainedTokenizerBase", template: str) -> "PreTrainedTokenizerBase":
    """The tokenizer with the chat template that ``template`` names or whose file it is; itself for one of ``MODES``.

    Raises:
      DataError: neither a name of its templates nor a file.
    """
    if template in MODES:
        return tokenizer
    own = tokenizer.chat_template
    names = list(own) if isinstance(own, dict) else ["default"] if own else []
    path = Path(here(template, DataError))
    if template in names and path.is_file() and template != "default":
        raise DataError(f"--template {template}: a template of the tokenizer and a file here; write ./{template}")
    if template in names:
        text = own[template] if isinstance(own, dict) else own
    elif path.is_file():
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of the encoding
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"--template {template}: cannot be read as UTF-8 text ({error})") from None
        text = template_in(path) if path.suffix.lower() == ".json" else text
    else:
        words = [*MODES, *names]
        raise DataError(
            f"--template {template}: no such file, and no template of the tokenizer; expected {', '.join(words)} or a "
            f"file{did_you_mean(template, words)}"
        )
    read_source(str(text))
    chosen = copy.copy(tokenizer)
    chosen.chat_template = text
    return chosen
