"""Find and check the files of a model directory; every problem names its file.

A directory holds ``config.json`` and either ``model.safetensors`` or ``model.safetensors.index.json`` with the
shards it names; where both are there the single file counts, as in transformers. Nothing is unpickled and no code of
the directory is run.

Of a directory in a store all but the weights is copied here (``resolve``), where tokenizer and config are read by
libraries that want files; the weights stay there (``weights_place``) and are read by the byte ranges of what is held.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import Any

from ches_jax.bundled import located, model_dir
from ches_jax.errors import CheckpointError, many
from ches_jax.notices import notice
from ches_jax.runs.files import read_object
from ches_jax.runs.store import (
    content_mark,
    copy_of,
    fetched_files,
    is_address,
    is_store,
    is_there,
    names_in,
    place,
    scheme_of,
)

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]


_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_KNOWN_FILES = (
    CONFIG, INDEX, "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", *_ADAPTER_FILES,
)  # fmt: skip
"""The files that are requested where a server does not list a folder."""
_WEIGHTS: dict[Path, Path] = {}
"""Copy of a directory -> the place in a store where its weights are."""


def weights_place(directory: Path) -> Path:
    """Where the weights of a directory lie: there, or in the store that it is the copy of."""
    return _WEIGHTS.get(directory, directory)


def _beside_store(address: Path) -> Path:
    """A copy of all but the weights of a directory in a store; an adapter, which is small, with its weights.

    Raises:
      CheckpointError: there is no model or adapter there, or it cannot be read.
    """
    directory = copy_of(address)
    if directory not in _WEIGHTS:
        listed = scheme_of(address) not in ("http", "https")
        names = names_in(address, CheckpointError) if listed else _KNOWN_FILES
        wanted = [n for n in names if n in _ADAPTER_FILES or any(Path(n).match(p) for p in HUB_FILES[1:])]
        found = fetched_files(address, wanted, CheckpointError)
        if CONFIG not in found and _ADAPTER_FILES[0] not in found:
            raise CheckpointError(f"{address}: no {CONFIG} there; expected a Hugging Face model directory")
        _WEIGHTS[directory] = address
    return directory


def resolve(model: str | Path) -> Path:
    """The local directory of ``model``: a path, or a hub name that is fetched (or found in the hub's cache).

    ``bundled`` is the model of the package. Of an address (``gs://``, ``s3://``, ``hf://``, ``https://``) it is a copy
    without the weights (see ``weights_place``).

    Raises:
      CheckpointError: there is no such directory and the hub cannot give it.
    """
    if not isinstance(model, str | PurePath) and not is_store(model):
        raise CheckpointError(
            f"a {type(model).__name__} instead of a model's name; give a local Hugging Face model directory or a hub "
            "name (owner/name)"
        )
    if is_address(str(model)):
        address = place(str(model), CheckpointError)
        if is_store(address):
            return _beside_store(address)
        model = address
    path = Path(located(str(model), model_dir)).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: is a file; expected a model directory with {CONFIG} in it")
    name = str(model)
    if name == "embedded":
        raise CheckpointError("embedded: what ships with the package is called bundled since 0.2.0; give bundled")
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{path}: no such directory; give a local Hugging Face model directory or a hub name (owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as e:  # the hub client raises dozens of types; all mean "not to be had"
        raise CheckpointError(
            f"{name}: not a local directory, and it cannot be downloaded from the hub ({type(e).__name__}); check the "
            "name, the network and the licence, or give a local directory"
        ) from e


LONGEST_NAME = 255
"""Bytes of the name of a file, on every common file system; asking for a longer one is an error of the system."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``, or a CheckpointError that names the file and what is wrong."""
    return read_object(path, CheckpointError, "a Hugging Face model directory")


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` as a dict.

    Raises:
      CheckpointError: it cannot be read, or is not there: an adapter alone is no model.
    """
    if not (directory / CONFIG).exists() and (directory / _ADAPTER_FILES[0]).exists():
        raise CheckpointError(
            f"{directory}: a PEFT adapter{_of_base(directory)} and no model; give that as --model and this directory "
            "as --adapter"
        )
    config = read_json(directory / CONFIG)
    if isinstance(verb := config.get("verb"), str) and "model_type" not in config:
        raise CheckpointError(f"{directory}: a run of `ches {verb:.20}` and no model{_model_of_run(directory, verb)}")
    return config


def _model_of_run(directory: Path, verb: str) -> str:
    """Where a run keeps the model that it trained; empty where it trains none."""
    if verb != "train":
        return f"; expected a Hugging Face model directory with {CONFIG} in it"
    if (directory / "model" / CONFIG).is_file():
        return f"; the one that it trained is {directory / 'model'}"
    return f"; write what it trained with: ches convert --run {directory} --out MODEL"


def _of_base(directory: Path) -> str:
    """`` of BASE``, where the adapter in a directory names its base."""
    try:
        base = read_json(directory / _ADAPTER_FILES[0]).get("base_model_name_or_path")
    except CheckpointError:
        base = None
    return f" of {base!r:.200}" if base else ""


def _require_one_reading(directory: Path, folder: Path) -> None:
    """Refuse whole weights beside an adapter: transformers reads the adapter on its base, and not those weights.

    Raises:
      CheckpointError: both are there.
    """
    config, weights = _ADAPTER_FILES
    if not (directory / config).exists():
        return
    found = next((n for n in (weights, "adapter_model.bin") if is_there(folder / n) or (directory / n).exists()), None)
    if found is not None:
        raise CheckpointError(
            f"{directory}: holds a model's weights and, in {config} and {found}, an adapter{_of_base(directory)}: "
            "transformers loads that base with the adapter on it, and not the weights beside them. Move the two files "
            "to a directory of their own (--adapter puts them on a model), or remove them if they are merged already"
        )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the directory: the single one, or those of the index in order of first mention.

    Raises:
      CheckpointError: none there, an index that names a missing file or one outside the directory, an adapter beside
        them.
    """
    folder = weights_place(directory)
    single, index = folder / SINGLE, directory / INDEX
    if is_there(single) or index.exists():
        _require_one_reading(directory, folder)
    if is_there(single):
        if index.exists() and set(_named_by(index)) != {SINGLE}:
            notice(
                f"{directory}: {SINGLE} is read, as transformers does; {INDEX} beside it and the files it names are "
                "not (an older save? remove one of the two)"
            )
        return [single]
    if not index.exists():
        raise CheckpointError(f"{directory}: no {SINGLE} and no {INDEX}{_other_weights(directory)}")
    names = list(dict.fromkeys(weight_map(directory).values()))
    problems, files = [], []
    for name in names:
        if Path(name).name != name or name in {"", ".", ".."}:
            problems.append(f"{name!r} is a path outside the directory; the index may only name files beside it")
        elif len(name.encode("utf-8", "replace")) > LONGEST_NAME or not is_there(folder / name):
            problems.append(f"shard {name!r} is missing")
        else:
            files.append(folder / name)
    if problems:
        raise CheckpointError(many(str(index), problems))
    return files


def _other_weights(directory: Path) -> str:
    """What there is instead of weights under the names that count, and what to do with it."""
    names = sorted(p.name for p in directory.iterdir())
    other = [n for n in names if Path(n).suffix in {".bin", ".pt", ".pth", ".gguf", ".msgpack"}]
    shards = [n for n in names if n.endswith(".safetensors")]
    if not shards:
        return f" (found {_first(other)}: convert to safetensors first)" if other else ""
    return (
        f" (found {_first(shards)}: transformers reads none of these names either; write the index of the shards, or "
        f"call a single file {SINGLE})"
    )


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> name of its file, as the index has it; empty where the single file counts.

    Raises:
      CheckpointError: an index that is none.
    """
    if is_there(weights_place(directory) / SINGLE):
        return {}
    index = directory / INDEX
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: expected a non-empty 'weight_map' object")
    return {name: str(file) for name, file in names.items()}


def _named_by(index: Path) -> list[str]:
    """The files that an index names which is not read itself: none where it is damaged."""
    try:
        names = read_json(index).get("weight_map")
    except CheckpointError:
        return []
    return [str(file) for file in names.values()] if isinstance(names, dict) else []


def model_files(directory: Path) -> list[Path]:
    """Every file of the directory that may be read: weights, and what configures model, tokenizer and generation.

    Raises:
      CheckpointError: as ``weight_files``.
    """
    weights = weight_files(directory)
    others = {p for pattern in HUB_FILES for p in directory.glob(pattern) if p.is_file() and p.suffix != ".safetensors"}
    templates = (p for p in (directory / "additional_chat_templates").glob("*.jinja") if p.is_file())
    return [*weights, *sorted(others), *sorted(templates)]


def fingerprint(directory: Path) -> str:
    """SHA-256 over the bytes of the config and the weight files (32 hex digits): equal means equal weights."""
    return fingerprint_of([directory / CONFIG, *weight_files(directory)])


def fingerprint_of(files: Sequence[Path]) -> str:
    """SHA-256 over the bytes of some files (32 hex digits)."""
    return joined_fingerprint(file_digests(files), files)


def joined_fingerprint(digests: Mapping[Path, bytes], files: Sequence[Path]) -> str:
    """One fingerprint of several files whose digests are known (32 hex digits)."""
    return hashlib.sha256(b"".join(digests[path] for path in files)).hexdigest()[:32]


def file_digests(files: Iterable[Path]) -> dict[Path, bytes]:
    """SHA-256 of the bytes of each file, several read at a time; in a store what stands for them there.

    Weights in a store are not read for it: its own checksum counts, or its version of the file.
    """

    def digest(path: Path) -> bytes:
        return bytes.fromhex(content_mark(path))

    files = list(files)
    with ThreadPoolExecutor() as pool:
        return dict(zip(files, pool.map(digest, files), strict=True))
