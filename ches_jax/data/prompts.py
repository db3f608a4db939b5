"""What is the prompt of a row, and what are its responses.

``canonical_content`` brings every accepted row shape to one: explicit text, an explicit conversation, or token ids.
``render`` writes it as the text that a model sees.

    accepted                                              canonical
    prompt, chosen, rejected: str                         the same
    chosen, rejected: whole "Human: / Assistant:" texts   prompt up to the last common "Assistant:"
    prompt, chosen, rejected: messages                    the same
    chosen, rejected: whole conversations                 prompt = their common leading messages
    prompt, and responses that repeat it                  the prompt once (``repeats``)
    prompt_ids, chosen_ids, rejected_ids                  the same; they win over text beside them
    chosen_prompt, rejected_prompt, chosen, rejected      the same (``two_prompts``); with equal prompts, a plain pair
    a prompt alone: prompt (str or messages), prompt_ids  the same (``canonical_prompt``)

A row may hold several candidates instead: ``responses``, a list of any of these, after ``prompt`` or ``prompt_ids``
(``pair_contents``). It stands for pairs of them, each of which means what it would mean as a row of its own:

    preference among the candidates     from
    scores: [7.5, 3, 7]                 a number for each response, the higher the better; equal ones make no pair
    chosen: 2                           the number (from 0) of the one that is preferred to all others
    neither                             the order of the list, best first

    chosen-against-all   the best one against each that is worse
    all-pairs            every one against each that is worse

These are the shapes of the data sets with several responses to a prompt: texts beside scores (``generations`` and
``ratings``, ``all_generated_responses`` and ``all_rm_scores``), objects that hold both (``completions`` of
UltraFeedback), lists by rank, and indices of the better one. A dot reaches into objects: ``completions.response``.
"""

import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from ches_jax.data.messages import Message, as_messages, is_message, kind, require_answer, without_nulls
from ches_jax.data.nested import DEEPEST, decoded, within_depth
from ches_jax.data.repeats import ids_without_prompt, split_conversations, without_prompt
from ches_jax.data.two_prompts import SIDES, TWO_PROMPT_IDS, TWO_PROMPTS
from ches_jax.errors import DataError
from ches_jax.types import Pairing

TEXT_COLUMNS = ("prompt", "chosen", "rejected")
LARGEST_ID = 2**31 - 1
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
BestFirst = Literal["best-first"]
BEST_FIRST: BestFirst = "best-first"
"""The best response of a row beside each other one: how a list of responses is read."""
CANDIDATE_COLUMNS = ("responses", "scores")
MOST_PAIRS = 100_000
"""Of one row: a chunk of them is held in memory."""
PAIR_COLUMNS = (*TEXT_COLUMNS, *ID_COLUMNS, *TWO_PROMPTS, *TWO_PROMPT_IDS, "tools", "chat_template_kwargs", "category")
COLUMNS = (*PAIR_COLUMNS, *CANDIDATE_COLUMNS)


PROMPT_COLUMNS = ("prompt", "prompt_ids", "tools", "chat_template_kwargs", "category")
_IDS = frozenset(ID_COLUMNS)
_OF_TWO = frozenset({*TWO_PROMPTS, *TWO_PROMPT_IDS})
NOT_TEXT = frozenset(COLUMNS) - {*TEXT_COLUMNS, "category"}
"""What makes more of a row than texts."""

Numbers = tuple[int, int] | tuple[()] | None
"""Chosen and rejected among a row's candidates; () where they make no pair, None where the row is one pair."""

_ASSISTANTS = tuple(re.compile(rf"(?:\r?\n){{{lines}}}Assistant:") for lines in (2, 1))


