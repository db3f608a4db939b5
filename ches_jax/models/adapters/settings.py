"""``adapter_config.json``: what PEFT does with an adapter's matrices, read and written.

Names of modules are matched by PEFT's own rules, the patterns among them within a time limit.
"""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from ches_jax.errors import CheckpointError
from ches_jax.models.adapters.lora import ALL_LINEAR, LowRank

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
OFF = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
"""Settings that would change the function of the adapter; every one must be absent or off."""
KNOWN = frozenset({"use_rslora"})
"""Settings that are read although their name has the form of a variant's switch."""
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that also change the base weights."""
PATTERN_SECONDS = 5.0
"""For all patterns of an adapter together: they are regular expressions of whoever wrote the file."""
LARGEST_RANK = 1 << 16


def refused(raw: Mapping[str, Any]) -> Iterator[str]:
    """Settings that change the function in another way than LoRA does, and values that are none."""
    if raw.get("peft_type") != "LORA":
        yield f"{CONFIG}: 'peft_type' is {raw.get('peft_type')!r}; expected 'LORA'"
        return  # the settings of another type say nothing here
    for key, what in (
        ("target_modules", "names of modules"),
        ("exclude_modules", "names of modules"),
        ("layers_pattern", "names of lists of layers"),
        ("modules_to_save", "names of modules"),
    ):
        value = raw.get(key)
        if value is not None and not isinstance(value, str) and not _list_of(value, str):
            yield f"{CONFIG}: {key!r} is {value!r:.60}; expected {what}"
    parameters, layers = raw.get("target_parameters"), raw.get("layers_to_transform")
    if parameters is not None and not _list_of(parameters, str):
        yield f"{CONFIG}: 'target_parameters' is {parameters!r:.60}; expected names of parameters"
    if layers is not None and not isinstance(layers, int) and not _list_of(layers, int):
        yield f"{CONFIG}: 'layers_to_transform' is {layers!r:.60}; expected numbers of layers"
    for key in OFF:
        if raw.get(key):
            yield f"{CONFIG}: {key!r} = {raw[key]!r} is not supported; expected it to be off"
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        yield f"{CONFIG}: 'bias' = {raw['bias']!r} is not known; expected 'none', 'all' or 'lora_only'"
    if isinstance(raw.get("modules_to_save"), str):
        yield f"{CONFIG}: 'modules_to_save' is {raw['modules_to_save']!r:.60}; expected a list of names"
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASE):
        yield (
            f"{CONFIG}: 'init_lora_weights' = {start!r} changes the base weights too; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes it one for the plain base"
        )
    for key in raw.keys() - KNOWN - set(OFF):
        if key.startswith("use_") and raw[key]:
            yield f"{CONFIG}: {key!r} = {raw[key]!r} is not known; expected it to be off"
    for key, pattern, expected, good in (
        ("r", "rank_pattern", "a positive number (whole, at most 65536)", _rank),
        ("lora_alpha", "alpha_pattern", "a positive number", _positive),
    ):
        if not good(raw.get(key)):
            yield f"{CONFIG}: {key!r} is {raw.get(key)!r:.60}; expected {expected}"
        values = raw.get(pattern) or {}
        if not isinstance(values, dict):
            yield f"{CONFIG}: {pattern!r} is {values!r:.60}; expected an object"
            continue
        for name, value in values.items():
            if not good(value):
                yield f"{CONFIG}: {pattern!r} of {name!r:.60} is {value!r:.60}; expected {expected}"


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _rank(value: Any) -> bool:
    return _positive(value) and value <= LARGEST_RANK and value == int(value)


class Patterns:
    """Regular expressions of ``adapter_config.json``, matched against names of modules within ``PATTERN_SECONDS``."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._left = PATTERN_SECONDS

    def compiled(self, setting: str, text: str, form: str = "{}") -> Any:
        """``text`` of a setting, put into ``form``.

        Raises:
          CheckpointError: it is no regular expression.
        """
        try:
            re.compile(text)  # what PEFT would refuse; the other dialect is wider
            return regex.compile(form.format(text))
        except (re.error, regex.error, RecursionError, OverflowError) as e:
            raise CheckpointError(
                f"{self._directory}: {CONFIG}: {setting!r} has {text!r:.80}, which is no regular expression ({e})"
            ) from None

    def matches(self, setting: str, pattern: Any, module: str) -> bool:
        """Whether a pattern matches the whole name, within the time that is left.

        Raises:
          CheckpointError: it takes for ever.
        """
        start = time.monotonic()
        try:
            return pattern.fullmatch(module, timeout=max(self._left, 1e-3)) is not None
        except TimeoutError:
            raise CheckpointError(
                f"{self._directory}: {CONFIG}: {setting!r} takes longer than {PATTERN_SECONDS:g} seconds to match "
                f"module names ({pattern.pattern!r:.80}); write plain names of modules"
            ) from None
        finally:
            self._left -= time.monotonic() - start


