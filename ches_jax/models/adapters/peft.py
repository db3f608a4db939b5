"""Adapters in PEFT's directory format: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written.

A stored module is adapted as one map, ``base_model.model.<module>.lora_A.weight`` [r, in] and ``lora_B.weight``
[out, r]. Where a family keeps several of our matrices in one module (GPT-2, GPT-NeoX, Phi-3), their adapters are
written as one of the summed rank: the A's on top of each other, each B in the rows of its matrix. Read back, every
matrix of the module gets the whole A and its rows of B. Both are the same function, exactly. Experts are a form of
their own (``together``). ``sites`` has the names, ``settings`` the config.

Where the scale differs by layer (``rank_pattern``, ``alpha_pattern``), the stack has the scale of the first layer and
each B its own, relative to that: the same function, rounded once to float32.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from ches_jax.errors import CheckpointError, many
from ches_jax.hf.directory import fingerprint_of, read_json, resolve
from ches_jax.hf.tensors import Tensor, all_finite, open_files, same_values
from ches_jax.hf.text_part import OTHER, Parts
from ches_jax.models.adapters.lora import LowRank, Spec, adapted, merged
from ches_jax.models.adapters.settings import (
    CONFIG,
    WEIGHTS,
    Patterns,
    Strengths,
    Targets,
    refused,
    settings,
    unread,
)
from ches_jax.models.adapters.sites import PREFIX, Sites, below_wrapper, sites_of
from ches_jax.models.checkpoint.load import load_replaced, with_parameters
from ches_jax.models.checkpoint.tensor_map import Rule, TransposedSlice
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.models.sharding import placement
from ches_jax.notices import notice
from ches_jax.runs.files import new_directory

NAME = re.compile(rf"^(?:{re.escape(PREFIX)})?(?P<module>.+)\.lora_(?P<part>[AB])(?:\.default)?\.weight$")


@dataclass(frozen=True)
class Adapter:
    """An adapter for a decoder: what is adapted, and the matrices by parameter name."""

    spec: Spec
    arrays: dict[str, np.ndarray]
    """``layers.self_attn.q_proj.lora_a`` [L, r, in] and ``.lora_b`` [L, out, r], float32."""
    replaced: dict[str, Tensor] = field(default_factory=dict)
    """Whole tensors that take the place of the model's, by their names in its file."""


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


def read_adapter(directory: Path, base: Path, *, whole: bool = False) -> Adapter:
    """The adapter in ``directory`` for the model in ``base``.

    Layers that it leaves out get zeros, which change nothing and get no gradient. Tensors that take the place of the
    model's (``modules_to_save``, trained biases) are for those who want them (``whole``), and refused for others.

    Raises:
      CheckpointError: settings that change the function in another way than LoRA does, names or shapes that do not fit
        the model; all problems in one message.
    """
    raw = read_json(directory / CONFIG)
    if problems := list(refused(raw)):
        raise CheckpointError(many(str(directory), problems))
    targets = raw.get("target_parameters") or []
    sites, patterns = sites_of(base, as_in_memory=bool(targets)), Patterns(directory)
    tensors = open_files(directory, [directory / WEIGHTS])
    found = _sorted_out(tensors, sites, sites.wrapped(targets), Targets(raw, patterns))
    strength = Strengths(raw, patterns)

    def strength_of(module: str) -> LowRank:
        """By the name that PEFT knew it by: patterns may be whole names, as of a multimodal model."""
        return strength(found.called[module])

    problems = [
        *_unknown_parameters(targets, sites),
        *found.problems,
        *unread(found.passed_over),
        *_misplaced(found.replaced, found.modules, sites, whole),
        *_not_saved(raw.get("modules_to_save") or [], (*found.replaced, *found.repeated, *found.left_out)),
    ]
    for module, two in found.modules.items():
        if two.keys() != {"A", "B"}:
            problems.append(f"{module}: has lora_{''.join(two)} alone")
        else:
            problems += _misfits(module, two, *sites.sizes(sites.owners[module], strength_of(module).rank))
    if problems or not found.modules:
        raise CheckpointError(many(str(directory), problems or ["holds no adapter"]))
    if said := Parts({}, found.left_out).left_out():
        notice(f"{directory}: {said}")
    if found.repeated:
        notice(f"{directory}: {', '.join(found.repeated)} repeat the values of the model, and are left out")
    spec, arrays = _stacked(strength_of, found.modules, sites)
    return Adapter(spec, arrays, {own: tensors[name] for name, own in found.replaced.items()})


@dataclass
class _Found:
    """The tensors of an adapter's file by what they are."""

    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Module of the model -> A and B."""
    called: dict[str, str] = field(default_factory=dict)
    """Module of the model -> the name that PEFT knew it by."""
    passed_over: dict[str, str] = field(default_factory=dict)
    """Name of a module -> the setting for which PEFT would not have put an adapter on it."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Name of a tensor -> the part of a multimodal model, which text never passes."""
    repeated: list[str] = field(default_factory=list)
    """Tensors that hold the values of the model's."""
    replaced: dict[str, str] = field(default_factory=dict)
    """Name of a tensor -> that of the model's, whose place it takes."""
    problems: list[str] = field(default_factory=list)


