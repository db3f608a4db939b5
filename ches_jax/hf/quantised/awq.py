r"""AWQ (arXiv:2306.00978) in the layout of its matrix-matrix kernel (``gemm``).

.. math:: W_{oi} = s_{g(i)\,o}\,(q_{io} - z_{g(i)\,o})

in the dtype of the scales. ``qweight`` [inputs, outputs] and ``qzeros`` [groups, outputs] are packed along the outputs,
eight numbers of four bits a word; the numbers of a word are those of outputs 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ches_jax.hf.quantised.scheme import (
    Misfit,
    Scheme,
    Settings,
    computed,
    require_dtype,
    require_shape,
    unpacked,
)
from ches_jax.hf.tensors import Tensor

ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
"""Which output of eight stands where in a word."""


@dataclass(frozen=True)
class Awq(Scheme):
    """Four bits with zero points."""

    group: int
    """-1: all inputs are one group."""
    needed: ClassVar = ("qweight", "qzeros", "scales")

    @property
    def name(self) -> str:
        """Bits and groups."""
        return f"awq gemm (4 bits, groups of {'all inputs' if self.group == -1 else self.group})"

    def tensor(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight: s (q - z), transposed to [outputs, inputs]."""
        weight, zeros, scales = (parts[part] for part in self.needed)
        for part in ("qweight", "qzeros"):
            require_dtype(part, parts[part], "int32")
        require_dtype("scales", scales, "float16", "bfloat16", "float32")
        if len(weight.shape) != 2:
            raise Misfit(f"qweight has shape {weight.shape}; expected a matrix")
        inputs, outputs = weight.shape[0], weight.shape[1] * 8
        size = inputs if self.group == -1 else self.group
        if inputs % size:
            raise Misfit(f"{inputs} inputs are no multiple of the group size {size}")
        require_shape("scales", scales, (inputs // size, outputs))
        require_shape("qzeros", zeros, (inputs // size, outputs // 8))

        def rows(start: int, stop: int) -> np.ndarray:
            first = start // 8
            q, z = (_in_order(t.read((slice(None), slice(first, -(-stop // 8))))) for t in (weight, zeros))
            q, z = (a[:, start - first * 8 :][:, : stop - start].astype(np.int16) for a in (q, z))
            s = scales.read((slice(None), slice(start, stop)))
            of_input = np.arange(inputs) // size
            return ((q - z[of_input]).astype(scales.dtype) * s[of_input]).T

        return computed(f"{module}.weight", (outputs, inputs), scales.dtype, weight, rows)


def _in_order(words: np.ndarray) -> np.ndarray:
    """The numbers of some words, in the order of the outputs.

    >>> _in_order(np.array([[0x75316420]], np.uint32))
    array([[0, 1, 2, 3, 4, 5, 6, 7]], dtype=uint8)
    """
    numbers = unpacked(words, 4).reshape(*words.shape, 8)
    out = np.empty_like(numbers)
    out[..., ORDER] = numbers
    return out.reshape(words.shape[0], -1)


def read(raw: Mapping[str, Any], dtype: str) -> tuple[Awq, list[str]]:
    """The scheme of a ``quantization_config``, and what is wrong with it."""
    s = Settings(raw)
    s.need("bits", 4)
    group = s.need("group_size", int)
    if group != -1 and group < 1:
        s.problems.append(f"'group_size' = {group!r}; expected a positive number, or -1")
        group = -1
    s.optional("zero_point", True, True)
    written = str(raw.get("version") or raw.get("format") or "gemm").lower()
    if written != "gemm":
        s.problems.append(f"'version' = {written!r:.40}: words in the order of another kernel; expected 'gemm'")
    return Awq(group), s.problems
