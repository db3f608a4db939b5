"""A safetensors file that is written one tensor at a time, where all of them together are not to be in memory."""

import json
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from ches_jax.hf.tensors import STORED

CODES = {dtype: code for code, dtype in STORED.items()}
"""NumPy's name of a dtype -> the format's."""
ALIGNED = 8
"""Bytes that the length of a header is a multiple of."""


class Writer:
    """Writes the header at once, then the tensors in its order.

    >>> import io
    >>> from safetensors.numpy import load
    >>> file = io.BytesIO()
    >>> writer = Writer(file, {"a": ("float32", (2,)), "b": ("int32", ())})
    >>> writer.write(np.ones(2, np.float32))
    >>> writer.write(np.array(3, np.int32))
    >>> sorted(load(file.getvalue()).items())
    [('a', array([1., 1.], dtype=float32)), ('b', array(3, dtype=int32))]
    """

    def __init__(self, file: BinaryIO, kinds: Mapping[str, tuple[str, tuple[int, ...]]]):
        """Of tensors with these dtypes and shapes."""
        self._file = file
        entries, at = {}, 0
        for name, (dtype, shape) in kinds.items():
            size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
            entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
            at += size
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % ALIGNED)
        file.write(len(header).to_bytes(8, "little") + header)
        self._left = iter(kinds.values())

    def write(self, values: np.ndarray) -> None:
        """The next tensor; what it is must be what the header says."""
        assert (str(values.dtype), values.shape) == next(self._left)
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
