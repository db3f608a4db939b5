r"""Rows of texts, taken from the bytes of their lines without decoding these.

Most pairs are JSON lines of texts. What is written of such a row again, and what its id is the hash of, are the texts
as JSON has them, and so they stand in the line:

    {"prompt": "1+1?\n", "chosen": "2", "rejected": "3"}      "1+1?\n"   "2"   "3"

One pattern takes the lines of a block apart. A line that is written in another way (escapes that we would not write,
columns that the line before did not have), or whose texts may say more than they seem (a conversation written as text,
responses that repeat their prompt) is understood as a row of any other format is. Where it is one pair of texts too,
these are written as JSON has them, and it stands among the others.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import compress
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from ches_jax.data.formats import Lines, row_of_line
from ches_jax.data.prompts import NOT_TEXT, TEXT_COLUMNS
from ches_jax.runs.json_text import PLAIN_TEXT, quoted, written

_CATEGORY = "category"
_OTHER = rb"null|true|false|-?[0-9][0-9.e+-]{0,30}"
"""A value, but for texts, of a column that is carried along; whether a number is as we write it, ``_is_ours`` tells."""
_WORDS = frozenset({b"null", b"true", b"false"})
_TEXTS = frozenset(TEXT_COLUMNS)
_SIMPLE = rb'"[^"]*(?:(?<=\\)"[^"]*)*(?<!\\)"'
"""A text of JSON as ``PLAIN_TEXT`` has it, where no backslash is followed by another: found in a third of the time."""
_SIMPLY_ESCAPED = np.isin(np.arange(256), list(b'"bfnrt'))
"""By the byte behind a backslash."""
_PIECES = 16
"""Of a block of lines; where rows of different kinds alternate, what is left of it is read row by row."""
_SPACE = rb"(?: |\\[nrtf]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)*"
"""White space that ``str.strip`` takes away, as it stands in a ``PLAIN_TEXT``."""
_MAY_BE_SPACE = frozenset(b' "\\\xc2\xe1\xe2\xe3')
"""Its first bytes, and the end of a text."""
_FIRST_LETTERS = re.compile(rb'"%b([^"]{0,4})' % _SPACE)
"""Of a text, behind its white space."""
_MAY_BE_TURNS = re.compile(rb'"%b(?:[\[{]|array)' % _SPACE)
"""How a conversation that is written as text begins."""
_OPENING = _MAY_BE_SPACE | frozenset(b"[{a")
"""Its first bytes."""


class Understood(Protocol):
    """A pair as ``data.sources`` understands it."""

    @property
    def row_id(self) -> str: ...
    @property
    def content(self) -> Mapping[str, Any]: ...
    @property
    def extra(self) -> Mapping[str, Any]: ...
    @property
    def category(self) -> str | None: ...
    @property
    def candidates(self) -> tuple[int, ...] | None: ...


R = TypeVar("R", bound=Understood)


@dataclass(frozen=True, slots=True)
class TextRows:
    """Some rows in their order, each of which is a pair of texts."""

    index: np.ndarray
    """Positions of the rows in the source, [rows]."""
    names: tuple[str, ...]
    """The columns of every row, in its order: prompt, chosen, rejected and those that are carried along."""
    values: list[tuple[bytes, ...]]
    """By row, what stands in the columns, as JSON has it (``json_text.written``)."""
    ids: list[str]
    """By row, its ``row_id``."""

    def __len__(self) -> int:
        return len(self.values)

    def column(self, name: str, wanted: Iterable[object] | None = None) -> list[bytes]:
        """A column, of all rows or of those that are ``wanted`` (true at their places)."""
        at = self.names.index(name)
        return [row[at] for row in (self.values if wanted is None else compress(self.values, wanted))]


def text_ids(chosen: Iterable[bytes], prompt: Iterable[bytes], rejected: Iterable[bytes]) -> list[str]:
    """``row_id`` of pairs of texts, given as JSON has them.

    >>> text_ids([b'"a"'], [b'"p"'], [b'"b"'])
    ['8ad7972c3a7a43fe4ae5c60fb53bdb64']
    """
    sha256 = hashlib.sha256
    hashed = map(b'{"chosen":%b,"prompt":%b,"rejected":%b}'.__mod__, zip(chosen, prompt, rejected, strict=True))
    return [sha256(text).hexdigest()[:32] for text in hashed]


def text_rows(blocks: Iterable[Lines], understood: Callable[[int, str, Any], list[R]]) -> Iterator[TextRows | list[R]]:
    """Rows of JSON lines in their order: pairs of texts together, and others as they are understood.

    Args:
      blocks: the lines.
      understood: (position, where, row as read) -> the pairs of a row.
    """
    names: tuple[str, ...] = ()
    for lines in blocks:
        block = _Block(lines, understood, names)
        yield from block.pieces()
        names = block.names


class _Block(Generic[R]):
    """The lines of one block, taken apart from the first to the last."""

    def __init__(self, lines: Lines, understood: Callable[[int, str, Any], list[R]], names: tuple[str, ...]):
        """``names``: the columns of rows of texts so far, none before the first."""
        self._lines, self._understood, self.names = lines, understood, names
        self._at = 0
        """The first line that is not taken."""
        self._values: list[tuple[bytes, ...]] = []
        self._ids: list[str] = []
        self._others: list[R] = []

    def pieces(self) -> Iterator[TextRows | list[R]]:
        """All rows."""
        text, count = _text_of(self._lines), 0
        while self._at < len(self._lines):
            apart = count < _PIECES
            if apart and text and self.names and not self._others:
                self._take_matching(text)
                if self._at == len(self._lines):
                    break
            raw, records = self._one(self._at)
            texts = _as_texts(raw, records) if apart else None
            another = texts is None or tuple(raw) != self.names
            if (self._values and another) or (self._others and texts is not None):
                count += 1
                yield self._taken()
            if texts is None:
                self._others += records
            else:
                self.names = tuple(raw)
                self._values.append(texts)
                self._ids.append(records[0].row_id)
            self._at += 1
        if self._values or self._others:
            yield self._taken()

    def _taken(self) -> TextRows | list[R]:
        """What was taken last: texts, or other rows."""
        if not self._values:
            others, self._others = self._others, []
            return others
        index = self._lines.positions[self._at - len(self._values) : self._at]
        rows = TextRows(index, self.names, self._values, self._ids)
        self._values, self._ids = [], []
        return rows

    def _one(self, at: int) -> tuple[Any, list[R]]:
        """What a line holds, and what that means."""
        begin, end = self._lines.bounds[at : at + 2].tolist()
        where, raw = row_of_line(int(self._lines.numbers[at]), self._lines.text[begin:end])
        return raw, self._understood(int(self._lines.positions[at]), where, raw)

    def _take_matching(self, text: bytes) -> None:
        """Takes the lines that are written as ours are, up to the first that is not; ``text``: how a text looks."""
        bounds = self._lines.bounds[self._at :]
        pattern: Any = _pattern(self.names, text)  # what it matches one after another, the library says nowhere
        found = [*iter(pattern.scanner(self._lines.text, int(bounds[0])).match, None)]
        ends = np.array([line.end() for line in found], np.int64)
        # what does not end with its line is no row
        values = [line.groups() for line in found[: int((ends == bounds[1 : 1 + len(ends)]).cumprod().sum())]]
        if not values:
            return
        columns = dict(zip(self.names, zip(*values, strict=True), strict=True))
        ids = text_ids(columns["chosen"], columns["prompt"], columns["rejected"])
        braces = self._lines.text.count(b"{", int(bounds[0]), int(bounds[len(values)]))
        for i in _doubtful(columns, braces > len(values)):  # each line begins with one
            raw, records = self._one(self._at + i)
            texts = _as_texts(raw, records)
            if texts is None:
                del values[i:], ids[i:]
                break
            values[i], ids[i] = texts, records[0].row_id
        self._values += values
        self._ids += ids
        self._at += len(values)


@lru_cache(64)
def _pattern(names: tuple[str, ...], text: bytes) -> re.Pattern[bytes]:
    """A line of a row with these columns, as it is mostly written."""
    kinds = {
        **dict.fromkeys(names, b"%b|%b" % (text, _OTHER)),
        _CATEGORY: b"%b|null" % text,
        **dict.fromkeys(_TEXTS, text),
    }
    members = b", ?".join(b"%b: ?(%b)" % (re.escape(quoted(name)), kinds[name]) for name in names)
    return re.compile(rb"\{%b\}\r?(?:\n|\Z)" % members)


def _text_of(lines: Lines) -> bytes:
    """How a text of some lines looks, as a pattern: the simple one where it does; none where they are no UTF-8."""
    if not _is_utf8(lines.text):
        return b""
    letters = np.frombuffer(lines.text, np.uint8)
    escapes = np.flatnonzero(letters == ord("\\")) + 1
    plain = np.count_nonzero(letters < ord(" ")) == np.count_nonzero(letters == ord("\n"))
    return _SIMPLE if plain and _SIMPLY_ESCAPED[letters[escapes[escapes < len(letters)]]].all() else PLAIN_TEXT


def _as_texts(raw: Any, records: list[R]) -> tuple[bytes, ...] | None:
    """The values of a row that is one pair of texts, by its columns, as JSON has them; None for any other."""
    if len(records) != 1 or records[0].candidates is not None:
        return None
    (record,) = records
    content = record.content
    if content.keys() != _TEXTS or not all(isinstance(text, str) for text in content.values()):
        return None
    values = {**record.extra, **content, _CATEGORY: record.category}
    if not NOT_TEXT.isdisjoint(raw) or not raw.keys() >= _TEXTS or raw.keys() | {_CATEGORY} != values.keys():
        return None
    return tuple([written(values[name]).encode() for name in raw])


def _doubtful(columns: Mapping[str, Sequence[bytes]], braces: bool) -> list[int]:
    """Rows of texts that may be something else, as conversations have ``braces``, or that we would write otherwise."""
    prompts, chosen, rejected = (columns[name] for name in TEXT_COLUMNS)
    found = {
        i
        for i, (prompt, one) in enumerate(zip(prompts, chosen, strict=True))
        if (prompt[1] == one[1] or prompt[1] in _MAY_BE_SPACE or one[1] in _MAY_BE_SPACE)
        and _begin_alike(prompt, one, rejected[i])
    }
    for name, column in columns.items():
        if name in _TEXTS and braces:
            found |= {i for i, text in enumerate(column) if text[1] in _OPENING and _MAY_BE_TURNS.match(text)}
        elif name not in _TEXTS and name != _CATEGORY:
            found |= {i for i, value in enumerate(column) if not _is_ours(value)}
    return sorted(found)


def _begin_alike(prompt: bytes, *responses: bytes) -> bool:
    """Whether responses begin with the first letters of a prompt, all behind their white space."""
    begin = _begin(prompt)
    return begin != b"" and all(_begin(text) == begin for text in responses)


def _begin(text: bytes) -> bytes:
    found = _FIRST_LETTERS.match(text)
    return found[1] if found else b""


def _is_ours(value: bytes) -> bool:
    """Whether a value that the pattern found is written as ``json_text.written`` does.

    >>> _is_ours(b"0.10"), _is_ours(b"0.1"), _is_ours(b"1e400")
    (False, True, False)
    """
    if value.startswith(b'"') or value in _WORDS:
        return True
    try:
        return written(json.loads(value)).encode() == value
    except ValueError:
        return False


def _is_utf8(text: bytes) -> bool:
    try:
        return text.isascii() or bool(text.decode())
    except UnicodeDecodeError:
        return False
