"""Help: of the command, and of a verb with its options in titled groups and a few commands to copy."""

import inspect
import os
import shutil
import sys
import textwrap
from typing import Any

from ches_jax.cli.options import ORDER, Option, help_texts, options_of

DESCRIPTION = "Likelihood displacement in preference optimisation: score, select, train, diagnose, verify."
EXAMPLES = {
    "score": (
        "ches score",
        "ches score --model meta-llama/Llama-3.2-1B --pairs pairs.jsonl --out runs/llama",
        "ches score --pairs pairs.jsonl --logps --dtype bfloat16 --json --quiet",
    ),
    "plan": (
        "ches plan score --model config.json --topology v5e:4x4",
        "ches plan train --model my-model --topology v6e:16x16 --slices 2 --lora-rank 16 --json",
    ),
    "doctor": (
        "ches doctor",
        "ches doctor --model my-model --pairs pairs.jsonl --show 5",
        "ches doctor --pairs train.jsonl --against test.jsonl --json",
    ),
    "select": (
        "ches select --scores runs/influence-001 --keep lowest:0.75 --out kept",
        "ches select --scores runs/influence-001 --keep lowest:0.75 --control length --out control",
        "ches select --scores runs/score-001 --by 'column:abs(chosen_score - rejected_score)' --keep highest:50% "
        "--dedup near --out clear",
    ),
    "generate": (
        "ches generate --limit 8 --max-new-tokens 32",
        "ches generate --model runs/train-001/model --prompts prompts.jsonl --temperature 0",
    ),
    "judge": (
        "ches judge --responses runs/generate-001",
        "ches judge --responses runs/generate-001 --by model --judge my-judge",
    ),
    "label": (
        "ches label --model runs/train-001/model --reference bundled --out labelled",
        "ches label --by file --labels labels.jsonl --pairs pairs.jsonl --out labelled",
        "ches label --by density-ratio --pairs feedback.jsonl --out weighed",
    ),
    "gather": (
        "ches gather --pairs pairs.jsonl --make samples --responses runs/generate-001 --out rows",
        "ches gather --pairs labelled/pairs.jsonl --make goals --out goals",
    ),
    "recipe": (
        "ches recipe examples/recipes/d2o.toml --out runs/d2o",
        "ches recipe examples/recipes/d2o.toml --out runs/d2o --resume",
    ),
    "train": (
        "ches train --loss 'wpo(dpo(beta=0.1)) + 0.2*sft' --steps 20",
        "ches train --model my-model --pairs pairs.jsonl --loss dpo --loss-args beta=0.1 --holdout 200 --out runs/dpo",
        "ches train --lora-rank 16 --optimizer adamw --lr 1e-4 --schedule cosine",
    ),
    "forecast": (
        "ches forecast --holdout 64 --lr 1e-5 --steps 16",
        "ches forecast --model my-sft-model --pairs pairs.jsonl --probes held.jsonl --lr 3e-5 --steps 16 --pilot 4",
    ),
    "influence": (
        "ches influence --model my-sft-model --pairs pairs.jsonl --probes held.jsonl --lr 3e-5 --out runs/influence",
        "ches influence --holdout 64 --loss ipo_sum --optimizer adamw",
    ),
    "groups": (
        "ches groups --model my-policy --groups rollouts/100.jsonl --objective grpo --out runs/groups",
        "ches groups --model my-policy --groups 'completions_*.parquet' --columns group=uid --lr 1e-6",
    ),
    "diagnose": (
        "ches diagnose trl-output",
        "ches diagnose --before my-model --after trained --pairs held-out.jsonl --out diagnosis",
        "ches diagnose runs/train-001 --fail-if 'lld_rate>0.2'",
    ),
    "report": ("ches report runs/score-001", "ches report runs/score-001 --out page"),
    "show": ("ches show runs/score-001 96", "ches show runs/train-001 held_out-96"),
    "merge": ("ches merge runs/score-001", "ches merge runs/score-001 --json"),
    "verify": (
        "ches verify --claims T4 T5",
        "ches verify --out runs/claims",
        "ches verify --model my-model --pairs pairs.jsonl",
    ),
    "convert": (
        "ches convert --model my-model --dtype bfloat16 --out smaller",
        "ches convert --run runs/train-001 --step best --out trained",
    ),
    "completion": ("ches completion bash", "ches completion fish"),
}
FIRST = (
    "ches diagnose trl-output",
    "ches score --out runs/first",
    "ches report runs/first",
    "ches train --steps 20 --lr 1e-5",
    "ches score --help",
)


def command_help(commands: dict[str, type[Any]]) -> str:
    """``ches --help``."""
    width = max(map(len, commands))
    lines = ["usage: ches VERB [options]", "", *_wrapped(DESCRIPTION), "", _title("verbs")]
    for verb, command in commands.items():
        lines += _wrapped(_sentences(command)[0], f"  {verb:<{width}}  ")
    lines += ["", _title("options")]
    lines += ["  --help     this; after a verb, its options", "  --version  versions of the package and of jax"]
    lines += ["", _title("examples"), *(f"  {example}" for example in FIRST)]
    return "\n".join(lines)


def verb_help(verb: str, command: type[Any]) -> str:
    """``ches VERB --help``."""
    options, texts = options_of(verb, command), help_texts(command)
    words = [option.field.upper() for option in options if option.positional]
    words += [f"--{option.name} {option.metavar}" for option in options if option.required and not option.positional]
    lines = [" ".join(["usage: ches", verb, *words, "[options]"]), ""]
    for paragraph in _sentences(command):
        lines += [*_wrapped(paragraph), ""]
    for group in ORDER:
        members = [option for option in options if option.group == group]
        if members:
            lines += [_title(group), *(line for o in members for line in _option_lines(o, texts.get(o.field, ""))), ""]
    return "\n".join([*lines, _title("examples"), *(f"  {example}" for example in EXAMPLES[verb])])


def _option_lines(option: Option, text: str) -> list[str]:
    if option.positional:
        head = option.field.upper()
    elif option.switch:
        head = f"--no-{option.name}" if option.default else f"--{option.name}"
    else:
        head = f"--{option.name} {option.metavar}"
    if option.required:
        text += " (required)"
    elif not option.switch and option.default not in (None, "", ()) and "default" not in text:
        text += f" (default: {option.default})"
    if len(head) <= 22:
        return _wrapped(text, f"  {head:<22}  ")
    return [f"  {head}", *_wrapped(text, " " * 26)]


def _sentences(command: type[Any]) -> list[str]:
    """The paragraphs of a docstring."""
    return [" ".join(part.split()) for part in inspect.cleandoc(command.__doc__ or "").split("\n\n")]


def _wrapped(text: str, first: str = "") -> list[str]:
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 110))
    wrapped = textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapped or [first.rstrip()]


def _title(text: str) -> str:
    """In bold on a terminal that wants it."""
    plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"
