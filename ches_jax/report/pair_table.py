"""The table of all pairs of a page: numbers as packed arrays, texts as packed JSON, both compressed.

100,000 pairs fit a few megabytes: numbers are float32, words are codes, and texts are whole for the pairs that lead the
table's order and short for the others, within a budget of characters. Of more pairs those in the middle have none.
"""

import base64
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ches_jax.report.axes import axis, digits_of
from ches_jax.report.html import clean
from ches_jax.scores.table import Scores, blocks, rows_at

LARGE = 16 << 20
"""Bytes from which on a block is compressed for speed."""
WHOLE = 300
"""Pairs whose texts are whole in any case, from either end of the table's order."""
CHARACTERS = 6_000_000
"""Budget of the texts of one page; a page of few pairs keeps them all whole."""
MOST_TEXTS = 100_000
"""Pairs that have texts on a page: those that lead the table's order, from either end."""
MOST_IDS = 20_000
"""Rows up to which a page has their ids."""
LONGEST = 20_000
"""Of one text, whatever the budget."""
SEPARATOR = "\x01"
"""Between the texts of a side, which are one string: a browser is slow at hundreds of thousands of small ones. No text
has it (``clean``)."""


@dataclass(frozen=True)
class Ids(Sequence[str]):
    """The ids of the rows of a table, read from it where they are needed."""

    table: Scores

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, at: Any) -> Any:
        return rows_at(self.table, [at], ["row_id"])["row_id"][0].as_py()

    def __iter__(self) -> Iterator[str]:
        return (row_id for block in blocks(self.table, ["row_id"]) for row_id in block["row_id"].to_pylist())


@dataclass(frozen=True)
class Numbers(Sequence[Any]):
    """A column of numbers that is made where it is needed, and not kept: a page of a million pairs has many."""

    rows: int
    make: Callable[[], np.ndarray]

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, at: Any) -> Any:
        return self.make()[at]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.make(), dtype)


class Texts(Sequence[str]):
    """A side of the pairs of a page: the texts of those that have one there, "" for the others.

    Of the pairs that need not be whole it keeps what a page can show (``most``), as soon as the page is full.
    """

    def __init__(self, rows: int, positions: np.ndarray, most: int, backwards: bool = False):
        """Empty texts of the pairs at ``positions``; of a cut text its end is kept where it is ``backwards``."""
        self.positions = positions
        self.sizes = np.zeros(len(positions), np.int64)
        """Characters of each text before it is cut."""
        self._rows, self._most, self._backwards = rows, most, backwards
        self._texts = [""] * len(positions)

    def set(self, places: np.ndarray, texts: Sequence[str], whole: np.ndarray) -> None:
        """Keeps the texts of the pairs at ``positions[places]``, those that are ``whole`` as they are."""
        self.sizes[places] = [len(text) for text in texts]
        for place, text, all_of_it in zip(places.tolist(), texts, whole.tolist(), strict=True):
            self._texts[place] = text if all_of_it else self._cut(text)

    def cut(self, whole: np.ndarray) -> None:
        """Cuts what is kept already, but for the places that are ``whole``."""
        self._texts = [t if w else self._cut(t) for t, w in zip(self._texts, whole.tolist(), strict=True)]

    def _cut(self, text: str) -> str:
        return text if len(text) <= self._most else text[-self._most :] if self._backwards else text[: self._most]

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, at: Any) -> Any:
        place = int(np.searchsorted(self.positions, at))
        return self._texts[place] if place < len(self.positions) and self.positions[place] == at else ""

    def some(self, rows: np.ndarray) -> list[str]:
        """The texts of some of those that have one."""
        return [self._texts[place] for place in np.searchsorted(self.positions, rows).tolist()]


