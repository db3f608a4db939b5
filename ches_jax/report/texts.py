"""The texts and the tokens of pairs in a report, read from the source that was scored."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.data.messages import side_text
from ches_jax.data.sources import at_a_time
from ches_jax.data.text_rows import TextRows
from ches_jax.errors import ChesError, RunError
from ches_jax.report.pair_table import CHARACTERS, LONGEST, Texts, Tokens, short_texts
from ches_jax.runs.files import read_parquet
from ches_jax.scores.parts import TOKEN_SCHEMA, TOKENS
from ches_jax.scores.table import CANDIDATES, Scores, rows_at
from ches_jax.select.config import SelectConfig
from ches_jax.select.scored_rows import (
    Joining,
    Key,
    Rows,
    SourceRow,
    keys,
    row_ids,
    row_keys,
    source_blocks,
)

SIDES = ("prompt", "chosen", "rejected")
_TOKEN_COLUMNS = pa.schema([TOKEN_SCHEMA.field(name) for name in ("index", "response", "text", "ches", "head_score")])
_CANDIDATES = pa.schema([TOKEN_SCHEMA.field(name) for name in CANDIDATES])
MOST_TOKENS = 600
"""Of one response."""


def read_texts(
    run: Path, table: Scores, rows: Iterable[SourceRow] | None, shown: np.ndarray, ends: np.ndarray
) -> tuple[dict[str, Texts], str]:
    """The texts of those rows of a score table that are ``shown``, and a note where they cannot be had.

    A report is worth having without texts: that the source is gone, or is not the one that was scored,
    is a note on the page and no error.

    Args:
      run: the directory.
      table: its table.
      rows: the rows that were scored; opened from the run when not given.
      shown: which rows of the table have texts, [rows].
      ends: positions of those whose texts are kept whole; of the others no more than a page has room for.
    """
    positions = np.flatnonzero(shown)
    whole = np.isin(positions, ends)
    most = 1 + short_texts(CHARACTERS, len(SIDES) * int((~whole).sum()))  # one more than is shown: it was cut
    texts = {side: Texts(len(table), positions, most, backwards=side == "prompt") for side in SIDES}
    found, characters = 0, 0
    try:
        blocks = (
            source_blocks(SelectConfig(scores=run, out=run), wanted=_positions(table, shown))
            if rows is None
            else at_a_time(rows)
        )
        joining = Joining(table, shown)
        for some in blocks:
            at, scored_ids = joining.places(some)
            there = at >= 0
            if (changed := _changed(some, scored_ids, there)) is not None:
                return {}, f"Texts are not shown: the pairs file changed since it was scored (row {changed})."
            places = np.searchsorted(positions, at[there])
            found += len(places)
            room = characters <= CHARACTERS
            for side, kept in texts.items():
                kept.set(places, _side_texts(some, side, there), whole[places] | room)
                characters += int(np.minimum(kept.sizes[places], LONGEST).sum())
            if room and characters > CHARACTERS:
                for kept in texts.values():
                    kept.cut(whole)
            if found == len(positions):
                return texts, ""
    except (ChesError, OSError) as error:
        return {}, f"Texts are not shown: {error}"
    missing = len(positions) - found
    return texts, f"{missing} of the rows are not in the pairs file any more; they have no texts here."


def _changed(rows: Rows, scored_ids: Sequence[str], there: np.ndarray) -> int | None:
    """The first row of those in the table whose id is not the one that it has there; None: there is no such row."""
    ids = row_ids(rows)
    if ids == scored_ids:
        return None
    wrong = (at for at in np.flatnonzero(there).tolist() if ids[at] != scored_ids[at])
    return next((row_keys(rows)[at][0] for at in wrong), None)


def _side_texts(rows: Rows, side: str, wanted: np.ndarray) -> list[str]:
    """The texts of a side of those rows that are wanted."""
    if isinstance(rows, TextRows):
        return json.loads(b"[%b]" % b",".join(rows.column(side, wanted)))
    return [side_text(row.content, side) for row in compress(rows, wanted)]


def _positions(table: Scores, shown: np.ndarray) -> bytes | None:
    """Which rows of the source are shown, 1 at their positions; None: all of the table, wherever they are."""
    if shown.all():
        return None
    at = table["index"].to_numpy()[shown]
    wanted = np.zeros(int(at.max()) + 1, np.uint8)
    wanted[at] = 1
    return wanted.tobytes()


def texts_by_id(rows: Iterable[SourceRow], ids: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The texts of rows named by ``row_id``, and their categories; empty where a row is not in the source."""
    wanted: dict[str, list[int]] = {}
    for i, row_id in enumerate(ids):
        wanted.setdefault(row_id, []).append(i)
    texts = {side: [""] * len(ids) for side in SIDES}
    categories = [""] * len(ids)
    for row in rows:
        for i in wanted.get(row.row_id, ()):
            categories[i] = row.category or ""
            for side in SIDES:
                texts[side][i] = side_text(row.content, side)
    return texts, categories


