"""Words of the command line before they are parsed: names of other trainers, and the nearest right one."""

import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from ches_jax.cli.options import Option, options_of
from ches_jax.errors import ChesError, did_you_mean

SAME = {
    "model-name-or-path": "model",
    "model-name": "model",
    "model-path": "model",
    "pretrained": "model",
    "adapter-name-or-path": "adapter",
    "peft": "adapter",
    "torch-dtype": "dtype",
    "dataset-name": "pairs prompts",
    "dataset": "pairs prompts",
    "dataset-path": "pairs prompts",
    "data": "pairs prompts",
    "train-file": "pairs",
    "eval-dataset": "eval-pairs probes pairs",
    "eval-file": "eval-pairs probes pairs",
    "eval": "eval-pairs probes pairs",
    "dataset-split": "split",
    "dataset-train-split": "split",
    "max-samples": "limit",
    "max-train-samples": "limit",
    "max-seq-length": "max-length",
    "max-seq-len": "max-length",
    "output-dir": "out",
    "output-path": "out",
    "output": "out",
    "run-dir": "run",
    "learning-rate": "lr",
    "num-train-epochs": "epochs",
    "num-epochs": "epochs",
    "max-steps": "steps",
    "lr-scheduler-type": "schedule",
    "warmup-steps": "warmup",
    "max-grad-norm": "clip",
    "loss-type": "loss",
    "ref-model": "reference before",
    "ref": "reference before",
    "base-model": "before model",
    "base": "before model",
    "trained": "after",
    "trained-model": "after",
    "ref-model-name-or-path": "reference",
    "optim": "optimizer",
    "lora-r": "lora-rank",
    "gradient-checkpointing": "remat",
    "save-steps": "save-every",
    "eval-steps": "eval-every",
    "save-total-limit": "keep",
    "report-to": "tracker",
    "num-samples": "samples",
    "num-return-sequences": "samples",
    "max-tokens": "max-new-tokens",
    "max-gen-toks": "max-new-tokens",
    "stop-sequences": "stop",
}
"""A name elsewhere -> the option that takes the same value (the first that the verb has)."""
WITHOUT_NAME = {"run": "path run_dir", "run-dir": "path run_dir"} | dict.fromkeys(
    ("trl-log", "log", "log-dir", "logdir", "logging-dir", "log-file"), "path"
)
"""A name elsewhere, or of an older version -> the fields whose value is now written without a name."""
LEADING = {"verify": "claims"}
"""A verb -> the option whose values may stand first without its name: ``ches verify T4 T5``."""
SUBJECTS = ("claims", "scores", "responses", "groups", "pairs", "prompts")
"""Options that a verb is about: a path without a name is most likely meant for the first that it has."""
DIFFERENT = {
    "per-device-train-batch-size": "--batch-size N is the pairs of an update over all devices, and --accumulate K cuts "
    "it into K micro-batches",
    "train-batch-size": "--batch-size N is the pairs of an update over all devices",
    "per-device-eval-batch-size": "evaluation takes packed rows; --row-tokens says how long they are",
    "gradient-accumulation-steps": "--accumulate K cuts the --batch-size pairs of an update into K micro-batches",
    "beta": "numbers of the loss are written with it, --loss 'dpo(beta=0.1)', or given as --loss-args beta=0.1",
    "label-smoothing": "numbers of the loss are written with it: --loss 'cdpo(label_smoothing=0.1)', or of any loss "
    "smooth(simpo, 0.1)",
    "loss-weights": "weights are written into the --loss: 0.8*sigmoid + 0.2*sft",
    "weight-decay": "hyper-parameters of the optimiser are given as --optimizer-args weight_decay=0.01",
    "warmup-ratio": "--warmup is a number of updates",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "fp32": "--dtype float32",
    "use-peft": "--lora-rank 16 trains adapters",
    "lora-target-modules": "--lora-targets q,v, or all-linear",
    "attn-implementation": "--attention auto, blocks or dense",
    "device": "--mesh data=4 lays out the devices; JAX_PLATFORMS=cpu picks the platform",
    "logging-steps": "every update is written to metrics.jsonl",
    "tokenizer": "the tokenizer is the one in the directory of --model",
    "overwrite-output-dir": "a run is never written over; give a new --out, or --resume",
    "batch-size": "--batch-tokens N is the tokens of a device and step",
    "model-args": "--model DIR names the model",
    "do-sample": "--temperature 0 is greedy, anything above samples",
    "resume-from-checkpoint": "--resume continues the run that --out holds",
    "push-to-hub": "the trained model is OUT/model, a directory that huggingface-cli upload takes",
    "trust-remote-code": "no code of a model directory is ever run",
}
"""A name elsewhere -> what to say here, because the value means something else."""


def the_verb(word: str, verbs: Sequence[str]) -> str:
    """The verb of a command line.

    Raises:
      ChesError: there is none of that name; the nearest.
    """
    if word in verbs:
        return word
    what = f"{word}: options come after the verb" if word.startswith("-") else f"no verb is named {word!r}"
    raise ChesError(f"{what}{did_you_mean(word, verbs)}; the verbs are: {', '.join(verbs)}")


