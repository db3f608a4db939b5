"""How a data set says what its rows mean: a declaration, and the canonical rows that follow from it.

A declaration is a small JSON or TOML file (``--schema FILE``), the same words on the command line (``--columns``), or a
row of ``presets``. All of it is text or lists of text:

    prompt     column of the prompt (text, a conversation, or a list of the user's turns)
    system     column of a system text, which goes in front of the prompt
    input      column of a text that goes under the prompt, after a line end
    history    column of earlier turns, which go in front of the prompt: a conversation, or pairs of question and answer
    chosen     column of the preferred response, or of a list of them
    rejected   the other; of two lists every chosen one makes a pair with every rejected one
    responses  instead of both: a column for each response, or one column with a list of them
    winner     column that names the better response, by
    order      the word of ``winner`` for each response: model_a, model_b; or "from 0", "from 1" for numbers of
               responses; or negative, positive for a number with a sign; or the columns that hold the label
    winners    a column for each response, 1 where it is the better one
    tie        beside it: a column that is 1 where none is
    scores     a column for each response, or one with a list: the higher, the better
    ranks      the same: the lower, the better
    best_first column that lists the numbers of the responses, from the best to the worst
    group      prompt: rows after one another that share it are the responses to one prompt
    category, tools, chat_template_kwargs    columns that are carried along

A dot reaches into objects (``completions.response``); lists and objects that are written as JSON text are decoded.
"""

import itertools
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ches_jax.data.messages import is_message, kind, text_of
from ches_jax.data.nested import decoded, is_printed_conversation
from ches_jax.data.prompts import lookup
from ches_jax.data.schema.values import are_pairs_of_turns, are_turns, number, turns
from ches_jax.data.schema.winners import by_cell, of_order, of_winner, of_winners
from ches_jax.data.two_prompts import TWO_PROMPTS
from ches_jax.errors import DataError, did_you_mean
from ches_jax.runs.files import read_text
from ches_jax.runs.store import here

Names = tuple[str, ...]
_ASIDE = ("tools", "chat_template_kwargs", "category")
_DIALOGUE = "\n\nHuman:"
_PLAIN_TEXTS = ("prompt", "chosen", "rejected", *TWO_PROMPTS)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """A declaration; see the words above."""

    name: str = "columns"
    """For messages."""
    prompt: str = ""
    system: str = ""
    input: str = ""
    history: str = ""
    chosen: str = ""
    rejected: str = ""
    responses: Names = ()
    winner: str = ""
    order: Names = ()
    winners: Names = ()
    tie: str = ""
    scores: Names = ()
    ranks: Names = ()
    best_first: str = ""
    group: str = ""
    category: str = "category"
    tools: str = "tools"
    chat_template_kwargs: str = "chat_template_kwargs"

    @property
    def reads(self) -> list[str]:
        """The columns that are read, as they are named (a dot reaches into objects)."""
        words = (self.prompt, self.system, self.input, self.chosen, self.rejected, self.winner, self.tie)
        words += (self.history, self.best_first)
        more = (self.category, self.tools, self.chat_template_kwargs)
        return [n for n in (*words, *self.responses, *self.winners, *self.scores, *self.ranks, *more) if n]

    def describe(self) -> str:
        """The declaration in one line."""
        return ", ".join(f"{word}={value}" for word, value in self.to_words().items())

    def to_words(self) -> dict[str, str]:
        """The words of ``--columns`` that say the same."""
        default = Schema()
        words = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return {w: v if isinstance(v, str) else ",".join(v) for w, v in words.items() if v and v != getattr(default, w)}


PLAIN = Schema(name="chosen-rejected", prompt="prompt", chosen="chosen", rejected="rejected")
"""Rows that are in canonical columns already; whole conversations need no prompt."""
WORDS = tuple(f.name for f in fields(Schema) if f.name != "name")
_WAYS = ("winner", "winners", "scores", "ranks", "best_first")
"""Words that say which response is better."""
_LISTS = ("responses", "order", "winners", "scores", "ranks")
ONLY_HERE = frozenset(WORDS) - {"prompt", "chosen", "rejected", "responses", "scores", *_ASIDE}
"""Words of ``--columns`` that make it a declaration."""


