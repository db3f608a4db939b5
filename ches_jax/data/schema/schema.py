"""A schema: in which columns of a data set lie prompt, responses and preference. A plain record, as a user writes it.

``Schema.read`` turns a row as it lies in the data into one that ``prompts.pair_contents`` knows: ``prompt`` with
``chosen, rejected``, or with ``responses`` and ``chosen`` (the number of the preferred one) or ``scores``.

    data                                                      schema
    {"q": .., "good": .., "bad": ..}                          prompt=q chosen=good rejected=bad
    {"q": .., "a": .., "b": .., "vote": "b"}                  prompt=q responses=[a, b] winner=vote winner_is={a: 0, b: 1}
    {"q": .., "r1": .., "r2": .., "pref": -2}                 ... winner=pref winner_is={negative: 0, positive: 1, zero: tie}
    {"q": .., "replies": [..], "ranks": [2, 0, 1]}            prompt=q responses=replies ranks=ranks
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ches_jax.data.prompts import lookup
from ches_jax.data.schema.values import as_conversation, cell, is_conversation, is_text, normal, number, parse_json
from ches_jax.errors import ChesError, DataError

TIE = "tie"
_SIGNS = ("negative", "positive", "zero")
_MAX_FILE = 1 << 20


@dataclass(frozen=True)
class Schema:
    """Names of columns; a dot reaches into objects and into every object of a list (``completions.response``).

    >>> arena = Schema(prompt=("q",), responses=("a", "b"), winner="vote", winner_is={"a": 0, "b": 1, "tie": "tie"})
    >>> arena.read({"q": "1+1?", "a": "3", "b": "2", "vote": "b", "judge": 7})
    {'prompt': '1+1?', 'responses': ['3', '2'], 'chosen': 1, 'judge': 7}
    """

    name: str = "columns"
    """For messages and ``run.json``."""
    source: str = ""
    """The data sets it was written after."""
    prompt: tuple[str, ...] = ()
    """Texts that are joined by a line end (empty ones left out), or one conversation."""
    system: str | None = None
    """Text that stands before the prompt as the system's message; empty or null: none."""
    chosen: str | None = None
    rejected: str | None = None
    """Response, or list of responses, every chosen one against every rejected one."""
    responses: tuple[str, ...] = ()
    """One column with a list, or a column for each response."""
    winner: str | None = None
    """Column that tells which response is preferred."""
    winner_is: Mapping[str, int | str] = field(default_factory=dict)
    """Its values (lower case) -> number of the response from 0, or "tie". For numbers also: negative, positive, zero."""
    winner_names: tuple[str, ...] = ()
    """Columns of which one holds what ``winner`` holds: the names of the models."""
    one_hot: tuple[str, ...] = ()
    """A column for each response that is 1 where it is preferred; none is 1: a tie."""
    scores: tuple[str, ...] = ()
    """A column for each response, or one with a list; higher is better."""
    ranks: tuple[str, ...] = ()
    """The same; lower is better."""
    turns: bool = False
    """Prompt and responses are lists of turns (or JSON text of such) that take their turn."""
    group: bool = False
    """Rows after one another that share the prompt hold one response each."""
    ignore: tuple[str, ...] = ()
    """Columns that look as if they said something about the pair and do not."""

    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        names = (*self.prompt, self.system, self.chosen, self.rejected, *self.responses, self.winner)
        return tuple(n for n in (*names, *self.winner_names, *self.one_hot, *self.scores, *self.ranks) if n)

    def describe(self) -> str:
        """What is read as what, in one line."""
        parts = {
            "prompt": "+".join(self.prompt), "system": self.system, "chosen": self.chosen, "rejected": self.rejected,
            "responses": ", ".join(self.responses), "winner": self.winner, "one-hot": ", ".join(self.one_hot),
            "scores (higher is better)": ", ".join(self.scores), "ranks (lower is better)": ", ".join(self.ranks),
        }  # fmt: skip
        return "; ".join(f"{what} = {names}" for what, names in parts.items() if names)

    def read(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row in canonical columns, with the columns that this schema does not read.

        Raises:
          DataError: a column is missing, or holds what cannot be read so.
        """
        content = self.read_prompt(row)
        system = content.pop("system", None)
        if self.turns:
            content = _take_turns(content["prompt"], self._responses(row)) | self._preference(row)
        elif self.chosen and self.rejected:
            content |= _sides(cell(row, self.chosen), cell(row, self.rejected))
        else:
            responses = self._responses(row)
            content |= {"responses": responses, **self._preference(row, responses)}
        if system is not None:
            _with_system(content, system)
        return content | self.rest(row)

    def read_group(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Rows of one response each that share a prompt, as one row; as ``read``."""
        values = [lookup(row, (self.scores or self.ranks)[0]) for row in rows]
        together = {**rows[0], self.responses[0]: [cell(row, self.responses[0]) for row in rows]}
        return self.read({**together, (self.scores or self.ranks)[0]: values})

    def same_group(self, row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether two rows share their prompt and their system text."""
        return all(lookup(row, name) == lookup(other, name) for name in (*self.prompt, self.system) if name)

    def read_prompt(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The ``prompt`` of a row (and its ``system`` text apart); nothing where the responses hold it."""
        system = cell(row, self.system) if self.system else None
        content = {"system": system} if isinstance(system, str) and system.strip() else {}
        if not self.prompt:
            return content
        values = [cell(row, path) for path in self.prompt]
        if self.turns:
            return content | {"prompt": _turns(self.prompt[0], values[0])}
        values = [v for v in values if v is not None and v != ""]
        if len(values) > 1 and not all(isinstance(v, str) for v in values):
            raise DataError(f"{' and '.join(self.prompt)} are to be joined to a prompt, and not both are text")
        if not values:
            return content | ({"prompt": ""} if lookup(row, self.prompt[0]) == "" else {})
        return content | {"prompt": "\n".join(values) if len(values) > 1 else values[0]}

    def rest(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns that are not read."""
        read = {name if name in row else name.partition(".")[0] for name in self.columns()}
        canonical = {"prompt", "chosen", "rejected", "responses", "scores", "system"}
        return {name: value for name, value in row.items() if name not in read and name not in canonical}

    def _responses(self, row: Mapping[str, Any]) -> list[Any]:
        if len(self.responses) > 1:
            responses = [cell(row, path) for path in self.responses]
            missing = [n for n, r in zip(self.responses, responses, strict=True) if r is None]
            if missing:
                raise DataError(f"'{missing[0]}' is missing or null; expected a response")
            return responses
        responses = cell(row, self.responses[0])
        if not isinstance(responses, list) or any(r is None for r in responses):
            raise DataError(f"'{self.responses[0]}' is a {type(responses).__name__}; expected a list of responses")
        return responses

    def _preference(self, row: Mapping[str, Any], responses: Sequence[Any] = (None, None)) -> dict[str, Any]:
        """``chosen`` (a number) or ``scores``; equal scores where the row tells a tie."""
        if self.winner:
            number_of = self._winner(row, len(responses))
            return {"scores": [0] * len(responses)} if number_of is None else {"chosen": number_of}
        if self.one_hot:
            flags = [_flag(name, lookup(row, name)) for name in self.one_hot]
            if sum(flags) > 1:
                raise DataError(f"{' and '.join(self.one_hot)} all say that theirs is preferred; expected one of them")
            return {"scores": [0] * len(flags)} if not any(flags) else {"chosen": flags.index(True)}
        names, sign = (self.scores, 1) if self.scores else (self.ranks, -1)
        if not names:
            return {}
        cells = [lookup(row, n) for n in names] if len(names) > 1 else lookup(row, names[0])
        numbers = [number(c) for c in cells] if isinstance(cells, list) else []
        if len(numbers) != len(responses) or None in numbers:
            raise DataError(f"{' and '.join(names)}: {cells!r}; expected {len(responses)} finite numbers"[:200])
        return {"scores": [sign * n for n in numbers if n is not None]}

    def _winner(self, row: Mapping[str, Any], count: int) -> int | None:
        value = lookup(row, self.winner or "")
        names = [lookup(row, n) for n in self.winner_names]
        if names.count(value) == 1:
            return names.index(value)
        told = self.winner_is.get(word(value), None)
        if told is None and (size := number(value)) is not None:
            told = self.winner_is.get(_SIGNS[2] if size == 0 else _SIGNS[size > 0])
        if told == TIE:
            return None
        if not isinstance(told, int) or not 0 <= told < count:
            known = ", ".join(self.winner_is) or " or ".join(self.winner_names)
            raise DataError(f"'{self.winner}' is {value!r}, which names no response; expected one of {known}"[:300])
        return told


def word(value: Any) -> str:
    """A value of a label as a word: lower case, without white space around; whole numbers without a fraction.

    >>> word(" Model_A "), word(1.0), word(True)
    ('model_a', '1', 'true')
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().lower()
    return text[:-2] if text.endswith(".0") and text[:-2].lstrip("-").isdigit() else text


def schema_file(path: Path) -> Schema:
    """A schema from a TOML or JSON file with the fields of ``Schema``.

    Raises:
      ChesError: no such file, another syntax, a field that does not exist or has another type.
    """
    try:
        if path.stat().st_size > _MAX_FILE:
            raise ChesError(f"--schema {path}: more than 1 MiB; expected a small TOML or JSON file")
        text = path.read_text(encoding="utf-8")
        given = tomllib.loads(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ChesError(f"--schema {path}: cannot be read ({error}); expected a TOML or JSON file") from None
    return schema_of(given, str(path))


def schema_of(given: Any, name: str) -> Schema:
    """A schema from the values of a file.

    Raises:
      ChesError: as ``schema_file``.
    """
    kinds = {f.name: f for f in fields(Schema)}
    if not isinstance(given, Mapping):
        raise ChesError(f"--schema {name}: expected an object with {', '.join(kinds)}")
    values: dict[str, Any] = {"name": name}
    for key, value in given.items():
        if key not in kinds:
            raise ChesError(f"--schema {name}: no field {key!r}; there are {', '.join(kinds)}")
        default = getattr(Schema, key, None)
        if isinstance(default, tuple):
            value = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
            good = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
        elif isinstance(default, bool):
            good = isinstance(value, bool)
        elif key == "winner_is":
            good = isinstance(value, Mapping) and all(
                v == TIE or (type(v) is int and v >= 0) for v in value.values()
            )  # fmt: skip
            value = {word(k): v for k, v in value.items()} if good else value
        else:
            good = isinstance(value, str)
        if not good:
            raise ChesError(f"--schema {name}: {key} is {value!r}; see docs/data.md for what it can be"[:300])
        values[key] = value
    return _checked(Schema(**values))


def _checked(schema: Schema) -> Schema:
    sides = bool(schema.chosen), bool(schema.rejected)
    ways = [w for w in ("winner", "one_hot", "scores", "ranks") if getattr(schema, w)]
    if any(sides) != all(sides) or all(sides) == bool(schema.responses):
        raise ChesError(f"--schema {schema.name}: give either chosen and rejected, or responses")
    if len(ways) > 1 or (ways and all(sides)):
        also = ["chosen and rejected"] if all(sides) else []
        raise ChesError(f"--schema {schema.name}: {' and '.join(also + ways)} all say what is preferred: keep one")
    if schema.responses and not ways:
        raise ChesError(f"--schema {schema.name}: responses without winner, one_hot, scores or ranks")
    return schema


def _sides(chosen: Any, rejected: Any) -> dict[str, Any]:
    """Chosen and rejected; lists of several responses become ``responses`` with the numbers of the chosen ones."""
    lists = [_several(side) for side in (chosen, rejected)]
    if not any(lists):
        return {k: v for k, v in (("chosen", chosen), ("rejected", rejected)) if v is not None}
    several = [s if _several(s) else [s] for s in (chosen, rejected)]
    if len(several[0]) == len(several[1]) == 1:
        return {"chosen": several[0][0], "rejected": several[1][0]}
    return {"responses": [*several[0], *several[1]], "chosen": list(range(len(several[0])))}


def _several(value: Any) -> bool:
    """Whether a value is a list of responses, rather than one response of several messages."""
    return isinstance(value, list) and bool(value) and all(
        isinstance(v, str) or (isinstance(v, list) and is_text(v)) for v in value
    )  # fmt: skip


def _turns(name: str, value: Any) -> list[str]:
    value = parse_json(value) if isinstance(value, str) and parse_json(value) is not None else value
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise DataError(f"'{name}' is {value!r}; expected a list of turns, each a text"[:200])
    return value


def _take_turns(prompt: list[str], responses: Sequence[Any]) -> dict[str, Any]:
    """Turns of the user and of each response's assistant as conversations; one turn stays text."""
    answers = [_turns("response", r) for r in responses]
    if any(len(a) != len(prompt) for a in answers):
        raise DataError(f"{len(prompt)} turns of the user and {[len(a) for a in answers]} of the responses")
    if len(prompt) == 1:
        return {"prompt": prompt[0], "responses": [a[0] for a in answers]}
    conversations = [
        [m for user, text in zip(prompt, answer, strict=True)
         for m in ({"role": "user", "content": user}, {"role": "assistant", "content": text})]
        for answer in answers
    ]  # fmt: skip
    return {"responses": conversations}


def _with_system(content: dict[str, Any], system: str) -> None:
    """Put the system's text before the prompt, or before every conversation where these hold the prompt."""
    message = {"role": "system", "content": system}
    if "prompt" in content:
        prompt = content["prompt"]
        if isinstance(prompt, str) and prompt.lstrip().startswith("Human:"):
            raise DataError("a system text beside a dialogue of 'Human:' and 'Assistant:': cannot be put together")
        content["prompt"] = _after(message, as_conversation("prompt", prompt))
        return
    for name in ("chosen", "rejected"):
        if is_conversation(content.get(name)):
            content[name] = _after(message, normal(content[name]))
    if "responses" in content:
        content["responses"] = [_after(message, r) if is_conversation(r) else r for r in content["responses"]]


def _after(message: dict[str, Any], conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = conversation[0]
    if first.get("role") != "system":
        return [message, *conversation]
    if str(first.get("content", "")).strip() != message["content"].strip():
        raise DataError("the conversation begins with another system text than the system column holds")
    return conversation


def _flag(name: str, value: Any) -> bool:
    size = float(value) if isinstance(value, bool) else number(value)
    if size not in (0.0, 1.0):
        raise DataError(f"'{name}' is {value!r}; expected 0 or 1")
    return bool(size)
