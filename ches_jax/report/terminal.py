"""One pair of a run for the terminal: its numbers, its texts, and its tokens in colour where the run has them."""

import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ches_jax.errors import RunError, printable
from ches_jax.report.axes import digits_of, readable
from ches_jax.report.elements import row_key
from ches_jax.report.page import page_of
from ches_jax.report.pair_table import Column, PairTable, Tokens
from ches_jax.runs.shapes import read_json_lines
from ches_jax.runs.store import fetched_run, place

RED, BLUE, PLAIN = "\x1b[41;97m", "\x1b[44;97m", "\x1b[0m"
"""Behind tokens that raise the risk, behind those that lower it."""
STRONG = 0.25
"""Of the largest share in a pair, from which on a token is coloured."""


def pair_text(run_dir: Path, row: str, *, colour: bool = False) -> str:
    """A pair of a run as text.

    Args:
      run_dir: a directory that has a page with a table (``ches report``).
      row: what names the pair: its key in the page's links (``96``, ``held_out-96``), its row, or how its ``row_id``
        begins.
      colour: whether tokens are coloured; otherwise the ones that weigh most are listed with their numbers.

    Raises:
      RunError: no such pair, or several of that name.
    """
    run_dir = fetched_run(place(run_dir, RunError), RunError)
    page = page_of(run_dir, most_texts=sys.maxsize)
    pairs = page.pairs
    if pairs is None:
        raise RunError(f"{run_dir}: this run has no pairs to show, only means")
    try:
        position = find(pairs, row, str(run_dir))
    except RunError as error:
        raise RunError(f"{error}{_left_out(run_dir, row)}") from None
    notes = [printable(f"note: {note}") for note in page.notes]
    return "\n".join([_shown(pairs, position, _tokens(run_dir, pairs, position), colour), *notes])


def _left_out(run_dir: Path, row: str) -> str:
    """Why a row of the data is no pair of the run, for the end of a message; empty where nothing says so."""
    for folder in (run_dir, run_dir / "after"):
        path = folder / "dropped.jsonl"
        if not path.is_file():
            continue
        for dropped in read_json_lines(path, {"index?": int, "reasons?": [str]}, RunError):
            if str(dropped.get("index")) == row and dropped.get("reasons"):
                return f"; row {row} was left out: {printable(', '.join(dropped['reasons']))}"
    return ""


def find(pairs: PairTable, row: str, where: str) -> int:
    """The position of the pair that ``row`` names.

    Raises:
      RunError: none, or several.
    """
    wanted = row.removeprefix("#").removeprefix("row-")
    keys = [row_key(pairs, i) for i in range(pairs.rows)]
    index = next((c.values for c in pairs.columns if c.name == "index"), None)
    ids = pairs.row_ids or []
    matches = [i for i, key in enumerate(keys) if key == wanted]
    if not matches and index is not None and wanted.isdigit():
        matches = [i for i in range(pairs.rows) if int(index[i]) == int(wanted)]
    if not matches and len(wanted) >= 4:
        matches = [i for i, row_id in enumerate(ids) if row_id.startswith(wanted)]
    if len(matches) > 1:
        raise RunError(
            f"{where}: {len(matches)} pairs are called {row}; say which: {', '.join(keys[i] for i in matches[:6])}"
        )
    if not matches:
        near = difflib.get_close_matches(wanted, keys, n=3) or keys[:3]
        raise RunError(f"{where}: no pair {row}; there are {pairs.rows}, such as {', '.join(near)}")
    return matches[0]


def _tokens(run_dir: Path, pairs: PairTable, position: int) -> Tokens | None:
    """The token scores of a pair, also of one that the page shows without."""
    if pairs.tokens is None or position in pairs.tokens.of:
        return pairs.tokens
    from ches_jax.report.texts import token_table
    from ches_jax.scores.table import read_table

    return token_table(
        run_dir, read_table(run_dir)[0], [position], {side: list(texts) for side, texts in pairs.texts.items()}
    )


def _shown(pairs: PairTable, position: int, tokens: Tokens | None, colour: bool) -> str:
    lines = [f"{pairs.one} {printable(row_key(pairs, position))}"]
    facts = {c.label: f"{_cell(c, position)}{f' {c.unit}' if c.unit else ''}" for c in pairs.columns}
    facts |= {"row_id": pairs.row_ids[position]} if pairs.row_ids else {}
    lines += [printable(f"  {name:26} {value}") for name, value in facts.items()]
    pieces = tokens.of.get(position) if tokens is not None else None
    for side, texts in pairs.texts.items():
        lines += ["", side]
        if pieces and tokens is not None and pieces.get(side):
            largest = max(abs(v or 0.0) for s in ("chosen", "rejected") for _, v in pieces.get(s, []))
            lines.append(f"({tokens.name}: {tokens.sides[side]}; red {tokens.up}, blue {tokens.down})")
            lines.append(_coloured(pieces[side], largest) if colour else printable(texts[position]))
            lines.append(_heaviest(pieces[side]))
        else:
            lines.append(printable(texts[position]) or "(empty)")
    return "\n".join(lines)


def _cell(column: Column, position: int) -> str:
    value = column.values[position]
    if column.kind == "word":
        return str(value or "-")
    values = np.asarray(column.values)
    digits = 0 if values.dtype.kind in "iu" else digits_of(values.astype(np.float64))
    return readable(float(value), digits, signed=column.signed)


def _coloured(tokens: Sequence[Sequence], largest: float) -> str:
    parts = []
    for text, value in tokens:
        value = value or 0.0
        strong = abs(value) > STRONG * largest
        shown = printable(text)
        parts.append(f"{RED if value > 0 else BLUE}{shown}{PLAIN}" if strong else shown)
    return "".join(parts)


def _heaviest(tokens: Sequence[Sequence]) -> str:
    order = sorted((t for t in tokens if t[1]), key=lambda t: -abs(t[1]))[:8]
    return "  most: " + ", ".join(f"{printable(text.strip())!r} {value:+.4g}" for text, value in order) if order else ""
