"""Where data lie: files, globs, folders and addresses, as paths on this machine; compressed files as their bytes.

An address (``https://``, ``hf://``, ``s3://``, ``gs://``) is copied here once for each process, through fsspec, so that
a run reads the same bytes from its first row to its last.
"""

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import unquote

from ches_jax.errors import DataError
from ches_jax.runs.store import fetched, is_address, is_store, matching, place, scheme_of

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
"""Suffixes of files that hold other files."""
BUFFER = 1 << 18
"""Bytes that are read at once: lines are taken from what is in memory."""
_PART = re.compile(r"(?P<split>.*?)[-_.]?(?P<number>\d{3,})(-of-(?P<count>\d+))?(-[0-9a-f]{8,})?")
"""Names of the parts of a split, as the hub and Spark write them."""


def _open_zstd(path: Path) -> BinaryIO:
    import pyarrow as pa

    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))  # type: ignore[arg-type]


_OPENERS: Mapping[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": _open_zstd,
}


def behind_page(spec: str) -> str:
    """What the page of a data set or of a file shows, as it is read: a name on the hub, or the address of the bytes.

    >>> behind_page("https://huggingface.co/datasets/Anthropic/hh-rlhf"), behind_page("pairs.jsonl")
    ('Anthropic/hh-rlhf', 'pairs.jsonl')
    >>> behind_page("https://github.com/o/r/blob/main/a.jsonl")
    'https://raw.githubusercontent.com/o/r/main/a.jsonl'
    """
    if page := re.fullmatch(r"https://huggingface\.co/datasets/([\w.-]+/[\w.-]+?)/?(?:tree/main/?|viewer.*)?", spec):
        return page[1]
    spec = re.sub(r"^(https://huggingface\.co/(?:datasets/)?[^/]+/[^/]+)/blob/", r"\1/resolve/", spec)
    return re.sub(r"^https://github\.com/([^/]+/[^/]+)/blob/", r"https://raw.githubusercontent.com/\1/", spec)


def located(spec: str) -> list[Path]:
    """Paths that a specification stands for: one of a file or folder, several of a glob or of names with commas.

    Raises:
      DataError: an address that cannot be read, a glob that fits nothing, or a name in a list that is not there.
    """
    if is_address(spec):
        return [path for one in spec.split(",") for path in _copied(one)]
    if Path(spec).exists():
        return [Path(spec)]
    matching: list[Path] = []
    names = spec.split(",")
    for name in names:
        fitting = [Path(p) for p in sorted(glob.glob(name, recursive=True))] if _is_glob(name) else [Path(name)]
        if not fitting:
            raise DataError(f"{name}: no file fits this pattern")
        if len(names) > 1 and not fitting[0].exists():
            raise DataError(f"{name}: no such file (one of {len(names)} names with commas)")
        matching += fitting
    double = next((p for i, p in enumerate(matching) if p in matching[:i]), None)
    if double is not None:
        raise DataError(f"{spec}: {double} is named twice")
    return matching


def kind_of(path: Path) -> tuple[str, str]:
    """Suffixes of the format and of the compression, in small letters.

    >>> kind_of(Path("a/pairs.JSONL.gz")), kind_of(Path("pairs.csv"))
    (('.jsonl', '.gz'), ('.csv', ''))
    """
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(path.stem).suffix.lower(), suffix
    return suffix, ""


def open_bytes(path: Path) -> BinaryIO:
    """A file for reading, decompressed; its first bytes say how it is compressed, whatever its name."""
    with path.open("rb") as file:
        begin = file.read(6)
    opener = next((opener for magic, opener in _OPENERS.items() if begin.startswith(magic)), None)
    if opener is not None:
        return cast(BinaryIO, opener(path))
    return path.open("rb") if is_store(path) else path.open("rb", BUFFER)


def is_compressed(path: Path) -> bool:
    """Whether the first bytes of a file are those of a compression."""
    with path.open("rb") as file:
        return file.read(6).startswith(tuple(_OPENERS))


def digest(files: Iterable[Path]) -> str:
    """sha256 of one file, or of the digests of several in order; streamed."""
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def splits_of(folder: Path, formats: Iterable[str]) -> dict[str, list[Path]]:
    """Files of a folder by split: ``data/train-00000-of-00002.parquet``, ``train/0.parquet``, ``train.jsonl``.

    Files of a folder with a name (a configuration of the hub) are "name/split"; those of ``lang=de`` hold the rows of
    which a column has that value (``partition_values``), and are of one split.

    Raises:
      DataError: parts of a split are not there.
    """
    known = set(formats)
    files = [p for p in sorted(folder.rglob("*")) if kind_of(p)[0] in known and p.is_file()]
    files = [p for p in files if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts)]
    splits: dict[str, list[Path]] = {}
    parts: dict[str, list[re.Match[str]]] = {}
    for path in files:
        below = [part for part in path.relative_to(folder).parts[:-1] if part != "data"]
        folders = [part.removeprefix("split=") for part in below if "=" not in part or part.startswith("split=")]
        stem = path.name.partition(".")[0]
        match = _PART.fullmatch(stem)
        name = match["split"] if match else stem
        split = "/".join([*folders, *([name] if name not in ("", "data", "part") and (match or not below) else [])])
        splits.setdefault(split, []).append(path)
        if match and match["count"]:
            parts.setdefault(split, []).append(match)
    for split, matches in parts.items():
        count = int(matches[0]["count"])
        missing = set(range(count)) - {int(m["number"]) for m in matches}
        if missing:
            raise DataError(
                f"{folder}: split '{split}' lacks {len(missing)} of its {count} parts (the first: {min(missing):05d}); "
                "download the folder again"
            )
    return splits


def partition_values(inside: Path) -> dict[str, str]:
    """Columns that the folders of a file tell, as Hive, Spark and pyarrow lay them out.

    >>> partition_values(Path("split=train/lang=de/part-0.parquet"))
    {'lang': 'de'}
    """
    pairs = [part.partition("=") for part in inside.parts[:-1] if "=" in part]
    return {name: unquote(value) for name, _, value in pairs if name != "split"}


def _is_glob(name: str) -> bool:
    return any(c in name for c in "*?[")


@cache
def _copied(address: str) -> tuple[Path, ...]:
    """Copies of what an address names, in order of their names; of a folder the folder."""
    if address.partition("://")[0].lower() == "file":
        return tuple(located(address.partition("://")[2]))
    found = place(address, DataError)
    if _is_glob(str(found)) and scheme_of(found) not in ("http", "https"):
        fitting = matching(found, DataError)
        if not fitting:
            raise DataError(f"{address}: no file fits this pattern")
        return tuple(fetched(one, DataError) for one in fitting)
    return (fetched(found, DataError),)
