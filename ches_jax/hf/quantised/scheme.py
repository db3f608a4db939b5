"""What a format of quantised weights provides, and how the stored parts of a module become one tensor.

A module's weight is stored in parts (``q_proj.qweight``, ``q_proj.scales``, ...). A scheme says which names are parts
of what, checks that they fit each other, and gives a tensor that computes the numbers of a range of rows when they are
read, so that a weight is never dequantised before its turn.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from ches_jax.errors import CheckpointError, many
from ches_jax.hf.tensors import DTYPES, Computed, Tensor

Rows = Callable[[int, int], np.ndarray]
Codes = Callable[[], tuple[np.ndarray, np.ndarray]]


class Misfit(Exception):
    """What is wrong with the parts of one module."""


class Scheme(ABC):
    """One way to store weights, with the settings of one checkpoint."""

    needed: ClassVar[tuple[str, ...]]
    """Parts without which a weight is half described."""
    more: ClassVar[tuple[str, ...]] = ()
    """Parts that a weight may have."""
    leaf: ClassVar[str] = "weight"
    """What the module's tensor is called; empty where the module's name is the tensor's."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The scheme and its settings, for people and for ``run.json``."""

    def part(self, name: str) -> tuple[str, str] | None:
        """The module and the part that a stored name is; None where it is a tensor as any other."""
        module, _, leaf = name.rpartition(".")
        return (module, leaf) if leaf in (*self.needed, *self.more) else None

    @abstractmethod
    def tensor(self, module: str, parts: Mapping[str, Tensor]) -> Tensor:
        """The weight of a module.

        Raises:
          Misfit: the parts do not fit each other or the settings.
        """


def dequantised(scheme: Scheme, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Every tensor, with those of ``scheme`` in place of their parts; nothing is read yet but the smallest parts.

    Raises:
      CheckpointError: parts that are missing or do not fit, all problems in one message.
    """
    out: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (found := scheme.part(name)) is None:
            out[name] = tensor
        else:
            modules.setdefault(found[0], {})[found[1]] = tensor
    problems = []
    for module, parts in modules.items():
        name = f"{module}.{scheme.leaf}" if scheme.leaf else module
        alone = parts.get("weight")
        if len(parts) == 1 and alone is not None and alone.dtype in DTYPES.values():
            out[name] = alone  # one of the modules that were not quantised
        elif lacking := [part for part in scheme.needed if part not in parts]:
            problems.append(f"{module}: half described: has {', '.join(sorted(parts))} and lacks {', '.join(lacking)}")
        else:
            try:
                out[name] = scheme.tensor(module, parts)
            except Misfit as e:
                problems.append(f"{module}: {e}")
    if problems:
        raise CheckpointError(many(f"{where}: weights stored as {scheme.name}", problems))
    return out


def computed(
    name: str, shape: tuple[int, ...], dtype: str, first: Tensor, rows: Rows, codes: Codes | None = None
) -> Computed:
    """A tensor that computes its rows, standing where the first of its parts is stored."""
    return Computed(name, shape, dtype, first.file, first.offset, rows, codes)


def require_shape(part: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Refuse a part of another shape."""
    if tensor.shape not in shapes:
        raise Misfit(f"{part} has shape {tensor.shape}; expected {' or '.join(map(str, dict.fromkeys(shapes)))}")


def require_dtype(part: str, tensor: Tensor, *dtypes: str) -> None:
    """Refuse a part stored in another dtype."""
    if tensor.dtype not in dtypes:
        raise Misfit(f"{part} is stored as {tensor.dtype}; expected {' or '.join(dtypes)}")


def unpacked(words: np.ndarray, bits: int) -> np.ndarray:
    """The unsigned numbers of ``bits`` bits in 32-bit words, lowest bits first, along the last axis.

    >>> unpacked(np.array([0x76543210], np.uint32), 4)
    array([0, 1, 2, 3, 4, 5, 6, 7], dtype=uint8)
    """
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    numbers = (words.view(np.uint32)[..., None] >> shifts) & np.uint32((1 << bits) - 1)
    return numbers.astype(np.uint8).reshape(*words.shape[:-1], -1)


def words_of(count: int, bits: int) -> int:
    """32-bit words that hold ``count`` numbers."""
    return -(-count * bits // 32)


class Settings:
    """Typed access to ``quantization_config`` that collects what is wrong with it."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = ""):
        """``prefix`` names the object in messages."""
        self.raw, self.prefix = raw, prefix
        self.problems: list[str] = []

    def need(self, key: str, *allowed: Any) -> Any:
        """A value that must be written, one of ``allowed`` (values, or types)."""
        value = self.raw.get(key)
        if value is None:
            self.problems.append(f"half described: {self.prefix}{key!r} is missing")
        elif not any(_is(value, a) for a in allowed):
            self.problems.append(f"{self.prefix}{key!r} = {value!r:.60}; expected {_listed(allowed)}")
        else:
            return value
        return next((a for a in allowed if not isinstance(a, type)), 1)

    def optional(self, key: str, default: Any, *allowed: Any) -> Any:
        """A value that has a default."""
        return default if self.raw.get(key) is None else self.need(key, *allowed)

    def off(self, key: str, why: str) -> None:
        """A setting that must be absent or off."""
        if self.raw.get(key):
            self.problems.append(f"{self.prefix}{key!r} = {self.raw[key]!r:.60}: {why}")


def _is(value: Any, allowed: Any) -> bool:
    if isinstance(allowed, type):
        return isinstance(value, allowed) and not (isinstance(value, bool) and allowed is not bool)
    return value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def _listed(allowed: tuple[Any, ...]) -> str:
    names = {int: "a whole number", bool: "true or false", list: "a list", dict: "an object", str: "a text"}
    return " or ".join(names.get(a, repr(a)) if isinstance(a, type) else repr(a) for a in allowed)
