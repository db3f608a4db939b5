"""``ches recipe FILE``: commands in a row, each with what the ones before it made; continues where it was stopped.

A recipe is TOML. ``{stage/path}`` in a value is what another stage made: of this round if it has run, else of the round
before; ``[first]`` says what stands there where neither is. ``{{`` and ``}}`` are single braces.

    rounds = 2
    [first]
    "train/model" = "bundled"
    [[stage]]
    name = "samples"
    verb = "generate"
    options = { model = "{train/model}", prompts = "bundled", samples = 4, limit = 32 }
    [[stage]]
    name = "train"
    verb = "train"
    options = { pairs = "{rows/pairs.jsonl}", loss = "dpo + 0.2*sft", steps = 8 }

Each stage writes OUT/ROUND-NAME. ``recipe.json`` says which are done; a stage whose command is another one now is
refused, and nothing is made twice.
"""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ches_jax.errors import ChesError, did_you_mean
from ches_jax.runs.directory import write_json
from ches_jax.runs.files import read_object, read_text
from ches_jax.runs.shapes import require_shape

RECORD = "recipe.json"
PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
MOST_ROUNDS = 100
DONE = {"done": {str: {"words": [str], "headline": str}}}
"""The shape of what is read of ``recipe.json``."""


@dataclass(frozen=True)
class Stage:
    """A command of a recipe."""

    name: str
    verb: str
    options: Mapping[str, Any]
    path: str | None = None
    """What a verb takes without a name: the run of ``diagnose`` or ``report``."""


@dataclass(frozen=True)
class Recipe:
    """What a file says."""

    stages: tuple[Stage, ...]
    rounds: int = 1
    first: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A stage of a round, its command complete."""

    key: str
    """Its directory below the recipe's."""
    verb: str
    words: tuple[str, ...]


def read_recipe(path: Path, verbs: Sequence[str]) -> Recipe:
    """A recipe file, checked.

    Raises:
      ChesError: no such file, no TOML, a stage without name or verb, an unknown verb, two stages of one name.
    """
    try:
        values = tomllib.loads(read_text(path, ChesError, "a recipe in TOML"))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ChesError(f"{path}: is no TOML ({error})") from None
    if unknown := values.keys() - {"stage", "rounds", "first"}:
        raise ChesError(f"{path}: {', '.join(sorted(unknown))}: a recipe has rounds, [first] and [[stage]]")
    rounds, first, listed = values.get("rounds", 1), values.get("first", {}), values.get("stage", [])
    if type(rounds) is not int or not 1 <= rounds <= MOST_ROUNDS:
        raise ChesError(f"{path}: rounds = {rounds!r}; expected a whole number from 1 to {MOST_ROUNDS}")
    if not isinstance(listed, list) or not listed:
        raise ChesError(f"{path}: no [[stage]]; a recipe is a list of them, each with name, verb and options")
    stages = []
    for number, one in enumerate(listed, 1):
        subject = f"{path}, stage {number}"
        if (
            not isinstance(one, dict)
            or one.keys() - {"name", "verb", "options", "path"}
            or not {"name", "verb"} <= one.keys()
        ):
            raise ChesError(f"{subject}: expected name, verb and options (and path, for a verb that takes one)")
        name, verb, options = one["name"], one["verb"], one.get("options", {})
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ChesError(f"{subject}: name = {name!r}; expected letters, digits, - and _")
        if verb not in verbs:
            raise ChesError(f"{subject} ({name}): no verb {verb!r}{did_you_mean(str(verb), verbs)}")
        if not isinstance(options, dict) or "out" in options:
            raise ChesError(
                f"{subject} ({name}): options is a table, without out: each stage has a directory of its own"
            )
        if name in {stage.name for stage in stages}:
            raise ChesError(f"{subject}: a second stage is named {name!r}")
        stages.append(Stage(name, verb, options, one.get("path")))
    recipe = Recipe(tuple(stages), rounds, {str(k): str(v) for k, v in dict(first).items()})
    steps_of(recipe, Path("."))
    return recipe


