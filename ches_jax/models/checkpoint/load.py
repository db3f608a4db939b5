"""A model directory becomes a ``Decoder``: every config key, tensor and parameter accounted for, in one message.

Tensors are read lazily, slice by slice, straight into the device's shards; a stacked parameter is gathered from the
layers' tensors one parameter at a time, so the host never holds the model twice.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from ches_jax.distributed.mesh import LogicalMesh, make_mesh
from ches_jax.errors import CheckpointError, ChesError, many
from ches_jax.hf.directory import resolve
from ches_jax.hf.tensors import DTYPES, Tensor, all_finite
from ches_jax.models.checkpoint.stored_names import (
    as_expected,
    effective_config,
    foreign_prefix,
    kinds_without_weights,
    model_tensors,
    stored_rules,
    table_ends,
)
from ches_jax.models.checkpoint.tensor_map import Rule, resolved
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.models.families.registry import Family, decoder_config, family_of
from ches_jax.models.sharding import placement
from ches_jax.models.stacks import layers_of
from ches_jax.notices import notice

NOT_TIED = (
    ": {other!r} is stored alone, and config.json does not tie the two (tie_word_embeddings). Read as tied, they would "
    "be one matrix; as untied, transformers starts the missing one at random. Say which in config.json, or store both"
)


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose names and shapes have been checked; no weight has been read."""

    directory: Path
    decoder: Decoder
    """With shapes in place of weights; it computes in float32."""
    tensors: dict[str, Tensor]
    table: dict[str, Rule]

    @property
    def config(self) -> DecoderConfig:
        """What the decoder is made of."""
        return self.decoder.config


def open_checkpoint(directory: Path, replaced: Mapping[str, Tensor] | None = None) -> Checkpoint:
    """Check config, tensor names and shapes of a directory, with ``replaced`` in place of some of its tensors.

    Raises:
      CheckpointError: anything that does not fit, all problems in one message.
    """
    raw = effective_config(directory)
    config = decoder_config(raw, str(directory))
    decoder = abstract_decoder(config)
    shapes = {name: leaf.shape for name, leaf in named_parameters(decoder).items()}
    stored = {**model_tensors(directory), **(replaced or {})}
    tensors, table = _checked_table(directory, family_of(raw, str(directory)), config, shapes, stored)
    return Checkpoint(directory, decoder, tensors, table)


