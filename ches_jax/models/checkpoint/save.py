"""A ``Decoder`` becomes a model directory: the loader's table read in the other direction."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ches_jax.errors import CheckpointError
from ches_jax.hf.directory import fingerprint
from ches_jax.hf.export import SHARD_BYTES, copy_tokenizer, write_config, write_weights
from ches_jax.models.checkpoint.load import open_checkpoint
from ches_jax.models.checkpoint.stored_names import effective_config
from ches_jax.models.checkpoint.tensor_map import Rule
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, named_parameters
from ches_jax.models.families.registry import decoder_config, family_of
from ches_jax.models.stacks import layers_of
from ches_jax.runs.files import new_directory


def save_pretrained(
    model: Decoder,
    out: str | Path,
    *,
    like: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Write ``model`` as a Hugging Face directory.

    Args:
      model: the decoder.
      out: a new (or empty) directory; it appears when it is whole.
      like: directory the model came from: its config, tokenizer and per-tensor dtypes are kept.
      config: ``config.json`` of a new model, where there is no ``like``.
      dtype: store all weights in this dtype; default: the dtypes of ``like``, else those the parameters have.
      shard_bytes: largest size of a weight file.

    Returns:
      The fingerprint of the written directory.
    """
    source = Path(like) if like is not None else None
    raw = dict(config) if config is not None else effective_config(source) if source else None
    if raw is None:
        raise ValueError("save_pretrained needs like=DIR or config=dict")
    if decoder_config(raw, "config of the model to save") != model.config:
        raise ValueError("the config does not describe this model")
    stored = {} if source is None or dtype else {n: t.dtype for n, t in open_checkpoint(source).tensors.items()}
    params = named_parameters(model)
    rules = family_of(raw, str(out)).name_rules(params, model.config)
    with new_directory(Path(out), CheckpointError) as directory:
        write_weights(directory, stored_tensors(rules, params, model.config, stored, dtype), shard_bytes)
        kept = {str(v.dtype) for v in params.values()}
        if dtype or source is None:
            raw.pop("torch_dtype", None)
            raw["dtype"] = dtype or (kept.pop() if len(kept) == 1 else "float32")
        write_config(directory, raw)
        if source is not None:
            copy_tokenizer(source, directory)
    return fingerprint(Path(out))


def stored_tensors(
    rules: list[Rule],
    params: Mapping[str, jax.Array],
    config: DecoderConfig,
    stored: Mapping[str, str],
    dtype: str | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file, assembled from the parameters that share it, layer by layer."""
    by_tensor: dict[tuple[str, tuple[int, ...]], list[Rule]] = {}
    for rule in rules:
        by_tensor.setdefault((rule.tensor, layers_of(config, rule.param)), []).append(rule)
    for group in by_tensor.values():
        first = group[0]
        names = first.names(params[first.param].shape, layers_of(config, first.param))
        for index, name in names.items():
            parts = [np.asarray(params[rule.param][index]) for rule in group]
            out = np.empty(group[0].view.tensor_shape(parts[0].shape), parts[0].dtype)
            for rule, part in zip(group, parts, strict=True):
                rule.view.write(out, part)
            yield name, out.astype(jnp.dtype(dtype or stored.get(name, out.dtype)), copy=False)