def corrected(verb: str, command: type[Any], words: Sequence[str]) -> list[str]:
    """The words of a verb with underscores as dashes and names of other trainers as ours.

    Raises:
      ChesError: an option that the verb does not have, a value that the option does not take or none where it takes
        one, two values of an option that takes one, a word that belongs to no option, or a required option that is not
        there.
    """
    if verb in LEADING and words and not _is_option(words[0]):
        words = [f"--{LEADING[verb]}", *words]
    options = options_of(verb, command)
    flags = {flag: option for option in options for flag in option.flags}
    places = [option for option in options if option.positional]
    seen: dict[str, list[str]] = {}  # the field of an option -> how it was given
    out: list[str] = []
    takes = 0  # values that the option before a word still takes
    for i, word in enumerate(words):
        if not _is_option(word):
            out.append(word)
            if takes:
                takes -= 1
            elif places:
                seen[places.pop(0).field] = [word]
            else:
                if first := [seen[o.field][0] for o in options if o.positional and o.field in seen]:
                    raise ChesError(f"ches {verb}: takes one path, and {first[0]!r} and {word!r} are two")
                meant = next((f"; did you mean --{o} {word}?" for o in SUBJECTS if f"--{o}" in flags), "")
                raise ChesError(f"ches {verb}: {word!r} belongs to no option{meant}; ches {verb} --help names all")
            continue
        typed, equals, value = word.partition("=")
        if (place := _place(typed, flags, places)) is not None:
            print(f"ches: {typed} PATH is written without a name: ches {verb} PATH", file=sys.stderr)
            out += [value] if equals else []
            if equals:
                seen[places.pop(places.index(place)).field] = [value]
            takes = 0
            continue
        flag = _flag(verb, typed, flags)
        option = flags[flag]
        given = [value] if equals else [*takewhile(lambda w: not _is_option(w), words[i + 1 :])]
        if not option.switch:
            given = given if option.many else given[:1]
            _require_value(verb, option, flag, given)
        _require_once(verb, option, [flag] if option.switch else given, seen)
        takes = 0 if equals or option.switch else len(words) if option.many else 1
        out.append(f"{flag}{equals}{value}")
    missing = [
        o.field.upper() if o.positional else f"--{o.name}" for o in options if o.required and o.field not in seen
    ]
    if missing:
        raise ChesError(f"ches {verb}: {' and '.join(missing)} must be given; ches {verb} --help says what it is")
    return out


def _require_once(verb: str, option: Option, given: list[str], seen: dict[str, list[str]]) -> None:
    """Note how the option was given; of two different ways the parser would silently take the last."""
    before = seen.setdefault(option.field, given)
    if before == given or option.repeats:
        return
    name = "" if option.switch else f"--{option.name} "
    how = ", all its values after it" if option.many else ""
    raise ChesError(
        f"ches {verb}: {name}{' '.join(before)} and {' '.join(given)} are both given: write the option once{how}"
    )


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not word[1].isdigit() and word[1] != "."


def _place(typed: str, flags: Mapping[str, Option], places: Sequence[Option]) -> Option | None:
    """The place whose value an older name still gives; None for a name that is an option."""
    name = typed.lstrip("-").replace("_", "-")
    if f"--{name}" in flags:
        return None
    fields = WITHOUT_NAME.get(name, "").split()
    return next((place for place in places if place.field in fields), None)


def _flag(verb: str, typed: str, options: Mapping[str, Option]) -> str:
    flag = "--" + typed.lstrip("-").replace("_", "-")
    if flag in options:
        return flag
    name = flag[2:]
    for ours in SAME.get(name, "").split():
        if f"--{ours}" in options:
            return f"--{ours}"
    subject = f"ches {verb}: no option {typed}"
    mentioned = [word for word in DIFFERENT.get(name, "").replace(",", " ").split() if word.startswith("--")]
    if name in DIFFERENT and (not mentioned or mentioned[0] in options):
        raise ChesError(f"{subject}: {DIFFERENT[name]}")
    near = did_you_mean(name, tuple(option.removeprefix("--") for option in options), "--")
    raise ChesError(f"{subject}{near}; ches {verb} --help names all")


def _require_value(verb: str, option: Option, flag: str, given: Sequence[str]) -> None:
    if not given:
        if not option.many:
            raise ChesError(f"ches {verb}: {flag} takes a value: {option.metavar}")
        return
    word, kinds = given[0], option.metavar.split("|")
    if option.choices and word not in option.choices:
        near = did_you_mean(word, option.choices)
        raise ChesError(f"{flag} {word!r}: expected one of {', '.join(option.choices)}{near}")
    for kind, read in (("INT", int), ("FLOAT", float)):
        if kind in kinds and word not in kinds:
            try:
                read(word)
            except ValueError:
                wanted = {"INT": "a whole number", "FLOAT": "a number"}[kind]
                raise ChesError(f"{flag} {word!r}: expected {' or '.join([wanted, *kinds[1:]])}") from None
