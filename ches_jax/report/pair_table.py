"""The table of all pairs of a page: numbers as packed arrays, texts as packed JSON, both compressed.

100,000 pairs fit a few megabytes: numbers are float32, words are codes, and texts are whole for the pairs that lead the
table's order and short for the others, within a budget of characters. Of more pairs those in the middle have none.
"""

import base64
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ches_jax.report.axes import axis, digits_of
from ches_jax.report.html import clean

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
    """A column of texts of a table, each made when it is read."""

    column: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.column)

    def __getitem__(self, at: Any) -> Any:
        return self.column[at].as_py()

    def __iter__(self) -> Iterator[str]:
        return (value for chunk in self.column.chunks for value in chunk.to_pylist())


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

    def encoded(self) -> tuple[dict[str, Any], dict[str, str]]:
        """What describes the columns, and the packed blocks by name."""
        whole, short = self._budget()
        texts, cut = self._texts(whole, short)
        columns = list(self.columns)
        if cut.any():
            columns.append(Column(name="_cut", label="", values=cut.astype(int), shown=False))
        meta, arrays, offset = [], [], 0
        for column in columns:
            described, data = _encode(column)
            padding = -offset % 4
            arrays.append(b"\0" * padding + data.tobytes())
            meta.append({**described, "offset": offset + padding})
            offset += padding + data.nbytes
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
        blocks = {
            "numbers": packed(b"".join(arrays)),
            "texts": packed(_json({name: SEPARATOR.join(of) for name, of in texts.items()})),
        }
        if self.tokens is not None and self.tokens.of:
            t = self.tokens
            head["tokens"] = {"name": t.name, "label": t.label, "up": t.up, "down": t.down, **t.sides}
            blocks["tokens"] = packed(_json(_cleaned({str(k): dict(v) for k, v in t.of.items()})))
        return head, blocks

    def _budget(self) -> tuple[np.ndarray, int]:
        """Which rows keep whole texts, and how many characters of each text the others keep."""
        sizes = np.zeros(self.rows, dtype=np.int64)
        rows = self._with_texts()
        for texts in self.texts.values():
            sizes[rows] += np.fromiter((min(len(texts[i]), LONGEST) for i in rows), np.int64, len(rows))
        if sizes.sum() <= CHARACTERS:
            return np.ones(self.rows, dtype=bool), LONGEST
        whole = np.zeros(self.rows, dtype=bool)
        order = self.leading_rows()
        ends = np.concatenate([order[:WHOLE], order[::-1][:WHOLE]])
        spent = np.cumsum(sizes[ends])
        whole[ends[spent <= CHARACTERS // 3]] = True
        left = CHARACTERS - int(sizes[whole].sum())
        count = max(1, len(self.texts) * int((~whole[rows]).sum()))
        return whole, int(np.clip(left // count, 24, 400))

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
        return np.argsort(np.where(np.isnan(values), np.inf, values), kind="stable")

    def _texts(self, whole: np.ndarray, short: int) -> tuple[dict[str, list[str]], np.ndarray]:
        cut = np.zeros(self.rows, dtype=bool) if self.left_out is None else self.left_out.copy()
        out: dict[str, list[str]] = {}
        for name, texts in self.texts.items():
            out[name] = ["…"] * self.rows
            for i in self._with_texts().tolist():
                text = str(texts[i])
                most = LONGEST if whole[i] else short
                if len(text) > most:
                    cut[i] = True
                    text = "… " + text[-most:] if name == "prompt" and not whole[i] else text[:most] + " …"
                out[name][i] = clean(text)
        if self.row_ids is not None and self.rows <= MOST_IDS:
            out["id"] = [clean(i) for i in self.row_ids]
        return out, cut


def _encode(column: Column) -> tuple[dict[str, Any], np.ndarray]:
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
        given = column.values if isinstance(column.values, Words) else _coded(column.values)
        words = [clean(word) for word in given.names]
        names = sorted(set(words))
        code = {word: i for i, word in enumerate(names)}
        size = np.uint8 if len(names) < 256 else np.uint16 if len(names) < 65536 else np.int32
        data = np.array([code[word] for word in words], size)[given.codes]
        kind = {np.uint8: "u1", np.uint16: "u2", np.int32: "i4"}[size]
        return {**described, "type": kind, "values": names}, data
    values = np.asarray(column.values)
    if values.dtype.kind in "iu":
        return {**described, "type": "i4", "digits": 0, "axis": _axis(values)}, values.astype(np.int32)
    values = np.where(np.isfinite(values), values, np.nan).astype(np.float32)
    finite = values[np.isfinite(values)]
    counted = bool(finite.size and (finite == np.round(finite)).all() and np.abs(finite).max() < 1e7)
    digits = 0 if counted else digits_of(finite)
    return {**described, "type": "f4", "digits": digits, "axis": _axis(values, column.signed)}, values


def _coded(values: Sequence[Any] | np.ndarray) -> Words:
    places: dict[str, int] = {}
    codes = [places.setdefault("" if word is None else word, len(places)) for word in values]
    return Words([*places], np.array(codes, dtype=np.int64))


def _axis(values: np.ndarray, zero: bool = False) -> dict[str, Any]:
    scale = axis(values.astype(np.float64), zero=zero, pad=0.03)
    return {"range": [scale.low, scale.high], "ticks": list(scale.ticks), "labels": list(scale.labels)}


def packed(data: bytes) -> str:
    """Bytes as compressed base64, the same for the same bytes."""
    level = 6 if len(data) < LARGE else 3  # 2 % larger in a third of the time
    return base64.b64encode(gzip.compress(data, level, mtime=0)).decode()


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
