"""Which columns are the prompt, its system text and its history; whether a text stands in a row's prompt already."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ches_jax.data.messages import text_of
from ches_jax.data.nested import decoded
from ches_jax.data.prompts import lookup, pair_contents
from ches_jax.data.schema.column_names import PROMPT, SYSTEM, words_in
from ches_jax.data.schema.column_values import Rows, has_any, is_texts, two_readings
from ches_jax.data.schema.mapping import PLAIN, Schema, canonical_rows
from ches_jax.data.schema.values import are_pairs_of_turns, are_turns, turns
from ches_jax.errors import DataError

_INSIDE = ("text", "full_text", "content", "value", "post", "prompt", "question", "body", "instruction")
"""Keys of the text of a prompt that is an object."""


def prompt_words(rows: Rows, columns: Sequence[str], taken: Sequence[str], optional: bool) -> dict[str, str]:
    fitting = [path for name in columns if words_in(name) and name not in taken for path in prompt_path(rows, name)]
    named = [p for p in fitting if p == "prompt"]
    if named:
        return {"prompt": "prompt"}
    if optional or not fitting:
        return {}
    if set(fitting) == {"instruction", "input"}:
        return {"prompt": "instruction", "input": "input"}
    different = [p for p in fitting if any(lookup(r, p) != lookup(r, fitting[0]) for r in rows)]
    if different:
        raise two_readings(
            f"the prompt is in '{fitting[0]}'",
            f"it is in '{different[0]}'",
            f"--columns prompt={fitting[0]} ... or --columns prompt={different[0]} ...",
        )
    return {"prompt": fitting[0]}


def prompt_path(rows: Rows, name: str) -> Iterator[str]:
    """The column, or the text in its objects, where it is named as a prompt and holds what a prompt can be."""
    if name.lower() not in PROMPT and not {"prompt", "instruction", "question", "query"} & {*words_in(name)[-1:]}:
        return
    if any(w in SYSTEM for w in (name.lower(), *words_in(name))):
        return
    values = [v for row in rows if (v := turns(decoded(row.get(name)))) not in (None, "", [])]
    if not values:
        return
    if all(isinstance(v, str) or are_turns(v) or is_texts(v) for v in values):
        yield name
    elif all(isinstance(v, Mapping) for v in values):
        inside = [k for k in _INSIDE if all(isinstance(v.get(k), str) for v in values)]
        yield from (f"{name}.{k}" for k in inside[:1])


def with_system(schema: Schema, rows: Rows, columns: Sequence[str]) -> Schema:
    """The declaration with the column of a system text, where there is one that says something."""
    if schema.system:
        return schema
    fitting = [n for n in columns if n.lower() in SYSTEM and n not in schema.reads]
    fitting = [n for n in fitting if any(isinstance(r.get(n), str) and r[n].strip() for r in rows)]
    fitting = [n for n in fitting if not all(stands(schema, r, r.get(n), ("prompt",)) for r in rows)]
    if len(fitting) > 1:
        raise two_readings(
            f"the system text is in '{fitting[0]}'",
            f"it is in '{fitting[1]}'",
            f"--columns system={fitting[0]} ... or --columns system={fitting[1]} ...",
        )
    if not fitting:
        return schema
    prompt = schema.prompt if schema != PLAIN or has_any(rows, "prompt") else ""
    return replace(schema, name=f"{schema.name} with {fitting[0]}", system=fitting[0], prompt=prompt)


def with_history(schema: Schema, rows: Rows, columns: Sequence[str]) -> Schema:
    """The declaration with a column of earlier questions and answers, where they are written in pairs."""
    if schema.history or not schema.prompt or not has_any(rows, schema.prompt):
        return schema
    for name in (n for n in columns if "history" in words_in(n) and n not in schema.reads):
        values = [v for r in rows if (v := decoded(r.get(name)))]
        if values and all(map(are_pairs_of_turns, values)):
            return replace(schema, name=f"{schema.name} with {name}", history=name)
    return schema


def stands(schema: Schema, row: Mapping[str, Any], value: Any, where: Sequence[str]) -> bool:
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
