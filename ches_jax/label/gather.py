"""``ches gather``: pairs and generated texts into the rows that an objective or the next command reads."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeGuard

from ches_jax.data.sources import Record, row_id
from ches_jax.data.two_prompts import has_two_prompts
from ches_jax.errors import ChesError, DataError
from ches_jax.inputs import Opener
from ches_jax.label.config import GatherConfig
from ches_jax.label.run import rows_of
from ches_jax.notices import notice
from ches_jax.runs.files import new_directory
from ches_jax.runs.json_text import json_bytes, json_value

PAIRS = "pairs.jsonl"
SUMMARY = "gather.json"
REWARDS = ("chosen_reward", "rejected_reward")
PAIR = "pair"
"""Of a row that sets a pair's chosen response against a text: the pair's id."""
NEEDS = {
    "pairs": (),
    "samples": ("responses",),
    "contests": ("responses",),
    "against": ("responses",),
    "filtered": ("rewards",),
    "goals": (),
}

Row = dict[str, Any]


def gather(config: GatherConfig) -> dict[str, Any]:
    """Write ``config.out``; returns what ``gather.json`` holds.

    Raises:
      ChesError: options or input that are not fit.
    """
    if not config.out:
        raise ChesError("--out must be given: the directory to write")
    for option in NEEDS[config.make]:
        if getattr(config, option) is None:
            raise ChesError(f"--make {config.make} needs --{option}")
    _require_goal(config.goal)
    opener = Opener()
    rows = rows_of(config, opener)
    made = list(MAKE[config.make](config, opener, rows))
    if not made:
        why = " (the rewards of each one's responses are written alike)" if config.make == "goals" else ""
        raise ChesError(f"--make {config.make}: none of {len(rows)} pairs makes a row{why}")
    opener.require_unchanged()
    counts = {"pairs": len(rows), "rows": len(made)}
    record = json_value({"verb": "gather", "config": asdict(config), "counts": counts, **opener.identity()})
    with new_directory(Path(config.out), ChesError) as folder:
        (folder / PAIRS).write_bytes(b"".join(map(json_bytes, made)))
        (folder / SUMMARY).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def _require_goal(goal: str) -> None:
    """Refuse a goal in which no reward can be written.

    Raises:
      ChesError: another place than {reward}, or a format that is none.
    """
    try:
        differs = goal.format(reward=1.0) != goal.format(reward=2.0)
    except (LookupError, ValueError, AttributeError, TypeError) as error:
        raise ChesError(f"--goal {goal!r}: expected {{reward}} or {{reward:.2f}} in it ({error})") from None
    if not differs:
        raise ChesError(f"--goal {goal!r}: expected {{reward}} in it, where the reward stands")


def texts_of(spec: str, opener: Opener) -> dict[str, list[str]]:
    """Generated texts by the id of their prompt, in the order of the samples; says how many were cut."""
    path = Path(spec)
    found: dict[str, dict[int, str]] = {}
    cut = count = 0
    for where, row in opener.labels(str(path / "responses.jsonl" if path.is_dir() else path), "responses"):
        if not isinstance(row.get("text"), str) or "row_id" not in row:
            raise DataError(f"--responses {spec}, {where}: expected row_id, sample and text, as `ches generate` writes")
        sample, of_prompt = row.get("sample") or 0, found.setdefault(str(row["row_id"]), {})
        if isinstance(sample, str) and sample.isdecimal():
            sample = int(sample)  # from a CSV table
        if not isinstance(sample, int):
            raise DataError(f"--responses {spec}, {where}: sample is {sample!r:.40}; expected a number from 0")
        if of_prompt.setdefault(sample, row["text"]) != row["text"]:
            raise DataError(
                f"--responses {spec}, {where}: another text of the same prompt and sample {sample} stands before it; "
                "of two runs of `ches generate` gather the texts one after the other, or number their samples on"
            )
        count, cut = count + 1, cut + (row.get("finish_reason") == "length")
    if cut:
        notice(
            f"--responses {spec}: {cut} of {count} texts were cut at their largest number of tokens, and as responses "
            "they are trained to end there; ches generate --max-new-tokens N allows longer ones"
        )
    return {key: [texts[k] for k in sorted(texts)] for key, texts in found.items()}


def prompt_id(record: Record) -> str:
    """The id that ``ches generate`` gives a pair's prompt."""
    content = record.content
    names = ("prompt_ids",) if "prompt_ids" in content else ("prompt", "tools", "chat_template_kwargs")
    return row_id({name: content[name] for name in names if name in content})


def _with_texts(config: GatherConfig, opener: Opener, rows: list[Record]) -> Iterator[tuple[Record, list[str]]]:
    """Pairs with the texts of their prompts; a prompt that several pairs have comes once for each.

    Raises:
      DataError: none of the prompts was generated for.
    """
    texts = texts_of(str(config.responses), opener)
    found = [(row, texts[prompt_id(row)]) for row in rows if prompt_id(row) in texts]
    if not found:
        raise DataError(
            f"--responses {config.responses}: its texts are of other prompts than those of {config.pairs}; generate "
            f"with --prompts {config.pairs}"
        )
    yield from found


