"""Hyper-parameters of a run: its beta and its loss, from what lies beside the log."""

import itertools
import json
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BETA = ("beta", "pref_beta", "rl_beta", "dpo_beta", "reference_policy_kl_penalty")
MOVING = ("sync_ref_model", "tr_dpo", "ref_model_update", "update_ref_model")
"""Whether the reference follows the policy."""
LOSS = ("loss_type", "pref_loss", "dpo_loss_type", "loss", "rlhf_type", "rl")
DECISIVE = (*BETA, *LOSS)
OF_OTHERS = re.compile(r"optim|adam|sgd|(^|_)ema(_|$)|sched|momentum|averag")
"""Names of settings in which a beta is not that of the loss."""
WITHOUT = ("reference_free",)
"""Whether the reference is left out, so that rewards are log-probabilities."""
AVERAGED = (
    "average_log_prob",
    "average_log_probs",
    "preference_average_log_probs",
    "length_normalized",
    "length_normalize",
    "dpo_norm_loss",
)
"""Whether log-probabilities are means over tokens."""
TAIL = "ld_alpha"
"""The weight of what a response has beyond the shorter one of its pair (LD-DPO)."""
TEXT = ("BINUNICODE", "SHORT_BINUNICODE")
"""Opcodes of a pickle that push a text."""
COMPONENT = "_component_"
"""The class of an object in a config of torchtune: ``torchtune.rlhf.loss.DPOLoss``."""
FILES = (
    "config.json",
    "args.json",
    "training_args.json",
    "train_args.json",
    "hparams.json",
    "wandb-metadata.json",
    "config.yaml",
    "config.yml",
    "training_args.yaml",
    "train.yaml",
    "hparams.yaml",
    "axolotl.yaml",
    "README.md",
    "training_args.bin",
)
"""Where trainers keep their arguments. A model's config.json has none of the names, and so tells nothing."""
LARGEST = 16_000_000
"""Bytes of such a file."""
MOST = 100_000
"""Names in it."""


@dataclass(frozen=True)
class RunSettings:
    """What is known of a run besides its metrics."""

    beta: float | None = None
    beta_from: str = ""
    loss: str | None = None
    """Several, one weighed against the other, with a plus between them."""
    moving_reference: bool = False
    no_reference: bool = False
    averaged: str = ""
    """The setting by which log-probabilities are no sums over the tokens of a response."""

    @property
    def losses(self) -> tuple[str, ...]:
        """Each of its losses."""
        return tuple(self.loss.split("+")) if self.loss else ()


def find_settings(folders: list[Path], in_log: Mapping[str, Any]) -> RunSettings:
    """The settings in the log itself, or else in the files of FILES in the first folder that has them.

    Two files of one folder that tell different values tell nothing.
    """
    for settings_of in ([("the log", in_log)], *([*_of_folder(f)] for f in folders)):
        betas = {v: where for where, settings in settings_of if (v := _number(settings, BETA)) is not None}
        losses = {v: where for where, settings in settings_of if (v := _word(settings, LOSS)) is not None}
        moving = any(settings.get(name) is True for _, settings in settings_of for name in MOVING)
        without = any(settings.get(name) is True for _, settings in settings_of for name in WITHOUT)
        averaged = next((said for _, settings in settings_of if (said := _averaged(settings))), "")
        if len(betas) == 1 or losses or moving or without or averaged:
            beta, where = next(iter(betas.items())) if len(betas) == 1 else (None, "")
            loss = next(iter(losses)) if len(losses) == 1 else None
            return RunSettings(beta, where, loss, moving, without, averaged)
    return RunSettings()


def _averaged(settings: Mapping[str, Any]) -> str:
    """The setting that makes log-probabilities something else than sums over tokens; empty where none does.

    >>> _averaged({"ld_alpha": 0.5}), _averaged({"ld_alpha": 1.0, "average_log_prob": False})
    ('ld_alpha', '')
    """
    weight = settings.get(TAIL)
    if isinstance(weight, (int, float)) and not isinstance(weight, bool) and weight != 1:
        return TAIL
    return next((name for name in AVERAGED if settings.get(name) is True), "")


