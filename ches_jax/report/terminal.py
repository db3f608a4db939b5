"""One pair of a run for the terminal: its numbers, its texts, and its tokens in colour where the run has them."""

import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ches_jax.errors import RunError, printable
from ches_jax.report.axes import digits_of, readable
from ches_jax.report.elements import row_key, row_keys
from ches_jax.report.page import is_of_scores, page_of
from ches_jax.report.pair_table import Column, PairTable
from ches_jax.runs.shapes import read_json_lines
from ches_jax.runs.store import fetched_run, place

RED, BLUE, PLAIN = "\x1b[41;97m", "\x1b[44;97m", "\x1b[0m"
"""Behind tokens that raise the risk, behind those that lower it."""
MOST_COMPARED = 20_000
"""Pairs whose names are compared with one that there is not."""
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
    try:
        pairs, position, notes = _found(run_dir, row)
    except NoSuchPair as error:
        raise RunError(f"{error}{_left_out(run_dir, row)}") from None
    lines = [printable(f"note: {note}") for note in notes]
    return "\n".join([_shown(pairs, position, colour), *lines])


def _found(run_dir: Path, row: str) -> tuple[PairTable, int, Sequence[str]]:
    """The pairs of a run with the texts of one, its position, and what is to be noted."""
    if is_of_scores(run_dir):  # of which there may be a million: the page is more than is needed
        from ches_jax.report.score_page import one_pair

        return one_pair(run_dir, lambda pairs: find(pairs, row, str(run_dir)))
    page = page_of(run_dir)
    if page.pairs is None:
        raise RunError(f"{run_dir}: this run has no pairs to show, only means")
    return page.pairs, find(page.pairs, row, str(run_dir)), page.notes


class NoSuchPair(RunError):
    """No pair of that name, or several."""


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
      NoSuchPair: none, or several.
    """
    wanted = row.removeprefix("#").removeprefix("row-")
    matches = [i for i, key in enumerate(row_keys(pairs)) if key == wanted]
    index = next((c.values for c in pairs.columns if c.name == "index"), None)
    if not matches and index is not None and wanted.isdigit() and len(wanted) < 19:
        matches = np.flatnonzero(np.asarray(index) == int(wanted)).tolist()
    if not matches and len(wanted) >= 4:
        matches = [i for i, row_id in enumerate(pairs.row_ids or []) if row_id.startswith(wanted)]
    if len(matches) > 1:
        several = ", ".join(row_key(pairs, i) for i in matches[:6])
        raise NoSuchPair(f"{where}: {len(matches)} pairs are called {row}; say which: {several}")
    if not matches:
        keys = [*itertools.islice(row_keys(pairs), MOST_COMPARED)]
        near = difflib.get_close_matches(wanted, keys, n=3) or keys[:3]
        raise NoSuchPair(f"{where}: no pair {row}; there are {pairs.rows}, such as {', '.join(near)}")
    return matches[0]


def _shown(pairs: PairTable, position: int, colour: bool) -> str:
    lines = [f"{pairs.one} {printable(row_key(pairs, position))}"]
    facts = {c.label: f"{_cell(c, position)}{f' {c.unit}' if c.unit else ''}" for c in pairs.columns}
    facts |= {"row_id": pairs.row_ids[position]} if pairs.row_ids else {}
    lines += [printable(f"  {name:26} {value}") for name, value in facts.items()]
    tokens = pairs.tokens
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
