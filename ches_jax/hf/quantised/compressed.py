r"""compressed-tensors, weights only: int8, packed int4 and fp8 with a scale for each tensor, channel, group or block.

.. math:: W_{ij} = (q_{ij} - z_{ij})\,s_{ij}

in the arithmetic of the scale's dtype, which is also that of the weight. ``pack-quantized`` stores q + 2^(bits-1) in
``weight_packed``, 32-bit words along the inputs, and zero points in words along the outputs; ``weight_g_idx`` says
which group an input belongs to where activations were ordered. Source: the library's own ``decompress``.
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
    words_of,
)
from ches_jax.hf.tensors import Tensor

PACKED = "pack-quantized"
FORMATS = (PACKED, "int-quantized", "float-quantized", "naive-quantized")
LATER = "is another function than that of the weights; only weight-only checkpoints are read"


@dataclass(frozen=True)
class Compressed(Scheme):
    """One set of settings for all quantised weights."""

    format: str
    kind: str
    bits: int
    strategy: str
    group: int | None
    block: tuple[int, int] | None
    symmetric: bool
    ordered: bool
    needed: ClassVar = ("weight_scale",)
    more: ClassVar = ("weight", "weight_packed", "weight_zero_point", "weight_shape", "weight_g_idx")

    @property
    def name(self) -> str:
        """Format, bits and what has a scale."""
        size = {"group": f" of {self.group}", "block": f" of {self.block}"}.get(self.strategy, "")
        zero = "" if self.symmetric else ", zero points"
        return (
            f"compressed-tensors {self.format} ({self.kind}{self.bits}, a scale for each {self.strategy}{size}{zero})"
        )

    def tensor(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight: (q - z) s."""
        scale, zero = parts["weight_scale"], parts.get("weight_zero_point")
        require_dtype("weight_scale", scale, "float32", "bfloat16", "float16")
        stored, shape = self._stored(parts)
        if len(shape) != 2:
            raise Misfit(f"the weight has shape {shape}; expected a matrix")
        height, width = shape
        of_row, of_column = self._places(height, width, parts.get("weight_g_idx"))
        grid = (int(of_row[-1]) + 1, int(of_column.max()) + 1)
        flat: list[tuple[int, ...]] = [(grid[0],)] if grid[1] == 1 else []
        require_shape("weight_scale", scale, grid, *flat, *([()] if grid == (1, 1) else []))
        if zero is None and not self.symmetric:
            raise Misfit("half described: has no weight_zero_point, and 'symmetric' is false")
        packed_zero = zero is not None and self.format == PACKED and self.strategy in ("group", "channel")
        if zero is not None and packed_zero:
            require_dtype("weight_zero_point", zero, "int32")
            require_shape("weight_zero_point", zero, (words_of(grid[0], self.bits), grid[1]))
        elif zero is not None:
            require_dtype("weight_zero_point", zero, "int8", "float8_e4m3fn", scale.dtype)
            require_shape("weight_zero_point", zero, scale.shape)

        def rows(start: int, stop: int) -> np.ndarray:
            q = self._numbers(stored, start, stop, width).astype(scale.dtype)
            at = np.ix_(of_row[start:stop], of_column)
            if zero is not None:
                z = zero.read()
                if packed_zero:
                    z = unpacked(np.ascontiguousarray(z.T), self.bits).T[: grid[0]].astype(np.int16) - self._offset
                q = q - z.reshape(grid)[at].astype(scale.dtype)
            return q * scale.read().reshape(grid)[at]

        return computed(f"{module}.weight", (height, width), scale.dtype, stored, rows)

    @property
    def _offset(self) -> int:
        return 1 << (self.bits - 1)

    def _stored(self, parts: Mapping[str, Tensor]) -> tuple[Tensor, tuple[int, ...]]:
        """The tensor that holds q, and the shape of the weight."""
        if self.format != PACKED:
            if "weight" not in parts:
                raise Misfit("half described: lacks weight")
            weight = parts["weight"]
            require_dtype("weight", weight, "int8" if self.kind == "int" else "float8_e4m3fn")
            return weight, weight.shape
        if lacking := [part for part in ("weight_packed", "weight_shape") if part not in parts]:
            raise Misfit(f"half described: lacks {', '.join(lacking)}")
        packed = parts["weight_packed"]
        require_dtype("weight_packed", packed, "int32")
        require_dtype("weight_shape", parts["weight_shape"], "int64", "int32")
        shape = tuple(int(n) for n in parts["weight_shape"].read())
        if len(shape) == 2:
            require_shape("weight_packed", packed, (shape[0], words_of(shape[1], self.bits)))
        return packed, shape

    def _numbers(self, stored: Tensor, start: int, stop: int, width: int) -> np.ndarray:
        """The q of some rows."""
        numbers = stored.read((slice(start, stop), slice(None)))
        if self.format != PACKED:
            return numbers
        return unpacked(numbers, self.bits)[:, :width].astype(np.int16) - self._offset

    def _places(self, height: int, width: int, g_idx: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of the scale of each row and each column of the weight."""
        row, column = np.arange(height), np.zeros(width, np.int64)
        if self.strategy == "tensor":
            return row * 0, column
        if self.block is not None:
            return row // self.block[0], np.arange(width) // self.block[1]
        if self.group is None:
            return row, column
        if g_idx is None:
            if self.ordered:
                raise Misfit("half described: has no weight_g_idx, and 'actorder' is 'group'")
            if width % self.group:
                raise Misfit(f"{width} inputs are no multiple of the group size {self.group}")
            return row, np.arange(width) // self.group
        require_shape("weight_g_idx", g_idx, (width,))
        groups = g_idx.read().astype(np.int64)
        if sorted(set(groups.tolist())) != list(range(-(-width // self.group))):
            raise Misfit("weight_g_idx does not number the groups of the inputs")
        return row, groups


def read(raw: Mapping[str, Any], dtype: str) -> tuple[Compressed | None, list[str]]:
    """The scheme of a ``quantization_config``, and what is wrong with it."""
    s = Settings(raw)
    s.optional("quantization_status", "compressed", "compressed")
    s.off("kv_cache_scheme", f"keys and values are quantised, which {LATER}")
    s.off("transform_config", "weights are stored rotated")
    sparsity = raw.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format", "dense") != "dense":
        s.problems.append(f"'sparsity_config' has the format {sparsity['format']!r}, which is not read")
    groups = s.need("config_groups", dict)
    groups = groups if isinstance(groups, dict) else {}
    schemes: set[Compressed] = set()
    for key, group in groups.items():
        g = Settings(group if isinstance(group, dict) else {}, f"{key}.")
        for name in ("input_activations", "output_activations"):
            g.off(name, f"activations are quantised, which {LATER}")
        one = _weights(g, raw.get("format") or g.raw.get("format"))
        s.problems += g.problems
        if one is not None and not g.problems:
            schemes.add(one)
    if not groups and not s.problems:
        s.problems.append("half described: 'config_groups' is empty")
    if len(schemes) > 1:
        s.problems.append("'config_groups' quantise different weights differently, which is not read")
    return next(iter(schemes), None), s.problems


def _weights(g: Settings, written: Any) -> Compressed | None:
    """The settings of one group."""
    w = Settings(g.need("weights", dict) if isinstance(g.raw.get("weights"), dict) else {}, f"{g.prefix}weights.")
    if not w.raw:
        g.problems.append(f"half described: {g.prefix}'weights' is missing")
        return None
    form = Settings({"format": written})
    format_ = form.need("format", *FORMATS)
    kind = w.need("type", "int", "float")
    bits = w.need("num_bits", *((8,) if format_ != PACKED else (2, 4, 8)))
    strategy = w.need("strategy", "tensor", "channel", "group", "block")
    w.optional("dynamic", False, False)
    other = {"float": (PACKED, "int-quantized"), "int": ("float-quantized",)}[kind]
    if format_ in other:
        w.problems.append(f"{w.prefix}'type' = {kind!r} in the format {format_!r}")
    group = w.need("group_size", int) if strategy == "group" else None
    block = w.need("block_structure", list) if strategy == "block" else None
    if block is not None and not (isinstance(block, list) and len(block) == 2):
        block = [1, 1]
    actorder = w.optional("actorder", None, "group", "weight", "static", "dynamic", False)
    g.problems += [*form.problems, *w.problems]
    return Compressed(
        format_,
        kind,
        bits,
        strategy,
        group,
        None if block is None else (block[0], block[1]),
        bool(w.optional("symmetric", True, bool)),
        actorder in ("group", "dynamic"),
    )