TokenScores = dict[Key, dict[str, list[tuple[str, float | None]]]]
"""By pair and response: the text of each token and what it adds to the score."""


def read_tokens(run: Path, pairs: Sequence[Key]) -> tuple[TokenScores, str]:
    """Token scores of some pairs, where the run has them, and the score they belong to."""
    path = run / TOKENS
    if not path.is_file():
        return {}, ""
    wanted = [("index", "in", [index for index, _ in pairs])]
    rows = read_parquet(path, RunError, "the token scores of `ches score`", _TOKEN_COLUMNS, _CANDIDATES, filters=wanted)
    by = "ches" if rows["head_score"].null_count else "head_score"
    by_pair: TokenScores = {key: {} for key in pairs}
    for key, row in zip(keys(rows), rows.select(["response", "text", by]).to_pylist(), strict=True):
        if key in by_pair:
            by_pair[key].setdefault(row["response"], []).append((row["text"], row[by]))
    return {key: texts for key, texts in by_pair.items() if texts}, by


def token_table(
    run: Path, table: Scores, positions: Sequence[int], texts: Mapping[str, Sequence[str]]
) -> Tokens | None:
    """The token scores of the pairs at ``positions``, as the page shows them; None where the run has none."""
    if not (run / TOKENS).is_file():
        return None
    read = [n for n in ("index", *CANDIDATES, "shared_prefix_tokens") if n in table.schema.names]
    pairs = rows_at(table, positions, read)
    pair_keys = keys(pairs)
    found, by = read_tokens(run, pair_keys)
    if not found:
        return None
    shared = pairs["shared_prefix_tokens"].to_pylist() if "shared_prefix_tokens" in read else [0] * len(pairs)
    of: dict[int, dict[str, Any]] = {}
    for p, key, in_both in zip(positions, pair_keys, shared, strict=True):
        if (of_pair := found.get(key)) is None:
            continue
        sides = dict(of_pair)
        prefix = [(text, None) for text, _ in sides.get("chosen", [])[: in_both or 0]]
        sides["rejected"] = [*prefix, *sides.get("rejected", [])]
        of[p] = {}
        for side, tokens in sides.items():
            whole = readable_tokens(tokens, texts[side][p] if texts else "")
            of[p][side] = [
                [text, None if value is None else float(f"{value:.5g}")] for text, value in whole[:MOST_TOKENS]
            ]
            if len(whole) > MOST_TOKENS:
                of[p][f"{side}_more"] = len(whole) - MOST_TOKENS
    label, inside = ("Head score", "head score") if by == "head_score" else ("CHES", "CHES")
    return Tokens(
        name=by,
        label=label,
        up="raises the risk",
        down="lowers it",
        sides={
            "chosen": f"what each token adds to the {inside} of the pair",
            "rejected": "how each token pulls on the chosen response",
        },
        of=of,
    )


def readable_tokens(tokens: Sequence[tuple[str, float | None]], text: str) -> list[tuple[str, float | None]]:
    """Tokens that are parts of one character joined until they are text, their numbers added up.

    A tokenizer that falls back to bytes cuts a character into tokens that are no text by themselves (they decode to
    the replacement character). What a run of them says is what stands in the response between its readable
    neighbours.

    >>> readable_tokens([("a", 1.0), ("\ufffd", 2.0), ("\ufffd", 3.0), ("b", 4.0)], "aéb")
    [('a', 1.0), ('é', 5.0), ('b', 4.0)]
    """
    out: list[tuple[str, float | None]] = []
    at, i = 0, 0
    while i < len(tokens):
        token, value = tokens[i]
        if "\ufffd" not in token:
            here, end = _place(text, token, at)
            if here >= 0 and here - at <= len(token) + 4:
                at = end
            out.append((token, value))
            i += 1
            continue
        values, first = [], i
        while i < len(tokens) and "\ufffd" in tokens[i][0]:
            values.append(tokens[i][1])
            i += 1
        following = next((t for t, _ in tokens[i:] if t.strip() and "\ufffd" not in t), "")
        end = _place(text, following, at)[0] if following else len(text)
        close = at < end <= at + 4 * (i - first)  # what stands further on is something else
        piece = text[at:end] if close else "".join(t for t, _ in tokens[first:i])
        at = end if close else at
        numbers = [v for v in values if v is not None]
        out.append((piece, sum(numbers) if numbers else None))
    return out


def _place(text: str, token: str, at: int) -> tuple[int, int]:
    """Where a token stands in a text from ``at`` on, and its end; -1 where it does not.

    Some tokenizers decode a single token without the space before it, so the text is decoded both ways.
    """
    for part in (token, token.strip()):
        if part and (here := text.find(part, at)) >= 0:
            return here, here + len(part)
    return -1, at