def canonical_content(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    r"""Brings a row of any accepted shape to explicit ``prompt, chosen, rejected`` or to token ids.

    Args:
      row: the row as read; null values count as absent.
      columns: canonical name -> name in the row, where they differ (see ``lookup``); an empty name hides the column.

    Raises:
      DataError: columns are missing or hold something else than text, messages or token ids.

    >>> dialogue = "\n\nHuman: 1+1?\n\nAssistant:"
    >>> canonical_content({"chosen": dialogue + " 2", "rejected": dialogue + " 3"}, {})
    {'prompt': '\n\nHuman: 1+1?\n\nAssistant:', 'chosen': ' 2', 'rejected': ' 3'}
    """
    return _content(_values(row, columns, PAIR_COLUMNS), row, columns)


def pair_contents(
    row: Mapping[str, Any], columns: Mapping[str, str], pairing: Pairing | BestFirst
) -> list[tuple[Numbers, dict[str, Any]]]:
    """The pairs of a row: one as ``canonical_content`` tells it, or those of its candidates.

    A row has candidates where it has ``responses`` and no ``rejected``, or where ``columns`` names ``responses``. When
    they make no pair, there is one entry without numbers that holds ``prompt`` and ``responses`` as they are.

    Raises:
      DataError: as ``canonical_content``; ``responses``, ``chosen`` or ``scores`` are not what they have to be.

    >>> row = {"prompt": "1+1?", "responses": [" 2", " 3", " 4"], "scores": [1, 0, 0]}
    >>> [numbers for numbers, content in pair_contents(row, {}, "all-pairs")]
    [(0, 1), (0, 2)]
    """
    if not columns and (content := _texts_alone(row)) is not None:
        return [(None, content)]
    values = _values(row, columns, COLUMNS)
    has_rejected = "rejected" in values or "rejected_ids" in values
    if "responses" not in values or (has_rejected and "responses" not in columns):
        return [(None, _content(values, row, columns))]
    responses = values["responses"]
    if two := [name for name in (*TWO_PROMPTS, *TWO_PROMPT_IDS) if name in values]:
        raise DataError(
            f"'responses' are answers to one prompt, and '{two[0]}' says that each response has its own: hide one with "
            f"--columns responses= or --columns {two[0]}="
        )
    if not isinstance(responses, list) or not all(isinstance(r, str | list) or is_message(r) for r in responses):
        raise DataError(
            f"'responses' is {kind(responses)}; expected a list of texts, of conversations or of token ids; a dot "
            "reaches into objects: --columns responses=completions.response"
        )
    if pairing != BEST_FIRST and not {"scores", "chosen"} & values.keys():
        _require_told(row, columns)
    if not (pairs := _preferences(values, len(responses), pairing)):
        prompt = values.get("prompt_ids", values.get("prompt"))
        return [((), without_nulls({"prompt": prompt, "responses": responses}))]
    shared = {n: values[n] for n in ("prompt", "prompt_ids", "tools", "chat_template_kwargs") if n in values}
    sides = ID_COLUMNS[1:] if _are_ids(responses, values) else TEXT_COLUMNS[1:]
    numbered: list[tuple[Numbers, dict[str, Any]]] = []
    for chosen, rejected in pairs:
        both = {side: responses[i] for side, i in zip(sides, (chosen, rejected), strict=True)}
        try:
            numbered.append(((chosen, rejected), _content(shared | both, row, columns)))
        except DataError as error:
            raise DataError(f"responses {chosen} and {rejected} as chosen and rejected: {error}") from None
    return numbered


def _texts_alone(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a row of three texts and of nothing else that is read, as most are; None for any other."""
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
        return None
    if not NOT_TEXT.isdisjoint(row):
        return None
    prompt, chosen, rejected = without_prompt(prompt, chosen, rejected)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def lookup(row: Mapping[str, Any], name: str) -> Any:
    """The column ``name`` of a row; a dot reaches into an object, or into every object of a list. None: not there.

    >>> lookup({"completions": [{"text": "a"}, {"text": "b"}]}, "completions.text")
    ['a', 'b']
    """
    if name in row or "." not in name:
        return row.get(name)
    head, _, rest = name.partition(".")
    inner = row.get(head)
    if isinstance(inner, list):
        return [lookup(part, rest) if isinstance(part, Mapping) else None for part in inner]
    return lookup(inner, rest) if isinstance(inner, Mapping) else None


def columns_read(row: Mapping[str, Any], columns: Mapping[str, str], names: Collection[str]) -> Collection[str]:
    """The row's own columns that ``names`` stand for."""
    if not columns:
        return names
    theirs = (columns.get(name, name) for name in names)
    return {name if name in row else name.partition(".")[0] for name in theirs}


def _values(row: Mapping[str, Any], columns: Mapping[str, str], names: Sequence[str]) -> dict[str, Any]:
    """What the row holds under each of ``names``, nulls left out."""
    if not columns:
        return {name: value for name, value in row.items() if value is not None and name in names}
    cells = {name: lookup(row, columns.get(name, name)) for name in names}
    return {name: value for name, value in cells.items() if value is not None}


def _content(values: Mapping[str, Any], row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not _OF_TWO.isdisjoint(values):
        return _content_of_two(values, row, columns)
    if values.keys() >= _IDS:
        ids = ids_without_prompt(*(_token_ids(name, values[name]) for name in ID_COLUMNS))
        return dict(zip(ID_COLUMNS, ids, strict=True))
    required: list[str] = ["chosen", "rejected"]
    if not _IDS.isdisjoint(values) and not any(n in values for n in required):
        required = list(ID_COLUMNS)
    if columns.get("prompt"):
        required.insert(0, "prompt")
    _require([name for name in required if name not in values], row, columns)
    content = _explicit(values, row, columns)
    for name in ("tools", "chat_template_kwargs"):
        if name in values:
            content[name] = _template_argument(name, values[name])
    return content


def _content_of_two(values: Mapping[str, Any], row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row with a prompt for each response: both as rows of their own, joined; with equal prompts a plain pair."""
    of_ids = all(name in values for name in (*TWO_PROMPT_IDS, *ID_COLUMNS[1:]))
    ids, names = ("_ids", TWO_PROMPT_IDS) if of_ids else ("", TWO_PROMPTS)
    if missing := [name for name in names if name not in values]:
        there = next(name for name in (*TWO_PROMPTS, *TWO_PROMPT_IDS) if name in values)
        raise DataError(
            f"'{there}' without '{missing[0]}': a row has a prompt for each response, chosen_prompt and "
            f"rejected_prompt, or one prompt for both (--columns {there}= hides the column)"
        )
    plain = {k: v for k, v in values.items() if k not in (*TWO_PROMPTS, *TWO_PROMPT_IDS)}
    one = f"prompt{ids}"
    for name in names:
        if one in values and values[one] != values[name]:
            raise DataError(
                f"'{one}' and '{name}' are two prompts of one response: the pair may have the prompt of '{one}' "
                f"(--columns {names[0]}=,{names[1]}= hides the others), or a prompt for each response (--columns "
                f"{one}=)"
            )
    if values[names[0]] == values[names[1]]:
        return _content({**plain, one: values[names[0]]}, row, {k: v for k, v in columns.items() if k != "prompt"})
    halves = []
    for side, name in zip(SIDES, names, strict=True):
        both = {f"{s}{ids}": values[f"{side}{ids}"] for s in SIDES if f"{side}{ids}" in values}
        halves.append(_content({**plain, one: values[name], **both}, row, columns))
    chosen, rejected = halves
    if type(chosen[one]) is not type(rejected[one]):
        raise DataError(f"one of '{names[0]}' and '{names[1]}' is text and the other a conversation: give both alike")
    aside = {k: v for k, v in chosen.items() if k not in (one, *(f"{s}{ids}" for s in SIDES))}
    prompts = dict(zip(names, (chosen[one], rejected[one]), strict=True))
    return {**prompts, f"chosen{ids}": chosen[f"chosen{ids}"], f"rejected{ids}": rejected[f"rejected{ids}"], **aside}


def _require_told(row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """A row that has a column for it and nothing in it does not say which response is preferred."""
    for name in ("scores", "chosen"):
        theirs = columns.get(name, name)
        if theirs in row and (name == "scores" or "rejected" not in row):
            raise DataError(
                f"'{theirs}' is null, so that the row does not say which response is preferred (--columns {name}= "
                "hides the column, and the first response is taken for the best)"
            )


def _preferences(values: Mapping[str, Any], count: int, pairing: Pairing | BestFirst) -> list[tuple[int, int]]:
    """(chosen, rejected) of the pairs among ``count`` candidates, rising; ``best-first`` pairs equal ones too."""
    chosen, scores = values.get("chosen"), values.get("scores")
    if pairing == "all-pairs" and (most := count * (count - 1) // 2) > MOST_PAIRS:
        raise DataError(
            f"{count} responses make {most} pairs; a row may make {MOST_PAIRS}: give fewer responses, or --candidates "
            "chosen-against-all"
        )
    if chosen is not None and scores is not None:
        raise DataError(
            "'chosen' and 'scores' both say which response is preferred: hide one with --columns chosen= or "
            "--columns scores="
        )
    numbers = range(count)
    if scores is not None:
        if not isinstance(scores, list) or len(scores) != count or not all(map(_is_number, scores)):
            raise DataError(
                f"'scores' is {kind(scores)}; expected a list of {count} finite numbers, one for each response "
                "(--columns scores= hides the column)"
            )
        if pairing == BEST_FIRST:
            best = next((i for i in numbers if scores[i] == max(scores)), 0)
            return [(best, j) for j in numbers if j != best]
        best = [i for i in numbers if scores[i] == max(scores)][:1] if pairing == "chosen-against-all" else numbers
        return [(i, j) for i in best for j in numbers if scores[i] > scores[j]]
    if pairing == BEST_FIRST:
        raise DataError(
            "a list of responses needs their 'scores', a number for each; say which column they are with "
            "--columns scores=NAME"
        )
    if chosen is not None:
        if type(chosen) is not int or not 0 <= chosen < max(count, 1):
            raise DataError(
                f"'chosen' is {kind(chosen)}; beside 'responses' it is the number of the preferred one, from 0 to "
                f"{max(count - 1, 0)} (--columns chosen= hides the column)"
            )
        if pairing == "all-pairs":
            raise DataError(
                "--candidates all-pairs needs an order of all responses, and 'chosen' names one: give 'scores', or "
                "list the responses best first and hide the column with --columns chosen="
            )
        return [(chosen, j) for j in numbers if j != chosen]
    return [(i, j) for i in (numbers if pairing == "all-pairs" else numbers[:1]) for j in range(i + 1, count)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max  # math.isfinite fails at 4,000 digits


def _are_ids(responses: Sequence[Any], values: Mapping[str, Any]) -> bool:
    """Whether the responses are token ids: lists without messages, one of them not empty or after ``prompt_ids``."""
    plain = all(isinstance(r, list) and not any(isinstance(part, Mapping) for part in r) for r in responses)
    return plain and ("prompt_ids" in values or any(responses))


def canonical_prompt(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Brings a prompt of any accepted shape to ``prompt`` (text or messages) or ``prompt_ids``.

    Args:
      row: the row as read; of a preference pair the prompt is taken.
      columns: as for ``canonical_content``.

    Raises:
      DataError: there is no prompt, or it is something else than text, messages or token ids.
    """
    values = _values(row, columns, PROMPT_COLUMNS)
    if "prompt_ids" in values:
        return {"prompt_ids": _token_ids("prompt_ids", values["prompt_ids"])}
    if (asked := _prompt_of_pair(row, columns)) is not None:
        content = {"prompt": asked}
    elif "prompt" not in values and any(row.get(name) is not None for name in TWO_PROMPTS):
        raise DataError(
            f"the row has two prompts, {' and '.join(TWO_PROMPTS)}, and one is needed; say which with --columns "
            f"prompt={TWO_PROMPTS[0]}"
        )
    elif "prompt" in values:
        content = {"prompt": _text_or_messages("prompt", values["prompt"])}
    elif not columns.get("prompt") and row.get("chosen") is not None and row.get("rejected") is not None:
        content = {"prompt": canonical_content(row, {})["prompt"]}
    else:
        name = columns.get("prompt") or "prompt"
        raise DataError(
            f"no column '{name}'{' (it is null here)' if name in row else ''}; found: "
            f"{', '.join(map(str, row)) or 'none'}; say which column holds the prompt with --columns prompt=NAME"
        )
    for name in ("tools", "chat_template_kwargs"):
        if name in values:
            content[name] = _template_argument(name, values[name])
    return content


def _prompt_of_pair(row: Mapping[str, Any], columns: Mapping[str, str]) -> str | list[Message] | None:
    """The prompt that scoring puts before the responses of a pair with a ``prompt``; None: the row is no such pair."""
    if any(row.get(name) is None for name in (columns.get("prompt", "prompt"), "chosen", "rejected")):
        return None
    try:
        return (
            canonical_content(row, {"prompt": columns["prompt"]} if "prompt" in columns else {}).get("prompt") or None
        )
    except DataError:
        return None  # chosen and rejected are something else there


def _explicit(values: Mapping[str, Any], row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    chosen = _text_or_messages("chosen", values["chosen"])
    rejected = _text_or_messages("rejected", values["rejected"])
    prompt = values.get("prompt")
    if prompt is not None:
        prompt = _text_or_messages("prompt", prompt)
    parts: Sequence[Any] | None
    if isinstance(chosen, list) and isinstance(rejected, list):
        require_answer("chosen", chosen)
        require_answer("rejected", rejected)
        parts = split_conversations(prompt, chosen, rejected)
    elif isinstance(chosen, str) and isinstance(rejected, str):
        if isinstance(prompt, list):
            parts = split_conversations(prompt, as_messages("chosen", chosen), as_messages("rejected", rejected))
        elif prompt is None:
            parts = _split_dialogue(chosen, rejected)
            _require([] if parts else ["prompt"], row, columns)
        else:
            parts = without_prompt(prompt, chosen, rejected)
    else:
        raise DataError("one of 'chosen' and 'rejected' is text and the other a conversation: give both alike")
    return dict(zip(TEXT_COLUMNS, parts or (), strict=True))


def _split_dialogue(chosen: str, rejected: str) -> tuple[str, str, str] | None:
    r"""Cuts two whole "Human: / Assistant:" texts after their last common "Assistant:", behind an empty line if any is.

    >>> _split_dialogue("Human: 1+1?\r\n\r\nAssistant: 2", "Human: 1+1?\r\n\r\nAssistant: 3")[1:]
    (' 2', ' 3')
    """
    pairs = zip(chosen, rejected, strict=False)
    shorter = min(len(chosen), len(rejected))
    common = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    for mark in _ASSISTANTS[: 1 + chosen.lstrip().startswith("Human:")]:
        if marks := list(mark.finditer(chosen, 0, common)):
            cut = marks[-1].end()
            return chosen[:cut], chosen[cut:], rejected[cut:]
    if all(text.lstrip().startswith("Human:") for text in (chosen, rejected)):
        return "", chosen, rejected  # audited as an empty prompt
    return None


def _require(missing: Sequence[str], row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    if not missing:
        return
    if "rejected" in missing and {"completion", "label"} <= row.keys():
        raise DataError(
            "one response with a label (an unpaired row): a pair needs a chosen and a rejected response; "
            "ches train --loss kto reads rows like this, and ches doctor --pairs FILE without a model examines them"
        )
    named = [f"'{columns.get(n) or n}'" for n in missing]
    null = [n for n in missing if (columns.get(n) or n) in row]
    remedy = " ".join(f"{n}=NAME" for n in missing)
    raise DataError(
        f"no column {' or '.join(named)}{' (it is null here)' if null else ''}; "
        f"found: {', '.join(map(str, row)) or 'none'}; expected prompt, chosen, rejected or "
        f"{', '.join(ID_COLUMNS)} or prompt, responses; say which column is which with --columns {remedy}"
    )


def _text_or_messages(name: str, value: Any) -> str | list[Message]:
    return value if isinstance(value, str) else as_messages(name, value)


def _token_ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(i) is int and i >= 0 for i in value):
        raise DataError(f"'{name}' is {kind(value)}; expected a list of token ids (integers from 0)")
    if max(value, default=0) > LARGEST_ID:
        raise DataError(f"'{name}' holds the token id {str(max(value))[:40]}; ids are at most {LARGEST_ID} (32 bits)")
    return value


def _template_argument(name: str, value: Any) -> Any:
    """Of ``tools`` or ``chat_template_kwargs``. What is written as JSON text keeps its nulls: somebody wrote them."""
    wanted, expected = (list, "a list") if name == "tools" else (Mapping, "an object")
    if as_text := isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"'{name}' is text that is not JSON; expected {expected}") from None
    if not isinstance(value, wanted):
        raise DataError(f"'{name}' is {kind(value)}; expected {expected}")
    if not within_depth(value):
        raise DataError(f"'{name}' is nested more than {DEEPEST} deep; expected {expected}")
    plain = value if as_text else without_nulls(value)
    if name != "tools":
        return plain
    tools = [decoded(tool) for tool in plain]
    if none := [tool for tool in tools if not isinstance(tool, Mapping)]:
        raise DataError(f"'tools' lists {kind(none[0])}; expected objects, or their JSON text")
    return tools
