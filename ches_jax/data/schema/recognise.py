"""Which declaration fits a data set: a preset that has all its columns, or what names and values of columns say.

Two readings that both fit are refused, with both and how to choose; an unread column that may matter is reported.
"""

import contextlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ches_jax.data.messages import text_of
from ches_jax.data.prompts import ID_COLUMNS, lookup, pair_contents
from ches_jax.data.schema.mapping import PLAIN, Names, Schema, canonical_rows, from_words, grouped
from ches_jax.data.schema.presets import PRESETS
from ches_jax.data.schema.values import are_pairs_of_turns, are_turns, decoded, turns, word
from ches_jax.data.schema.winners import FROM_0, FROM_1, SIGNS, is_tie
from ches_jax.data.two_prompts import TWO_PROMPTS
from ches_jax.errors import DataError

Rows = Sequence[Mapping[str, Any]]

PROMPT = frozenset(
    {
        "prompt",
        "prompts",
        "instruction",
        "question",
        "query",
        "context",
        "history",
        "input",
        "user",
        "post",
        "problem",
        "messages",
        "conversations",
        "conversation",
        "dialogue",
        "dialog",
        "trajectory",
    }
)
BESIDE = frozenset(
    {
        "article",
        "background",
        "context",
        "document",
        "history",
        "instructions",
        "paragraph",
        "passage",
        "persona",
        "scenario",
        "turns",
    }
)
"""Words of a column that may belong to the prompt beside it."""
SYSTEM = frozenset({"system", "system_prompt", "system_message", "system_text", "sys"})
_INSIDE = ("text", "full_text", "content", "value", "post", "prompt", "question", "body", "instruction")
"""Keys of the text of a prompt that is an object."""
SIDES = (
    ("chosen", "rejected"),
    ("chosen", "reject"),
    ("preferred", "dispreferred"),
    ("preferred", "nonpreferred"),
    ("preferred", "unpreferred"),
    ("preferred", "rejected"),
    ("accepted", "rejected"),
    ("winner", "loser"),
    ("winning", "losing"),
    ("better", "worse"),
    ("positive", "negative"),
    ("good", "bad"),
    ("correct", "incorrect"),
    ("win", "lose"),
    ("pos", "neg"),
    ("j", "k"),
    ("w", "l"),
)
"""Words of the better and of the worse response, as columns are named."""
SEQUENCES = (
    tuple("abcdefghij"),
    tuple("0123456789"),
    tuple("123456789"),
    ("left", "right"),
    ("first", "second", "third", "fourth"),
)
"""How the names of columns of responses differ, from the first on."""
_RESPONSE = frozenset(
    {
        "response",
        "answer",
        "completion",
        "conversation",
        "output",
        "reply",
        "generation",
        "candidate",
        "summary",
        "text",
        "ref",
        "message",
        "option",
        "continuation",
        "choice",
    }
)
_SINGULAR = {"replies": "reply", "summaries": "summary", **{f"{w}s": w for w in _RESPONSE}}
STEM = _RESPONSE | _SINGULAR.keys()
"""Words in the name of a column of responses."""
WINNER = frozenset(
    {
        "winner",
        "winners",
        "choice",
        "choices",
        "better",
        "best",
        "preferred",
        "preference",
        "pref",
        "label",
        "labels",
        "verdict",
        "vote",
        "selected",
        "selection",
    }
)
_NUMBER = frozenset({"index", "idx", "id", "number", "num"})
"""Words of the number of a response: ``chosen_idx``."""
SEEN_OR_HEARD = frozenset({"image", "images", "video", "videos", "audio", "audios"})
"""Last words of columns that hold what no text says."""
TIED = ("tie", "tied", "draw")
_TURNED = frozenset({"safer", "flip", "flipped", "swap", "swapped", "reversed", "inverted"})
"""Words of a label beside the names of the sides."""
SCORE = frozenset(
    {
        *("score", "scores", "rating", "ratings", "reward", "rewards"),
        *("points", "votes", "upvotes", "grade", "grades"),
    }
)
RANK = frozenset({"rank", "ranks", "ranking", "rankings", "placement", "placements"})
ORDER = frozenset({"ranking", "rankings", "order", "ordering", "permutation"})
"""Words of a list that may hold a place for each response, or the numbers of the responses from the best on."""
PLACE = frozenset({"position", "positions", "place", "places"})
"""Words of a place among the best, or of where a response was shown."""
_TEXT_OF = ("text", "response", "answer", "completion", "content", "output", "generation", "reply", "summary")
_NO_NAMES = frozenset({"true", "false", "yes", "no"})
_LABEL = 40
"""Most letters of a label."""


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
        return Recognised(PLAIN)
    if all(_has(rows, n) for n in TWO_PROMPTS) and fits(PLAIN, rows):
        return Recognised(PLAIN, tuple(left_over(PLAIN, rows, [n for n in columns if n not in TWO_PROMPTS])))
    if "responses" in columns and PLAIN.prompt in columns and fits(PLAIN, rows):
        return _canonical_list(rows, columns)
    named = _named_by_side(rows, columns)
    schema = named or _preset(rows) or _inferred(rows, columns) or PLAIN
    if schema.chosen:
        _require_agreement(rows, columns, (schema.chosen, schema.rejected))
    schema = _with_history(_with_system(schema, rows, columns), rows, columns)
    return Recognised(schema, tuple(left_over(schema, rows, columns)))


