"""Frozen matrices that stay in the bytes of a quantised file and become numbers inside the compiled layer.

This is what QLoRA (arXiv:2305.14314) does with its base: the memory of a run is that of the file and of the adapters.
The numbers are those of the dequantised weights, bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ches_jax.hf.quantised.bitsandbytes import INV_127, NF4
from ches_jax.hf.tensors import Computed
from ches_jax.models.checkpoint.load import Checkpoint, open_checkpoint, read_parameter
from ches_jax.models.checkpoint.tensor_map import Rule, TransposedSlice
from ches_jax.models.decoder import Decoder, named_parameters
from ches_jax.models.layers import Linear
from ches_jax.models.sharding import placement
from ches_jax.models.stacks import layers_of

Arrays = dict[str, jax.Array]


def is_packed(name: str) -> bool:
    """Whether a parameter's name is that of a part of a packed weight."""
    return ".packed." in name


class Packed(nnx.Module):
    """A matrix [outputs, inputs] as codes (int8, or two of four bits in a byte) and factors (float32)."""

    def __init__(self, codes: Any, factors: Any, dtype: str):
        """``dtype`` is what the numbers are rounded to, as the file says."""
        self.codes = nnx.Param(codes)
        self.factors = nnx.Param(factors)
        self.dtype = dtype

    def __call__(self) -> Float[Array, "O I"]:
        """The numbers."""
        codes, factors = self.codes[...], self.factors[...]
        if codes.dtype == jnp.uint8:
            pairs = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(codes.shape[0], -1)
            numbers = jnp.take(jnp.asarray(NF4), pairs.astype(jnp.int32))
        else:
            numbers = codes.astype(jnp.float32)
        numbers = numbers * jnp.repeat(factors, numbers.shape[1] // factors.shape[1], axis=1)
        return (numbers if codes.dtype == jnp.uint8 else numbers * INV_127).astype(self.dtype)


def load_packed(directory: Path, mesh: Mesh) -> tuple[Arrays, dict[str, str]]:
    """The parameters of a directory as stored, and of which modules the weights stay packed (-> their dtype)."""
    opened, place = open_checkpoint(directory), placement(mesh)
    abstract = opened.decoder
    arrays: Arrays = {}
    dtypes: dict[str, str] = {}
    for name, leaf in named_parameters(abstract).items():
        module = name.removesuffix(".weight")
        # routers and tables are no maps that the layers take packed
        linear = module != name and isinstance(_module(abstract, module), Linear)
        stacked = _codes(opened, opened.table[name], leaf.shape) if linear else None
        if stacked is None:
            arrays[name] = read_parameter(opened, name, leaf.shape, place(name, leaf.shape))
            continue
        *parts, dtypes[module] = stacked
        for part, array in zip(("codes", "factors"), parts, strict=True):
            full = f"{module}.packed.{part}"
            arrays[full] = jax.device_put(array, place(full, array.shape))
    return arrays, dtypes


def _codes(opened: Checkpoint, rule: Rule, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, str] | None:
    """Codes and factors of all layers, and the dtype; None where one of them is not stored so."""
    if rule.lead != 1 or len(shape) != 3 or isinstance(rule.view, TransposedSlice):
        return None
    tensors = [opened.tensors[n] for n in rule.names(shape, layers_of(opened.config, rule.param)).values()]
    read = [tensor.codes for tensor in tensors if isinstance(tensor, Computed) and tensor.codes is not None]
    if len(read) < len(tensors) or len({t.dtype for t in tensors}) > 1:
        return None
    rows = rule.view.outputs(shape[1])[0]
    codes, factors = zip(*((c[rows], f[rows]) for c, f in (one() for one in read)), strict=True)
    return np.stack(codes), np.stack(factors), tensors[0].dtype


def with_packed(abstract: Decoder, dtypes: Mapping[str, str], arrays: Mapping[str, Any]) -> Decoder:
    """``abstract`` with packed weights in place of those of the modules in ``dtypes``."""
    for name, dtype in dtypes.items():
        module = _module(abstract, name)
        codes, factors = (arrays[f"{name}.packed.{part}"] for part in ("codes", "factors"))
        module.packed, module.weight = Packed(_shape(codes), _shape(factors), dtype), None
    return abstract


def _module(abstract: Decoder, name: str) -> Any:
    module: Any = abstract
    for part in name.split("."):
        module = module[part] if isinstance(module, nnx.Dict) else getattr(module, part)
    return module


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