def _pairs(config: GatherConfig, opener: Opener, rows: list[Record]) -> Iterator[Row]:
    for row in rows:
        category = {} if row.category is None else {"category": row.category}
        yield {**row.extra, **row.content, **category}


def _samples(config: GatherConfig, opener: Opener, rows: list[Record]) -> Iterator[Row]:
    for row, texts in _with_texts(config, opener, rows):
        yield {"prompt": _prompt(config, row), "rejected": row.content["rejected"], "responses": texts}


def _contests(config: GatherConfig, opener: Opener, rows: list[Record]) -> Iterator[Row]:
    seen = set()
    for row, texts in _with_texts(config, opener, rows):
        different = [t for t in dict.fromkeys(texts) if t.strip()]
        if len(different) > 1 and prompt_id(row) not in seen:
            seen.add(prompt_id(row))
            yield {"prompt": _prompt(config, row), "chosen": different[0], "rejected": different[1]}


def _against(config: GatherConfig, opener: Opener, rows: list[Record]) -> Iterator[Row]:
    for row, texts in _with_texts(config, opener, rows):
        chosen = row.content["chosen"]
        for text in dict.fromkeys(texts):
            if text.strip() and text != chosen:
                yield {"prompt": _prompt(config, row), "chosen": chosen, "rejected": text, PAIR: row.row_id}


def _filtered(config: GatherConfig, opener: Opener, rows: list[Record]) -> Iterator[Row]:
    found = list(opener.labels(str(config.rewards), "rewards"))
    if all(PAIR in values for _, values in found):
        yield from _unbeaten(config, found, rows)
        return
    rewards: dict[str, float] = {}
    for where, values in found:
        reward = values.get(config.reward_column)
        if not _is_reward(reward):
            raise DataError(
                f"--rewards {config.rewards}, {where}: {config.reward_column!r} is {reward!r}; expected a number, or "
                "true or false; name another column with --reward-column"
            )
        key = str(values.get("row_id"))
        rewards[key] = max(rewards.get(key, -float("inf")), float(reward))
    for row in rows:
        own = _rewards(config, row)[0]
        known = rewards.get(prompt_id(row))
        if known is None:
            raise DataError(f"--rewards {config.rewards}: has no reward for a text of {row.where}'s prompt")
        if own >= known:
            yield {**row.extra, **row.content}


def _unbeaten(config: GatherConfig, found: list[tuple[str, Mapping[str, Any]]], rows: list[Record]) -> Iterator[Row]:
    """The pairs whose chosen response no text has a higher reward than, by the labels of ``--make against``."""
    known = {row.row_id for row in rows}
    beaten = set()
    for where, values in found:
        sides = [values.get(name) for name in REWARDS]
        if values[PAIR] not in known or not all(map(_is_reward, sides)):
            raise DataError(
                f"--rewards {config.rewards}, {where}: expected the id of one of the pairs in {PAIR!r} and numbers in "
                f"{' and '.join(REWARDS)}: what `ches label` makes of `ches gather --make against` of the same --pairs"
            )
        if sides[1] > sides[0]:  # type: ignore[operator]
            beaten.add(values[PAIR])
    for row in rows:
        if row.row_id not in beaten:
            yield {**row.extra, **row.content}


def _goals(config: GatherConfig, opener: Opener, rows: list[Record]) -> Iterator[Row]:
    for row in rows:
        chosen, rejected = _rewards(config, row)
        prompt = _prompt(config, row)
        sides = row.content["chosen"], row.content["rejected"]
        if not isinstance(prompt, str):
            raise DataError(f"{config.pairs}, {row.where}: --make goals writes before prompts that are texts")
        goals = [config.goal.format(reward=reward) for reward in (chosen, rejected)]
        if goals[0] == goals[1]:  # the two rows would contradict each other
            continue
        for goal, (good, bad) in zip(goals, (sides, sides[::-1]), strict=True):
            yield {"prompt": goal + prompt, "chosen": good, "rejected": bad}


def _is_reward(value: Any) -> TypeGuard[float]:
    """Whether rewards can be compared with it: a comparison with NaN is false, whatever is asked."""
    return isinstance(value, int | float) and math.isfinite(value)


def _prompt(config: GatherConfig, row: Record) -> Any:
    """The prompt of a pair, text or messages.

    Raises:
      DataError: the row has two, or is token ids.
    """
    if "prompt" not in row.content:
        what = "two prompts" if has_two_prompts(row.content) else "token ids"
        raise DataError(
            f"{config.pairs}, {row.where}: --make {config.make} reads one prompt for both responses, text or messages; "
            f"this row has {what}"
        )
    return row.content["prompt"]


def _rewards(config: GatherConfig, row: Record) -> tuple[float, float]:
    values: Mapping[str, Any] = row.extra
    found = [values.get(name) for name in REWARDS]
    if not all(map(_is_reward, found)):
        raise DataError(
            f"{config.pairs}, {row.where}: --make {config.make} needs numbers in {' and '.join(REWARDS)}; "
            "`ches label` writes them"
        )
    return float(found[0]), float(found[1])  # type: ignore[arg-type]


MAKE = {
    "pairs": _pairs,
    "samples": _samples,
    "contests": _contests,
    "against": _against,
    "filtered": _filtered,
    "goals": _goals,
}
