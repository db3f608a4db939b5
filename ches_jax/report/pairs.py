"""The texts of single pairs in a report, read from the source that was scored."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.errors import ChesError
from ches_jax.report.html import escape, text_block, token_map
from ches_jax.report.summary import number
from ches_jax.scores.parts import TOKENS
from ches_jax.select.config import SelectConfig
from ches_jax.select.scored_rows import Key, SourceRow, key_of, keys, source_rows


def read_texts(
    run: Path, table: pa.Table, positions: Sequence[int], rows: Iterable[SourceRow] | None
) -> tuple[dict[int, Mapping[str, Any]], str]:
    """The contents of the rows at ``positions`` of the table, and a note where they cannot be had.

    A report is worth having without texts: that the source is gone, or is not the one that was scored,
    is a note on the page and no error.
    """
    table_keys, ids = keys(table), table["row_id"].to_pylist()
    position_of = {table_keys[p]: p for p in positions}
    texts: dict[int, Mapping[str, Any]] = {}
    if not position_of:
        return texts, ""
    try:
        for row in source_rows(SelectConfig(scores=run, out=run)) if rows is None else rows:
            if (position := position_of.get(key_of(row))) is not None:
                if row.row_id != ids[position]:
                    return {}, f"the pairs file changed since it was scored (row {row.index})"
                texts[position] = row.content
            if len(texts) == len(position_of):
                break
    except (ChesError, OSError) as error:
        return texts, str(error)
    missing = len(position_of) - len(texts)
    return texts, f"{missing} of the rows are not in the pairs file any more" if missing else ""


def plain_text(value: Any) -> str:
    """A text, or a conversation, or token ids, as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple, np.ndarray)):
        if all(isinstance(m, Mapping) for m in value):
            return "\n".join(f"[{m.get('role', '?')}] {plain_text(m.get('content') or '')}" for m in value)
        return "token ids " + " ".join(str(v) for v in value)
    return json.dumps(value, ensure_ascii=False, default=str)


Tokens = dict[Key, dict[str, list[tuple[str, float]]]]
"""By pair and response: the text of each token and what it adds to the score."""


def read_tokens(run: Path, pairs: Sequence[Key]) -> tuple[Tokens, str]:
    """Token scores of a few pairs, where the run has them, and the score they belong to."""
    path = run / TOKENS
    if not path.is_file():
        return {}, ""
    rows = pq.read_table(path, filters=[("index", "in", [index for index, _ in pairs])])
    by = "ches" if rows["head_score"].null_count else "head_score"
    by_pair: Tokens = {key: {} for key in pairs}
    for key, row in zip(keys(rows), rows.select(["response", "text", by]).to_pylist(), strict=True):
        if key in by_pair:
            by_pair[key].setdefault(row["response"], []).append((row["text"], row[by]))
    return {key: texts for key, texts in by_pair.items() if texts}, by


def token_maps(tokens: dict[str, list[tuple[str, float]]], by: str) -> str:
    """Both responses with their tokens coloured by what they add, on one scale."""
    largest = max((abs(v) for response in tokens.values() for _, v in response), default=0.0)
    labels = {"chosen": f"chosen, each token's share of {by}", "rejected": "rejected, each token's pull on the chosen"}
    maps = [token_map(labels[side], tokens.get(side, []), largest, side) for side in ("chosen", "rejected")]
    return f'<div class="two"><div>{maps[0]}</div>\n<div>{maps[1]}</div></div>'


def pair_card(
    table: pa.Table, position: int, content: Mapping[str, Any] | None, tokens: Tokens | None = None, by: str = "ches"
) -> str:
    """One pair: its numbers, its prompt, and the two responses side by side where the screen is wide."""
    row = table.slice(position, 1).to_pylist()[0]
    facts = [f"row {row['index']}", row["row_id"][:12]]
    (key,) = keys(table.slice(position, 1))
    if key[1] is not None:
        facts.append("responses {} and {}".format(*key[1]))
    scores = ("ches", "ln_ches", "head_score", "edit_distance")
    facts += [f"{name} {number(row[name])}" for name in scores if row.get(name) is not None]
    facts.append(f"tokens: chosen {row['chosen_tokens']}, rejected {row['rejected_tokens']}")
    if row.get("category"):
        facts.append(f"category {row['category']}")
    facts += row.get("flags") or []
    header = f"<header>{escape(' · '.join(facts))}</header>"
    own_tokens = (tokens or {}).get(key)
    maps = f"\n{token_maps(own_tokens, by)}" if own_tokens else ""
    if content is None:
        return f"<article>{header}{maps}</article>"
    prompt, chosen, rejected = (content.get(k, content.get(f"{k}_ids", "")) for k in ("prompt", "chosen", "rejected"))
    return (
        f"<article>{header}\n{text_block('prompt', plain_text(prompt))}\n"
        f'<div class="two"><div>{text_block("chosen", plain_text(chosen), "chosen")}</div>\n'
        f"<div>{text_block('rejected', plain_text(rejected), 'rejected')}</div></div>{maps}</article>"
    )
