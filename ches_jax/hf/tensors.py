"""Lazy named tensors from safetensors files: name -> shape and dtype now, bytes when asked.

The safetensors library checks each file; the bytes are then read straight into the caller's array, without a copy in
between and without mapping the file, so that loading needs the memory of the model once.
"""

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name 'bfloat16')
import numpy as np
from safetensors import SafetensorError, safe_open

from ches_jax.errors import CheckpointError, many
from ches_jax.hf.directory import weight_files

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INFINITY = {"float64": 0x7FF0 << 48, "float32": 0x7F80 << 16, "float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits of +infinity: the magnitude bits of a finite number are below."""
CHUNK = 1 << 18
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Tensor:
    """One stored tensor; only the bytes of the slice asked for are read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    """Of the first byte in the file."""

    def read(self, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part of it that ``index`` selects, as a new array in the stored dtype."""
        index = index or tuple(slice(None) for _ in self.shape)
        shape = [len(range(*s.indices(n))) for s, n in zip(index, self.shape, strict=True)]
        out = np.empty(shape, np.dtype(self.dtype))
        self.read_into(out, index)
        return out

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """Read the part that ``index`` selects into ``out``, a contiguous array of the stored dtype."""
        bounds = [s.indices(n) for s, n in zip(index, self.shape, strict=True)]
        row = math.prod(self.shape[1:]) * out.dtype.itemsize
        if all(b == (0, n, 1) for b, n in zip(bounds[1:], self.shape[1:], strict=True)):
            start = bounds[0][0] if bounds else 0
            _read_bytes(self.file, out, self.offset + start * row)
        else:
            stored = np.memmap(self.file, out.dtype, "r", self.offset, self.shape)
            out[...] = stored[index]


def _read_bytes(file: Path, out: np.ndarray, offset: int) -> None:
    """Fill ``out`` from ``offset`` on."""
    target = out.reshape(-1).view(np.uint8).data
    with file.open("rb", buffering=0) as f:
        at = 0
        while at < len(target):  # one call reads two gigabytes at most
            got = os.preadv(f.fileno(), [target[at:]], offset + at)
            if got == 0:
                raise CheckpointError(f"{file}: ends early; copy or download it again")
            at += got


def all_finite(values: np.ndarray) -> bool:
    """Whether no value is NaN or infinite, by the bits: fast for every dtype, bfloat16 too.

    >>> all_finite(np.ones(3, np.float32)), all_finite(np.array([0, -np.inf], np.float16))
    (True, False)
    """
    limit = INFINITY[str(values.dtype)]
    bits = values.reshape(-1).view(f"u{values.dtype.itemsize}")
    magnitude = bits.dtype.type((1 << (8 * values.dtype.itemsize - 1)) - 1)
    chunks = (bits[i : i + CHUNK] & magnitude for i in range(0, bits.size, CHUNK))
    return all(int(chunk.max()) < limit for chunk in chunks)


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the directory's weight files by name; no weight is read yet.

    Raises:
      CheckpointError: as ``open_files``.
    """
    return open_files(directory, weight_files(directory))


def open_files(directory: Path, files: Iterable[Path]) -> dict[str, Tensor]:
    """Every tensor of some safetensors files of ``directory``.

    Raises:
      CheckpointError: a file that is no safetensors file or is cut short, a name stored twice, a dtype that is no
        float. All problems in one message.
    """
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="np"):
                header, start = _header(path)
        except (SafetensorError, OSError, ValueError) as e:
            problems.append(f"{path.name} is not a whole safetensors file ({e}); copy or download it again")
            continue
        for name, entry in header.items():
            dtype = DTYPES.get(entry["dtype"])
            if name in tensors:
                problems.append(f"tensor {name!r} is stored in {tensors[name].file.name} and again in {path.name}")
            elif dtype is None:
                problems.append(
                    f"tensor {name!r} is stored as {entry['dtype']}; expected one of {', '.join(DTYPES)} "
                    "(quantised checkpoints are not supported: give the unquantised weights)"
                )
            else:
                tensors[name] = Tensor(name, tuple(entry["shape"]), dtype, path, start + entry["data_offsets"][0])
    if problems:
        raise CheckpointError(many(str(directory), problems))
    return tensors


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """The entries of a safetensors file and where its data begins: 8 bytes of length, then JSON, then data."""
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length
