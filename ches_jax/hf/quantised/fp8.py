r"""fp8 weights with one scale for each block (DeepSeek-V3, Qwen3-FP8).

.. math:: W_{ij} = q_{ij}\,s_{\lfloor i/b_r\rfloor,\lfloor j/b_c\rfloor}

``weight`` is float8_e4m3fn, ``weight_scale_inv`` holds s (in spite of its name a factor). The product is taken in
float32 and rounded to the dtype that ``config.json`` names, as DeepSeek's own conversion and transformers do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ches_jax.hf.quantised.scheme import Misfit, Scheme, Settings, computed, require_dtype, require_shape
from ches_jax.hf.tensors import Tensor


@dataclass(frozen=True)
class Fp8(Scheme):
    """Block scales, or one scale for the whole weight where ``block`` is None."""

    block: tuple[int, int] | None
    dtype: str
    needed: ClassVar = ("weight", "weight_scale_inv")

    @property
    def name(self) -> str:
        """Of the weights; what a server does to activations is no part of them."""
        per = "tensor" if self.block is None else f"block of {self.block[0]}x{self.block[1]}"
        return f"fp8 (e4m3, a scale for each {per})"

    def tensor(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight: q times its block's scale."""
        weight, scale = (parts[part] for part in self.needed)
        require_dtype("weight", weight, "float8_e4m3fn")
        require_dtype("weight_scale_inv", scale, "float32", "bfloat16", "float16")
        *lead, height, width = weight.shape
        if self.block is None:
            if int(np.prod(scale.shape)) != 1:
                raise Misfit(
                    f"weight_scale_inv has shape {scale.shape}; expected one number ('weight_block_size' is not given)"
                )
            block = (height, width)
        else:
            block = self.block
            require_shape("weight_scale_inv", scale, (*lead, -(-height // block[0]), -(-width // block[1])))

        def rows(start: int, stop: int) -> np.ndarray:
            q = weight.read((slice(start, stop), *(slice(None) for _ in weight.shape[1:]))).astype(np.float32)
            if self.block is None:
                return (q * scale.read().astype(np.float32).reshape(())).astype(self.dtype)
            s = scale.read().astype(np.float32)
            if lead:
                s, at = s[start:stop], np.arange(height)
            else:
                at = np.arange(start, stop)
            s = s[..., at // block[0], :][..., np.arange(width) // block[1]]
            return (q * s).astype(self.dtype)

        return computed(f"{module}.weight", weight.shape, self.dtype, weight, rows)


def read(raw: Mapping[str, Any], dtype: str) -> tuple[Fp8, list[str]]:
    """The scheme of a ``quantization_config``, and what is wrong with it."""
    s = Settings(raw)
    s.optional("fmt", "e4m3", "e4m3")
    if raw.get("activation_scheme", "dynamic") != "dynamic":
        s.problems.append(
            f"'activation_scheme' = {raw['activation_scheme']!r}: activations are quantised with stored scales, which "
            "is another function than that of the weights"
        )
    block = s.optional("weight_block_size", None, list)
    if block is not None and not (len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        s.problems.append(f"'weight_block_size' = {block!r:.60}; expected two positive numbers")
        block = None
    return Fp8(None if block is None else (block[0], block[1]), dtype), s.problems