@dataclass(frozen=True)
class Words(Sequence[str]):
    """A word for each pair, each distinct one kept once."""

    names: Sequence[str]
    codes: np.ndarray
    """Places in ``names``, [rows]."""

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, at: Any) -> Any:
        return self.names[int(self.codes[at])]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: a number, a whole number or a word for each pair."""

    name: str
    label: str
    values: Sequence[Any] | np.ndarray
    kind: Literal["number", "word"] = "number"
    meaning: str = ""
    unit: str = ""
    signed: bool = False
    """Whether positive numbers bear a plus sign."""
    minor: bool = False
    """Left out of the table on a phone."""
    shown: bool = True
    """Whether it is a column of the table; the others stand with the unfolded pair and can be sorted by."""
    down: bool = True
    """Whether the first click sorts the highest first."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What the tokens of some pairs say of one score."""

    name: str
    label: str
    up: str
    """What a positive number means."""
    down: str
    sides: Mapping[str, str]
    """By response: what its numbers are."""
    of: Mapping[int, Mapping[str, Any]]
    """By position: for each response a list of (text, number or None), and NAME_more: how many are left out."""


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """All pairs of a page."""

    name: str
    """Of the file that the page saves."""
    rows: int
    columns: Sequence[Column]
    key: Sequence[str]
    """Columns that together name a pair in links."""
    sort: tuple[str, int]
    """The order at first: a column, and -1 for the highest first."""
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By side (prompt, chosen, rejected): the text of each pair."""
    row_ids: Sequence[str] | None = None
    tokens: Tokens | None = None
    show: str = ""
    """The command that shows one pair, without the pair."""
    one: str = "pair"
    unit: str = "pairs"
    left_out: np.ndarray | None = None
    """True for the pairs that are on the page without their texts, [rows]."""
    show_key: str = ""
    """The column whose number ends the command; the pair's key when empty."""

    def encoded(self) -> tuple[dict[str, Any], dict[str, Iterator[str]]]:
        """What describes the columns, and the packed blocks by name, each written as it is read."""
        whole, short = self._budget()
        cut = self._is_cut(whole, short)
        columns = list(self.columns)
        if cut.any():
            columns.append(Column(name="_cut", label="", values=cut.astype(int), shown=False))
        meta, offset = [], 0
        for column in columns:
            described = _described(column)
            offset += -offset % 4
            meta.append({**described, "offset": offset})
            offset += self.rows * int(described["type"][1])
        sides = [name for name in ("prompt", "chosen", "rejected", "response") if name in self.texts]
        head = {
            "rows": self.rows,
            "columns": meta,
            "key": list(self.key),
            "sort": list(self.sort),
            "sides": sides,
            "show": self.show,
            "one": self.one,
            "unit": self.unit,
            "name": self.name,
            "showKey": self.show_key,
            "searches": "words" if not cut.any() else f"words, in the first {short} characters",
        }
        packs = {"numbers": packed(_aligned(map(_data, columns))), "texts": packed(self._text_block(whole, short))}
        if self.tokens is not None and self.tokens.of:
            t = self.tokens
            head["tokens"] = {"name": t.name, "label": t.label, "up": t.up, "down": t.down, **t.sides}
            packs["tokens"] = packed([_json(_cleaned({str(k): dict(v) for k, v in t.of.items()}))])
        return head, packs

    def _budget(self) -> tuple[np.ndarray, int]:
        """Which rows keep whole texts, and how many characters of each text the others keep."""
        sizes = np.zeros(self.rows, dtype=np.int64)
        rows = self._with_texts()
        for texts in self.texts.values():
            sizes[rows] += np.minimum(_sizes(texts, rows), LONGEST)
        if sizes.sum() <= CHARACTERS:
            return np.ones(self.rows, dtype=bool), LONGEST
        whole = np.zeros(self.rows, dtype=bool)
        order = self.leading_rows()
        ends = np.concatenate([order[:WHOLE], order[::-1][:WHOLE]])
        spent = np.cumsum(sizes[ends])
        whole[ends[spent <= CHARACTERS // 3]] = True
        left = CHARACTERS - int(sizes[whole].sum())
        return whole, short_texts(left, len(self.texts) * int((~whole[rows]).sum()))

    def _with_texts(self) -> np.ndarray:
        """Positions of the pairs that have texts on the page."""
        return np.arange(self.rows) if self.left_out is None else np.flatnonzero(~self.left_out)

    def leading_rows(self) -> np.ndarray:
        """Positions in the table's order at first, those without a number last."""
        name, way = self.sort
        column = next(c for c in self.columns if c.name == name)
        if column.kind == "word":
            return np.arange(self.rows)
        values = way * np.asarray(column.values, dtype=np.float64)
        values[np.isnan(values)] = np.inf
        return np.argsort(values, kind="stable")

    def _is_cut(self, whole: np.ndarray, short: int) -> np.ndarray:
        """Which rows have less than their texts on the page, [rows]."""
        cut = np.zeros(self.rows, dtype=bool) if self.left_out is None else self.left_out.copy()
        rows = self._with_texts()
        most = np.where(whole[rows], LONGEST, short)
        for texts in self.texts.values():
            cut[rows[_sizes(texts, rows) > most]] = True
        return cut

    def _text_block(self, whole: np.ndarray, short: int) -> Iterator[bytes]:
        """JSON: by side, the texts of all rows with ``SEPARATOR`` between them."""
        with_texts = self._with_texts()

        def of(name: str, start: int, stop: int) -> list[str]:
            texts, out = self.texts[name], ["…"] * (stop - start)
            rows = with_texts[slice(*np.searchsorted(with_texts, [start, stop]))]
            some = texts.some(rows) if isinstance(texts, Texts) else [str(texts[i]) for i in rows]
            for i, text in zip(rows.tolist(), some, strict=True):
                most = LONGEST if whole[i] else short
                if len(text) > most:
                    text = "… " + text[-most:] if name == "prompt" and not whole[i] else text[:most] + " …"
                out[i - start] = clean(text)
            return out

        before = b"{"
        for name in self.texts:
            yield before + _json(name) + b":"
            yield from _joined(of(name, start, min(start + _AT_ONCE, self.rows)) for start in self._starts())
            before = b","
        if self.row_ids is not None and self.rows <= MOST_IDS:
            yield before + _json("id") + b":"
            yield from _joined([[clean(i) for i in self.row_ids]])
            before = b","
        yield b"}" if before == b"," else b"{}"

    def _starts(self) -> range:
        return range(0, self.rows, _AT_ONCE)


_AT_ONCE = 4096
"""Rows whose texts are written at once."""


def short_texts(characters: int, count: int) -> int:
    """How many characters each of ``count`` texts has."""
    return int(np.clip(characters // max(1, count), 24, 400))


def _sizes(texts: Sequence[str], rows: np.ndarray) -> np.ndarray:
    """Characters of some texts."""
    if isinstance(texts, Texts):
        return texts.sizes[np.searchsorted(texts.positions, rows)]
    return np.fromiter((len(texts[i]) for i in rows), np.int64, len(rows))


def _joined(parts: Iterable[Sequence[str]]) -> Iterator[bytes]:
    """Texts with ``SEPARATOR`` between them, as a string of JSON."""
    before = b'"'
    for texts in parts:
        yield before + _json(SEPARATOR.join(texts))[1:-1]
        before = _json(SEPARATOR)[1:-1]
    yield b'"' if before != b'"' else b'""'


def _described(column: Column) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": column.name,
        "label": clean(column.label),
        "kind": column.kind,
        "meaning": clean(column.meaning),
        "unit": column.unit,
        "signed": column.signed,
        "minor": column.minor,
        "shown": column.shown,
        "down": column.down,
        "digits": None,
    }
    if column.kind == "word":
        names = _names(_as_words(column))
        return {**described, "type": _word_type(names)[0], "values": names}
    values = np.asarray(column.values)
    if values.dtype.kind in "iu":
        return {**described, "type": "i4", "digits": 0, "axis": _axis(values)}
    values = _float32(values)
    finite = values[np.isfinite(values)]
    counted = bool(finite.size and (finite == np.round(finite)).all() and np.abs(finite).max() < 1e7)
    digits = 0 if counted else digits_of(finite)
    return {**described, "type": "f4", "digits": digits, "axis": _axis(values, column.signed)}


def _data(column: Column) -> bytes:
    """The numbers of a column, or the places of its words among ``_names``."""
    if column.kind == "word":
        given = _as_words(column)
        names = _names(given)
        code = {word: i for i, word in enumerate(names)}
        return np.array([code[clean(word)] for word in given.names], _word_type(names)[1])[given.codes].tobytes()
    values = np.asarray(column.values)
    return (values.astype(np.int32) if values.dtype.kind in "iu" else _float32(values)).tobytes()


def _float32(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.nan).astype(np.float32)


def _as_words(column: Column) -> Words:
    return column.values if isinstance(column.values, Words) else _coded(column.values)


def _names(words: Words) -> list[str]:
    return sorted({clean(word) for word in words.names})


def _word_type(names: Sequence[str]) -> tuple[str, Any]:
    """Of the places of so many words, for the page and for numpy."""
    return ("u1", np.uint8) if len(names) < 256 else ("u2", np.uint16) if len(names) < 65536 else ("i4", np.int32)


def _aligned(arrays: Iterable[bytes]) -> Iterator[bytes]:
    """Each array, behind what makes it begin at a multiple of four bytes."""
    offset = 0
    for data in arrays:
        yield b"\0" * (-offset % 4)
        yield data
        offset += -offset % 4 + len(data)


def _coded(values: Sequence[Any] | np.ndarray) -> Words:
    places: dict[str, int] = {}
    codes = [places.setdefault("" if word is None else word, len(places)) for word in values]
    return Words([*places], np.array(codes, dtype=np.int64))


def _axis(values: np.ndarray, zero: bool = False) -> dict[str, Any]:
    scale = axis(values.astype(np.float64), zero=zero, pad=0.03)
    return {"range": [scale.low, scale.high], "ticks": list(scale.ticks), "labels": list(scale.labels)}


def packed(parts: Iterable[bytes]) -> Iterator[str]:
    """Bytes as compressed base64, the same for the same bytes, written as they are read."""
    begin, size, left = [], 0, iter(parts)
    for part in left:
        begin.append(part)
        size += len(part)
        if size >= LARGE:
            break
    level = 6 if size < LARGE else 3  # 2 % larger in a third of the time
    made = zlib.compressobj(level, wbits=31)
    waiting = b""
    for part in itertools.chain((begin.pop(0) for _ in range(len(begin))), left):
        waiting += made.compress(part)
        ready = len(waiting) // 3 * 3
        yield base64.b64encode(waiting[:ready]).decode()
        waiting = waiting[ready:]
    yield base64.b64encode(waiting + made.flush()).decode()


def unpacked(text: str) -> bytes:
    """The inverse of ``packed``."""
    return gzip.decompress(base64.b64decode(text))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, Mapping):
        return {k: _cleaned(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value
