r"""GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it: whole numbers by groups of inputs.

.. math:: W_{oi} = s_{g(i)\,o}\,(q_{io} - z_{g(i)\,o})

in the dtype of the scales. ``qweight`` [inputs, outputs] is packed along the inputs, ``qzeros`` [groups, outputs] along
the outputs, lowest bits first; ``g_idx`` says which group an input belongs to (activation order). The first version of
the format stores z - 1, the second z.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ches_jax.errors import CheckpointError
from ches_jax.hf.quantised.scheme import (
    Misfit,
    Scheme,
    Settings,
    computed,
    require_dtype,
    require_shape,
    unpacked,
    words_of,
)
from ches_jax.hf.tensors import Tensor


@dataclass(frozen=True)
class Gptq(Scheme):
    """Bits, group size and which version of the format."""

    bits: int
    group: int
    """-1: all inputs are one group."""
    ordered: bool
    version: int
    needed: ClassVar = ("qweight", "qzeros", "scales")
    more: ClassVar = ("g_idx",)

    @property
    def name(self) -> str:
        """Bits, groups, order, version."""
        order = ", activation order" if self.ordered else ""
        size = "all inputs" if self.group == -1 else str(self.group)
        return f"gptq v{self.version} ({self.bits} bits, groups of {size}{order})"

    def tensor(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight: s (q - z), transposed to [outputs, inputs]."""
        weight, zeros, scales = (parts[part] for part in self.needed)
        for part in ("qweight", "qzeros"):
            require_dtype(part, parts[part], "int32")
        require_dtype("scales", scales, "float16", "bfloat16", "float32")
        if len(weight.shape) != 2:
            raise Misfit(f"qweight has shape {weight.shape}; expected a matrix")
        inputs, outputs = weight.shape[0] * 32 // self.bits, weight.shape[1]
        size = inputs if self.group == -1 else self.group
        groups = -(-inputs // size)
        require_shape("scales", scales, (groups, outputs))
        require_shape("qzeros", zeros, (groups, words_of(outputs, self.bits)))
        of_input = self._groups(parts.get("g_idx"), inputs, size, groups)

        def rows(start: int, stop: int) -> np.ndarray:
            q = unpacked(np.ascontiguousarray(weight.read((slice(None), slice(start, stop))).T), self.bits)
            first = start * self.bits // 32
            words = zeros.read((slice(None), slice(first, words_of(stop, self.bits))))
            z = unpacked(words, self.bits)[:, start - first * 32 // self.bits :][:, : stop - start].astype(np.int16)
            if self.version == 1:
                if (z == (1 << self.bits) - 1).any():
                    raise CheckpointError(
                        f"{zeros.file.parent}: {zeros.name}: holds {(1 << self.bits) - 1} in the first version of "
                        f"the format, which some programs read as the zero point 0 and others as {1 << self.bits}; "
                        "save the model as gptq_v2"
                    )
                z = z + 1
            s = scales.read((slice(None), slice(start, stop)))
            return s[of_input].T * (q.astype(np.int16) - z[of_input].T).astype(scales.dtype)

        return computed(f"{module}.weight", (outputs, inputs), scales.dtype, weight, rows)

    def _groups(self, g_idx: Tensor | None, inputs: int, size: int, groups: int) -> np.ndarray:
        """The group of each input."""
        if g_idx is None:
            if self.ordered:
                raise Misfit("half described: has no g_idx, and 'desc_act' is true")
            return np.arange(inputs) // size
        require_shape("g_idx", g_idx, (inputs,))
        of_input = g_idx.read().astype(np.int64)
        if of_input.min() < 0 or of_input.max() >= groups:
            raise Misfit(f"g_idx names group {of_input.max()}; there are {groups}")
        return of_input


def read(raw: Mapping[str, Any], dtype: str) -> tuple[Gptq, list[str]]:
    """The scheme of a ``quantization_config``, and what is wrong with it."""
    s = Settings(raw)
    bits = s.need("bits", 4, 8, 2)
    group = s.need("group_size", int)
    if group != -1 and group < 1:
        s.problems.append(f"'group_size' = {group!r}; expected a positive number, or -1")
        group = -1
    s.off("dynamic", "modules are quantised differently, which is not read")
    s.off("is_marlin_format", "words are stored in the order of one kernel")
    s.optional("pack_dtype", "int32", "int32", "torch.int32")
    written = raw.get("checkpoint_format") or raw.get("format") or "gptq"
    if written not in ("gptq", "gptq_v2"):
        s.problems.append(f"'checkpoint_format' = {written!r:.40}; expected 'gptq' or 'gptq_v2'")
    return Gptq(bits, group, bool(raw.get("desc_act")), 2 if written == "gptq_v2" else 1), s.problems
