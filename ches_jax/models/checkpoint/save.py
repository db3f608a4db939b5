"""A ``Decoder`` becomes a model directory: the loader's table read in the other direction."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ches_jax.errors import CheckpointError
from ches_jax.hf.directory import CONFIG, INDEX, fingerprint, model_files, read_config, weight_files, weight_map
from ches_jax.hf.export import SHARD_BYTES, copy_tokenizer, write_config, write_weights
from ches_jax.hf.quantised.schemes import KEY as QUANTISED
from ches_jax.hf.quantised.schemes import scheme_of
from ches_jax.hf.tensors import DTYPES, STORED, open_files
from ches_jax.hf.text_part import TEXT, TIED, text_config
from ches_jax.models.checkpoint.load import open_checkpoint
from ches_jax.models.checkpoint.stored_names import effective_config, stored_rules
from ches_jax.models.checkpoint.tensor_map import Rule
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, named_parameters
from ches_jax.models.families.registry import decoder_config, family_of
from ches_jax.models.stacks import layers_of
from ches_jax.runs.files import new_directory
from ches_jax.runs.model_card import CARD
from ches_jax.runs.store import output_place


def save_pretrained(
    model: Decoder,
    out: str | Path,
    *,
    like: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    whole: bool = False,
    card: str | None = None,
) -> str:
    """Write ``model`` as a Hugging Face directory.

    Args:
      model: the decoder.
      out: a new (or empty) directory; it appears when it is whole.
      like: directory the model came from: its config, tokenizer and per-tensor dtypes are kept. Of a multimodal
        directory it is the text model that is written, as a checkpoint of its own.
      config: ``config.json`` of a new model, where there is no ``like``.
      dtype: store all weights in this dtype; default: the dtypes of ``like``, else those the parameters have.
      shard_bytes: largest size of a weight file.
      whole: write all of a multimodal ``like``, with ``model`` in place of its text model.
      card: what its ``README.md`` says.

    Returns:
      The fingerprint of the written directory.

    Raises:
      CheckpointError: ``out`` is not empty; ``whole`` of a directory that cannot be written so.
    """
    source = Path(like) if like is not None else None
    if whole and source is not None:
        return _save_whole(model, output_place(out, CheckpointError), source, dtype, shard_bytes, card)
    raw = dict(config) if config is not None else effective_config(source) if source else None
    if raw is None:
        raise ValueError("save_pretrained needs like=DIR or config=dict")
    if decoder_config(raw, "config of the model to save") != model.config:
        raise ValueError("the config does not describe this model")
    there = {} if source is None else {n: t.dtype for n, t in open_checkpoint(source).tensors.items()}
    stored = {} if dtype else there
    params = named_parameters(model)
    family = family_of(raw, str(out))
    rules = stored_rules(family, {name: v.shape for name, v in params.items()}, model.config, there)
    raw.pop(QUANTISED, None)  # what is written is not
    if source is not None and is_multimodal(source):
        raw["architectures"] = [family.ARCHITECTURE]
    with new_directory(output_place(out, CheckpointError), CheckpointError, CONFIG) as directory:
        write_weights(directory, stored_tensors(rules, params, model.config, stored, dtype), shard_bytes)
        kept = {str(v.dtype) for v in params.values()}
        if dtype or source is None:
            raw = without_dtype(raw) | {"dtype": dtype or (kept.pop() if len(kept) == 1 else "float32")}
        write_config(directory, raw)
        if source is not None:
            copy_tokenizer(source, directory)
        _write_card(directory, card)
        return fingerprint(directory)


def _save_whole(model: Decoder, out: Path, source: Path, dtype: str | None, shard_bytes: int, card: str | None) -> str:
    """Every tensor and file of ``source``, the text model's from ``model``."""
    require_whole(source)
    raw, text = read_config(source), effective_config(source)
    opened = open_checkpoint(source)
    if opened.config != model.config:
        raise ValueError("the directory does not describe this model")
    params = named_parameters(model)
    stored = {name: tensor.dtype for name, tensor in opened.tensors.items()}
    shapes = {name: v.shape for name, v in params.items()}
    rules = stored_rules(family_of(text, str(out)), shapes, model.config, stored)
    tied = model.unembedding if model.config.tie_embeddings else None

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        written = set()
        for name, value in stored_tensors(rules, params, model.config, stored, dtype):
            written.add(opened.tensors[name].name)
            yield opened.tensors[name].name, value
        heads = {t.name for t in opened.tensors.values()}
        for name, tensor in open_files(source, weight_files(source), weight_map(source), kinds=STORED).items():
            if name in written:
                continue
            kept = jnp.dtype(dtype) if dtype and tensor.dtype in DTYPES.values() else np.dtype(tensor.dtype)
            # what is left of the text model is a head stored beside the embedding it repeats
            value = np.asarray(tied) if name in heads and tied is not None else tensor.read()
            yield name, value.astype(kept, copy=False)

    if TIED in text and (raw.get(TIED), raw[TEXT].get(TIED)) != (text[TIED], text[TIED]):
        raw |= {TIED: text[TIED], TEXT: raw[TEXT] | {TIED: text[TIED]}}
    if dtype:
        raw = without_dtype(raw) | {"dtype": dtype, TEXT: without_dtype(raw[TEXT]) | {"dtype": dtype}}
    with new_directory(out, CheckpointError, CONFIG) as directory:
        write_weights(directory, tensors(), shard_bytes)
        for path in model_files(source):
            if path.suffix != ".safetensors" and path.name != INDEX:
                (directory / path.relative_to(source)).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, directory / path.relative_to(source))
        write_config(directory, raw)
        _write_card(directory, card)
        return fingerprint(directory)


def _write_card(directory: Path, card: str | None) -> None:
    if card is not None:
        (directory / CARD).write_text(card, encoding="utf-8")


def require_whole(source: Path) -> None:
    """Refuse to write all of a directory where that is not its text model and the rest of it.

    Raises:
      CheckpointError: says what to do instead.
    """
    if not is_multimodal(source):
        raise CheckpointError(
            f"{source}: is no multimodal directory, so there is no more to write than its text model; leave out "
            "--whole (--export-whole)"
        )
    if scheme := scheme_of(text_config(read_config(source), str(source)), str(source)):
        raise CheckpointError(
            f"{source}: its weights are quantised ({scheme.name}), and what is written is not: "
            "the whole directory would be half of each; write the text model alone (leave out --whole, --export-whole)"
        )


def is_multimodal(directory: Path) -> bool:
    """Whether a directory holds a text model inside another one."""
    return TEXT in read_config(directory)


def without_dtype(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config that does not say what its weights are stored in."""
    return {key: value for key, value in raw.items() if key not in ("dtype", "torch_dtype")}


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
