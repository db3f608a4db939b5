"""Where a model directory stores the matrices that can be adapted, and by which names PEFT knows them.

PEFT names modules as transformers 5 has them in memory. There the experts of a layer are one tensor, also where the
file has one for each of them; and it takes names of modules that experts had of their own (``up_proj``), wherever they
stand, for those of experts. Such modules, and routers, it adapts by the names of their parameters, ``up_proj.weight``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ches_jax.hf.tensors import Tensor
from ches_jax.hf.text_part import INSIDE
from ches_jax.models.adapters.lora import adaptable
from ches_jax.models.adapters.together import by_expert, is_together, side_by_side, swapped, wrappers
from ches_jax.models.checkpoint.stored_names import (
    effective_config,
    in_memory,
    model_tensors,
    stored_rules,
    table_ends,
)
from ches_jax.models.checkpoint.tensor_map import Rule, TransposedSlice
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import abstract_parameters
from ches_jax.models.families.registry import decoder_config, family_of
from ches_jax.models.stacks import below_stack, layers_of

PREFIX = "base_model.model."


def below_wrapper(module: str) -> tuple[str, str]:
    """Names that a module of a multimodal model may have in the text model alone.

    >>> below_wrapper("model.language_model.layers.0.mlp.up_proj")
    ('layers.0.mlp.up_proj', 'model.layers.0.mlp.up_proj')
    """
    inner = INSIDE.sub("", module)
    return inner, f"model.{inner}"


@dataclass(frozen=True)
class Sites:
    """The matrices of a model that can be adapted. A *module* is what holds one, by its stored name."""

    rules: list[Rule]
    shapes: dict[str, tuple[int, ...]]
    config: DecoderConfig
    tensors: Mapping[str, Tensor]
    ends: tuple[str, str]
    """The stored names of the embedding and of the head."""
    one_by_one: bool
    """Whether files of the family have a tensor for each expert."""

    def of_the_base(self, name: str) -> str | None:
        """The tensor of the model's file that a tensor of an adapter's file has the name of."""
        bare = name.removeprefix(PREFIX).replace(".base_layer.", ".")
        names = [*below_wrapper(bare), *(self.ends[:1] if bare.endswith("lm_head.weight") else ())]
        return next((n for n in names if n in self.tensors), None)

    def stored(self, rule: Rule) -> dict[tuple[int, ...], str]:
        """The modules that hold a matrix, by index in its stack."""
        names = rule.names(self.shapes[rule.param], layers_of(self.config, rule.param))
        return {at: name.removesuffix(".weight") for at, name in names.items()}

    @cached_property
    def owners(self) -> dict[str, Rule]:
        """The modules of all layers -> the matrix that each holds."""
        return {module: rule for rule in self.rules for module in self.stored(rule).values()}

    @property
    def modules(self) -> list[str]:
        """The modules below their layer."""
        return list(dict.fromkeys(module for rule in self.rules for module in self.below_layer(rule)))

    def below_layer(self, rule: Rule) -> list[str]:
        """The modules that hold a matrix, below their layer: ``self_attn.q_proj``; one for each expert."""
        inner = rule.tensor.partition("{layer}.")[2].removesuffix(".weight")
        experts = self.shapes[rule.param][rule.lead - 1] if rule.by_expert else 1
        return [inner.format(expert=expert) for expert in range(experts)]

    def parameter(self, rule: Rule, module: str) -> str:
        """The name of the parameter of a module."""
        return module if is_together(rule) else f"{module}.weight"

    @property
    def parameters(self) -> dict[str, str]:
        """The parameters that PEFT can adapt by name -> their modules; it takes outputs of GPT-2's for inputs."""
        rules = [rule for rule in self.rules if not isinstance(rule.view, TransposedSlice)]
        return {self.parameter(rule, module): module for rule in rules for module in self.stored(rule).values()}

    def by_parameter(self) -> dict[str, str]:
        """The modules below their layer that PEFT knows by no other name than that of their parameter -> that name."""
        return {
            module: self.parameter(rule, module)
            for rule in self.rules
            if self._must_be_parameter(rule)
            for module in self.below_layer(rule)
        }

    def _must_be_parameter(self, rule: Rule) -> bool:
        below = below_stack(rule.param) or ""
        return is_together(rule) or below == "mlp.router.weight" or (self.one_by_one and below.startswith("mlp."))

    def wrapped(self, targets: Sequence[str]) -> dict[str, str]:
        """The module that PEFT keeps an adapter of ``target_parameters`` under -> the module that is adapted."""
        parameters = self.parameters
        return {place: parameters[name] for place, name in wrappers(parameters, targets).items()}

    def sizes(self, rule: Rule, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes that A and B of the module have."""
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


def sites_of(base: Path, *, as_in_memory: bool) -> Sites:
    """Of a model directory, with the names of its file or those that transformers 5 has in memory."""
    raw, tensors = effective_config(base), model_tensors(base)
    config, family = decoder_config(raw, str(base)), family_of(raw, str(base))
    shapes = {name: leaf.shape for name, leaf in abstract_parameters(config).items()}
    adapted = {f"{module}.weight" for modules in adaptable(config).values() for module in modules}
    rules = [rule for rule in stored_rules(family, shapes, config, tensors) if rule.param in adapted]
    if as_in_memory:
        rules = [in_memory(rule, shapes[rule.param]) for rule in rules]
    one_by_one = any(rule.by_expert for rule in family.name_rules(shapes, config))
    return Sites(rules, shapes, config, tensors, table_ends(family, config), one_by_one)
