"""What a directory's tensors say beyond its config: which are the text model's, their prefix, whether the head is tied.

As transformers reads them: each name may have or lack the name of the model below its head (``model.``,
``transformer.``), and a head that is stored beside the embedding with other values is a head of its own, whatever
``config.json`` says. Of a multimodal directory it is the text model that is read.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from ches_jax.hf.directory import read_config
from ches_jax.hf.quantised.scheme import dequantised
from ches_jax.hf.quantised.schemes import scheme_of
from ches_jax.hf.tensors import Computed, Tensor, open_tensors, same_values
from ches_jax.hf.text_part import TIED, text_config, text_tensors
from ches_jax.models.checkpoint.tensor_map import ExpertPart, Rule
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.registry import Family, decoder_config, family_of
from ches_jax.models.stacks import below_stack, layers_of
from ches_jax.notices import notice

HEADS = {"lm_head.weight": "embed_out.weight"}
"""The head's name in transformers 5 -> the one that GPT-NeoX files had and have."""


def effective_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a model directory (the text model's), its head untied where the weights have another one.

    Raises:
      CheckpointError: a config or weight files that cannot be read.
    """
    raw = text_config(read_config(directory), str(directory))
    config = decoder_config(raw, str(directory))
    if not config.tie_embeddings:
        return raw
    family = family_of(raw, str(directory))
    embedding, head = table_ends(family, config)
    stored, _ = as_expected(model_tensors(directory), embedding, head)
    if embedding not in stored or head not in stored or _same(stored[embedding], stored[head]):
        return raw
    notice(
        f"{directory}: config.json ties the head to the embedding ({TIED}), but {stored[head].name!r} and "
        f"{stored[embedding].name!r} are both stored and differ: they are not tied, as in transformers"
    )
    return raw | {TIED: False}


def model_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of the text model under its own names; those of other parts are left out, which is said once.

    Quantised weights are dequantised when they are read.

    Raises:
      CheckpointError: weight files that cannot be read, or that hold no text model.
    """
    tensors, parts = text_tensors(open_tensors(directory), str(directory))
    if left_out := parts.left_out():
        notice(f"{directory}: {left_out}")
    scheme = scheme_of(text_config(read_config(directory), str(directory)), str(directory))
    if scheme is None:
        return tensors
    out = dequantised(scheme, tensors, str(directory))
    if not any(isinstance(tensor, Computed) for tensor in out.values()):
        notice(
            f"{directory}: config.json calls the weights quantised ({scheme.name}), and none of them is: they are read "
            "as they are stored. Some loaders quantise such weights then; remove the key where they are merged ones"
        )
    return out


def table_ends(family: Family, config: DecoderConfig) -> tuple[str, str]:
    """The stored names of the embedding and of the head."""
    embedding, head = family.name_rules(["embed_tokens.weight", "lm_head.weight"], config)
    return embedding.tensor, head.tensor


def stored_rules(
    family: Family, shapes: Mapping[str, tuple[int, ...]], config: DecoderConfig, stored: Iterable[str]
) -> list[Rule]:
    """The family's rules, as the file has it: some programs write names that transformers 5 has in memory.

    The published Qwen 3.5 has the matrices of all experts in one tensor so.
    """
    names = set(stored)

    def as_stored(rule: Rule) -> Rule:
        there = in_memory(rule, shapes[rule.param])
        first = there.tensor_name(layers_of(config, rule.param)[0]) if rule.stacked else there.tensor
        return there if there != rule and names & {first, first.partition(".")[2]} else rule

    return [as_stored(rule) for rule in family.name_rules(shapes, config)]


def in_memory(rule: Rule, shape: tuple[int, ...]) -> Rule:
    """The rule of a matrix as transformers 5 has it in memory: those of all experts in one tensor.

    ``experts.gate_up_proj`` [E, 2 I, D], gates before ups, and ``experts.down_proj`` [E, D, I].

    >>> in_memory(Rule("layers.mlp.experts.up_proj.weight", "l.{layer}.mlp.experts.{expert}.w3.weight"), (2, 5, 7, 9))
    Rule(param='layers.mlp.experts.up_proj.weight', tensor='l.{layer}.mlp.experts.gate_up_proj', \
view=ExpertPart(start=7, step=1, total=14, turned=False))
    """
    tensor = rule.tensor.replace(".block_sparse_moe.", ".mlp.")
    projection = (below_stack(rule.param) or "").removeprefix("mlp.experts.")
    parts = {"gate_proj.weight": 0, "up_proj.weight": 1, "down_proj.weight": None}
    if not rule.by_expert or projection not in parts:
        return replace(rule, tensor=tensor)
    part, width = parts[projection], shape[-2]
    name = f"{tensor.partition('{expert}.')[0]}{'down_proj' if part is None else 'gate_up_proj'}"
    return replace(rule, tensor=name, view=ExpertPart() if part is None else ExpertPart(part * width, 1, 2 * width))


def _same(a: Tensor, b: Tensor) -> bool:
    return _same_unchanged(a, b, *(t.file.stat().st_mtime_ns for t in (a, b)))


@lru_cache(maxsize=8)
def _same_unchanged(a: Tensor, b: Tensor, *times: int) -> bool:
    """Values are compared once for as long as the files stay."""
    return same_values(a, b)


def as_expected(
    tensors: Mapping[str, Tensor], embedding: str, head: str, others: Iterable[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under the names that a family expects, and what is wrong with that.

    A stored name that is not expected may have the prefix of the model below its head too much or too little; what is
    none of the expected ones keeps its name.
    """
    names = {embedding, head, *others}
    prefix = embedding.partition(".")[0] + "."
    out: dict[str, Tensor] = {}
    problems = []
    for stored, tensor in tensors.items():
        bare = stored.removeprefix(prefix)
        candidates = (bare, prefix + stored, HEADS.get(bare))
        name = stored if stored in names else next((c for c in candidates if c in names), stored)
        if name in out:
            problems.append(f"tensors {out[name].name!r} and {stored!r} are the same parameter; remove one of the two")
        out[name] = tensor
    return out, problems


def kinds_without_weights(
    config: DecoderConfig, table: Mapping[str, Rule], shapes: Mapping[str, tuple[int, ...]], stored: Collection[str]
) -> tuple[list[str], set[str]]:
    """Layers whose mixer or MLP has no weight at all in the file: a line for those that lack the same.

    Returns:
      The problems, and the names (of what is missing, and of what is there instead) that they speak for.
    """
    wanted: dict[tuple[int, str], set[str]] = defaultdict(set)
    for param, rule in table.items():
        layers = layers_of(config, param)
        for index, name in rule.names(shapes[param], layers).items() if rule.stacked else ():
            wanted[layers[index[0]], (below_stack(param) or "").partition(".")[0]].add(name)
    expected = {name for names in wanted.values() for name in names}
    first = next(rule.tensor.partition("{layer}")[0] for rule in table.values() if rule.stacked)
    alike: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    spoken_for: set[str] = set()
    for (layer, part), names in sorted(wanted.items()):
        if part in ("self_attn", "mlp") and names.isdisjoint(stored):
            before, kind = f"{first}{layer}.", config.kinds[layer]
            instead = {name for name in stored if name.startswith(before) and name not in expected}
            what = kind.mixer.replace("_", " ") if part == "self_attn" else f"a {kind.mlp.replace('_', ' ')} MLP"
            alike[what, _few(names, before), _few(instead, before)].append(layer)
            spoken_for |= names | instead
    return [
        f"{what} in layers {', '.join(map(str, layers))}, says config.json, and the file has none of its weights "
        f"({names})" + (f"; it has those of another kind of layer ({instead})" if instead else "")
        for (what, names, instead), layers in alike.items()
    ], spoken_for


def _few(names: Collection[str], before: str) -> str:
    """The first of some names in a layer, and how many more there are."""
    shown = sorted(name.removeprefix(before) for name in names)
    return ", ".join(shown[:3]) + (f", {len(shown) - 3} more" if len(shown) > 3 else "")


def foreign_prefix(stored: Iterable[str], missing: Iterable[str]) -> str | None:
    """What stands before all missing names in a file of a wrapped module, such as ``_orig_mod.``; None where not so.

    >>> foreign_prefix(["_orig_mod.model.norm.weight"], ["model.norm.weight"])
    '_orig_mod.'
    """
    stored, missing = list(stored), list(missing)
    prefixes = {name.removesuffix(missing[0]) for name in stored if missing and name.endswith(f".{missing[0]}")}
    known = set(stored)
    return next((p for p in sorted(prefixes) if all(p + name in known for name in missing)), None)
