"""Rows of one response with a label, as KTO reads them: ``prompt, completion, label`` (or ``completion_ids``)."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ches_jax.data.messages import kind
from ches_jax.data.prompts import PAIR_COLUMNS, Numbers, canonical_content, lookup
from ches_jax.data.schema.column_names import SYSTEM as SYSTEM_NAMES
from ches_jax.data.schema.column_values import Rows, two_readings
from ches_jax.data.schema.left_over import require_text
from ches_jax.data.schema.mapping import Schema, decoded_turns, in_conversation
from ches_jax.data.schema.values import are_turns, turns, word
from ches_jax.data.sources import Kind
from ches_jax.errors import DataError
from ches_jax.types import TokenPair

COMPLETION = ("completion", "completion_ids")
OTHER_NAMES = ("response", "messages", "conversations")
SYSTEM = "system"
"""A column of a system text, which goes in front of the prompt."""
LABEL = "label"
"""Columns of a row with one response: the response, and whether it is a good one."""
_GOOD = {"1": True, "true": True, "yes": True, "good": True, "desirable": True}
_BAD = {"0": False, "-1": False, "false": False, "no": False, "bad": False, "undesirable": False}


def one_response(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[tuple[Numbers, dict[str, Any]]]:
    """A row of one response, as a pair of two equal ones.

    The response of a labelled row without ``completion`` is ``response``, or the last message of ``messages``, but not
    where the row has a chosen or a rejected one.

    Raises:
      DataError: as ``canonical_content``; there is no response.
    """
    text, ids = (columns.get(name, name) for name in COMPLETION)
    named = {*COMPLETION} & columns.keys() or any(row.get(name) is not None for name in COMPLETION)
    pair = any(side in name.lower() for name in map(str, row) for side in ("chosen", "reject"))
    if not named and not pair and row.get(columns.get(LABEL) or LABEL) is not None:
        text = next((other for other in OTHER_NAMES if row.get(other) is not None), text)
    if lookup(row, text) is None and lookup(row, ids) is None:
        raise DataError(
            f"no column '{text}' with the response{' (it is null here)' if text in row else ''}; found: "
            f"{', '.join(map(str, row)) or 'none'}; expected prompt, completion, label: say which column is which with "
            "--columns completion=NAME label=NAME"
        )
    names = {k: v for k, v in columns.items() if k not in (*COMPLETION, LABEL, SYSTEM)}
    names |= {"chosen": text, "rejected": text, "chosen_ids": ids, "rejected_ids": ids}
    prompt = columns.get("prompt") or "prompt"
    turned = {n: turns(decoded_turns(row[n])) for n in (text, prompt) if n in row}
    if columns.get(SYSTEM):
        whole = text if row.get(prompt) is None and are_turns(turned.get(text)) else prompt
        turned[whole] = in_conversation(Schema(system=columns[SYSTEM]), row, turned.get(whole))
    return [(None, canonical_content({**row, **turned}, names))]


def with_label(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[tuple[Numbers, dict[str, Any]]]:
    """The same for a row whose label has to say whether the response is good.

    Raises:
      DataError: as ``one_response``; or the label is none.
    """
    content = one_response(row, columns)
    _good(row, columns)
    return content


def labelled(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[tuple[Numbers, dict[str, Any]]]:
    """The same as ``prompt``, ``response`` and ``good``: whether the label says so.

    Raises:
      DataError: as ``canonical_content``; or the label is none.
    """
    good = _good(row, columns)
    ((_, content),) = one_response(row, columns)
    ids = "_ids" if "prompt_ids" in content else ""
    return [(None, {"prompt": content[f"prompt{ids}"], "response": content[f"chosen{ids}"], "good": good})]


def _good(row: Mapping[str, Any], columns: Mapping[str, str]) -> bool:
    name = columns.get(LABEL) or LABEL
    if name.partition(".")[0] not in row and name not in row:
        raise DataError(
            f"no column '{name}' that says whether the response is good; found: {', '.join(map(str, row)) or 'none'}; "
            "say which it is with --columns label=NAME"
        )
    return is_good(name, lookup(row, name))


def is_good(name: str, value: Any) -> bool:
    """Whether a label means a good response: true or 1; false, 0 and -1 mean a bad one.

    >>> is_good("label", True), is_good("label", "-1"), is_good("label", 0.0)
    (True, False, False)

    Raises:
      DataError: it is something else, such as a rating.
    """
    known = _GOOD | _BAD
    if value is None or word(value) not in known:
        raise DataError(
            f"'{name}' is {kind(value)}; expected whether the response is good: true or false, 1 or 0 (or -1); a "
            "rating needs a threshold first"
        )
    return known[word(value)]


def with_own_flags(pair: TokenPair) -> TokenPair:
    """A response that was tokenised as two equal ones, with the findings about one."""
    return replace(pair, flags=tuple(f for f in pair.flags if f != "identical" and not f.endswith("_rejected")))


def as_one_response(content: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row of one response from its content as a pair of two equal ones.

    >>> as_one_response({"prompt": "1+1?", "chosen": " 2", "rejected": " 2"})
    {'prompt': '1+1?', 'completion': ' 2'}
    """
    names = {"chosen": "completion", "chosen_ids": "completion_ids"}
    return {names.get(n, n): v for n, v in content.items() if n not in ("rejected", "rejected_ids")}


def _named(rows: Rows, columns: Mapping[str, str]) -> Mapping[str, str]:
    """The names of columns, with that of a system text where some row has one.

    Raises:
      DataError: two columns may be it; one holds pictures or sounds.
    """
    every = [str(n) for n in dict.fromkeys(itertools.chain.from_iterable(rows))]
    if not {*COMPLETION} & columns.keys():
        require_text(rows, every, "completion=" + next((n for n in (*COMPLETION, *OTHER_NAMES) if n in every), "NAME"))
    names = [n for n in every if n.lower() in SYSTEM_NAMES]
    fitting = [n for n in names if any(isinstance(r.get(n), str) and r[n].strip() for r in rows)]
    if SYSTEM in columns or not fitting:
        return columns
    if len(fitting) > 1:
        one, other = fitting[:2]
        raise two_readings(
            f"the system text is in '{one}'",
            f"it is in '{other}'",
            f"--columns system={one} ... or --columns system={other} ...",
        )
    return {**columns, SYSTEM: fitting[0]}


_COLUMNS = (*PAIR_COLUMNS, *COMPLETION, LABEL, SYSTEM)
ONE_RESPONSE = Kind("single responses", _COLUMNS, one_response, named=_named)
WITH_LABEL = Kind("single responses with a label", _COLUMNS, with_label, named=_named)
LABELLED = Kind("labelled responses", _COLUMNS, labelled, named=_named)
