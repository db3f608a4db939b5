"""Lazy named tensors from safetensors files: name -> shape and dtype now, bytes when asked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name 'bfloat16', which safetensors asks for)
import numpy as np
from safetensors import SafetensorError, safe_open

from ches_jax.errors import CheckpointError, many
from ches_jax.hf.directory import weight_files

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Tensor:
    """One stored tensor; ``read`` touches only the bytes of the slice asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    _slice: Any

    def read(self, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part of it that ``index`` selects, as a numpy array in the stored dtype."""
        if not self.shape:
            return np.asarray(self._slice[...])
        return self._slice[index if index else tuple(slice(None) for _ in self.shape)]


def open_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the directory's weight files by name; no weight is read yet.

    Raises:
      CheckpointError: a file that is no safetensors file or is cut short, a name stored twice, a dtype that is no
        float. All problems in one message.
    """
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for path in weight_files(directory):
        try:
            handle = safe_open(path, framework="np")
        except (SafetensorError, OSError, ValueError) as e:
            problems.append(f"{path.name} is not a whole safetensors file ({e}); copy or download it again")
            continue
        for name in handle.keys():  # noqa: SIM118  (the handle is no mapping)
            part = handle.get_slice(name)
            dtype = DTYPES.get(part.get_dtype())
            if name in tensors:
                problems.append(f"tensor {name!r} is stored in {tensors[name].file.name} and again in {path.name}")
            elif dtype is None:
                problems.append(
                    f"tensor {name!r} is stored as {part.get_dtype()}; expected one of {', '.join(DTYPES)} "
                    "(quantised checkpoints are not supported: give the unquantised weights)"
                )
            else:
                tensors[name] = Tensor(name, tuple(part.get_shape()), dtype, path, part)
    if problems:
        raise CheckpointError(many(str(directory), problems))
    return tensors