def is_plain(schema: Schema | None) -> bool:
    """Whether a schema is ``PLAIN``; called for every row, so the fields are compared only where they must be."""
    return schema is PLAIN or schema == PLAIN


def is_declaration(columns: Mapping[str, str]) -> bool:
    """Whether words of ``--columns`` say more than other names of canonical columns."""
    return any(w in ONLY_HERE or (w in ("responses", "scores") and "," in v) for w, v in columns.items())


def from_words(words: Mapping[str, Any], name: str = "columns") -> Schema:
    """A declaration from words, lists as lists or with commas.

    >>> from_words({"prompt": "post", "responses": "a,b", "scores": "score_a,score_b"}).responses
    ('a', 'b')

    Raises:
      DataError: an unknown word, one of another type, or words that together say nothing or two things.
    """
    values: dict[str, Any] = {}
    for word, value in words.items():
        if word not in WORDS:
            raise DataError(
                f"{name}: '{word}' is not a word of a schema{did_you_mean(word, WORDS)} (the words: {', '.join(WORDS)})"
            )
        if word in _LISTS:
            listed = value.split(",") if isinstance(value, str) else value
            if not isinstance(listed, list) or not all(isinstance(v, str | int) for v in listed):
                raise DataError(f"{name}: '{word}' is {kind(value)}; expected a name or a list of names")
            values[word] = tuple(str(v).strip() for v in listed if str(v).strip())
        elif isinstance(value, str):
            values[word] = value
        else:
            raise DataError(f"{name}: '{word}' is {kind(value)}; expected the name of a column")
    schema = Schema(name=name, **values)
    _check(schema)
    return schema


def from_file(path: str) -> Schema:
    """A declaration from a JSON or TOML file.

    Raises:
      DataError: not there, not readable, or not a declaration.
    """
    expected = 'JSON or TOML with words such as prompt = "question"'
    text = read_text(Path(here(path, DataError)), DataError, expected, "utf-8-sig")
    try:
        words = tomllib.loads(text) if path.lower().endswith(".toml") else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"--schema {path}: cannot be read ({error}); expected {expected}") from None
    if not isinstance(words, dict):
        raise DataError(f"--schema {path}: {kind(words)}; expected an object with words such as prompt, responses")
    return from_words(words, str(path))


def _check(schema: Schema) -> None:
    ways = [w for w in _WAYS if getattr(schema, w)]
    both = bool(schema.chosen) and bool(schema.rejected)
    many = len(schema.responses)
    fault = ""
    if bool(schema.chosen) != bool(schema.rejected):
        fault = "one of chosen and rejected is named; expected both, or responses"
    elif both and (many or ways):
        fault = f"chosen and rejected say which response is better, and so does {ways[0] if ways else 'responses'}"
    elif many and len(ways) != 1:
        fault = f"responses need one of {', '.join(_WAYS)} to say which is better, " + (
            f"not {' and '.join(ways)}" if ways else "and none is named"
        )
    elif ways and not many:
        fault = f"{ways[0]} without responses; name the columns of the responses"
    elif schema.winner and not schema.order:
        fault = (
            "winner needs order: its word for each response (order=model_a,model_b), 'from 0' or 'from 1' for a "
            "number, or negative,positive"
        )
    elif schema.order and not schema.winner:
        fault = "order without winner: it says what the words of winner mean"
    elif schema.group and (
        schema.group != "prompt" or not schema.prompt or many != 1 or schema.winner or schema.best_first
    ):
        fault = "group=prompt needs prompt, one column of responses, and scores or ranks"
    elif many > 1 and any(
        len(getattr(schema, w)) != many for w in ("winners", "scores", "ranks") if getattr(schema, w)
    ):
        fault = f"{ways[0]}: expected a column for each of the {many} responses"
    elif not schema.prompt and (schema.input or schema.history):
        fault = "input goes under a prompt and history in front of it, and none is named"
    if fault:
        raise DataError(f"{schema.name}: {fault}")


