"""Adapters in PEFT's directory format: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

A stored module is adapted as one map, ``base_model.model.<module>.lora_A.weight`` [r, in] and ``lora_B.weight``
[out, r]. Where a family keeps several of our matrices in one module (GPT-2, GPT-NeoX, Phi-3), their adapters are
written as one of the summed rank: the A's on top of each other, each B in the rows of its matrix. Read back, every
matrix of the module gets the whole A and its rows of B. Both are the same function, exactly. Experts that lie in one
tensor are a form of their own (``together``).

Where the scale differs by layer (``rank_pattern``, ``alpha_pattern``), the stack has the scale of the first layer and
each B its own, relative to that: the same function, rounded once to float32.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import regex
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from ches_jax.errors import CheckpointError, many
from ches_jax.hf.directory import fingerprint_of, read_json, resolve
from ches_jax.hf.tensors import Tensor, all_finite, open_files, same_values
from ches_jax.hf.text_part import INSIDE, OTHER, Parts
from ches_jax.models.adapters.lora import ALL_LINEAR, LowRank, Spec, adaptable, adapted, merged
from ches_jax.models.adapters.together import by_expert, is_together, side_by_side, swapped, wrappers
from ches_jax.models.checkpoint.load import load_model, with_parameters
from ches_jax.models.checkpoint.stored_names import effective_config, model_tensors, stored_rules, table_ends
from ches_jax.models.checkpoint.tensor_map import Rule, TransposedSlice
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, abstract_decoder, abstract_parameters, named_parameters
from ches_jax.models.families.registry import decoder_config, family_of
from ches_jax.models.sharding import placement
from ches_jax.models.stacks import layers_of
from ches_jax.notices import notice
from ches_jax.runs.files import new_directory

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
NAME = re.compile(rf"^(?:{re.escape(PREFIX)})?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight$")
OFF = (
    "use_dora",
    "use_qalora",
    "lora_bias",
    "modules_to_save",
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


@dataclass(frozen=True)
class Adapter:
    """An adapter for a decoder: what is adapted, and the matrices by parameter name."""

    spec: Spec
    arrays: dict[str, np.ndarray]
    """``layers.self_attn.q_proj.lora_a`` [L, r, in] and ``.lora_b`` [L, out, r], float32."""


def adapter_directory(adapter: str | Path) -> Path:
    """The local directory of an adapter: a path or a hub name."""
    directory = resolve(adapter)
    if not (directory / WEIGHTS).is_file():
        other = sorted(p.name for p in directory.glob("adapter_model.*"))
        inside = sorted(p.parent.name for p in directory.glob(f"*/{WEIGHTS}"))
        hint = f" (found {', '.join(other)}: save it as safetensors first)" if other else ""
        if inside and not other:
            hint = f" (it holds {len(inside)} adapters, {', '.join(inside[:6])}: give the folder of one)"
        raise CheckpointError(f"{directory}: no {WEIGHTS}{hint}; expected a PEFT adapter directory")
    return directory


def adapter_fingerprint(directory: Path) -> str:
    """Of the two files of the adapter."""
    return fingerprint_of(adapter_files(directory))


def adapter_files(directory: Path) -> list[Path]:
    """What is read of an adapter."""
    return [directory / CONFIG, directory / WEIGHTS]


def read_adapter(directory: Path, base: Path) -> Adapter:
    """The adapter in ``directory`` for the model in ``base``.

    Layers that it leaves out get zeros, which change nothing and get no gradient.

    Raises:
      CheckpointError: settings that change the function in another way than LoRA does, names or shapes that do not fit
        the model; all problems in one message.
    """
    raw = read_json(directory / CONFIG)
    if problems := list(_refused(raw)):
        raise CheckpointError(many(str(directory), problems))
    tensors = open_files(directory, [directory / WEIGHTS])
    sites = _sites(base)
    left_out: dict[str, str] = {}
    owners = {module: rule for rule in sites.rules for module in sites.stored(rule).values()}
    patterns = _Patterns(directory)
    strength, put_on = _Strengths(raw, patterns), _Targets(raw, patterns)
    unread: dict[str, str] = {}
    repeated: list[str] = []
    targets = raw.get("target_parameters") or []
    wrapped = wrappers(sites.together, targets)
    problems += [
        f"{CONFIG}: 'target_parameters' names {target!r}; expected one of {', '.join(sites.parameters) or 'none'}"
        for target in targets
        if not wrappers(sites.together, [target])
    ]
    modules: dict[str, dict[str, Tensor]] = {}
    called: dict[str, str] = {}
    for name, tensor in tensors.items():
        match = NAME.match(name)
        # an adapter of a multimodal model may reach its towers too, which text never passes
        if match and (other := OTHER.match(match["module"])):
            left_out[name] = other["part"]
            continue
        if match is None and (same := sites.is_the_base_s(name, tensor)) is not None:
            repeated.append(name)
            if not same:
                problems.append(
                    f"tensor {name!r} is a whole matrix beside the adapter, with other values than the model has: "
                    "PEFT puts it in place of the model's, which is not supported; save the merged model and give that"
                )
            continue
        # one that was made over a multimodal model names the text model inside it
        names = [wrapped.get(m, m) for m in _below_wrapper(match["module"])] if match else []
        module = next((m for m in names if m in owners), None)
        if match is None or module is None:
            problems.append(f"tensor {name!r} belongs to none of the modules {', '.join(sites.modules)} of this model")
        else:
            if (other := modules.setdefault(module, {}).setdefault(match["part"], tensor)) is not tensor:
                problems.append(f"tensors {other.name!r} and {name!r} are of the same module; remove one of the two")
            if wrapped.keys().isdisjoint(_below_wrapper(match["module"])):
                called[module] = match["module"]
                by = put_on.left_out_by(match["module"])
                unread |= {match["module"]: by} if by else {}
    problems += _unread(unread)

    def strength_of(module: str) -> LowRank:
        """By the name that PEFT knew the module by: patterns may be whole names, as of a multimodal model."""
        return strength(called.get(module, module))

    for module, two in modules.items():
        if two.keys() != {"A", "B"}:
            problems.append(f"{module}: has lora_{''.join(two)} alone")
        else:
            problems += _misfits(module, two, *sites.sizes(owners[module], strength_of(module).rank))
    if problems or not modules:
        raise CheckpointError(many(str(directory), problems or ["holds no adapter"]))
    if said := Parts({}, left_out).left_out():
        notice(f"{directory}: {said}")
    if repeated:
        notice(f"{directory}: {', '.join(repeated)} repeat the values of the model, and are left out")
    return _stacked(strength_of, modules, sites)


def _below_wrapper(module: str) -> tuple[str, str]:
    """Names that a module of a multimodal model may have in the text model alone.

    >>> _below_wrapper("model.language_model.layers.0.mlp.up_proj")
    ('layers.0.mlp.up_proj', 'model.layers.0.mlp.up_proj')
    """
    inner = INSIDE.sub("", module)
    return inner, f"model.{inner}"


def load_adapted(
    model: str | Path,
    adapter: str | Path,
    *,
    dtype: DTypeLike = "float32",
    param_dtype: DTypeLike | None = None,
    mesh: Mesh | str | None = None,
    axes: Mapping[str, str | Iterable[str]] | None = None,
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> Decoder:
    """The model with the adapter beside its matrices, not merged: nothing is rounded.

    Args:
      model: base model, as for ``load_model``.
      adapter: PEFT adapter, a directory or a hub name.
      dtype: of the computation.
      param_dtype: of the base weights; default: as stored. Adapters are float32.
      mesh: as for ``load_model``.
      axes: as for ``load_model``.
      sharding: as for ``load_model``.

    Raises:
      CheckpointError: anything that does not fit.
      ChesError: as ``load_model``.
    """
    base = resolve(model)
    lora = read_adapter(adapter_directory(adapter), base)
    plain = load_model(base, dtype=dtype, param_dtype=param_dtype, mesh=mesh, axes=axes, sharding=sharding)
    both = adapted(abstract_decoder(plain.config, dtype=plain.dtype), lora.spec)
    both.mesh = plain.mesh
    place = sharding or (lambda name, shape: None) if plain.mesh is None else placement(plain.mesh)
    arrays = {name: jax.device_put(value, place(name, value.shape)) for name, value in lora.arrays.items()}
    return with_parameters(both, {**named_parameters(plain), **arrays})


def load_merged(model: str | Path, adapter: str | Path, *, param_dtype: str | None = None) -> Decoder:
    """The model with ``W + s B A`` in place of W, rounded once to the dtype of W: one that needs no adapter.

    Raises:
      CheckpointError: anything that does not fit.
    """
    base = resolve(model)
    lora = read_adapter(adapter_directory(adapter), base)
    plain = load_model(base, param_dtype=param_dtype)
    whole = merged({**named_parameters(plain), **lora.arrays}, lora.spec)
    return with_parameters(abstract_decoder(plain.config), whole)


def _refused(raw: Mapping[str, Any]) -> Iterator[str]:
    if raw.get("peft_type") != "LORA":
        yield f"{CONFIG}: 'peft_type' is {raw.get('peft_type')!r}; expected 'LORA'"
        return  # the settings of another type say nothing here
    for key, what in (
        ("target_modules", "names of modules"),
        ("exclude_modules", "names of modules"),
        ("layers_pattern", "names of lists of layers"),
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
    if raw.get("bias", "none") != "none":
        yield f"{CONFIG}: 'bias' = {raw['bias']!r} is not supported; expected 'none'"
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.startswith(CHANGED_BASE):
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


class _Patterns:
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


class _Strengths:
    """Rank and scale of each adapted module, by PEFT's rule: the first pattern that the end of its name matches.

    Raises:
      CheckpointError: a pattern that is no regular expression, or one that takes for ever.
    """

    def __init__(self, raw: Mapping[str, Any], patterns: _Patterns):
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


class _Targets:
    """Which modules PEFT puts an adapter on; what a file holds for others is never read.

    Raises:
      CheckpointError: as ``_Strengths``.
    """

    def __init__(self, raw: Mapping[str, Any], patterns: _Patterns):
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


def _unread(left_out: Mapping[str, str]) -> Iterator[str]:
    """Modules that a setting leaves out, though the file holds an adapter for them."""
    for setting in dict.fromkeys(left_out.values()):
        modules = list(dict.fromkeys(m for m, by in left_out.items() if by == setting))
        yield (
            f"{CONFIG}: {setting!r} leaves out {len(modules)} modules of which {WEIGHTS} holds an adapter "
            f"({', '.join(modules[:3])}{', ...' if len(modules) > 3 else ''}): PEFT does not read those; which of the "
            "two files is of another adapter?"
        )


def _misfits(module: str, two: Mapping[str, Tensor], a: tuple[int, int], b: tuple[int, int]) -> Iterator[str]:
    """Shapes that do not fit the module or the rank, values that are none."""
    for part, expected in (("A", a), ("B", b)):
        if two[part].shape != expected:
            yield f"{module}: lora_{part} has shape {two[part].shape}; expected {expected}"
        elif not all_finite(two[part].read()):
            yield f"{module}: lora_{part} holds NaN or infinite values"


def _stacked(strength: Callable[[str], LowRank], parts: Mapping[str, Mapping[str, Tensor]], sites: "_Sites") -> Adapter:
    """The modules' A and B as stacks over layers; a layer of lower rank, or without an adapter, ends in zeros."""
    spec: dict[str, LowRank] = {}
    arrays: dict[str, np.ndarray] = {}
    for rule in sites.rules:
        modules = sites.stored(rule)
        strengths = {at: strength(module) for at, module in modules.items() if module in parts}
        if not strengths:
            continue
        common = next(iter(strengths.values())).scale
        *lead, outputs, inputs = sites.shapes[rule.param]
        rank = max(s.rank for s in strengths.values())
        a = np.zeros((*lead, rank, inputs), np.float32)
        b = np.zeros((*lead, outputs, rank), np.float32)
        rows, _ = rule.view.outputs(outputs)
        for at, (r, scale) in strengths.items():
            down, up = sites.halves(rule, *(parts[modules[at]][part].read() for part in "AB"))
            a[at][..., :r, :] = down.astype(np.float32)
            b[at][..., :r] = up[..., rows, :].astype(np.float64) * (scale / common)
        name = rule.param.removesuffix(".weight")
        spec[name] = LowRank(rank, common)
        arrays |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    return Adapter(spec, arrays)


