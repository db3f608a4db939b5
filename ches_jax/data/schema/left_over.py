"""Columns that may matter and are not read, and numbers that contradict how a row is read: notes for a person."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ches_jax.data.schema.column_names import (
    BESIDE,
    PROMPT,
    RANK,
    SCORE,
    SEEN_OR_HEARD,
    SIDES,
    SYSTEM,
    TURNED,
    WINNER,
    families,
    sequence_of,
    words_in,
)
from ches_jax.data.schema.column_values import (
    TIED,
    Rows,
    are_labels,
    are_responses,
    is_filled,
    is_numeric,
    say_something,
)
from ches_jax.data.schema.mapping import Schema, canonical_rows
from ches_jax.data.schema.prompt_column import prompt_path, stands
from ches_jax.data.schema.values import word
from ches_jax.errors import DataError


def left_over(schema: Schema, rows: Rows, columns: Sequence[str]) -> Iterator[str]:
    """Columns that may matter and are not read, each with what to do; numbers that contradict the sides."""
    read = {n.partition(".")[0] for n in schema.reads} | set(schema.reads)
    for name in columns:
        if name in read or not any(is_filled(r.get(name)) and r.get(name) != "" for r in rows):
            continue
        parts = {*words_in(name)}
        if name.lower() in SYSTEM or any(prompt_path(rows, name)) or (parts & BESIDE and say_something(rows, name)):
            where = ("prompt",) if name.lower() in SYSTEM else ("prompt", "chosen", "rejected", "responses")
            if not all(stands(schema, r, r.get(name), where) for r in rows):
                yield _told_of_prompt(schema, rows, name)
        elif parts & RANK or (parts & (WINNER | TURNED) and not parts & SCORE and are_labels(rows, name)):
            what = "a rank" if parts & RANK else "a label"
            yield f"{note_on(name)} {what} and is not read; docs/data.md: which response is better"
        elif ties := sum(isinstance(r.get(name), str) and word(r[name]) in TIED for r in rows):
            yield f"column '{name}' says tie in {ties} of {len(rows)} rows and is not read: these rows make pairs"
        elif shows(rows, name):
            yield f"{note_on(name)} what a prompt shows or plays, which no model here sees or hears: it is not read"
    unread = [n for n in columns if n not in read]
    yield from _other_sides(schema, rows, unread)
    yield from _contradicted(schema, rows, unread)


def shows(rows: Rows, name: str) -> bool:
    """Whether a column holds pictures or sounds, or where they are."""
    values = [v for row in rows if (v := row.get(name)) not in (None, "", [], {})]
    return bool(SEEN_OR_HEARD & {*words_in(name)[-1:]} and values) and not all(map(is_numeric, values))


def require_text(rows: Rows, columns: Sequence[str], words: str) -> None:
    """No column holds what no model here sees or hears, though the prompt speaks of it.

    Args:
      rows: some of a source.
      columns: their names.
      words: of ``--columns``, with which a person says that the texts alone are meant.

    Raises:
      DataError: one does.
    """
    for name in columns:
        if shows(rows, name):
            raise DataError(
                f"{note_on(name)} what a prompt shows or plays, which no model here sees or hears; to take the texts "
                f"alone: --columns {words}"
            )


def _other_sides(schema: Schema, rows: Rows, columns: Sequence[str]) -> Iterator[str]:
    """Two more columns of responses, beside those that are read."""
    taken = (schema.chosen, *schema.responses)[bool(not schema.chosen) :]
    for pair in (pair for words in SIDES for pair in families(columns, words)):
        if taken and all(are_responses(rows, name) and say_something(rows, name) for name in pair):
            one, two = pair
            yield (
                f"columns '{one}' and '{two}' look like responses and are not read; --columns chosen={one} "
                f"rejected={two} takes them instead of '{taken[0]}'"
            )


def note_on(column: str) -> str:
    """How a note on a column that is not read begins."""
    return f"column '{column}' looks like"


def _told_of_prompt(schema: Schema, rows: Rows, name: str) -> str:
    if name.lower() in SYSTEM:
        return f"{note_on(name)} a system text and is not read; --columns system={name} takes it"
    text = all(isinstance(r.get(name), str) for r in rows if is_filled(r.get(name)))
    ways = [f"prompt={name} takes it" + f" instead of '{schema.prompt}'" * bool(schema.prompt)]
    if schema.prompt:
        ways.append(f"input={name} puts it under that" if text else f"history={name} puts it in front of that")
    what = "a prompt" if name.lower() in PROMPT else "a part of the prompt"
    return f"{note_on(name)} {what} and is not read; --columns {', '.join(ways)}"


def _contradicted(schema: Schema, rows: Rows, columns: Sequence[str]) -> Iterator[str]:
    """Numbers of both sides that are not read and say the opposite in most rows."""
    sides = (schema.chosen, schema.rejected) if schema.chosen else schema.responses
    if len(sides) != 2:
        return
    words = next((w for w in (*SIDES, sequence_of(sides)) if sides in families(sides, w)), SIDES[0])
    for one, two in families(columns, words):
        if not {*words_in(one)} & (SCORE | RANK):
            continue
        sign = -1 if {*words_in(one)} & RANK else 1
        better = [
            (side, sign * (float(r[one]) - float(r[two])))
            for r in rows
            if is_numeric(r.get(one)) and is_numeric(r.get(two)) and (side := _better_side(schema, r))
        ]
        against = sum(side * difference < 0 for side, difference in better)
        if against * 2 > len(better):
            turned = f"chosen={schema.rejected} rejected={schema.chosen}" if schema.chosen else "another declaration"
            yield (
                f"'{one}' and '{two}' say the opposite of schema {schema.name} in {against} of {len(better)} rows: if "
                f"they are right, --columns {turned} turns it round (docs/data.md)"
            )


def _better_side(schema: Schema, row: Mapping[str, Any]) -> int:
    """1 where the first response is the better one, -1 where the second is, 0 where none is or nothing is known."""
    if schema.chosen:
        return 1
    try:
        first, second = canonical_rows(schema, row)[0][1]["scores"]
    except DataError:
        return 0
    return (first > second) - (first < second)