def load_model(
    model: str | Path,
    *,
    dtype: DTypeLike = "float32",
    param_dtype: DTypeLike | None = None,
    mesh: Mesh | str | None = None,
    axes: Mapping[str, str | Iterable[str]] | None = None,
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> Decoder:
    """Load a decoder from a Hugging Face directory or hub name.

    Args:
      model: directory, hub name, or ``bundled`` for the small model of the package.
      dtype: dtype of the computation: float32, bfloat16, float16 or float64 (needs x64 enabled).
      param_dtype: dtype the weights are kept in; default: as stored.
      mesh: spread the weights over its devices and compute there. Axes may be explicit or auto; those named ``data``,
        ``fsdp`` and ``tensor`` play those parts (see ``distributed.mesh``). Text is a mesh too: ``fsdp=4``.
      axes: which axes of ``mesh`` play the parts where they are called otherwise: ``{"fsdp": "model"}``.
      sharding: instead of ``mesh``, a function (parameter name, shape) -> sharding. Default: one device.

    Returns:
      A Flax NNX module: call it with token ids [B, T] for logits [B, T, V], or ``hidden`` and ``logits`` apart.

    Raises:
      CheckpointError: anything that does not fit, all problems in one message.
      ChesError: a dtype that cannot be computed in, a mesh whose axes have no part.

    Example:
      >>> model = load_model("bundled", mesh=jax.make_mesh((1,), ("shards",)), axes={"fsdp": "shards"})
      >>> model(np.array([[5, 6, 7]])).dtype
      dtype('float32')
    """
    return load_replaced(
        resolve(model), {}, dtype=dtype, param_dtype=param_dtype, mesh=mesh, axes=axes, sharding=sharding
    )


def load_replaced(
    directory: Path,
    replaced: Mapping[str, Tensor],
    *,
    dtype: DTypeLike = "float32",
    param_dtype: DTypeLike | None = None,
    mesh: Mesh | str | None = None,
    axes: Mapping[str, str | Iterable[str]] | None = None,
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> Decoder:
    """``load_model`` with tensors of another file in place of the directory's, by its names for them."""
    compute, stored_in = _float_dtype("dtype", dtype), _float_dtype("param_dtype", param_dtype)
    if sharding is not None and mesh is not None:
        raise ChesError("load_model: give mesh= or sharding=, not both")
    if axes is not None and mesh is None:
        raise ChesError("load_model: axes= names axes of a mesh; give mesh= too")
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    logical = None if mesh is None else LogicalMesh.of(mesh, axes)
    opened = open_checkpoint(directory, replaced)
    abstract = opened.decoder
    abstract.dtype, abstract.mesh = jnp.dtype(compute), logical
    params = named_parameters(abstract)
    place = sharding or _one_device if logical is None else placement(logical)
    bad: set[str] = set()
    arrays = {
        name: _read(opened, opened.table[name], leaf.shape, stored_in, place(name, leaf.shape), bad)
        for name, leaf in params.items()
    }
    if bad:
        raise _not_finite(directory, bad)
    return with_parameters(abstract, arrays)


def _float_dtype(name: str, dtype: DTypeLike | None) -> np.dtype | None:
    """The dtype as NumPy knows it."""
    if dtype is None:
        return None
    try:
        checked = jnp.dtype(dtype)
    except TypeError:
        checked = None
    known = tuple(DTYPES.values())
    if checked is None or checked.name not in known:
        raise ChesError(f"load_model: {name}={dtype!r}; expected one of {', '.join(known)}")
    if checked == np.float64 and not jax.config.read("jax_enable_x64"):
        raise ChesError(f"load_model: {name}='float64' needs jax.config.update('jax_enable_x64', True)")
    return checked


def _one_device(name: str, shape: tuple[int, ...]) -> Sharding:
    return SingleDeviceSharding(jax.local_devices()[0])


def with_parameters(abstract: Decoder, arrays: dict[str, Any]) -> Decoder:
    """The decoder with ``arrays`` as its parameters."""
    graph, state = nnx.split(abstract)
    flat = [(path, leaf.replace(arrays[".".join(map(str, path))])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def _checked_table(
    directory: Path,
    family: Family,
    config: DecoderConfig,
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, Rule]]:
    """Tensors by the family's names and rules by parameter, after every one of both has been accounted for."""
    table = {rule.param: rule for rule in stored_rules(family, shapes, config, stored)}
    embedding, head = table_ends(family, config)
    stored = _without_unread(directory, stored, table, config)
    names = [name for p, r in table.items() for name in r.names(shapes[p], layers_of(config, p)).values()]
    tensors, problems = as_expected(stored, embedding, head, names)
    if config.tie_embeddings and embedding not in tensors and head in tensors:
        # tied both ways: the one that is stored serves as both
        table["embed_tokens.weight"] = replace(table["embed_tokens.weight"], tensor=head)
    missing = [name for name in dict.fromkeys(names) if name not in tensors]
    if prefix := foreign_prefix(stored, missing):
        raise CheckpointError(
            f"{directory}: all tensor names begin with {prefix!r}, which transformers does not take off either; save "
            "the module inside, not its wrapper"
        )
    kinds, spoken_for = kinds_without_weights(config, table, shapes, tensors)
    problems += kinds
    used: Counter[str] = Counter(spoken_for)
    for param, shape in shapes.items():
        rule = table[param]
        part = shape[rule.lead :]
        for name in rule.names(shape, layers_of(config, param)).values():
            used[name] += 1
            if name in spoken_for:
                continue
            if name not in tensors:
                alone = {"lm_head.weight": embedding, "embed_tokens.weight": head}.get(param)
                problems.append(
                    f"tensor {name!r} is missing (for parameter {param})"
                    + (f"{NOT_TIED.format(other=alone)}" if alone in tensors and not config.tie_embeddings else "")
                )
            elif tensors[name].dtype not in DTYPES.values():
                problems.append(
                    f"tensor {name!r} is stored as {tensors[name].dtype}, and config.json has no 'quantization_config' "
                    f"that says what it means; expected one of {', '.join(DTYPES.values())}"
                )
            elif tensors[name].shape != rule.view.tensor_shape(part):
                problems.append(
                    f"tensor {name!r} has shape {tensors[name].shape}; config.json asks for "
                    f"{rule.view.tensor_shape(part)}"
                )
    # a tied head may be stored beside the embedding it repeats
    tied = {head} if config.tie_embeddings else set()
    problems += [
        f"tensor {t.name!r} matches no parameter of a {config.family} model"
        for n, t in tensors.items()
        if n not in used and n not in tied
    ]
    if problems:
        raise CheckpointError(many(str(directory), problems))
    return tensors, table


def read_parameter(opened: Checkpoint, name: str, shape: tuple[int, ...], sharding: Sharding) -> jax.Array:
    """One parameter as it is stored.

    Raises:
      CheckpointError: it holds NaN or infinite values.
    """
    bad: set[str] = set()
    array = _read(opened, opened.table[name], shape, None, sharding, bad)
    if bad:
        raise _not_finite(opened.directory, bad)
    return array


def _not_finite(directory: Path, names: Iterable[str]) -> CheckpointError:
    return CheckpointError(many(str(directory), [f"tensor {n!r} holds NaN or infinite values" for n in sorted(names)]))


def _without_unread(
    directory: Path, stored: dict[str, Tensor], table: Mapping[str, Rule], config: DecoderConfig
) -> dict[str, Tensor]:
    """The tensors without those that checkpoints of the family hold and the model does not read, which is said once."""
    first = next(rule.tensor.partition("{layer}")[0] for rule in table.values() if rule.stacked)
    beyond = tuple(f"{first}{config.num_layers + n}." for n in range(config.prediction_layers))
    borrowing = [i for i, kind in enumerate(config.kinds) if kind.kv == "borrowed"]
    reasons = {
        "of layers beyond the model's, which predict several tokens at once": beyond,
        "of keys and values in layers that borrow them": tuple(
            f"{first}{i}.self_attn.{name}." for i in borrowing for name in ("k_proj", "v_proj", "k_norm", "v_norm")
        ),
        "of a value head, which reinforcement learning trains beside the model": ("v_head.",),
    }
    out = dict(stored)
    for reason, prefixes in reasons.items():
        without_model = tuple(rest for prefix in prefixes if (rest := prefix.partition(".")[2]))
        unread = {name for name in out if prefixes and name.startswith((*prefixes, *without_model))}
        if unread:
            notice(f"{directory}: {len(unread)} tensors are left out: {reason}")
        out = {name: tensor for name, tensor in out.items() if name not in unread}
    return out


def _read(
    opened: Checkpoint, rule: Rule, shape: tuple[int, ...], dtype: np.dtype | None, sharding: Sharding, bad: set[str]
) -> jax.Array:
    """One parameter as a device array; each shard reads only its own slice. Names of NaN tensors go to ``bad``."""
    names = rule.names(shape, layers_of(opened.config, rule.param))
    tensors = {index: opened.tensors[name] for index, name in names.items()}
    stored = {t.dtype for t in tensors.values()}
    kept = dtype or _common_dtype(stored)

    def fill(tensor: Tensor, index: tuple[slice, ...], out: np.ndarray) -> None:
        direct = out.dtype == np.dtype(tensor.dtype)
        target = out if direct else np.empty(out.shape, np.dtype(tensor.dtype))
        rule.view.read_into(tensor, index, target)
        if not all_finite(target):
            bad.add(tensor.name)
        if not direct:
            out[...] = target

    def shard(index: Any) -> np.ndarray:
        index = resolved(index, shape)
        out = _aligned([s.stop - s.start for s in index], kept)
        lead, rest = index[: rule.lead], index[rule.lead :]
        if not lead:
            fill(tensors[()], rest, out)
            return out
        selected = list(product(*(range(s.start, s.stop) for s in lead)))
        places = [tuple(i - s.start for i, s in zip(at, lead, strict=True)) for at in selected]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda at, place: fill(tensors[at], rest, out[place]), selected, places))
        return out

    if isinstance(sharding, NamedSharding):
        return jax.make_array_from_callback(shape, sharding, shard)
    return jax.device_put(shard(tuple(slice(None) for _ in shape)), sharding)


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array on a 64-byte boundary: what the CPU backend takes over as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _common_dtype(stored: set[str]) -> np.dtype:
    """The stored dtype; float32 (or float64) where layers are stored in several."""
    if len(stored) == 1:
        return np.dtype(stored.pop())
    return np.dtype("float64" if "float64" in stored else "float32")