def write_adapter(out: Path, arrays: Mapping[str, Any], spec: Spec, base: Path, name: str | None = None) -> str:
    """Write an adapter as a directory that ``peft.PeftModel.from_pretrained`` and ``read_adapter`` open.

    Args:
      out: a new (or empty) directory; it appears when it is whole.
      arrays: ``lora_a`` and ``lora_b`` by parameter name.
      spec: ranks and scales.
      base: the model directory that it belongs to.
      name: what to call the base model; default: ``base``.

    Returns:
      The fingerprint of the written files.
    """
    sites = _sites(base)
    groups: dict[tuple[str, tuple[str, ...]], list[Rule]] = {}
    for rule in sites.rules:
        if rule.param.removesuffix(".weight") in spec:
            groups.setdefault((rule.tensor, tuple(sites.stored(rule).values())), []).append(rule)
    tensors: dict[str, np.ndarray] = {}
    strengths: dict[str, LowRank] = {}
    for group in groups.values():
        own = [spec[rule.param.removesuffix(".weight")] for rule in group]
        for module in sites.below_layer(group[0]):
            # one rank and scale for a module of all layers, though their stacks may have several
            rank, scale = strengths.get(module, LowRank(0, own[0].scale))
            strengths[module] = LowRank(max(rank, sum(one.rank for one in own)), scale)
    parameters = [name for name in sites.parameters if name in strengths]
    places = {tensor: module for module, tensor in wrappers(sites.together, parameters).items()}
    for group in groups.values():
        rank, scale = strengths[sites.below_layer(group[0])[0]]
        for at, module in sites.stored(group[0]).items():
            a, b = _fused(group, arrays, spec, scale, at)
            whole, missing = [(0, 0)] * (a.ndim - 2), (0, rank - a.shape[-2])
            a, b = np.pad(a, [*whole, missing, (0, 0)]), np.pad(b, [*whole, (0, 0), missing])
            a, b = sites.written(group[0], a, b)
            tensors[f"{PREFIX}{places.get(module, module)}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{PREFIX}{places.get(module, module)}.lora_B.weight"] = np.ascontiguousarray(b)
    config = _config(strengths, sites.modules, parameters, name or str(base))
    config["fan_in_fan_out"] = any(isinstance(rule.view, TransposedSlice) for rule in sites.rules)
    with new_directory(out, CheckpointError) as directory:
        (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    return adapter_fingerprint(out)


def _fused(
    group: list[Rule], arrays: Mapping[str, Any], spec: Spec, scale: float, at: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of the stored module at index ``at`` of the stack (of each expert) from the adapters in it."""
    downs, ups = [], []
    for rule in group:
        name = rule.param.removesuffix(".weight")
        a, b = (np.asarray(arrays[f"{name}.lora_{part}"][at], np.float32) for part in "ab")
        rows, total = rule.view.outputs(b.shape[-2])
        up = np.zeros((*b.shape[:-2], total, b.shape[-1]), np.float32)
        up[..., rows, :] = b if spec[name].scale == scale else b * np.float32(spec[name].scale / scale)
        downs.append(a)
        ups.append(up)
    return np.concatenate(downs, axis=-2), np.concatenate(ups, axis=-1)


def _config(strengths: Mapping[str, LowRank], modules: list[str], parameters: list[str], base: str) -> dict[str, Any]:
    """``adapter_config.json``: the first module's rank and alpha, and patterns for those that differ."""
    alphas = {module: _plain(s.scale * s.rank) for module, s in strengths.items()}
    first = next(iter(strengths))
    rank, alpha = strengths[first].rank, alphas[first]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": [_shortest(m, modules, strengths) for m in strengths if m not in parameters],
        "target_parameters": parameters or None,
        "rank_pattern": {m: s.rank for m, s in strengths.items() if s.rank != rank},
        "alpha_pattern": {m: a for m, a in alphas.items() if a != alpha},
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


def _shortest(module: str, modules: list[str], adapted: Mapping[str, Any]) -> str:
    """``q_proj`` where that means no module but adapted ones, else ``self_attn.q_proj``."""
    last = module.rpartition(".")[2]
    return last if all(m in adapted for m in modules if m.rpartition(".")[2] == last) else module


@dataclass(frozen=True)
class _Sites:
    """Where the matrices that can be adapted are stored in a model directory."""

    rules: list[Rule]
    shapes: dict[str, tuple[int, ...]]
    config: DecoderConfig
    tensors: Mapping[str, Tensor]
    ends: tuple[str, str]
    """The stored names of the embedding and of the head."""

    def is_the_base_s(self, name: str, tensor: Tensor) -> bool | None:
        """Whether a tensor of an adapter's file has the values of the model's of its name; None where there is none."""
        bare = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        names = [*_below_wrapper(bare), *(self.ends[:1] if bare.endswith("lm_head.weight") else ())]
        own = next((self.tensors[n] for n in names if n in self.tensors), None)
        return None if own is None else same_values(own, tensor)

    def stored(self, rule: Rule) -> dict[tuple[int, ...], str]:
        """The stored modules that hold a matrix, by index in its stack."""
        names = rule.names(self.shapes[rule.param], layers_of(self.config, rule.param))
        return {at: name.removesuffix(".weight") for at, name in names.items()}

    @property
    def modules(self) -> list[str]:
        """The stored modules below their layer."""
        return list(dict.fromkeys(module for rule in self.rules for module in self.below_layer(rule)))

    def below_layer(self, rule: Rule) -> list[str]:
        """The stored modules that hold a matrix, below their layer: ``self_attn.q_proj``; one for each expert."""
        inner = rule.tensor.partition("{layer}.")[2].removesuffix(".weight")
        experts = self.shapes[rule.param][rule.lead - 1] if rule.by_expert else 1
        return [inner.format(expert=expert) for expert in range(experts)]

    @property
    def together(self) -> list[str]:
        """The stored tensors that hold the matrices of all experts."""
        return [name for rule in self.rules if is_together(rule) for name in self.stored(rule).values()]

    @property
    def parameters(self) -> list[str]:
        """The same below their layer: ``mlp.experts.down_proj``."""
        return list(dict.fromkeys(name for r in self.rules if is_together(r) for name in self.below_layer(r)))

    def sizes(self, rule: Rule, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes that A and B of the stored module have."""
        *lead, outputs, inputs = self.shapes[rule.param]
        outputs = rule.view.outputs(outputs)[1]
        if not is_together(rule):
            return (rank, inputs), (outputs, rank)
        if swapped(rule, self.config.family):
            inputs, outputs = outputs, inputs
        return (lead[-1] * rank, inputs), (outputs, rank * lead[-1])

    def halves(self, rule: Rule, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A and B as stored -> [r, in] and [out, r], of each expert where all are in one tensor."""
        if not is_together(rule):
            return a, b
        return by_expert(a, b, self.shapes[rule.param][-3], swapped(rule, self.config.family))

    def written(self, rule: Rule, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The way back."""
        return side_by_side(a, b, swapped(rule, self.config.family)) if is_together(rule) else (a, b)


def _sites(base: Path) -> _Sites:
    raw, tensors = effective_config(base), model_tensors(base)
    config, family = decoder_config(raw, str(base)), family_of(raw, str(base))
    shapes = {name: leaf.shape for name, leaf in abstract_parameters(config).items()}
    sites = {f"{module}.weight" for modules in adaptable(config).values() for module in modules}
    rules = [rule for rule in stored_rules(family, shapes, config, tensors) if rule.param in sites]
    return _Sites(rules, shapes, config, tensors, table_ends(family, config))