def _named_by_side(rows: Rows, columns: Sequence[str]) -> Schema | None:
    """Rows whose ``chosen`` is no response but names one of two other columns."""
    values = [r[PLAIN.chosen] for r in rows if r.get(PLAIN.chosen) is not None]
    if not values or not all(
        isinstance(v, str | int) and len(word(v)) <= _LABEL and " " not in word(v) for v in values
    ):
        return None
    both = _placed_columns(rows, columns)
    if not both or not all(is_tie(v) or any(word(v) in (n.lower(), _parts(n)[-1]) for n in both) for v in values):
        return None
    words = _prompt_words(rows, columns, both, optional=_whole(rows, both[0]))
    order = _order(rows, PLAIN.chosen, both)
    return _made({"responses": list(both), "winner": PLAIN.chosen, "order": order, **words}, rows)


def _canonical_list(rows: Rows, columns: Sequence[str]) -> Recognised:
    """Rows with ``prompt`` and ``responses``: best first only where no other column may say which is better.

    Raises:
      DataError: two columns contradict each other, or one may say it in a way that is not known.
    """
    listed = "responses"
    if PLAIN.chosen in columns:
        return Recognised(PLAIN)
    fitting = _contradicting(rows, [listed], _ways_of_list(rows, columns, listed))
    words = _one_preference(fitting, listed, columns) if fitting else {}
    if words and (schema := _made({"prompt": PLAIN.prompt, "responses": listed, **words}, rows)):
        return Recognised(schema, tuple(left_over(schema, rows, columns)))
    for name in (n for n in columns if _orders(n) and n != listed):
        if _has(rows, name):
            raise _two_readings(
                "the responses are listed best first",
                f"'{name}' says which is better",
                f"--columns responses={listed}, or "
                + (f"winner={name} order=..." if _names_winner(name) else f"ranks={name} or best_first={name}")
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
        words = _prompt_words(rows, columns, (), optional=False)
        schema = replace(PLAIN, name="columns", chosen="", rejected="", **words) if words else None
    schema = _with_history(_with_system(schema or PLAIN, rows, columns), rows, columns)
    return Recognised(schema, tuple(left_over(schema, rows, columns)))


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
    fitting = [p for p in PRESETS.values() if all(_has(rows, n) for n in p.columns) and fits(p.schema, rows)]
    best = [p for p in fitting if not any(set(p.columns) < set(q.columns) for q in fitting)]
    if len(best) > 1:
        one, two = (p.schema for p in best[:2])
        raise _two_readings(
            f"the columns fit schema {one.name} ({one.describe()})",
            f"schema {two.name} ({two.describe()})",
            f"--schema {one.name} or --schema {two.name}",
        )
    return best[0].schema if best else None


def _has(rows: Rows, name: str) -> bool:
    return any(_filled(lookup(row, name)) for row in rows)


def _filled(value: Any) -> bool:
    if isinstance(value, list):
        return any(v is not None for v in value)
    return value is not None


def _inferred(rows: Rows, columns: Sequence[str]) -> Schema | None:
    sides = _two_sides(rows, columns)
    both = _placed_columns(rows, columns)
    listed = _one_list(rows, columns)
    if sides:
        words = _prompt_words(rows, columns, sides, optional=_whole(rows, sides[0]))
        return _made({"chosen": sides[0], "rejected": sides[1], **words}, rows)
    if both and listed:
        raise _two_readings(
            f"responses in {both[0]} and {both[1]}",
            f"responses in {listed}",
            f"--columns responses={both[0]},{both[1]} ... or --columns responses={listed} ...",
        )
    if both:
        words = _prompt_words(rows, columns, both, optional=_whole(rows, both[0]))
        return _made({"responses": list(both), **words, **_preferences(rows, columns, both)}, rows)
    if listed:
        words = _prompt_words(rows, columns, (listed,), optional=_whole(rows, listed, many=True))
        return _made({"responses": listed, **words, **_list_preferences(rows, columns, listed)}, rows)
    return _by_prompt(rows, columns)


def _made(words: dict[str, Any], rows: Rows) -> Schema | None:
    schema = replace(from_words(words, "columns"), name="columns")
    listed = bool(schema.responses) and not fits(PLAIN, rows)  # then its own message says what is wrong with the rows
    return schema if listed or fits(schema, rows) else None


# --- the prompt ---


def _prompt_words(rows: Rows, columns: Sequence[str], taken: Sequence[str], optional: bool) -> dict[str, str]:
    fitting = [path for name in columns if _parts(name) and name not in taken for path in _prompt_path(rows, name)]
    named = [p for p in fitting if p == "prompt"]
    if named:
        return {"prompt": "prompt"}
    if optional or not fitting:
        return {}
    if set(fitting) == {"instruction", "input"}:
        return {"prompt": "instruction", "input": "input"}
    different = [p for p in fitting if any(lookup(r, p) != lookup(r, fitting[0]) for r in rows)]
    if different:
        raise _two_readings(
            f"the prompt is in '{fitting[0]}'",
            f"it is in '{different[0]}'",
            f"--columns prompt={fitting[0]} ... or --columns prompt={different[0]} ...",
        )
    return {"prompt": fitting[0]}


def _prompt_path(rows: Rows, name: str) -> Iterator[str]:
    """The column, or the text in its objects, where it is named as a prompt and holds what a prompt can be."""
    if name.lower() not in PROMPT and not {"prompt", "instruction", "question", "query"} & {*_parts(name)[-1:]}:
        return
    if any(w in SYSTEM for w in (name.lower(), *_parts(name))):
        return
    values = [v for row in rows if (v := turns(decoded(row.get(name)))) not in (None, "", [])]
    if not values:
        return
    if all(isinstance(v, str) or are_turns(v) or _texts(v) for v in values):
        yield name
    elif all(isinstance(v, Mapping) for v in values):
        inside = [k for k in _INSIDE if all(isinstance(v.get(k), str) for v in values)]
        yield from (f"{name}.{k}" for k in inside[:1])


def _with_system(schema: Schema, rows: Rows, columns: Sequence[str]) -> Schema:
    """The declaration with the column of a system text, where there is one that says something."""
    if schema.system:
        return schema
    fitting = [n for n in columns if n.lower() in SYSTEM and n not in schema.reads]
    fitting = [n for n in fitting if any(isinstance(r.get(n), str) and r[n].strip() for r in rows)]
    fitting = [n for n in fitting if not all(_stands(schema, r, r.get(n), ("prompt",)) for r in rows)]
    if len(fitting) > 1:
        raise _two_readings(
            f"the system text is in '{fitting[0]}'",
            f"it is in '{fitting[1]}'",
            f"--columns system={fitting[0]} ... or --columns system={fitting[1]} ...",
        )
    if not fitting:
        return schema
    prompt = schema.prompt if schema != PLAIN or _has(rows, "prompt") else ""
    return replace(schema, name=f"{schema.name} with {fitting[0]}", system=fitting[0], prompt=prompt)


def _with_history(schema: Schema, rows: Rows, columns: Sequence[str]) -> Schema:
    """The declaration with a column of earlier questions and answers, where they are written in pairs."""
    if schema.history or not schema.prompt or not _has(rows, schema.prompt):
        return schema
    for name in (n for n in columns if "history" in _parts(n) and n not in schema.reads):
        values = [v for r in rows if (v := decoded(r.get(name)))]
        if values and all(map(are_pairs_of_turns, values)):
            return replace(schema, name=f"{schema.name} with {name}", history=name)
    return schema


# --- the responses ---


def _two_sides(rows: Rows, columns: Sequence[str]) -> Names | None:
    fitting: list[Names] = [
        (one, two)
        for words in SIDES
        for one, two in _families(columns, words)
        if _are_responses(rows, one, several=True)
        and _are_responses(rows, two, several=True)
        and (len(words[0]) > 1 or STEM & {*_parts(one)})
    ]
    exact = [pair for pair in fitting if pair in SIDES]
    return _only(exact or fitting or list(_beside_rejected(rows, columns)))


def _beside_rejected(rows: Rows, columns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Columns of a response and of its rejected counterpart: ``response``, ``rejected_response``."""
    parts = {name: _parts(name) for name in columns}
    for one, two in itertools.permutations(columns, 2):
        named = STEM & {*parts[one]} and parts[two] == ["rejected", *parts[one]]
        if named and _are_responses(rows, one, several=True) and _are_responses(rows, two, several=True):
            yield one, two


def _placed_columns(rows: Rows, columns: Sequence[str]) -> Names | None:
    """The columns of two responses, or of more."""
    fitting = [
        names
        for sequence in SEQUENCES
        for names in _in_sequence([n for n in columns if _may_hold_responses(rows, n)], sequence)
    ]
    return _only([names for names in fitting if not any(set(names) < set(others) for others in fitting)])


def _may_hold_responses(rows: Rows, name: str) -> bool:
    parts = {*_parts(name)}
    return bool(STEM & parts) and not {"model", "id", "source"} & parts and _are_responses(rows, name)


def _in_sequence(columns: Sequence[str], sequence: Sequence[str]) -> Iterator[Names]:
    """Columns whose names differ in one word only, which goes through a sequence."""
    parts = {name: _words_of_name(name) for name in columns}
    for one, two in _families(columns, (sequence[0], sequence[1])):
        at = next(i for i, (a, b) in enumerate(zip(parts[one], parts[two], strict=True)) if a != b)
        wanted = ([*parts[one][:at], w, *parts[one][at + 1 :]] for w in sequence[2:])
        more = (next((n for n in columns if parts[n] == words), None) for words in wanted)
        yield (one, two, *itertools.takewhile(lambda n: n is not None, more))  # type: ignore[misc]


def _sequence_of(sides: Names) -> tuple[str, ...]:
    """The words in which the names of the columns differ; letters where they differ in another way."""
    fitting = (s[: len(sides)] for s in SEQUENCES if any(names == sides for names in _in_sequence(sides, s)))
    return next(fitting, SEQUENCES[0][: len(sides)])


def _families(columns: Sequence[str], words: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs of columns whose names differ in one word only, these two."""
    parts = {name: _words_of_name(name) for name in columns}
    for one, two in itertools.permutations(columns, 2):
        if len(parts[one]) == len(parts[two]):
            different = [(a, b) for a, b in zip(parts[one], parts[two], strict=True) if a != b]
            if different == [words]:
                yield one, two


def _words_of_name(name: str) -> list[str]:
    """The words in which the names of columns of responses are compared."""
    return [_SINGULAR.get(w, w) for w in _joined(_parts(name))]


def _joined(words: list[str]) -> list[str]:
    """Words of a name with a "non" or "not" as part of the next one.

    >>> _joined(["non", "preferred", "output"])
    ['nonpreferred', 'output']
    """
    negated = [i for i, w in enumerate(words[:-1]) if w in ("non", "not")]
    return ["non" * (i - 1 in negated) + w for i, w in enumerate(words) if i not in negated]


def _only(fitting: list[Names]) -> Names | None:
    if len(fitting) > 1:
        (a, b, *_), (c, d, *_) = fitting[:2]
        raise _two_readings(
            f"the responses are in {a} and {b}",
            f"they are in {c} and {d}",
            f"--columns responses={a},{b} ... or --columns responses={c},{d} ...",
        )
    return fitting[0] if fitting else None


def _are_responses(rows: Rows, name: str, several: bool = False) -> bool:
    values = [v for row in rows if (v := turns(decoded(row.get(name)))) is not None]
    return (
        bool(values)
        and all(isinstance(v, str) or are_turns(v) or _texts(v) or (several and isinstance(v, list)) for v in values)
        and not (several and all(isinstance(v, str) and _numeric(v) for v in values))
    )


def _one_list(rows: Rows, columns: Sequence[str]) -> str | None:
    """The column that lists the responses, with the key of their text where they are objects."""
    fitting: list[str] = []
    for name in columns:
        values = [v for row in rows if isinstance(v := turns(decoded(row.get(name))), list) and v]
        if not STEM & {*_parts(name)} or not values or {"model", "models", "correct", "incorrect"} & {*_parts(name)}:
            continue
        members = list(itertools.chain.from_iterable(values))
        if all(isinstance(m, str) or (isinstance(m, list) and are_turns(m)) for m in members):
            fitting.append(name)
        elif all(isinstance(m, Mapping) and "role" not in m for m in members):
            keys = [k for k in _TEXT_OF if all(isinstance(v := m.get(k), str) or are_turns(turns(v)) for m in members)]
            fitting += [f"{name}.{k}" for k in keys[:1]]
    if len(fitting) > 1:
        raise _two_readings(
            f"the responses are in '{fitting[0]}'",
            f"they are in '{fitting[1]}'",
            f"--columns responses={fitting[0]} ... or --columns responses={fitting[1]} ...",
        )
    return fitting[0] if fitting else None


def _by_prompt(rows: Rows, columns: Sequence[str]) -> Schema | None:
    """One response a row with a number, and rows after one another that share a prompt."""
    texts = [n for n in columns if STEM & {*_parts(n)[-1:]} and _are_responses(rows, n)]
    alone = [n for n in texts if n.lower() in STEM] or texts
    numbers = [n for n in columns if (SCORE | RANK) & {*_parts(n)} and _numbers(rows, n)]
    if len(alone) != 1:
        return None
    words = _prompt_words(rows, columns, alone, optional=False)
    if not words or "input" in words:
        return None
    prompts = [str(lookup(row, words["prompt"])) for row in rows]
    by = f"--columns prompt={words['prompt']} responses={alone[0]}"
    if not numbers and (labels := [n for n in columns if n.lower() in ("label", "labels") and _flags(rows, n)]):
        raise _two_readings(
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
        raise _two_readings(
            f"'{numbers[0]}' says which response is better",
            f"'{numbers[1]}' does",
            f"--columns prompt={words['prompt']} responses={alone[0]} scores={numbers[0]} group=prompt, or "
            f"scores={numbers[1]}",
        )
    kind = _score_or_rank(rows, numbers[0])
    return _made({**words, "responses": alone[0], kind: numbers[0], "group": "prompt"}, rows)


# --- which is better ---


def _preferences(rows: Rows, columns: Sequence[str], sides: Names) -> dict[str, Any]:
    """The words that say which of some columns is better."""
    rest = [n for n in columns if n not in sides]
    fitting = [
        {"winners": list(those), **({"tie": tie[0]} if (tie := [n for n in rest if _parts(n)[-1:] == ["tie"]]) else {})}
        for those in _placed(rest, sides)
        if (WINNER | {"is", "wins"}) & {*_parts(those[0])}
        and not RANK & {*_parts(those[0])}
        and all(_flags(rows, n) for n in those)
    ]
    if not fitting:
        labels = [n for n in rest if _names_winner(n) and _one_cell(rows, n)]
        fitting = _labels(rows, [n for n in labels if not (SCORE | RANK) & {*_parts(n)}], sides)
    numbers = [
        {_score_or_rank(rows, *those): list(those)}
        for those in _placed(rest, sides)
        if (SCORE | RANK) & {*_parts(those[0])} and all(_numbers(rows, n) for n in those)
    ]
    return _one_preference(_contradicting(rows, list(sides), [*fitting, *numbers]), " and ".join(sides), columns)


def _labels(rows: Rows, names: Sequence[str], sides: Names) -> list[dict[str, Any]]:
    """The labels whose words are understood; beside them one that is not has to prefer the same responses.

    Raises:
      DataError: two readings of a label, where no other one says which is meant.
    """
    known: list[dict[str, Any]] = []
    unclear: dict[str, DataError] = {}
    for name in names:
        try:
            known.append({"winner": name, "order": _order(rows, name, sides)})
        except DataError as error:
            unclear[name] = error
    for name, error in unclear.items():
        if not known or not _goes_with(rows, name, {"responses": list(sides), **known[0]}):
            raise error
    return known


def _goes_with(rows: Rows, name: str, words: Mapping[str, Any]) -> bool:
    """Whether a label never has the same word where one response is the best and where another one is."""
    schema = from_words(words)
    best_of: dict[str, set[int]] = {}
    for row in rows:
        with contextlib.suppress(DataError):
            scores = canonical_rows(schema, row)[0][1]["scores"]
            if len({*scores}) > 1 and row.get(name) not in (None, ""):
                best_of.setdefault(word(row[name]), set()).add(scores.index(max(scores)))
    return all(len(best) == 1 for best in best_of.values())


def _placed(columns: Sequence[str], sides: Names) -> Iterator[Names]:
    """Columns, as many as there are responses, whose names differ as those do."""
    for sequence in (q for q in SEQUENCES if any(names == sides for names in _in_sequence(sides, q))):
        yield from (names[: len(sides)] for names in _in_sequence(columns, sequence) if len(names) >= len(sides))


def _list_preferences(rows: Rows, columns: Sequence[str], listed: str) -> dict[str, Any]:
    return _one_preference(_contradicting(rows, [listed], _ways_of_list(rows, columns, listed)), listed, columns)


def _ways_of_list(rows: Rows, columns: Sequence[str], listed: str) -> list[dict[str, Any]]:
    """The words of each column that may say which response of a list is better."""
    head, _, key = listed.partition(".")
    names = [n for n in columns if n != head]
    inside = {k for row in rows for m in (decoded(row.get(head)) if key else []) or [] for k in m} - {key, ""}
    lists = [n for n in (*names, *(f"{head}.{k}" for k in sorted(inside))) if _are_lists(rows, n)]
    ways: list[dict[str, Any]] = []
    for name in lists:
        parts = {*_parts(name.split(".")[-1])}
        if parts & ORDER and "." not in name:
            ways += _ordered(rows, name, listed)
        elif parts & (SCORE | RANK):
            ways.append({_score_or_rank(rows, name): name})
    if not ways and (places := [n for n in lists if PLACE & {*_parts(n.split(".")[-1])}]):
        raise _two_readings(
            f"'{places[0]}' is a rank (the lower, the better)",
            "it says where the response was shown",
            f"--columns responses={listed} ranks={places[0]}, or another word that says which is better "
            "(with prompt=...; docs/data.md)",
        )
    labels = [n for n in names if _names_winner(n) and _one_cell(rows, n) and _numbers(rows, n)]
    return ways + [{"winner": n, "order": [_start(rows, n, listed)]} for n in labels]


def _are_lists(rows: Rows, name: str) -> bool:
    values = [v for r in rows if (v := decoded(lookup(r, name))) is not None]
    return bool(values) and all(isinstance(v, list) and not all(m is None for m in v) for v in values)


def _ordered(rows: Rows, name: str, listed: str) -> list[dict[str, Any]]:
    """A list of ranks, or of the numbers of the responses from the best on: the same for two responses, not for more.

    Raises:
      DataError: both fit, and differ.
    """
    ways = [{"ranks": name}, {"best_first": name}]
    readable = [w for w in ways if _says_of_half(rows, {"responses": listed, **w})]
    if len(readable) == len(ways) and not _agree(rows, [listed], *ways):
        raise _two_readings(
            f"'{name}' has a rank for each response (the lower, the better)",
            "it lists the numbers of the responses, the best first",
            f"--columns responses={listed} ranks={name} or best_first={name} (with prompt=...)",
        )
    return readable[:1]


def _says_of_half(rows: Rows, words: Mapping[str, Any]) -> bool:
    """Whether the words say of half of the rows at least which response is better."""
    schema, said = from_words(words), 0
    for row in rows:
        with contextlib.suppress(DataError):
            said += bool(canonical_rows(schema, row))
    return said * 2 >= len(rows)


def _one_preference(fitting: list[dict[str, Any]], responses: str, columns: Sequence[str]) -> dict[str, Any]:
    if len(fitting) > 1:
        one, two = (_described(f) for f in fitting[:2])
        raise _two_readings(f"{one} says which response is better", f"{two} does", f"--columns {one} ... or {two} ...")
    if not fitting:
        best_first = f"; if they are listed best first, --columns prompt=... responses={responses} says so"
        raise DataError(
            f"responses in {responses}, but no column says which is better; found: {', '.join(columns)}; name it with "
            "--columns prompt=... responses=... and winner=... order=..., or scores=..., or ranks=..."
            + f"{best_first if ' and ' not in responses else ''} (docs/data.md)"
        )
    return fitting[0]


def _described(words: Mapping[str, Any]) -> str:
    """Words of a declaration as a user writes them."""
    tuples = {k: tuple(v) if isinstance(v, list) else (v,) for k, v in words.items() if k != "winner"}
    fields: dict[str, Any] = {**words, **tuples}
    return Schema(**fields).describe().replace(", ", " ")


def _order(rows: Rows, name: str, sides: Names) -> list[str]:
    """The word of a label for each of the columns.

    Raises:
      DataError: two readings of the label, or none.
    """
    said = {word(r[name]) for r in rows if r.get(name) not in (None, "") and not is_tie(r[name])}
    places = _sequence_of(sides)
    if order := _by_place(said, places) or _by_cell(rows, name, sides):
        return order
    if len(sides) > 2:
        return _order_of_several(said, name, sides)
    one, two = sides
    words = f"--columns responses={one},{two} winner={name} order="
    if all(map(_numeric, said)) and any(float(w) < 0 for w in said):
        raise _two_readings(
            f"a negative '{name}' means that {one} is better",
            f"that {two} is",
            f"{words}{','.join(SIGNS)} or order={','.join(SIGNS[::-1])} (with prompt=...)",
        )
    counts = not {"label", "labels", "preference", "pref"} & {*_parts(name)}  # 0 and 1 of a label may be no and yes
    if said <= {"0", "1"} and "0" in said and counts and places != ("1", "2"):
        return ["0", "1"]  # the number of the response
    if said == {"1", "2"} and places != ("0", "1"):
        return ["1", "2"]
    if "1" in said and said <= {"0", "1", "2"} and counts and places not in (("0", "1"), ("1", "2")):
        ties = [f" and {n} is a tie" if said > {"1", n} else "" for n in ("2", "0")]
        raise _two_readings(
            f"'{name}' 1 means that {two} is better, counted from 0{ties[0]}",
            f"that {one} is, counted from 1{ties[1]}",
            f"{words}0,1 or order=1,2 (with prompt=...)",
        )
    low, high = _words_of_two(said)
    raise _two_readings(
        f"'{name}' {low} means that {one} is better",
        f"that {two} is",
        f"{words}{low},{high} or order={high},{low} (with prompt=...)",
    )


def _order_of_several(said: set[str], name: str, sides: Names) -> list[str]:
    """The number of the better one of more than two columns, counted as some row shows."""
    numbers = [str(i) for i in range(len(sides) + 1)]
    listed = ",".join(sides)
    if not said <= {*numbers}:
        raise DataError(
            f"'{name}' says {', '.join(sorted(said)[:3])}, and it is not clear which of {listed} that is; name its "
            f"word for each with --columns responses={listed} winner={name} order=... (with prompt=...)"
        )
    if ("0" in said) == (numbers[-1] in said):
        raise _two_readings(
            f"'{name}' counts {listed} from 0",
            "it counts them from 1",
            f"--columns responses={listed} winner={name} order={','.join(numbers[:-1])} or "
            f"order={','.join(numbers[1:])} (with prompt=...)",
        )
    return numbers[:-1] if "0" in said else numbers[1:]


def _by_cell(rows: Rows, name: str, sides: Names) -> list[str]:
    """Columns that differ as the responses do, one of which holds the label of each row: names of models, texts."""
    columns = list(dict.fromkeys(itertools.chain.from_iterable(rows)))
    labelled = [r for r in rows if r.get(name) not in (None, "") and not is_tie(r[name])]
    if not labelled or any(_numeric(r[name]) or word(r[name]) in _NO_NAMES for r in labelled):
        return []
    for pair in _placed(columns, sides):
        if name not in pair and all([word(r.get(n)) == word(r[name]) for n in pair].count(True) == 1 for r in labelled):
            return list(pair)
    return []


def _words_of_two(said: set[str]) -> tuple[str, str]:
    """Two labels of which at least one was seen.

    >>> _words_of_two({"second"}), _words_of_two({"1"}), _words_of_two({"up", "down"}), _words_of_two({"up"})
    (('first', 'second'), ('0', '1'), ('down', 'up'), ('up', 'OTHER'))
    """
    pairs = (("0", "1"), ("1", "2"), ("false", "true"), ("no", "yes"), *((a, b) for a, b, *_ in SEQUENCES))
    first, second, *_ = next((pair for pair in pairs if said <= {*pair}), (*sorted(said), "OTHER", "OTHER"))
    return first, second


def _by_place(said: set[str], places: Names) -> list[str]:
    """The labels in the order of the columns, where each names its column by the word that tells it from the others.

    >>> _by_place({"model_b"}, ("a", "b")), _by_place({"0", "1"}, ("a", "b"))
    (['model_a', 'model_b'], [])
    >>> _by_place({"a is better", "a is much better", "b is better"}, ("a", "b"))
    ['a is better|a is much better', 'b is better']
    """
    # of a number only the place itself is a word: 1.98 is no "1", and neither is -1
    named = [sorted(w for w in said if place == w or (place in _parts(w) and not _numeric(w))) for place in places]
    if not said or sorted(itertools.chain(*named)) != sorted(said) or any("," in w or "|" in w for w in said):
        return []
    at = next(i for i, words in enumerate(named) if words)
    there = re.compile(rf"(?<![a-z0-9]){places[at]}(?![a-z0-9])")
    return [
        "|".join(words or [there.sub(place, w) for w in named[at]]) for place, words in zip(places, named, strict=True)
    ]


def _start(rows: Rows, name: str, listed: str) -> str:
    """Whether the number of the best response in a list counts from 0 or from 1."""
    said = [int(float(r[name])) for r in rows if _numeric(r.get(name))]
    counts = [len(v) for r in rows if isinstance(v := lookup(r, listed), list)]
    if 0 in said:
        return FROM_0
    if said and any(s >= n for s, n in zip(said, counts, strict=False)):
        return FROM_1
    raise _two_readings(
        f"'{name}' counts the responses from 0",
        "it counts them from 1",
        f"--columns responses={listed} winner={name} order='{FROM_0}' or order='{FROM_1}' (with prompt=...)",
    )


def _score_or_rank(rows: Rows, first: str, *more: str) -> str:
    """Whether numbers say how good (scores) or which place (ranks); by their name, and ranks by their values too."""
    names = (first, *more)
    parts = {*_parts(first.split(".")[-1])}
    cells = [[lookup(r, n) for n in names] if len(names) > 1 else decoded(lookup(r, first)) for r in rows]
    values = [v for cell in cells for v in (cell if isinstance(cell, list) else [cell]) if v is not None]
    places = all(float(v).is_integer() and float(v) >= 0 for v in values if _numeric(v))
    if parts & RANK and (parts & SCORE or not places):
        raise _two_readings(
            f"'{first}' is a rank (the lower, the better)",
            "it is a score (the higher, the better)",
            f"--columns ranks={','.join(names)} ... or scores={','.join(names)} ...",
        )
    return "ranks" if parts & RANK else "scores"


def _contradicting(rows: Rows, responses: list[str], fitting: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first way to say which response is better, and those that contradict it in some row."""
    return [words for i, words in enumerate(fitting) if i == 0 or not _agree(rows, responses, fitting[0], words)]


def _agree(rows: Rows, responses: list[str], first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two ways never prefer responses the other way round."""
    one, two = (from_words({"responses": responses, **words}, "columns") for words in (first, second))
    for row in rows:
        try:
            a, b = (canonical_rows(s, row)[0][1]["scores"] for s in (one, two))
        except DataError:
            continue
        if any((a[i] - a[j]) * (b[i] - b[j]) < 0 for i, j in itertools.combinations(range(len(a)), 2)):
            return False
    return True


def _require_agreement(rows: Rows, columns: Sequence[str], sides: tuple[str, str]) -> None:
    """A column that says that the rejected response won contradicts the names of the columns.

    Raises:
      DataError: names both readings.
    """
    for name in (n for n in columns if n not in sides and WINNER & {*_parts(n)}):
        if any(isinstance(r.get(name), str) and word(r[name]) == sides[1].lower() for r in rows):
            raise _two_readings(
                f"{sides[0]} is better by its name",
                f"'{name}' says {sides[1]} in some rows",
                f"--columns responses={sides[0]},{sides[1]} winner={name} order={sides[0]},{sides[1]} (with "
                f"prompt=...), or --columns chosen={sides[0]} rejected={sides[1]} ...",
            )


# --- what is not read ---


def left_over(schema: Schema, rows: Rows, columns: Sequence[str]) -> Iterator[str]:
    """Columns that may matter and are not read, each with what to do; numbers that contradict the sides."""
    read = {n.partition(".")[0] for n in schema.reads} | set(schema.reads)
    for name in columns:
        if name in read or not any(_filled(r.get(name)) and r.get(name) != "" for r in rows):
            continue
        parts = {*_parts(name)}
        if name.lower() in SYSTEM or any(_prompt_path(rows, name)) or (parts & BESIDE and _says_something(rows, name)):
            where = ("prompt",) if name.lower() in SYSTEM else ("prompt", "chosen", "rejected", "responses")
            if not all(_stands(schema, r, r.get(name), where) for r in rows):
                yield _told_of_prompt(schema, rows, name)
        elif parts & RANK or (parts & (WINNER | _TURNED) and not parts & SCORE and _one_cell(rows, name)):
            what = "a rank" if parts & RANK else "a label"
            yield f"{note_on(name)} {what} and is not read; docs/data.md: which response is better"
        elif ties := sum(isinstance(r.get(name), str) and word(r[name]) in TIED for r in rows):
            yield f"column '{name}' says tie in {ties} of {len(rows)} rows and is not read: these rows make pairs"
        elif SEEN_OR_HEARD & {*_parts(name)[-1:]}:
            yield f"{note_on(name)} what a prompt shows or plays, which no model here sees or hears: it is not read"
    unread = [n for n in columns if n not in read]
    yield from _other_sides(schema, rows, unread)
    yield from _contradicted(schema, rows, unread)


def _other_sides(schema: Schema, rows: Rows, columns: Sequence[str]) -> Iterator[str]:
    """Two more columns of responses, beside those that are read."""
    taken = (schema.chosen, *schema.responses)[bool(not schema.chosen) :]
    for pair in (pair for words in SIDES for pair in _families(columns, words)):
        if taken and all(_are_responses(rows, name) and _says_something(rows, name) for name in pair):
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
    text = all(isinstance(r.get(name), str) for r in rows if _filled(r.get(name)))
    ways = [f"prompt={name} takes it" + f" instead of '{schema.prompt}'" * bool(schema.prompt)]
    if schema.prompt:
        ways.append(f"input={name} puts it under that" if text else f"history={name} puts it in front of that")
    what = "a prompt" if name.lower() in PROMPT else "a part of the prompt"
    return f"{note_on(name)} {what} and is not read; --columns {', '.join(ways)}"


def _says_something(rows: Rows, name: str) -> bool:
    """Whether a column holds texts of several words, or turns."""
    values = [decoded(r.get(name)) for r in rows if _filled(r.get(name))]
    return any((isinstance(v, str) and len(v.split()) > 2) or (isinstance(v, list) and v) for v in values)


def _contradicted(schema: Schema, rows: Rows, columns: Sequence[str]) -> Iterator[str]:
    """Numbers of both sides that are not read and say the opposite in most rows."""
    sides = (schema.chosen, schema.rejected) if schema.chosen else schema.responses
    if len(sides) != 2:
        return
    words = next((w for w in (*SIDES, _sequence_of(sides)) if sides in _families(sides, w)), SIDES[0])
    for one, two in _families(columns, words):
        if not {*_parts(one)} & (SCORE | RANK):
            continue
        sign = -1 if {*_parts(one)} & RANK else 1
        better = [
            (side, sign * (float(r[one]) - float(r[two])))
            for r in rows
            if _numeric(r.get(one)) and _numeric(r.get(two)) and (side := _better_side(schema, r))
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


def _stands(schema: Schema, row: Mapping[str, Any], value: Any, where: Sequence[str]) -> bool:
    """Whether a text, or each text of turns, stands in the row's prompt (and responses, as ``where`` says) already."""
    value = turns(decoded(value))
    said = value if isinstance(value, list) else [value]
    texts = [value] if isinstance(value, str) else [text_of(m) for m in said] if are_turns(value) else []
    if not any(texts):
        return True
    try:
        rows = [canonical for _, canonical in canonical_rows(schema, row)]
        contents = [c for canonical in rows for _, c in pair_contents(canonical, {}, "chosen-against-all")]
    except DataError:
        return True
    there = [text for content in contents for name in where for text in _contents_of(content.get(name, ""))]
    return all(any(_holds(text, t.strip()) for text in there) for t in texts)


def _contents_of(value: Any) -> list[str]:
    """A text, or the texts of messages, without their roles."""
    return [value] if isinstance(value, str) else [text_of(m) if isinstance(m, dict) else str(m) for m in value]


def _holds(text: str, part: str) -> bool:
    """Whether a text holds another one, from a word's beginning to a word's end."""
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None if part else True


# --- small tests ---


def _names_winner(name: str) -> bool:
    """Whether a name is one of a label, or of the number of the better response: ``winner``, ``chosen_idx``."""
    parts = {*_parts(name)}
    return bool(WINNER & parts) or ("chosen" in parts and bool(_NUMBER & parts))


def _orders(name: str) -> bool:
    """Whether a name is one of something that may say which response of a list is better."""
    return _names_winner(name) or bool((RANK | ORDER | PLACE | {"safer"}) & {*_parts(name)})


def _parts(name: str) -> list[str]:
    """The words of a name: of ``winner_model_a``, ``winnerModelA`` and ``response1`` alike.

    >>> _parts("human_ref_A"), _parts("response1"), _parts("all_rm_scores")
    (['human', 'ref', 'a'], ['response', '1'], ['all', 'rm', 'scores'])
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z0-9])", " ", name)
    return re.findall(r"[a-z]+|[0-9]+", spaced.lower())


def _whole(rows: Rows, name: str, many: bool = False) -> bool:
    """Whether responses are conversations with the user's turn, which hold their prompt."""
    values = [v for row in rows if (v := turns(decoded(lookup(row, name)))) is not None]
    values = [v[0] for v in values if isinstance(v, list) and v] if many else values
    return bool(values) and all(
        (isinstance(v, list) and are_turns(v) and any(m["role"] == "user" for m in v))
        or (isinstance(v, str) and v.lstrip().startswith("Human:"))
        for v in values
    )


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)


def _numeric(value: Any) -> bool:
    try:
        return value is not None and not isinstance(value, list | Mapping) and float(value) == float(value)
    except (TypeError, ValueError):
        return False


def _numbers(rows: Rows, name: str) -> bool:
    """Whether a column holds numbers, but for single cells that make their rows unreadable."""
    values = [r[name] for r in rows if r.get(name) is not None]
    return bool(values) and sum(map(_numeric, values)) * 2 >= len(values)


def _flags(rows: Rows, name: str) -> bool:
    values = [r[name] for r in rows if r.get(name) is not None]
    return bool(values) and all(word(v) in ("0", "1", "true", "false", "yes", "no") for v in values)


def _one_cell(rows: Rows, name: str) -> bool:
    """Whether a column holds one short label a row."""
    values = [r[name] for r in rows if r.get(name) is not None]
    return bool(values) and all(
        isinstance(v, bool | int | float) or (isinstance(v, str) and len(v) <= _LABEL) for v in values
    )


def _two_readings(one: str, two: str, choice: str) -> DataError:
    return DataError(f"two readings: {one}, or {two}; choose with {choice}")
