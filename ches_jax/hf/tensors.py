"""Lazy named tensors from safetensors files: name -> shape and dtype now, bytes when asked.

The safetensors library checks each file; the bytes are then read straight into the caller's array, without a copy in
between and without mapping the file, so that loading needs the memory of the model once. Of a file in a store the
header is read and checked here, and then only the byte ranges of the slices that are needed.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name 'bfloat16')
import numpy as np
from safetensors import SafetensorError, safe_open

from ches_jax.errors import CheckpointError, many
from ches_jax.hf.directory import weight_files, weight_map
from ches_jax.runs.store import is_store, read_into, read_range, size_of

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
BLOCK = 64 * 2**20
"""Bytes that are read from a store at a time where columns are cut out of rows."""
HEADER_BYTES = 100_000_000
"""Longest header of a safetensors file, as the library has it."""
BUFFERS = (
    "rotary_emb.inv_freq",
    "rotary_emb.original_inv_freq",
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
            read_into(self.file, out.reshape(-1).view(np.uint8).data, self.offset + start * row, CheckpointError)
        elif is_store(self.file):
            _read_columns(self, out, bounds, row)
        else:
            stored = np.memmap(self.file, out.dtype, "r", self.offset, self.shape)
            out[...] = stored[index]


def _read_columns(tensor: Tensor, out: np.ndarray, bounds: list[tuple[int, int, int]], row: int) -> None:
    """Read a part that is not whole rows from a store: the rows that hold it, a block at a time, cut here."""
    first, stop, step = bounds[0]
    rest = tuple(slice(*b) for b in bounds[1:])
    block = max(1, BLOCK // max(1, row))
    for at in range(first, stop, block * step):
        end = min(stop, at + block * step)
        rows = np.empty((end - at, *tensor.shape[1:]), out.dtype)
        read_into(tensor.file, rows.reshape(-1).view(np.uint8).data, tensor.offset + at * row, CheckpointError)
        out[(at - first) // step : (end - first + step - 1) // step] = rows[(slice(None, None, step), *rest)]


@dataclass(frozen=True)
class Computed(Tensor):
    """A tensor whose numbers follow from stored ones; ``file`` and ``offset`` are those of the first of them."""

    rows: Callable[[int, int], np.ndarray]
    """Start and stop on the first axis -> the numbers there, in ``dtype``."""
    codes: "Callable[[], tuple[np.ndarray, np.ndarray]] | None" = None
    """Stored codes [outputs, .] and factors [outputs, .] of equal shares of a row, where it is made of these."""

    def read(self, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part of it that ``index`` selects."""
        first, *rest = index or tuple(slice(None) for _ in self.shape)
        start, stop, _ = first.indices(self.shape[0])
        return np.ascontiguousarray(self.rows(start, stop)[(slice(None), *rest)])

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """The same part, into ``out``."""
        out[...] = self.read(index)


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
            header, start = _header_in_store(path) if is_store(path) else _header(path)
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
    with safe_open(path, framework="np"), path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _header_in_store(path: Path) -> tuple[dict[str, dict], int]:
    """As ``_header``, checked as the library does: the tensors fill the file without gap or overlap.

    Raises:
      ValueError: they do not, or a shape does not fit its bytes.
    """
    size = size_of(path)
    length = int.from_bytes(read_range(path, 0, 8, CheckpointError), "little") if size >= 8 else 0
    if not 0 < length <= min(HEADER_BYTES, size - 8):
        raise ValueError("its header is not within the file")
    header = json.loads(read_range(path, 8, length, CheckpointError))
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    header.pop("__metadata__", None)
    at = 0
    try:
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            kind = STORED.get(entry["dtype"])
            width = np.dtype(kind).itemsize if kind else None
            if begin != at or end < begin or (width and end - begin != width * math.prod(entry["shape"])):
                raise ValueError(f"the bytes of tensor {name!r} are not where its header says")
            at = end
    except (KeyError, TypeError):
        raise ValueError("its header does not tell the place of every tensor") from None
    if 8 + length + at != size:
        raise ValueError(f"it has {size} bytes, and its header tells of {8 + length + at}")
    return header, 8 + length
