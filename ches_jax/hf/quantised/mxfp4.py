r"""MXFP4 experts (gpt-oss): numbers of 4 bits (e2m1), 32 of them with one power of two.

.. math:: W = \mathrm{e2m1}(q)\,2^{s-127}

``X_blocks`` [experts, rows, groups, 16] holds two numbers a byte, the lower four bits first; ``X_scales`` [experts,
rows, groups] the exponents. X itself is [experts, 32 groups, rows], as the checkpoints in bfloat16 store it. The
products are exact in bfloat16. Source: OCP Microscaling Formats 1.0; transformers' ``integrations/mxfp4.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ches_jax.errors import CheckpointError
from ches_jax.hf.quantised.scheme import Misfit, Scheme, computed, require_dtype, require_shape
from ches_jax.hf.tensors import Tensor

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
SUFFIXES = {"_blocks": "blocks", "_scales": "scales"}


@dataclass(frozen=True)
class Mxfp4(Scheme):
    """It has no settings."""

    dtype: str
    needed: ClassVar = ("blocks", "scales")
    leaf: ClassVar = ""

    @property
    def name(self) -> str:
        """The format's name."""
        return "mxfp4 (e2m1, an exponent for each 32)"

    def part(self, name: str) -> tuple[str, str] | None:
        """``X_blocks`` and ``X_scales``."""
        return next(((name.removesuffix(end), part) for end, part in SUFFIXES.items() if name.endswith(end)), None)

    def tensor(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The experts, transposed."""
        blocks, scales = parts["blocks"], parts["scales"]
        for part in self.needed:
            require_dtype(part, parts[part], "uint8")
        if len(blocks.shape) != 4 or blocks.shape[-1] != 16:
            raise Misfit(f"blocks have shape {blocks.shape}; expected [experts, rows, groups, 16]")
        require_shape("scales", scales, blocks.shape[:-1])
        experts, height, groups, _ = blocks.shape

        def rows(start: int, stop: int) -> np.ndarray:
            pairs = blocks.read((slice(start, stop), *(slice(None),) * 3))
            exponents = scales.read((slice(start, stop), *(slice(None),) * 2))
            if (exponents == 255).any():
                raise CheckpointError(
                    f"{scales.file.parent}: {scales.name}: holds the exponent 255, which stands for NaN"
                )
            numbers = E2M1[np.stack([pairs & 15, pairs >> 4], axis=-1)].reshape(*pairs.shape[:-1], 32)
            values = np.ldexp(numbers, exponents.astype(np.int32)[..., None] - 127)
            return values.reshape(stop - start, height, groups * 32).swapaxes(1, 2).astype(self.dtype)

        return computed(module, (experts, groups * 32, height), self.dtype, blocks, rows)


def read(raw: Mapping[str, Any], dtype: str) -> tuple[Mxfp4, list[str]]:
    """The scheme, and what is wrong with its settings: it has none that count."""
    return Mxfp4(dtype), []
