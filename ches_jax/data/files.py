"""Where data lie: a local file, several of them, a folder of shards, a store; each opened as plain bytes.

Compression is recognised by the first bytes of a file, not by its name. Stores are read through fsspec.
"""

import bz2
import glob
import gzip
import hashlib
import io
import lzma
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ches_jax.errors import DataError

SCHEMES = {"http": "aiohttp", "https": "aiohttp", "hf": "huggingface_hub", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs",
           "memory": "fsspec", "file": "fsspec"}  # fmt: skip
"""Scheme of an address -> the package that reads it."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
_SHARD = re.compile(r"[-_.]?\d{3,}(-of-\d+)?(-[0-9a-f]{8,})?$")
"""What shards of one split have at the end of their names."""


@dataclass(frozen=True)
class DataFile:
    """One file of data, local or in a store."""

    path: str

    @property
    def suffix(self) -> str:
        """Of the content: that of ``a.jsonl.gz`` is ``.jsonl``."""
        parts = PurePosixPath(self.path.rpartition("?")[0] if self.remote and "?" in self.path else self.path).suffixes
        if parts and parts[-1].lower() in COMPRESSED:
            parts = parts[:-1]
        return parts[-1].lower() if parts else ""

    @property
    def remote(self) -> bool:
        """Whether it lies in a store."""
        return scheme(self.path) is not None

    @contextmanager
    def stored(self) -> Iterator[IO[bytes]]:
        """The bytes as they are stored; a file in which one can seek."""
        if not self.remote:
            with open(self.path, "rb") as file:
                yield file
            return
        with _fsspec(self.path).open(self.path, "rb") as file:
            yield file

    @contextmanager
    def opened(self) -> Iterator[IO[bytes]]:
        """The content, decompressed as it is read.

        Raises:
          DataError: a compressed file is damaged or cut off.
        """
        with self.stored() as stored:
            begin = stored.read(6)
            stored.seek(0)
            kind = next((kind for magic, kind in _MAGIC.items() if begin.startswith(magic)), None)
            try:
                yield _decompressed(stored, kind)
            except (EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError) as error:
                if kind is None:
                    raise
                raise DataError(
                    f"{self.path}: the {kind} file is damaged or cut off ({error}); fetch it again"
                ) from None

    def size(self) -> int:
        """Bytes as stored."""
        return int(_fsspec(self.path).size(self.path) or 0) if self.remote else Path(self.path).stat().st_size

    def digest(self) -> str:
        """sha256 of the bytes as stored."""
        with self.stored() as file:
            sha = hashlib.sha256()
            while block := file.read(1 << 20):
                sha.update(block)
            return sha.hexdigest()


def digest(files: Iterable[DataFile]) -> str:
    """sha256 of one file, or of the digests of several in order."""
    digests = [file.digest() for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def scheme(spec: str) -> str | None:
    """The scheme of an address; None for a local path.

    >>> scheme("s3://bucket/a.jsonl"), scheme("data/a.jsonl")
    ('s3', None)
    """
    match = re.match(r"([a-zA-Z][\w+.-]*)://", spec)
    return match[1].lower() if match else None


def located(spec: str) -> list[DataFile] | None:
    """The files that ``spec`` names: one, several with commas between, or a pattern; None: it names no file.

    Raises:
      DataError: a scheme that is not read, a pattern that fits nothing, a list of which one does not exist.
    """
    if scheme(spec) is not None:
        return _remote(spec)
    if Path(spec).is_file():
        return [DataFile(spec)]
    if Path(spec).exists():
        return None
    if any(c in spec for c in "*?[") and "," not in spec:
        files = sorted(p for p in glob.glob(spec, recursive=True) if Path(p).is_file())
        if not files:
            raise DataError(f"{spec}: no file fits this pattern")
        return [DataFile(p) for p in files]
    parts = [part.strip() for part in spec.split(",")]
    if len(parts) < 2:
        return None
    missing = [p for p in parts if scheme(p) is None and not Path(p).is_file() and not glob.glob(p)]
    if missing:
        raise DataError(f"{missing[0]!r}, one of {len(parts)} files of a list: no such file")
    return [file for part in parts for file in located(part) or []]


def in_folder(folder: Path, suffixes: Iterable[str]) -> dict[str, list[DataFile]]:
    """The data files of a folder (not of hidden ones) by split, in the layout of the hub.

    ``data/train_prefs-00000-of-00002.parquet`` belongs to ``train_prefs``, ``test/0000.parquet`` to ``test``.
    """
    known = set(suffixes)
    splits: dict[str, list[DataFile]] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if any(part.startswith((".", "_")) for part in inside.parts) or not path.is_file():
            continue
        file = DataFile(str(path))
        if file.suffix in known and path.name not in ("dataset_info.json", "dataset_infos.json"):
            splits.setdefault(_split_of(inside), []).append(file)
    return splits


def _split_of(inside: Path) -> str:
    stem = inside.name
    while (suffix := PurePosixPath(stem).suffix) and (suffix.lower() in COMPRESSED or not suffix[1:].isdigit()):
        stem = stem[: -len(suffix)]
    name = _SHARD.sub("", stem)
    folders = [part for part in inside.parts[:-1] if part != "data"]
    return "/".join([*folders, name] if name and name not in ("data", "part") else folders) or "data"


def _remote(spec: str) -> list[DataFile]:
    named = scheme(spec)
    if named not in SCHEMES:
        raise DataError(f"{spec}: {named}:// is not a store that can be read; there are {', '.join(SCHEMES)}")
    if any(c in spec for c in "*[") and named not in ("http", "https"):
        found = [f"{named}://{str(p).removeprefix(f'{named}://').lstrip('/')}" for p in _fsspec(spec).glob(spec)]
        if not found:
            raise DataError(f"{spec}: no file fits this pattern")
        return [DataFile(p) for p in sorted(found)]
    file = DataFile(spec)
    try:
        there = _fsspec(spec).exists(spec)
    except Exception as error:
        raise DataError(f"{spec}: cannot be reached ({type(error).__name__}: {str(error)[:200]})") from None
    if not there:
        raise DataError(f"{spec}: no such file in the store")
    return [file]


def _fsspec(spec: str) -> Any:
    import fsspec

    named = scheme(spec)
    try:
        return fsspec.filesystem(named)
    except ImportError as error:
        raise DataError(
            f"{spec}: to read {named}:// the package {SCHEMES.get(named or '', named)} is needed; "
            "install it: pip install 'ches-jax[remote]'"
        ) from error


def _decompressed(stored: IO[bytes], kind: str | None) -> Any:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=stored)
    if kind == "bz2":
        return bz2.BZ2File(stored)
    if kind == "xz":
        return lzma.LZMAFile(stored)
    if kind == "zstd":
        import pyarrow as pa

        return io.BufferedReader(_Raw(pa.CompressedInputStream(pa.PythonFile(stored, "r"), "zstd")))
    return stored


class _Raw(io.RawIOBase):
    """An Arrow stream as Python's own, which has lines."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer."""
        block = self._stream.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)