def steps_of(recipe: Recipe, out: Path) -> list[Step]:
    """Every command of a recipe, in order.

    Raises:
      ChesError: a value that refers to no stage, or to one that has not run yet.
    """
    names = [stage.name for stage in recipe.stages]
    made: dict[str, Path] = {}
    steps = []
    for number in range(1, recipe.rounds + 1):
        for stage in recipe.stages:
            key = f"{number}-{stage.name}"

            def place(match: re.Match[str], stage: Stage = stage) -> str:
                if match[1] is None:
                    return match[0][0]
                name, _, rest = match[1].partition("/")
                if name in made:
                    return str(made[name] / rest) if rest else str(made[name])
                if match[1] in recipe.first:
                    return recipe.first[match[1]]
                if name not in names:
                    raise ChesError(f"stage {stage.name}: {match[0]} is no stage{did_you_mean(name, names)}")
                raise ChesError(
                    f"stage {stage.name}: {match[0]} has not run yet in the first round; say what stands there: "
                    f'[first] "{match[1]}" = ...'
                )

            words = [PLACE.sub(place, str(stage.path))] if stage.path is not None else []
            for option, value in stage.options.items():
                words += _words(option, value, lambda text, place=place: PLACE.sub(place, text))
            made[stage.name] = out / key
            steps.append(Step(key, stage.verb, (*words, "--out", str(out / key))))
    return steps


def _done(path: Path) -> dict[str, Any]:
    """The stages that ``recipe.json`` says are done."""
    record = require_shape(path, read_object(path, ChesError, "a recipe's directory"), DONE, ChesError)
    return record["done"]


def _words(option: str, value: Any, filled: Callable[[str], str]) -> list[str]:
    """An option of a recipe as words of a command line."""
    flag = "--" + option.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, dict):
        return [flag, *(f"{k}={filled(str(v))}" for k, v in value.items())]
    if isinstance(value, list):
        return [flag, *(filled(str(v)) for v in value)]
    return [flag, filled(str(value))]


def run_recipe(
    path: Path,
    out: Path,
    command: Callable[[str, list[str]], Any],
    verbs: Sequence[str],
    *,
    resume: bool,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Run what is not done yet.

    Args:
      path: the recipe.
      out: the directory of all its stages.
      command: runs a verb with words; returns an ``Outcome``.
      verbs: that a stage may name.
      resume: continue what ``out`` holds.
      say: where the stages are announced.

    Raises:
      ChesError: a recipe that is none, a directory that holds another one, or what a stage refuses.
    """
    steps = steps_of(read_recipe(path, verbs), out)
    there = _done(out / RECORD) if (out / RECORD).exists() else {}
    if out.exists() and any(out.iterdir()) and not resume:
        raise ChesError(f"{out}: is not empty; add --resume to continue it, or give a new --out")
    for step in steps:
        if step.key in there and there[step.key]["words"] != [step.verb, *step.words]:
            raise ChesError(
                f"{out / step.key}: was made by another command (ches {' '.join(there[step.key]['words'])}); the "
                f"recipe now says ches {step.verb} {' '.join(step.words)}; give a new --out"
            )
    done: dict[str, Any] = {}
    out.mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        words = [step.verb, *step.words]
        if step.key in there:
            done[step.key] = there[step.key]
            continue
        say(f"stage {number} of {len(steps)}, {step.key}: ches {' '.join(words)}")
        outcome = command(step.verb, list(step.words))
        if outcome.code:
            raise ChesError(f"stage {step.key}: {outcome.headline} (exit code {outcome.code})")
        done[step.key] = {"words": words, "headline": outcome.headline}
        write_json(out / RECORD, {"verb": "recipe", "recipe": str(path), "stages": len(steps), "done": done})
    return read_object(out / RECORD, ChesError, "a recipe's directory")
