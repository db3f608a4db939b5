"""One pair of a run in the terminal: its numbers and its texts, with the tokens coloured where they were scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.displacement.changes import FILE_NAME as CHANGES
from ches_jax.displacement.pair_table import FILE_NAME, read_texts, source_of
from ches_jax.errors import ChesError, RunError

TABLES = (FILE_NAME, "scores.parquet", CHANGES)
"""Where a run keeps its pairs, the first that is there."""
TOKENS = "token_scores.parquet"
TEXTS = ("prompt", "chosen", "rejected")
RAISES, LOWERS, PLAIN = "\x1b[41m", "\x1b[44m", "\x1b[0m"
STRONG = 0.25
"""Share of the pair's largest token score from which on a token is coloured."""


def show(run: Path, row: str, *, colour: bool = False) -> tuple[str, dict[str, Any]]:
    """A pair as text, and its numbers.

    Args:
      run: a directory of `ches diagnose --out`, `ches score` or `ches train`.
      row: ``index`` of the row of the data, or ``row_id`` (or its beginning).
      colour: whether tokens are coloured: red raises the score, blue lowers it.

    Raises:
      ChesError: no pairs in the run, no such row, several pairs.
    """
    path = next((run / name for name in TABLES if (run / name).is_file()), None)
    if path is None:
        raise RunError(f"{run}: none of {', '.join(TABLES)} in it; expected a run of diagnose --out, score or train")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{path}: cannot be read ({error})") from None
    found = _pair(table, row, path)
    texts = {side: found.pop(side, None) for side in TEXTS}
    if not any(texts.values()):
        texts = read_texts(source_of(run)).get(str(found.get("row_id")), {})
    tokens = _tokens(run, found)
    lines = [f"{name}: {_number(value)}" for name, value in found.items() if value not in (None, "", [])]
    for side in TEXTS:
        if side in tokens:
            lines += ["", f"{side} ({tokens[side].name}; red raises it, blue lowers it):", tokens[side].text(colour)]
        elif texts.get(side):
            lines += ["", f"{side}:", printable(str(texts[side]))]
    return "\n".join(lines), {**found, **{side: text for side, text in texts.items() if text}}


def _pair(table: pa.Table, row: str, path: Path) -> dict[str, Any]:
    """The row of the table; of a displacement log, the last evaluation."""
    rows = table.to_pylist()
    if "step" in table.column_names and rows:
        last = max(r["step"] for r in rows)
        rows = [r for r in rows if r["step"] == last]
    exact = [r for r in rows if row.isdigit() and r.get("index") == int(row)]
    found = exact or [r for r in rows if str(r.get("row_id") or "").startswith(row)]
    if not found:
        known = [r["index"] for r in rows[:3] if "index" in r]
        raise ChesError(f"{path}: no row {row}; rows have an index such as {', '.join(map(str, known))}, and a row_id")
    if len(found) > 1:
        which = ", ".join(str(r.get("row_id")) for r in found[:5])
        raise ChesError(f"{path}: {len(found)} pairs are called {row}; give the row_id of one: {which}")
    return dict(found[0])


class _Scored:
    """The tokens of one response with what each adds to a score."""

    def __init__(self, name: str, texts: Sequence[str], values: np.ndarray, largest: float):
        self.name, self.texts, self.values, self.largest = name, texts, values, largest

    def text(self, colour: bool) -> str:
        parts = []
        for text, value in zip(self.texts, self.values, strict=True):
            shown = printable(text)
            strong = colour and abs(value) >= STRONG * self.largest > 0
            parts.append(f"{RAISES if value > 0 else LOWERS}{shown}{PLAIN}" if strong else shown)
        return "".join(parts)


def _tokens(run: Path, pair: Mapping[str, Any]) -> dict[str, _Scored]:
    path = run / TOKENS
    if not path.is_file() or "index" not in pair:
        return {}
    rows = pq.read_table(path, filters=[("index", "==", pair["index"])])
    same = [n for n in ("chosen_candidate", "rejected_candidate") if n in rows.column_names and pair.get(n) is not None]
    kept = [r for r in rows.to_pylist() if all(r[n] == pair[n] for n in same)]
    name = "head_score" if kept and all(r.get("head_score") is not None for r in kept) else "ches"
    largest = max((abs(r[name]) for r in kept if r.get(name) is not None), default=0.0)
    out = {}
    for side in ("chosen", "rejected"):
        mine = [r for r in kept if r["response"] == side]
        if mine:
            out[side] = _Scored(name, [r["text"] for r in mine], np.array([r[name] or 0.0 for r in mine]), largest)
    return out


def printable(text: str) -> str:
    r"""A text without characters that steer a terminal; line ends stay.

    >>> printable("a\x1b[31mb\n")
    'a [31mb\n'
    """
    return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
