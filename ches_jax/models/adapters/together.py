"""Adapters of experts whose matrices lie in one tensor, in PEFT's format (``target_parameters``).

PEFT adapts a parameter [E, ...] of a module ``experts`` as one map for each of E experts, and stores them together:
``lora_A`` [E r, in], expert by expert, and ``lora_B`` [out, r E], rank by rank. A module with two such parameters is
wrapped twice: the first of them is adapted inside, under ``experts.base_layer``, the second under ``experts``. Where
the tensor is [E, in, out] and the code of the module does not say so (Llama 4), PEFT takes inputs for outputs: there A
and B have changed places.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from ches_jax.models.checkpoint.tensor_map import ExpertPart, Rule
from ches_jax.models.stacks import below_stack

FIRST = "gate_up_proj"
"""The parameter that modules define first, and PEFT wraps first."""
SAYS_TURNED = frozenset({"gpt_oss"})
"""Families whose tensors are [E, in, out] and whose code says so (``is_transposed``)."""


def is_together(rule: Rule) -> bool:
    """Whether the matrices of all experts are in one tensor."""
    return (below_stack(rule.param) or "").startswith("mlp.experts.") and not rule.by_expert


def swapped(rule: Rule, family: str) -> bool:
    """Whether PEFT takes the tensor's inputs for outputs."""
    return isinstance(rule.view, ExpertPart) and rule.view.turned and family not in SAYS_TURNED


def wrappers(stored: Iterable[str], targets: Sequence[str]) -> dict[str, str]:
    """The module that PEFT keeps the adapter of a stored tensor under -> that tensor.

    Args:
      stored: names of the tensors.
      targets: ``target_parameters``, which mean the tensors whose names end so.

    >>> wrappers(["l.0.experts.down_proj", "l.0.experts.gate_up_proj"], ["experts.gate_up_proj", "experts.down_proj"])
    {'l.0.experts': 'l.0.experts.down_proj', 'l.0.experts.base_layer': 'l.0.experts.gate_up_proj'}
    """
    by_module: dict[str, list[str]] = {}
    for name in dict.fromkeys(stored):
        if any(name == target or name.endswith(f".{target}") for target in targets):
            by_module.setdefault(name.rpartition(".")[0], []).append(name)
    out = {}
    for module, names in by_module.items():
        outermost_first = sorted(names, key=lambda name: name.endswith(f".{FIRST}"))
        out |= {module + ".base_layer" * depth: name for depth, name in enumerate(outermost_first)}
    return out


def side_by_side(a: np.ndarray, b: np.ndarray, swap: bool) -> tuple[np.ndarray, np.ndarray]:
    """A [E, r, in] and B [E, out, r] as PEFT stores them."""
    if swap:
        a, b = b.swapaxes(1, 2), a.swapaxes(1, 2)
    return a.reshape(-1, a.shape[-1]), b.transpose(1, 2, 0).reshape(b.shape[1], -1)


def by_expert(a: np.ndarray, b: np.ndarray, experts: int, swap: bool) -> tuple[np.ndarray, np.ndarray]:
    """What ``side_by_side`` was given."""
    a = a.reshape(experts, -1, a.shape[-1])
    b = b.reshape(len(b), -1, experts).transpose(2, 0, 1)
    return (b.swapaxes(1, 2), a.swapaxes(1, 2)) if swap else (a, b)
