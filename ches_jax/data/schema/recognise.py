"""Which declaration fits a data set: a preset that has all its columns, or what names and values of columns say.

Two readings that both fit are refused, with both and how to choose; an unread column that may matter is reported.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ches_jax.data.nested import decoded
from ches_jax.data.prompts import ID_COLUMNS, lookup, pair_contents
from ches_jax.data.schema.column_names import (
    RANK,
    SCORE,
    SEQUENCES,
    SIDES,
    STEM,
    families,
    in_sequence,
    names_winner,
    says_order,
    words_in,
)
from ches_jax.data.schema.column_values import (
    LONGEST_LABEL,
    Rows,
    are_flags,
    are_numbers,
    are_responses,
    are_whole,
    has_any,
    two_readings,
)
from ches_jax.data.schema.left_over import left_over, require_text
from ches_jax.data.schema.mapping import PLAIN, Names, Schema, canonical_rows, from_words, grouped
from ches_jax.data.schema.preference import (
    contradicting,
    one_preference,
    order_of_label,
    preference_of_columns,
    preference_of_list,
    require_agreement,
    score_or_rank,
    ways_of_list,
)
from ches_jax.data.schema.presets import PRESETS
from ches_jax.data.schema.prompt_column import prompt_words, with_history, with_system
from ches_jax.data.schema.values import are_turns, turns, word
from ches_jax.data.schema.winners import is_tie
from ches_jax.data.two_prompts import TWO_PROMPTS
from ches_jax.errors import DataError

_TEXT_OF = ("text", "response", "answer", "completion", "content", "output", "generation", "reply", "summary")


@dataclass(frozen=True)
class Recognised:
    """What was taken, and what a person should know about it."""

    schema: Schema
    notes: tuple[str, ...] = ()


def recognise(rows: Rows) -> Recognised:
    """The declaration that fits the rows; the plain one where nothing else does.

    Raises:
      DataError: two readings fit, or it is not said which response is better.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    if any(n in columns for n in ID_COLUMNS):
        return Recognised(PLAIN, tuple(_texts_beside_ids(rows)))
    if all(has_any(rows, n) for n in TWO_PROMPTS) and fits(PLAIN, rows):
        return _recognised(PLAIN, rows, [n for n in columns if n not in TWO_PROMPTS])
    if "responses" in columns and PLAIN.prompt in columns and fits(PLAIN, rows):
        return _canonical_list(rows, columns)
    named = _named_by_side(rows, columns)
    schema = named or _preset(rows) or _inferred(rows, columns) or PLAIN
    if schema.chosen:
        require_agreement(rows, columns, (schema.chosen, schema.rejected))
    schema = with_history(with_system(schema, rows, columns), rows, columns)
    return _recognised(schema, rows, columns)


def _recognised(schema: Schema, rows: Rows, columns: Sequence[str]) -> Recognised:
    require_text(rows, columns, schema.describe().replace(", ", " "))
    return Recognised(schema, tuple(left_over(schema, rows, columns)))


def _texts_beside_ids(rows: Rows) -> Iterator[str]:
    """A note where rows have the responses as texts too, as sets that a trainer has prepared do."""
    texts = [n for n in (PLAIN.chosen, PLAIN.rejected) if has_any(rows, n)]
    if len(texts) == 2 and all(has_any(rows, n) for n in ID_COLUMNS):
        yield (
            f"{', '.join(ID_COLUMNS)} are read, and the texts in 'chosen' and 'rejected' are not: ids hold for the "
            "tokenizer that made them alone; --columns prompt_ids=,chosen_ids=,rejected_ids= takes the texts"
        )


def _named_by_side(rows: Rows, columns: Sequence[str]) -> Schema | None:
    """Rows whose ``chosen`` is no response but names one of two other columns."""
    values = [r[PLAIN.chosen] for r in rows if r.get(PLAIN.chosen) is not None]
    if not values or not all(
        isinstance(v, str | int) and len(word(v)) <= LONGEST_LABEL and " " not in word(v) for v in values
    ):
        return None
    both = _placed_columns(rows, columns)
    if not both or not all(is_tie(v) or any(word(v) in (n.lower(), words_in(n)[-1]) for n in both) for v in values):
        return None
    words = prompt_words(rows, columns, both, optional=are_whole(rows, both[0]))
    order = order_of_label(rows, PLAIN.chosen, both)
    return _made({"responses": list(both), "winner": PLAIN.chosen, "order": order, **words}, rows)


