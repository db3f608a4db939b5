"""Groups: the responses that a policy gave to one prompt, with their rewards or advantages, as RL trainers write them.

    written by                     columns
    verl (rollout_data_dir)        input, output, score, step
    TRL (GRPO's completions)       step, prompt, completion, advantage, a column for each reward function
    OpenRLHF (batch_inference)     input, output, reward
    NeMo RL (train_data_step)      content: [prompt, response], rewards
    one row for a group            prompt, responses, rewards or advantages
    token ids                      prompt_ids, response_ids in the place of the texts

A row of one response joins the group of its prompt, or of its ``uid`` where it has one, within its ``step``. Text is
tokenised again, which need not give the tokens that were sampled; ids are taken as they are.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ches_jax.data.messages import kind
from ches_jax.data.nested import decoded
from ches_jax.data.packing import Candidates
from ches_jax.data.prompts import Numbers, canonical_content, lookup
from ches_jax.data.schema.values import are_turns, number, turns
from ches_jax.data.sources import Kind, Record, row_id
from ches_jax.errors import DataError
from ches_jax.types import Response, TokenPair, common_prefix

NAMES: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "input"),
    "prompt_ids": ("prompt_ids", "prompt_token_ids"),
    "response": ("response", "output", "completion"),
    "response_ids": ("response_ids", "completion_ids", "output_ids"),
    "responses": ("responses", "outputs", "completions"),
    "reward": ("reward", "score", "total_reward"),
    "rewards": ("rewards", "scores"),
    "advantage": ("advantage",),
    "advantages": ("advantages",),
    "group": ("group", "uid", "group_id", "prompt_id"),
    "step": ("step",),
    "content": ("content",),
}
"""Column -> the names under which trainers write it."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """One response, with what its trainer made of it."""

    record: Record
    """Its prompt and response, as a pair of the response with itself: what ``tokenize`` reads."""
    reward: float | None
    advantage: float | None


@dataclass(frozen=True, slots=True)
class Group:
    """The responses to one prompt."""

    where: str
    """For messages: its first row."""
    index: int
    """Position of that row in the source."""
    rollouts: tuple[Rollout, ...]

    def numbers(self, name: str) -> np.ndarray | None:
        """[N] ``reward`` or ``advantage`` of its responses; None where one has none."""
        values = [getattr(r, name) for r in self.rollouts]
        return None if None in values else np.array(values, np.float64)


def read_groups(records: Iterable[Record]) -> list[Group]:
    """Rows of ``ROLLOUTS`` as groups, in the order of their first rows.

    Raises:
      DataError: a row that cannot be read.
    """
    members: dict[str, list[tuple[Record, list[Rollout]]]] = {}
    for record in records:
        if record.fault:
            raise DataError(f"{record.where}: {record.fault}")
        members.setdefault(record.content["key"], []).append((record, _rollouts(record)))
    return [
        Group(some[0][0].where, some[0][0].index, tuple(one for _, rollouts in some for one in rollouts))
        for some in members.values()
    ]


def require_known(groups: Sequence[Group], source: str) -> str:
    """Whether all groups have ``advantage`` or else ``reward``: what is known of every response.

    Raises:
      DataError: neither; names the first group and the columns that would do.
    """
    missing = {}
    for name in ("advantage", "reward"):
        without = [g for g in groups if g.numbers(name) is None]
        if not without:
            return name
        missing[name] = without
    group = missing["reward"][0]
    raise DataError(
        f"{source}, {group.where}: a response without a reward and without an advantage, so that it is not known which "
        f"responses won; expected a column {', '.join(NAMES['reward'] + NAMES['advantage'])} (of a row with several "
        f"responses {', '.join(NAMES['rewards'] + NAMES['advantages'])}), or its name: --columns reward=NAME"
    )


def _rollouts(record: Record) -> list[Rollout]:
    content = record.content
    columns = [content[n] or [None] * len(content["texts"]) for n in ("rewards", "advantages")]
    return [
        Rollout(
            Record(record.index, row_id(text), record.where, text, record.category, record.extra), reward, advantage
        )
        for text, reward, advantage in zip(content["texts"], *columns, strict=True)
    ]


def _contents(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[tuple[Numbers, dict[str, Any]]]:
    """A row as ``key`` (of its group), ``texts`` (each a pair of a response with itself), ``rewards, advantages``."""
    found = {name: _cell(row, columns, name) for name in NAMES}
    _unfold(found, row)
    responses, many = _responses(found)
    if responses is None:
        raise _missing("response", row)
    ids = bool(responses) and isinstance(responses[0], list) and all(type(t) is int for t in responses[0])
    side = "_ids" if ids else ""
    prompt = turns(found[f"prompt{side}"])
    if prompt is None:
        raise _missing("prompt", row)
    numbers = {n: _numbers(found, n, len(responses), many) for n in ("reward", "advantage")}
    aside = {n: row[n] for n in ("tools", "chat_template_kwargs") if row.get(n) is not None}
    texts = [
        canonical_content({f"prompt{side}": prompt, f"chosen{side}": r, f"rejected{side}": r, **aside}, {})
        for r in responses
    ]
    key = row_id({"step": found["step"], "group": prompt if found["group"] is None else found["group"]})
    return [(None, {"key": key, "texts": texts, "rewards": numbers["reward"], "advantages": numbers["advantage"]})]


def _cell(row: Mapping[str, Any], columns: Mapping[str, str], name: str) -> Any:
    """The value of a column under any of its names.

    Raises:
      DataError: two of them are there and differ; a name that was given and is not there.
    """
    if name in columns:
        value = lookup(row, columns[name])
        if value is None and columns[name].partition(".")[0] not in row:
            raise DataError(f"no column {columns[name]!r}; found: {', '.join(map(str, row)) or 'none'}")
        return value
    there = [n for n in NAMES[name] if row.get(n) is not None]
    different = [n for n in there[1:] if row[n] != row[there[0]]]
    if different:
        raise DataError(
            f"{name} may be column {there[0]!r} or column {different[0]!r}: choose with --columns {name}={there[0]} or "
            f"--columns {name}={different[0]}"
        )
    return row[there[0]] if there else None


def _unfold(found: dict[str, Any], row: Mapping[str, Any]) -> None:
    """Reads NeMo RL's columns: a list of the texts of a conversation, numbers in lists of one."""
    for singular, plural in (("reward", "rewards"), ("advantage", "advantages")):
        values = found[plural]
        if not isinstance(values, list | type(None)):  # a column of another number, under the plural name
            found[singular], found[plural] = (values if found[singular] is None else found[singular]), None
    content = found.pop("content")
    if found["prompt"] is not None or found["prompt_ids"] is not None or content is None:
        return
    parts = decoded(content)
    while isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], list):
        parts = parts[0]
    if not isinstance(parts, list) or not all(isinstance(p, str) for p in parts):
        raise DataError(f"'content' is {kind(content)}; expected the texts of prompt and response")
    if len(parts) != 2:
        raise DataError(
            f"'content' has {len(parts)} turns; expected two, prompt and response: of more it is not known which are "
            "the policy's. Write the rows with prompt and response"
        )
    found["prompt"], found["response"] = parts
    for name in ("reward", "advantage"):
        if isinstance(found[f"{name}s"], list) and len(found[f"{name}s"]) == 1:
            found[name], found[f"{name}s"] = found[f"{name}s"][0], None


