r"""bitsandbytes: nf4 in blocks (QLoRA, arXiv:2305.14314), and int8 by rows (LLM.int8, arXiv:2208.07339).

.. math:: W_k = \mathrm{code}[q_k]\;a_{\lfloor k/b \rfloor}, \qquad W_{ij} = q_{ij}\,c_i / 127

nf4 packs two numbers a byte, the upper four bits first, over the flattened weight; the largest magnitudes a are stored
in float32, or quantised once more (double quantisation): a = code2[a8] a2 + offset. Computed in float32 and rounded to
the dtype that the quantisation state (for int8: ``config.json``) names. The outliers that LLM.int8 treats apart are a
matter of the activations: the weights are these.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ches_jax.hf.quantised.scheme import Misfit, Scheme, Settings, computed, require_dtype, require_shape
from ches_jax.hf.tensors import DTYPES, Tensor

STATE = "quant_state.bitsandbytes__nf4"
BIT4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)
NF4 = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022833234,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
"""The values of nf4: quantiles of a normal distribution (QLoRA, appendix E)."""
INV_127 = np.float32(7.874015718698502e-3)
"""1 / 127 as the library writes it."""


@dataclass(frozen=True)
class Nf4(Scheme):
    """Every weight brings its own state."""

    needed: ClassVar = ("weight", "absmax", "quant_map", STATE)

    @property
    def name(self) -> str:
        """The format's name."""
        return "bitsandbytes nf4"

    def part(self, name: str) -> tuple[str, str] | None:
        """``X.weight`` and ``X.weight.absmax`` and so on."""
        if name.endswith(".weight"):
            return name.removesuffix(".weight"), "weight"
        module, found, part = name.partition(".weight.")
        return (module, part) if found and part.startswith(("quant_state.", *BIT4_PARTS)) else None

    def tensor(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight: code[q] a."""
        weight, state = parts["weight"], _state(parts[STATE])
        height, width, size, dtype = *state["shape"], state["blocksize"], state["dtype"]
        count = height * width
        if width % 2 and height > 1:
            raise Misfit(f"the weight has shape {(height, width)}; expected an even number of inputs")
        if int(np.prod(weight.shape)) * np.dtype(weight.dtype).itemsize != -(-count // 2):
            raise Misfit(f"weight has shape {weight.shape}, which does not hold {count} numbers of 4 bits")
        blocks, nested = -(-count // size), "nested_absmax" in parts or "nested_quant_map" in parts
        require_shape("absmax", parts["absmax"], (blocks,))
        require_shape("quant_map", parts["quant_map"], (16,))
        require_dtype("absmax", parts["absmax"], "uint8" if nested else "float32")
        if nested:
            if lacking := [k for k in ("nested_absmax", "nested_quant_map") if k not in parts]:
                raise Misfit(f"half described: lacks {', '.join(lacking)}")
            if not all(isinstance(state.get(k), int | float) for k in ("nested_blocksize", "nested_offset")):
                raise Misfit("half described: the state lacks nested_blocksize and nested_offset")
            require_shape("nested_absmax", parts["nested_absmax"], (-(-blocks // state["nested_blocksize"]),))
            require_shape("nested_quant_map", parts["nested_quant_map"], (256,))

        def rows(start: int, stop: int) -> np.ndarray:
            first, last = start * width, stop * width
            # the library may store the bytes under any dtype
            flat = Tensor(weight.name, (-(-count // 2),), "uint8", weight.file, weight.offset)
            pairs = flat.read((slice(first // 2, -(-last // 2)),))
            q = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)[first % 2 :][: last - first]
            a = _largest(parts, state, first // size, -(-last // size))
            a = a[np.arange(first, last) // size - first // size]
            values = parts["quant_map"].read().astype(np.float32)[q] * a
            return values.reshape(stop - start, width).astype(dtype)

        def codes() -> tuple[np.ndarray, np.ndarray]:
            flat = Tensor(weight.name, (height, width // 2), "uint8", weight.file, weight.offset)
            return flat.read(), _largest(parts, state, 0, blocks).reshape(height, width // size)

        by_rows = width % size == 0 and np.array_equal(parts["quant_map"].read(), NF4)
        return computed(f"{module}.weight", (height, width), dtype, weight, rows, codes if by_rows else None)


def _largest(parts: Mapping[str, Tensor], state: Mapping[str, Any], start: int, stop: int) -> np.ndarray:
    """The largest magnitudes of some blocks."""
    a = parts["absmax"].read((slice(start, stop),))
    if "nested_absmax" not in parts:
        return a
    code, outer = (parts[k].read().astype(np.float32) for k in ("nested_quant_map", "nested_absmax"))
    return code[a] * outer[np.arange(start, stop) // state["nested_blocksize"]] + np.float32(state["nested_offset"])


def _state(tensor: Tensor) -> dict[str, Any]:
    """The JSON that is stored as bytes."""
    try:
        state = json.loads(tensor.read().tobytes().decode("utf-8"))
    except (ValueError, UnicodeDecodeError) as e:
        raise Misfit(f"the quantisation state is no JSON ({e})") from None
    if not isinstance(state, dict):
        raise Misfit("the quantisation state is no JSON object")
    shape, size, dtype = (state.get(k) for k in ("shape", "blocksize", "dtype"))
    if not (isinstance(shape, list) and len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)):
        raise Misfit(f"half described: the state's 'shape' is {shape!r:.40}; expected two numbers")
    if not (isinstance(size, int) and size > 1 and size % 2 == 0):
        raise Misfit(f"half described: the state's 'blocksize' is {size!r:.40}; expected an even number")
    if dtype not in DTYPES.values():
        raise Misfit(
            f"half described: the state's 'dtype' is {dtype!r:.40}; expected one of {', '.join(DTYPES.values())}"
        )
    return state


@dataclass(frozen=True)
class Int8(Scheme):
    """Rows scaled by their largest magnitude."""

    dtype: str
    needed: ClassVar = ("weight", "SCB")
    more: ClassVar = ("weight_format",)

    @property
    def name(self) -> str:
        """The format's name."""
        return "bitsandbytes int8"

    def tensor(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight: q c / 127."""
        weight, largest, layout = parts["weight"], parts["SCB"], parts.get("weight_format")
        require_dtype("weight", weight, "int8")
        require_dtype("SCB", largest, "float32")
        require_shape("SCB", largest, weight.shape[:1])
        if layout is not None and int(layout.read().reshape(-1)[0]) != 0:
            raise Misfit("weight_format is not that of plain rows (0); save the model again with a current version")

        def rows(start: int, stop: int) -> np.ndarray:
            q = weight.read((slice(start, stop), slice(None))).astype(np.float32)
            return (q * largest.read((slice(start, stop),))[:, None] * INV_127).astype(self.dtype)

        def codes() -> tuple[np.ndarray, np.ndarray]:
            return weight.read(), largest.read()[:, None]

        return computed(f"{module}.weight", weight.shape, self.dtype, weight, rows, codes)


def read(raw: Mapping[str, Any], dtype: str) -> tuple[Nf4 | Int8 | None, list[str]]:
    """The scheme of a ``quantization_config``, and what is wrong with it."""
    s = Settings(raw)
    four, eight = (bool(raw.get(k, raw.get(f"_{k}"))) for k in ("load_in_4bit", "load_in_8bit"))
    if four == eight:
        s.problems.append("half described: one of 'load_in_4bit' and 'load_in_8bit' should be true")
        return None, s.problems
    if eight:
        s.off("llm_int8_has_fp16_weight", "the weights are not those that are stored")
        return Int8(dtype), s.problems
    s.need("bnb_4bit_quant_type", "nf4")
    return Nf4(), s.problems
