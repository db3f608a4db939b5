"""Write a model directory that transformers (and ``ches_jax.hf``) open: safetensors shards, index, config, tokenizer.

The directory is written under a temporary name and renamed when it is whole.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ches_jax.hf.directory import CONFIG, INDEX, SINGLE

SHARD_BYTES = 2 * 2**30
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tiktoken.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
MORE_TEMPLATES = "additional_chat_templates"
"""A folder of chat templates by their names."""


def write_weights(directory: Path, tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as they come, a new shard whenever one is full; one file without an index if one is enough.

    At most one shard is in memory.
    """
    names: list[list[str]] = []
    current: dict[str, np.ndarray] = {}
    size = total = 0

    def flush() -> None:
        save_file(current, directory / f"shard-{len(names):05d}.safetensors", metadata={"format": "pt"})
        names.append(list(current))
        current.clear()

    for name, value in tensors:
        if current and size + value.nbytes > shard_bytes:
            flush()
            size = 0
        current[name] = np.ascontiguousarray(value)
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(names) == 1:
        (directory / "shard-00000.safetensors").rename(directory / SINGLE)
        return
    weight_map = {}
    for i, held in enumerate(names):
        file = f"model-{i + 1:05d}-of-{len(names):05d}.safetensors"
        (directory / f"shard-{i:05d}.safetensors").rename(directory / file)
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_config(directory: Path, raw: Mapping[str, Any]) -> None:
    """``config.json``."""
    (directory / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, directory: Path) -> None:
    """The tokenizer (and generation settings) of ``source``, byte for byte, where it has them."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    for file in sorted((source / MORE_TEMPLATES).glob("*.jinja")):
        (directory / MORE_TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(file, directory / MORE_TEMPLATES / file.name)