def _responses(found: Mapping[str, Any]) -> tuple[list[Any] | None, bool]:
    """The responses of a row, and whether they are a list of several. Ids win over the text beside them."""
    ids = found["response_ids"] if found["prompt_ids"] is not None else None
    one, several = found["response"] if ids is None else ids, turns(decoded(found["responses"]))
    if one is not None and several is not None:
        raise DataError("'response' and 'responses' are both there: hide one with --columns responses= or response=")
    if one is not None:
        return [turns(one)], False
    if several is not None and (not isinstance(several, list) or are_turns(several)):
        raise DataError(f"'responses' is {kind(several)}; expected a list of responses")
    return several, True


def _numbers(found: Mapping[str, Any], name: str, count: int, many: bool) -> list[float] | None:
    value = found[f"{name}s"] if many else found[name]
    other = found[name] if many else found[f"{name}s"]
    if value is None and other is not None:
        raise DataError(
            f"'{name if many else name + 's'}' is {kind(other)}; expected "
            + (f"a list of {count} numbers, one for each response" if many else f"one number, in column '{name}'")
        )
    if value is None:
        return None
    values = decoded(value) if many else [value]
    if not isinstance(values, list) or len(values) != count:
        raise DataError(f"'{name}s' is {kind(value)}; expected {count} numbers, one for each response")
    return [number(name, v) for v in values]


def _missing(name: str, row: Mapping[str, Any]) -> DataError:
    names = NAMES[name] + (NAMES[f"{name}_ids"]) + (NAMES["responses"] if name == "response" else ())
    return DataError(
        f"no {name}; found: {', '.join(map(str, row)) or 'none'}; expected one of {', '.join(names)}, or its name: "
        f"--columns {name}=NAME"
    )


ROLLOUTS = Kind("rollouts", (*NAMES, "tools", "chat_template_kwargs", "category"), _contents)


def group_item(pairs: Sequence[TokenPair]) -> Candidates:
    """The item of a group, from its responses as ``tokenize`` read each with itself.

    Tokens may merge across the prompt's end in some of them: the prompt then ends where it does in all.

    >>> Pair = lambda prompt, *ids: TokenPair(
    ...     row_id="", index=0, prompt=prompt, chosen=Response(ids, 9), rejected=Response(ids, 9))
    >>> group_item([Pair((1, 2), 5), Pair((1,), 3, 5)]).responses[0].content
    (2, 5)
    """
    first = pairs[0].prompt
    cut = min(common_prefix(first, p.prompt) for p in pairs)
    responses = tuple(Response((*p.prompt[cut:], *p.chosen.content), p.chosen.terminator) for p in pairs)
    return Candidates(first[:cut], responses, len(pairs))