Canonical = tuple[tuple[int, int] | None, dict[str, Any]]
"""Numbers of chosen and rejected where the row lists both, and a row in canonical columns."""


def canonical_rows(schema: Schema, row: Mapping[str, Any]) -> list[Canonical]:
    """A row as rows in canonical columns: ``prompt`` with ``chosen`` and ``rejected``, or ``responses`` and ``scores``.

    >>> schema = from_words({"prompt": "q", "responses": "a,b", "winner": "w", "order": "A,B"})
    >>> canonical_rows(schema, {"q": "1+1?", "a": "3", "b": "2", "w": "B"})
    [(None, {'prompt': '1+1?', 'responses': ['3', '2'], 'scores': [0.0, 1.0]})]

    Raises:
      DataError: what the declaration names is not there, or is something else.
    """
    if is_plain(schema):
        return _plain(row)
    prompt = _prompt(schema, row)
    aside = {w: v for w in _ASIDE[:2] if (v := lookup(row, getattr(schema, w))) not in (None, [])}
    shared = aside if prompt is None else {"prompt": prompt, **aside}
    if schema.responses:
        responses = _responses(schema, row)
        if responses is None:
            raise _missing(schema, row, schema.responses)
        canonical = shared | {"responses": responses, "scores": _scores(schema, row, len(responses))}
        if schema.winner and len(set(canonical["scores"])) == 1:
            canonical["tie"] = f"{schema.winner} is {lookup(row, schema.winner)!r}"
        elif schema.winners and len(set(canonical["scores"])) == 1:
            canonical["tie"] = f"{schema.tie} is {lookup(row, schema.tie)!r}"
        return [(None, _whole(schema, row, canonical))]
    if not schema.chosen:
        return [(None, _whole(schema, row, shared))]
    sides = [turns(decoded_turns(lookup(row, n))) for n in (schema.chosen, schema.rejected)]
    if None in sides:
        raise _missing(
            schema, row, [n for n, v in zip((schema.chosen, schema.rejected), sides, strict=True) if v is None]
        )
    if prompt is None:
        sides[1] = _in_place_of_last(sides[0], sides[1])
    return [(numbers, _whole(schema, row, shared | both)) for numbers, both in _sides(*sides)]


def _in_place_of_last(chosen: Any, rejected: Any) -> Any:
    """A rejected answer that stands alone beside a whole conversation, as the conversation that it would make."""
    answer = [{"role": "assistant", "content": rejected}] if isinstance(rejected, str) else rejected
    alone = isinstance(answer, list) and are_turns(answer) and answer[0]["role"] == "assistant"
    whole = isinstance(chosen, list) and are_turns(chosen) and [m["role"] for m in chosen[-2:]] == ["user", "assistant"]
    return [*chosen[:-1], *answer] if alone and whole else rejected


def _plain(row: Mapping[str, Any]) -> list[Canonical]:
    turned = {n: turns(decoded_turns(v)) for n in _PLAIN_TEXTS if n in row and not _is_text(v := row[n])}
    row = {**row, **turned}
    if not (_several(row.get("chosen")) or _several(row.get("rejected"))):
        return [(None, row)]
    return [(numbers, {**row, **both}) for numbers, both in _sides(row.get("chosen"), row.get("rejected"))]


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be nothing else: turns are objects."""
    return isinstance(value, str) and "{" not in value


def _sides(chosen: Any, rejected: Any) -> list[Canonical]:
    """Of two responses one pair; of lists of them each with each."""
    listed = [_several(side) for side in (chosen, rejected)]
    if listed == [None, None]:
        return [(None, {"chosen": chosen, "rejected": rejected})]
    first, second = (
        some if some is not None else [side] for some, side in zip(listed, (chosen, rejected), strict=True)
    )
    if not first or not second:
        raise DataError(f"'{'rejected' if first else 'chosen'}' is an empty list; expected a response")
    return [
        ((i, len(first) + j), {"chosen": a, "rejected": b})
        for (i, a), (j, b) in itertools.product(enumerate(first), enumerate(second))
    ]


def grouped(schema: Schema, rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Rows after one another that share a prompt as one row, with lists of their responses and numbers."""
    if not schema.group:
        yield from rows
        return

    def of_prompt(one: tuple[str, Any]) -> str:
        prompt = lookup(one[1], schema.prompt) if isinstance(one[1], Mapping) else None
        return json.dumps(prompt, default=str)

    lists = [n.partition(".")[0] for n in (*schema.responses, *schema.scores, *schema.ranks)]
    for _, some in itertools.groupby(rows, of_prompt):
        members = list(some)
        where = members[0][0] if len(members) == 1 else f"{members[0][0]} to {members[-1][0]}"
        if not all(isinstance(raw, Mapping) for _, raw in members):
            yield from members
            continue
        yield where, {**members[0][1], **{n: [raw.get(n) for _, raw in members] for n in lists}}


