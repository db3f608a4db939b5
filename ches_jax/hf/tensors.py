"""Lazy named tensors from safetensors files: name -> shape and dtype now, bytes when asked.

The safetensors library checks each file; the bytes are then read straight into the caller's array, without a copy in
between and without mapping the file, so that loading needs the memory of the model once.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name 'bfloat16')
import numpy as np
from safetensors import SafetensorError, safe_open

from ches_jax.errors import CheckpointError, many
from ches_jax.hf.directory import weight_files, weight_map

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What a parameter can be stored in: the format's name -> NumPy's."""
STORED = {
    **DTYPES,
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "BOOL": "bool"},
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
}
"""What any tensor can be stored in: quantised weights, their scales, and what is not of the text model too."""
INFINITY = {"float64": 0x7FF0 << 48, "float32": 0x7F80 << 16, "float16": 0x7C00, "bfloat16": 0x7F80}
"""The bits of +infinity: the magnitude bits of a finite number are below."""
CHUNK = 1 << 18
BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".crossattention.bias",
    ".crossattention.masked_bias",
    "position_ids",
)
"""Ends of the names of masks and rotary tables that old checkpoints carry, as bytes, truth values or floats: recomputed
from the config, never read."""
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Tensor:
    """One stored tensor; only the bytes of the slice are read."""

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


@dataclass(frozen=True)
class Computed(Tensor):
    """A tensor whose numbers follow from stored ones; ``file`` and ``offset`` are those of the first of them."""

    rows: Callable[[int, int], np.ndarray]
    """Start and stop on the first axis -> the numbers there, in ``dtype``."""

    def read(self, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part of it that ``index`` selects."""
        first, *rest = index or tuple(slice(None) for _ in self.shape)
        start, stop, _ = first.indices(self.shape[0])
        return np.ascontiguousarray(self.rows(start, stop)[(slice(None), *rest)])

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """The same part, into ``out``."""
        out[...] = self.read(index)


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
    """Every tensor of the directory's weight files by name, buffers apart; no weight is read yet.

    Raises:
      CheckpointError: as ``open_files``.
    """
    return open_files(directory, weight_files(directory), weight_map(directory), BUFFERS, STORED)


def open_files(
    directory: Path,
    files: Iterable[Path],
    assigned: Mapping[str, str] | None = None,
    skip: tuple[str, ...] = (),
    kinds: Mapping[str, str] = DTYPES,
) -> dict[str, Tensor]:
    """Every tensor of some safetensors files of ``directory``.

    Args:
      directory: for messages.
      files: in it.
      assigned: tensor name -> name of its file, where an index tells.
      skip: ends of names that are passed over.
      kinds: the dtypes that are read, by the format's name.

    Raises:
      CheckpointError: a file that is no safetensors file or is cut short, a name stored twice with different values, a
        dtype that is none of ``kinds``. All problems in one message.
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
            dtype = kinds.get(entry["dtype"])
            if name.endswith(skip):
                continue
            if dtype is None:
                problems.append(f"tensor {name!r} is stored as {entry['dtype']}; expected one of {', '.join(kinds)}")
                continue
            tensor = Tensor(name, tuple(entry["shape"]), dtype, path, start + entry["data_offsets"][0])
            if name in tensors:
                one, problem = _one_of(tensors[name], tensor, (assigned or {}).get(name))
                tensors[name] = one
                problems += [problem] if problem else []
            else:
                tensors[name] = tensor
    if problems:
        raise CheckpointError(many(str(directory), problems))
    return tensors


def _one_of(a: Tensor, b: Tensor, assigned: str | None) -> tuple[Tensor, str | None]:
    """Which of two tensors of one name counts: the index says, and transformers reads the last file by name.

    Where both mean the same tensor, or the values are the same, that is it; else there are two readings.
    """
    last = max(a, b, key=lambda t: t.file.name)
    if assigned == last.file.name or same_values(a, b):
        return last, None
    says = f"the index assigns it to {assigned}" if assigned else "the index does not say which counts"
    return last, (
        f"tensor {a.name!r} is stored in {a.file.name} and, with other values, in {b.file.name}: {says}, and "
        f"transformers reads {last.file.name}; remove one of the two"
    )


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two stored tensors hold the same numbers, whatever their dtypes; read a block of rows at a time."""
    if a.shape != b.shape:
        return False
    if not a.shape:
        return bool(a.read() == b.read())
    rows = max(1, CHUNK // max(1, math.prod(a.shape[1:])))
    rest = tuple(slice(None) for _ in a.shape[1:])
    blocks = ((slice(i, i + rows), *rest) for i in range(0, a.shape[0], rows))
    return all(np.array_equal(a.read(block).astype(np.float64), b.read(block).astype(np.float64)) for block in blocks)


def _header(path: Path) -> tuple[dict[str, dict], int]:
    """The entries of a safetensors file and where its data begins: 8 bytes of length, then JSON, then data."""
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length