class Strengths:
    """Rank and scale of each adapted module, by PEFT's rule: the first pattern that the end of its name matches.

    Raises:
      CheckpointError: a pattern that is no regular expression, or one that takes for ever.
    """

    def __init__(self, raw: Mapping[str, Any], patterns: Patterns):
        self._raw, self._patterns = raw, patterns
        self._of_setting = {
            name: [
                (patterns.compiled(name, key, r"(.*\.)?({})"), value) for key, value in (raw.get(name) or {}).items()
            ]
            for name in ("rank_pattern", "alpha_pattern")
        }
        self._known: dict[str, LowRank] = {}

    def __call__(self, module: str) -> LowRank:
        """Of ``module``, by its stored name."""
        if module not in self._known:
            rank = int(self._of("rank_pattern", "r", module))
            alpha = self._of("alpha_pattern", "lora_alpha", module)
            self._known[module] = LowRank(
                rank, alpha / math.sqrt(rank) if self._raw.get("use_rslora") else alpha / rank
            )
        return self._known[module]

    def _of(self, name: str, default: str, module: str) -> float:
        for pattern, value in self._of_setting[name]:
            if self._patterns.matches(name, pattern, module):
                return value
        return self._raw[default]


class Targets:
    """Which modules PEFT puts an adapter on; what a file holds for others is never read.

    Raises:
      CheckpointError: as ``Strengths``.
    """

    def __init__(self, raw: Mapping[str, Any], patterns: Patterns):
        self._raw, self._patterns = raw, patterns
        self._regexes = {
            name: patterns.compiled(name, raw[name])
            for name in ("target_modules", "exclude_modules")
            if isinstance(raw.get(name), str) and raw[name] != ALL_LINEAR
        }

    def left_out_by(self, module: str) -> str | None:
        """The setting that leaves out ``module``, by its name in the file; None where it is adapted, or none tells."""
        targets, layers = self._raw.get("target_modules"), self._raw.get("layers_to_transform")
        if self._raw.get("exclude_modules") and self._is_one_of("exclude_modules", module):
            return "exclude_modules"
        if not targets and self._raw.get("target_parameters"):
            return "target_modules"  # of PEFT's defaults for a model nothing is adapted then
        if not targets or targets == ALL_LINEAR:
            return None
        if not self._is_one_of("target_modules", module):
            return "target_modules"
        if isinstance(targets, str) or module in targets or layers in (None, []):
            return None  # layers are chosen among ends of names, and nowhere else
        names = self._raw.get("layers_pattern") or "[^.]*"
        for name in [names] if isinstance(names, str) else names:
            pattern = self._patterns.compiled("layers_pattern", name, r".*\.{}\.(?P<layer>\d+)\..*")
            if self._patterns.matches("layers_pattern", pattern, module):
                chosen = [layers] if isinstance(layers, int) else layers
                layer = int(pattern.fullmatch(module)["layer"])
                return None if layer in chosen else "layers_to_transform"
        return "layers_to_transform"

    def _is_one_of(self, setting: str, module: str) -> bool:
        if setting in self._regexes:
            return self._patterns.matches(setting, self._regexes[setting], module)
        return any(module == name or module.endswith(f".{name}") for name in self._raw[setting])


def unread(left_out: Mapping[str, str]) -> Iterator[str]:
    """Modules that a setting leaves out, though the file holds an adapter for them."""
    for setting in dict.fromkeys(left_out.values()):
        modules = list(dict.fromkeys(m for m, by in left_out.items() if by == setting))
        yield (
            f"{CONFIG}: {setting!r} leaves out {len(modules)} modules of which {WEIGHTS} holds an adapter "
            f"({', '.join(modules[:3])}{', ...' if len(modules) > 3 else ''}): PEFT does not read those; which of the "
            "two files is of another adapter?"
        )


def settings(
    strengths: Mapping[str, LowRank], modules: Sequence[str], by_parameter: Mapping[str, str], base: str
) -> dict[str, Any]:
    """``adapter_config.json``: the first module's rank and alpha, and patterns for those that differ.

    Args:
      strengths: rank and scale of each adapted module, by its name below the layer.
      modules: all that can be adapted.
      by_parameter: those that PEFT adapts by the name of their parameter -> that name.
      base: what to call the base model.
    """
    known = {by_parameter.get(module, module): strength for module, strength in strengths.items()}
    alphas = {name: _plain(s.scale * s.rank) for name, s in known.items()}
    first = next(iter(known))
    rank, alpha = known[first].rank, alphas[first]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": [_shortest(m, modules, strengths) for m in strengths if m not in by_parameter],
        "target_parameters": list(by_parameter.values()) or None,
        "rank_pattern": {name: s.rank for name, s in known.items() if s.rank != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _plain(value: float) -> float | int:
    """Whole numbers as such: 16, not 16.000000000000004.

    >>> _plain(2 / 3 * 3), _plain(0.5)
    (2, 0.5)
    """
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _shortest(module: str, modules: Sequence[str], adapted: Mapping[str, Any]) -> str:
    """``q_proj`` where that means no module but adapted ones, else ``self_attn.q_proj``."""
    last = module.rpartition(".")[2]
    return last if all(m in adapted for m in modules if m.rpartition(".")[2] == last) else module