def _canonical_list(rows: Rows, columns: Sequence[str]) -> Recognised:
    """Rows with ``prompt`` and ``responses``: best first only where no other column may say which is better.

    Raises:
      DataError: two columns contradict each other, or one may say it in a way that is not known.
    """
    listed = "responses"
    if PLAIN.chosen in columns:
        return Recognised(PLAIN)
    fitting = contradicting(rows, [listed], ways_of_list(rows, columns, listed))
    words = one_preference(fitting, listed, columns) if fitting else {}
    if words and (schema := _made({"prompt": PLAIN.prompt, "responses": listed, **words}, rows)):
        return _recognised(schema, rows, columns)
    for name in (n for n in columns if says_order(n) and n != listed):
        if has_any(rows, name):
            raise two_readings(
                "the responses are listed best first",
                f"'{name}' says which is better",
                f"--columns responses={listed}, or "
                + (f"winner={name} order=..." if names_winner(name) else f"ranks={name} or best_first={name}")
                + " (with prompt=...)",
            )
    return Recognised(PLAIN, ("no column says which of 'responses' is better: the first is taken for the best",))


def recognise_prompt(rows: Rows) -> Recognised:
    """The same for rows of which the prompt alone is asked: who wins does not matter.

    Raises:
      DataError: two columns may be the prompt.
    """
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    if "prompt_ids" in columns:
        return Recognised(PLAIN)
    schema = None if "prompt" in columns and "chosen" not in columns else _preset(rows)
    if schema is None and "prompt" not in columns and not ("chosen" in columns and fits(PLAIN, rows)):
        words = prompt_words(rows, columns, (), optional=False)
        schema = replace(PLAIN, name="columns", chosen="", rejected="", **words) if words else None
    schema = with_history(with_system(schema or PLAIN, rows, columns), rows, columns)
    return _recognised(schema, rows, columns)


def told_of_columns(schema: Schema | None, columns: Mapping[str, str], rows: Rows) -> Recognised:
    """What is left unread of a declaration that was given, or of columns that are renamed."""
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    taken = schema or replace(PLAIN, **{n: columns[n] for n in ("prompt", "chosen", "rejected") if n in columns})
    hidden = [n for n in names if n in columns.values() or (n in columns and not columns[n])]
    return Recognised(taken, tuple(left_over(taken, rows, [n for n in names if n not in hidden])))


def fits(schema: Schema, rows: Rows) -> bool:
    """Whether half of the rows at least can be read so."""
    groups = [members for _, members in grouped(schema, (("", row) for row in rows))]
    return sum(_readable(schema, row) for row in groups) * 2 >= max(len(groups), 1)


def _readable(schema: Schema, row: Mapping[str, Any]) -> bool:
    try:
        for _, canonical in canonical_rows(schema, row):
            pair_contents(canonical, {}, "chosen-against-all")
    except DataError:
        return False
    return True


def _preset(rows: Rows) -> Schema | None:
    fitting = [p for p in PRESETS.values() if all(has_any(rows, n) for n in p.columns) and fits(p.schema, rows)]
    if has_any(rows, PLAIN.prompt) and PLAIN in [p.schema for p in fitting]:  # then no other column is the prompt
        fitting = [p for p in fitting if p.schema.prompt == PLAIN.prompt or p.schema.chosen != PLAIN.chosen]
    best = [p for p in fitting if not any(set(p.columns) < set(q.columns) for q in fitting)]
    if len(best) > 1:
        one, two = (p.schema for p in best[:2])
        raise two_readings(
            f"the columns fit schema {one.name} ({one.describe()})",
            f"schema {two.name} ({two.describe()})",
            f"--schema {one.name} or --schema {two.name}",
        )
    return best[0].schema if best else None


def _inferred(rows: Rows, columns: Sequence[str]) -> Schema | None:
    sides = _two_sides(rows, columns)
    both = _placed_columns(rows, columns)
    listed = _one_list(rows, columns)
    if sides:
        words = prompt_words(rows, columns, sides, optional=are_whole(rows, sides[0]))
        return _made({"chosen": sides[0], "rejected": sides[1], **words}, rows)
    if both and listed:
        raise two_readings(
            f"responses in {both[0]} and {both[1]}",
            f"responses in {listed}",
            f"--columns responses={both[0]},{both[1]} ... or --columns responses={listed} ...",
        )
    if both:
        words = prompt_words(rows, columns, both, optional=are_whole(rows, both[0]))
        return _made({"responses": list(both), **words, **preference_of_columns(rows, columns, both)}, rows)
    if listed:
        words = prompt_words(rows, columns, (listed,), optional=are_whole(rows, listed, many=True))
        return _made({"responses": listed, **words, **preference_of_list(rows, columns, listed)}, rows)
    return _by_prompt(rows, columns)


def _made(words: dict[str, Any], rows: Rows) -> Schema | None:
    schema = replace(from_words(words, "columns"), name="columns")
    listed = bool(schema.responses) and not fits(PLAIN, rows)  # then its own message says what is wrong with the rows
    return schema if listed or fits(schema, rows) else None