def _prompt(schema: Schema, row: Mapping[str, Any]) -> Any:
    prompt = lookup(row, schema.prompt) if schema.prompt else None
    prompt = turns(decoded(decoded_turns(prompt)))
    if schema.prompt and prompt is None:
        raise _missing(schema, row, [schema.prompt])
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]  # a dialogue of one turn
    elif isinstance(prompt, Mapping):
        prompt = [prompt]
    more = lookup(row, schema.input) if schema.input else None
    if more:
        if not isinstance(more, str) or not isinstance(prompt, str):
            raise DataError(f"'{schema.input}' goes under the prompt; expected text and text")
        prompt = f"{prompt}\n{more}"
    if schema.history:
        prompt = [
            *_earlier(schema, row),
            *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt),
        ]
    return in_conversation(schema, row, prompt) if schema.system else prompt


def _earlier(schema: Schema, row: Mapping[str, Any]) -> list[Any]:
    """The turns before a prompt; none where the row has none."""
    value = turns(decoded(lookup(row, schema.history))) or []
    if are_pairs_of_turns(value):
        return _dialogue([ask for ask, _ in value], [answer for _, answer in value])
    if value and not (isinstance(value, list) and are_turns(value)):
        raise DataError(
            f"'{schema.history}' is {kind(value)}; expected turns, or pairs of a question and its answer, which go in "
            "front of the prompt"
        )
    return value


def in_conversation(schema: Schema, row: Mapping[str, Any], prompt: Any) -> Any:
    """The prompt as a conversation with the row's system text.

    Without one it is a conversation all the same, so that all rows are written alike.
    """
    system = lookup(row, schema.system)
    if system is not None and not isinstance(system, str):
        raise DataError(f"'{schema.system}' is {kind(system)}; expected a system text")
    if isinstance(prompt, str):
        if _DIALOGUE in prompt:
            raise DataError(
                f"'{schema.system}' beside a prompt that is a whole dialogue: it is not clear where it belongs"
            )
        prompt = [{"role": "user", "content": prompt}]
    if prompt is None or not system or not are_turns(prompt):
        return prompt
    first = prompt[0]
    if first["role"] in ("system", "developer"):
        if text_of(first).strip() != system.strip():
            raise DataError(
                f"two system texts: '{schema.system}' is {kind(system)} and the prompt begins with another; keep one "
                "(--columns system= hides the column)"
            )
        return prompt
    return [{"role": "system", "content": system}, *prompt]


def decoded_turns(value: Any) -> Any:
    """JSON text that holds turns, decoded; other text is text.

    Raises:
      DataError: a conversation as a program prints it, which cannot be read back.
    """
    if _is_text(value):
        return value
    parsed = decoded(value)
    if parsed is not value and are_turns(turns(parsed)):
        return parsed
    if isinstance(value, str) and is_printed_conversation(value):
        raise DataError(
            f"{kind(value)}: a conversation as a program prints it (a table of text was made of it), which cannot be "
            "read back; write it as JSON, or keep the data in JSON lines or Parquet"
        )
    return value