def _of_folder(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in FILES:
        path = folder / name
        if path.is_file():
            try:
                yield name, flat(_read(path))
            except (OSError, ValueError, RecursionError, EOFError, NotImplementedError, *_OF_ARCHIVES):
                continue


_OF_ARCHIVES = (zipfile.BadZipFile, zlib.error, struct.error, RuntimeError)
"""What a damaged archive raises (RuntimeError: one with a password)."""


def _read(path: Path) -> Any:
    if path.stat().st_size > LARGEST:
        raise ValueError("too large for settings")
    if path.suffix == ".bin":
        return _of_training_args(path)
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return json.loads(text)
    import yaml

    if path.suffix == ".md":
        parts = text.split("---")
        text = parts[1] if len(parts) > 2 and not parts[0].strip() else ""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _of_training_args(path: Path) -> dict[str, Any]:
    """Beta and the loss in the pickle of transformers' training arguments, whose opcodes are read and never run."""
    with zipfile.ZipFile(path) as archive:
        inside = [n for n in archive.infolist() if n.filename.endswith("data.pkl") and n.file_size <= LARGEST]
        if not inside:
            raise ValueError("no pickle in it")
        name = inside[0].filename
        opcodes = [(op.name, value) for op, value, _ in pickletools.genops(archive.read(name))]
    out: dict[str, Any] = {}
    switches = {*MOVING, *WITHOUT, *AVERAGED}
    wanted = {*BETA, *LOSS, TAIL, *switches}
    words = [(op, value) for op, value in opcodes if not op.startswith(("BINPUT", "LONG_BINPUT", "MEMOIZE"))]
    for i, (_, value) in enumerate(words[:-1]):
        if isinstance(value, str) and value in wanted:
            if value in switches:
                out[value] = words[i + 1][0] == "NEWTRUE"
                continue
            after = words[i + 1 :]
            if after[0][0] in ("BINFLOAT", "FLOAT"):
                out[value] = after[0][1]
            elif value in LOSS:  # a word, or a list of words, which begins with its brackets
                found = itertools.dropwhile(lambda word: word[0] in ("EMPTY_LIST", "MARK"), after)
                names = [name for _, name in itertools.takewhile(lambda word: word[0] in TEXT, found)]
                names = names if after[0][0] == "EMPTY_LIST" else names[:1]
                out |= {value: names} if names else {}
    return out


def flat(value: Any) -> dict[str, Any]:
    """The innermost name of each setting; ``{"value": ...}`` of Weights & Biases is the value.

    Of one name at several depths the outermost counts. A name of beta or of the loss that stands at one depth with two
    values tells nothing, and one inside the settings of an optimiser or of an average of weights is another.

    >>> flat({"optimizer": {"beta": 0.9}, "dpo": {"beta": 0.1}}), flat({"a": {"beta": 0.5}, "b": {"beta": 0.1}})
    ({'beta': 0.1}, {})
    """
    out: dict[str, Any] = {}
    unclear: set[str] = set()
    seen = 0
    level = [value] if isinstance(value, Mapping) else []
    while level:
        below, here = [], {}
        for name, inner in itertools.chain.from_iterable(found.items() for found in level):
            seen += 1
            if seen > MOST:  # YAML can name one object many times, and an object of such objects
                raise ValueError("more names than settings have")
            if isinstance(inner, Mapping) and "value" in inner and not isinstance(inner["value"], Mapping):
                inner = inner["value"]
            if isinstance(inner, Mapping):
                if name == "loss" and isinstance(component := inner.get(COMPONENT), str):
                    here.setdefault("loss", component.rpartition(".")[2].lower().removesuffix("loss"))
                other = OF_OTHERS.search(str(name).lower()) is not None
                below.append({n: v for n, v in inner.items() if not (other and n in DECISIVE)})
            elif here.setdefault(str(name), inner) != inner and name in DECISIVE:
                unclear.add(str(name))
        out = {n: v for n, v in here.items() if n not in unclear} | out
        level = below
    return out


def _number(settings: Mapping[str, Any], names: tuple[str, ...]) -> float | None:
    values = {v for n in names if (v := _plain_number(settings.get(n))) is not None and 0 < v < 1e9}
    return next(iter(values)) if len(values) == 1 else None


def _plain_number(value: Any) -> float | None:
    """A number, also where a writer put it into quotes.

    >>> _plain_number("0.1"), _plain_number(True), _plain_number("auto")
    (0.1, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _word(settings: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    for name in names:
        value = settings.get(name)
        if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
            value = "+".join(value)
        if isinstance(value, str):
            return value.lower()
    return None