def _two_sides(rows: Rows, columns: Sequence[str]) -> Names | None:
    fitting: list[Names] = [
        (one, two)
        for words in SIDES
        for one, two in families(columns, words)
        if are_responses(rows, one, several=True)
        and are_responses(rows, two, several=True)
        and (len(words[0]) > 1 or STEM & {*words_in(one)})
    ]
    exact = [pair for pair in fitting if pair in SIDES]
    return _only(exact or fitting or list(_beside_rejected(rows, columns)))


def _beside_rejected(rows: Rows, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Columns of a response and of its rejected counterpart: ``response``, ``rejected_response``."""
    parts = {name: words_in(name) for name in columns}
    for one, two in itertools.permutations(columns, 2):
        named = STEM & {*parts[one]} and parts[two] == ["rejected", *parts[one]]
        if named and are_responses(rows, one, several=True) and are_responses(rows, two, several=True):
            yield one, two


def _placed_columns(rows: Rows, columns: Sequence[str]) -> Names | None:
    """The columns of two responses, or of more."""
    fitting = [
        names
        for sequence in SEQUENCES
        for names in in_sequence([n for n in columns if _may_hold_responses(rows, n)], sequence)
    ]
    return _only([names for names in fitting if not any(set(names) < set(others) for others in fitting)])


def _may_hold_responses(rows: Rows, name: str) -> bool:
    parts = {*words_in(name)}
    return bool(STEM & parts) and not {"model", "id", "source"} & parts and are_responses(rows, name)


def _only(fitting: list[Names]) -> Names | None:
    if len(fitting) > 1:
        (a, b, *_), (c, d, *_) = fitting[:2]
        raise two_readings(
            f"the responses are in {a} and {b}",
            f"they are in {c} and {d}",
            f"--columns responses={a},{b} ... or --columns responses={c},{d} ...",
        )
    return fitting[0] if fitting else None


def _one_list(rows: Rows, columns: Sequence[str]) -> str | None:
    """The column that lists the responses, with the key of their text where they are objects."""
    fitting: list[str] = []
    for name in columns:
        values = [v for row in rows if isinstance(v := turns(decoded(row.get(name))), list) and v]
        if (
            not STEM & {*words_in(name)}
            or not values
            or {"model", "models", "correct", "incorrect"} & {*words_in(name)}
        ):
            continue
        members = list(itertools.chain.from_iterable(values))
        if all(isinstance(m, str) or (isinstance(m, list) and are_turns(m)) for m in members):
            fitting.append(name)
        elif all(isinstance(m, Mapping) and "role" not in m for m in members):
            keys = [k for k in _TEXT_OF if all(isinstance(v := m.get(k), str) or are_turns(turns(v)) for m in members)]
            fitting += [f"{name}.{k}" for k in keys[:1]]
    if len(fitting) > 1:
        raise two_readings(
            f"the responses are in '{fitting[0]}'",
            f"they are in '{fitting[1]}'",
            f"--columns responses={fitting[0]} ... or --columns responses={fitting[1]} ...",
        )
    return fitting[0] if fitting else None


def _by_prompt(rows: Rows, columns: Sequence[str]) -> Schema | None:
    """One response a row with a number, and rows after one another that share a prompt."""
    texts = [n for n in columns if STEM & {*words_in(n)[-1:]} and are_responses(rows, n)]
    alone = [n for n in texts if n.lower() in STEM] or texts
    numbers = [n for n in columns if (SCORE | RANK) & {*words_in(n)} and are_numbers(rows, n)]
    if len(alone) != 1:
        return None
    words = prompt_words(rows, columns, alone, optional=False)
    if not words or "input" in words:
        return None
    prompts = [str(lookup(row, words["prompt"])) for row in rows]
    by = f"--columns prompt={words['prompt']} responses={alone[0]}"
    if not numbers and (labels := [n for n in columns if n.lower() in ("label", "labels") and are_flags(rows, n)]):
        raise two_readings(
            f"each row is a response and '{labels[0]}' says whether it is a good one",
            "rows of one prompt after one another are its good and bad responses",
            f"--columns prompt={words['prompt']} completion={alone[0]} label={labels[0]} (ches train --loss kto, and "
            f"ches doctor without a model) or {by} scores={labels[0]} group=prompt",
        )
    if not numbers or len({*prompts}) == len(prompts):
        return None
    if all(a != b for a, b in itertools.pairwise(prompts)):
        raise DataError(
            f"one response a row, and rows with the same '{words['prompt']}' are not next to each other: sort the data "
            f"by it, then {by} scores={numbers[0]} group=prompt (or ranks=) reads them"
        )
    if len(numbers) > 1:
        raise two_readings(
            f"'{numbers[0]}' says which response is better",
            f"'{numbers[1]}' does",
            f"--columns prompt={words['prompt']} responses={alone[0]} scores={numbers[0]} group=prompt, or "
            f"scores={numbers[1]}",
        )
    kind = score_or_rank(rows, numbers[0])
    return _made({**words, "responses": alone[0], kind: numbers[0], "group": "prompt"}, rows)