def _responses(schema: Schema, row: Mapping[str, Any]) -> list[Any] | None:
    if len(schema.responses) == 1:
        value = turns(decoded(lookup(row, schema.responses[0])))
        if value is not None and not isinstance(value, list):
            raise DataError(f"'{schema.responses[0]}' is {kind(value)}; expected a list of responses")
        return value
    values = [turns(decoded(lookup(row, name))) for name in schema.responses]
    missing = [n for n, v in zip(schema.responses, values, strict=True) if v is None]
    if missing:
        raise _missing(schema, row, missing)
    return values


def _whole(schema: Schema, row: Mapping[str, Any], canonical: dict[str, Any]) -> dict[str, Any]:
    """Turns that are listed by speaker, as conversations; the system text in front of those that hold their prompt."""
    prompt = canonical.get("prompt")
    texts = "responses" if "responses" in canonical else None
    values = canonical["responses"] if texts else [canonical[n] for n in ("chosen", "rejected") if n in canonical]
    if isinstance(prompt, list) and prompt and all(isinstance(p, str) for p in prompt):
        if not all(isinstance(v, list) and len(v) == len(prompt) for v in values):
            raise DataError(f"'{schema.prompt}' has {len(prompt)} turns; expected as many in each response")
        values = [_dialogue(prompt, v) for v in values]
        prompt = None
    elif len(schema.responses) != 1:
        values = [v[0] if isinstance(v, list) and len(v) == 1 and isinstance(v[0], str) else v for v in values]
    if prompt is None and schema.system and (system := lookup(row, schema.system)):
        values = [in_conversation(schema, {schema.system: system}, v) if are_turns(v) else v for v in values]
    rest = {k: v for k, v in canonical.items() if k != "prompt"} | ({} if prompt is None else {"prompt": prompt})
    for value in values:
        if not isinstance(value, str | list) and not is_message(value):
            raise DataError(f"a response is {kind(value)}; expected text or messages")
    sides = {"responses": values} if texts else dict(zip(("chosen", "rejected"), values, strict=False))
    whole = rest | sides
    return {k: whole[k] for k in ("prompt", *(k for k in whole if k != "prompt")) if k in whole}


def _dialogue(asked: Sequence[str], answered: Sequence[Any]) -> list[dict[str, Any]]:
    if not all(isinstance(a, str) for a in answered):
        raise DataError("a turn of a response is missing; expected texts")
    both = zip(asked, answered, strict=True)
    return [
        {"role": role, "content": text} for ask, answer in both for role, text in (("user", ask), ("assistant", answer))
    ]


def _scores(schema: Schema, row: Mapping[str, Any], count: int) -> list[float]:
    if schema.winner:
        value = lookup(row, schema.winner)
        if value is None:
            raise _missing(schema, row, [schema.winner])
        label = by_cell(value, schema.order, [lookup(row, o) for o in schema.order])
        return of_winner(schema.winner, label, schema.order, count)
    if schema.winners:
        values = [lookup(row, n) for n in schema.winners]
        tie = lookup(row, schema.tie) if schema.tie else None
        return of_winners(schema.winners, values, tie)
    if schema.best_first:
        return of_order(schema.best_first, decoded(lookup(row, schema.best_first)), count)
    names, sign = (schema.scores, 1.0) if schema.scores else (schema.ranks, -1.0)
    values = decoded(lookup(row, names[0])) if len(names) == 1 else [lookup(row, n) for n in names]
    if not isinstance(values, list) or len(values) != count:
        raise DataError(f"'{', '.join(names)}' is {kind(values)}; expected {count} numbers, one for each response")
    labels = names if len(names) == count else names * count
    return [sign * number(n, v) for n, v in zip(labels, values, strict=True)]


def _several(value: Any) -> list[Any] | None:
    """Several responses in a list; None where the value is one response."""
    if isinstance(value, list) and not are_turns(value) and all(isinstance(v, str | list) for v in value):
        return value
    return None


def _missing(schema: Schema, row: Mapping[str, Any], names: Sequence[str]) -> DataError:
    null = " (it is null here)" if any(n.partition(".")[0] in row for n in names) else ""
    return DataError(
        f"no column {' or '.join(map(repr, names))}{null}, which schema {schema.name} reads; "
        f"found: {', '.join(map(str, row)) or 'none'}"
    )