def _sorted_out(tensors: Mapping[str, Tensor], sites: Sites, wrapped: Mapping[str, str], put_on: Targets) -> _Found:
    """What each tensor is; ``wrapped`` are the modules around parameters that adapters were put on by name."""
    found, owners = _Found(), sites.owners
    for name, tensor in tensors.items():
        match = NAME.match(name)
        # an adapter of a multimodal model may reach its towers too, which text never passes
        if match and (other := OTHER.match(match["module"])):
            found.left_out[name] = other["part"]
            continue
        if match is None and (own := sites.of_the_base(name)) is not None:
            if same_values(sites.tensors[own], tensor):
                found.repeated.append(name)
            else:
                found.replaced[name] = own
            continue
        # one that was made over a multimodal model names the text model inside it
        names = below_wrapper(match["module"]) if match else ()
        module = next((wrapped.get(n, n) for n in names if wrapped.get(n, n) in owners), None)
        if match is None or module is None:
            known = ", ".join(sites.modules)
            found.problems.append(f"tensor {name!r} belongs to none of the modules {known} of this model")
            continue
        if (other := found.modules.setdefault(module, {}).setdefault(match["part"], tensor)) is not tensor:
            found.problems.append(f"tensors {other.name!r} and {name!r} are of the same module; remove one of the two")
        if wrapped.keys().isdisjoint(names):
            found.called[module] = match["module"]
            by = put_on.left_out_by(match["module"])
            found.passed_over |= {match["module"]: by} if by else {}
        else:
            own = sites.parameter(owners[module], module).rpartition(".")[2]
            found.called[module] = f"{match['module'].replace('.base_layer', '')}.{own}"
    return found


def _unknown_parameters(targets: Iterable[str], sites: Sites) -> Iterator[str]:
    """``target_parameters`` that the model does not have."""
    known = ", ".join(sites.by_parameter().values()) or "none"
    for target in targets:
        if not sites.wrapped([target]):
            yield f"{CONFIG}: 'target_parameters' names {target!r}; expected some of {known}"


def _not_saved(modules: Iterable[str], names: Collection[str]) -> Iterator[str]:
    """``modules_to_save`` without a tensor among ``names``."""
    for saved in modules:
        if not any(f".{saved}." in f".{name}" for name in names):
            yield f"{CONFIG}: 'modules_to_save' names {saved!r}, of which {WEIGHTS} holds nothing"


def _misplaced(replaced: Mapping[str, str], adapted: Mapping[str, Any], sites: Sites, whole: bool) -> Iterator[str]:
    """Tensors that cannot take the place of the model's."""
    for name, own in replaced.items():
        what = f"tensor {name!r} takes the place of the model's {own!r}, with other values"
        if not whole:
            yield f"{what}: only adapters are trained; merge it first (ches convert --adapter) and start from that"
        elif sites.config.tie_embeddings and own in sites.ends:
            yield (
                f"{what}, and the model ties its head to its embedding: which of the two PEFT replaces depends on how "
                "the adapter was made; save the merged model and give that"
            )
        elif (own.rpartition(".")[0] in adapted) != (".base_layer." in name):
            yield f"{what}: PEFT does not read it under this name; remove it, or name it as PEFT writes it"


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
    lora = read_adapter(adapter_directory(adapter), base, whole=True)
    plain = load_replaced(
        base, lora.replaced, dtype=dtype, param_dtype=param_dtype, mesh=mesh, axes=axes, sharding=sharding
    )
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
    lora = read_adapter(adapter_directory(adapter), base, whole=True)
    plain = load_replaced(base, lora.replaced, param_dtype=param_dtype)
    whole = merged({**named_parameters(plain), **lora.arrays}, lora.spec)
    return with_parameters(abstract_decoder(plain.config), whole)


def _misfits(module: str, two: Mapping[str, Tensor], a: tuple[int, int], b: tuple[int, int]) -> Iterator[str]:
    """Shapes that do not fit the module or the rank, values that are none."""
    for part, expected in (("A", a), ("B", b)):
        if two[part].shape != expected:
            yield f"{module}: lora_{part} has shape {two[part].shape}; expected {expected}"
        elif not all_finite(two[part].read()):
            yield f"{module}: lora_{part} holds NaN or infinite values"


def _stacked(
    strength: Callable[[str], LowRank], parts: Mapping[str, Mapping[str, Tensor]], sites: Sites
) -> tuple[dict[str, LowRank], dict[str, np.ndarray]]:
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
    return spec, arrays


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
    sites = sites_of(base, as_in_memory=True)
    groups: dict[tuple[str, tuple[str, ...]], list[Rule]] = {}
    for rule in sites.rules:
        if rule.param.removesuffix(".weight") in spec:
            groups.setdefault((rule.tensor, tuple(sites.stored(rule).values())), []).append(rule)
    tensors: dict[str, np.ndarray] = {}
    strengths: dict[str, LowRank] = {}
    for group in groups.values():
        own = [spec[rule.param.removesuffix(".weight")] for rule in group]
        # one rank and scale for a module of all layers, though their stacks may have several
        (module,) = sites.below_layer(group[0])
        rank, scale = strengths.get(module, LowRank(0, own[0].scale))
        strengths[module] = LowRank(max(rank, sum(one.rank for one in own)), scale)
    by_parameter = {module: name for module, name in sites.by_parameter().items() if module in strengths}
    places = {module: place for place, module in sites.wrapped(list(by_parameter.values())).items()}
    for group in groups.values():
        rank, scale = strengths[sites.below_layer(group[0])[0]]
        for at, module in sites.stored(group[0]).items():
            a, b = _fused(group, arrays, spec, scale, at)
            whole, missing = [(0, 0)] * (a.ndim - 2), (0, rank - a.shape[-2])
            a, b = np.pad(a, [*whole, missing, (0, 0)]), np.pad(b, [*whole, (0, 0), missing])
            a, b = sites.written(group[0], a, b)
            tensors[f"{PREFIX}{places.get(module, module)}.lora_A.weight"] = np.ascontiguousarray(a)
            tensors[f"{PREFIX}{places.get(module, module)}.lora_B.weight"] = np.ascontiguousarray(b)
    config = settings(strengths, sites.modules, by_parameter, name or str(base))
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
