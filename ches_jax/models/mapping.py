"""Which stored tensor fills which parameter, as rows of a table that works in both directions.

A rule names a parameter (``layers.self_attn.q_proj.weight``, without the layer number), the tensor it comes from
(``model.layers.{layer}.self_attn.q_proj.weight``) and a *view*: the part of the tensor, in the parameter's orientation.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ches_jax.hf.tensors import Index, Tensor


@dataclass(frozen=True)
class View:
    """The whole tensor as it is."""

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape the stored tensor must have for a parameter (of one layer) of ``shape``."""
        return shape

    def read(self, tensor: Tensor, index: Index) -> np.ndarray:
        """The slice ``index`` of the parameter."""
        return tensor.read(index)

    def write(self, out: np.ndarray, value: np.ndarray) -> None:
        """Put the whole parameter into the stored tensor ``out``."""
        out[...] = value


@dataclass(frozen=True)
class Rows(View):
    """Rows ``start : start + n`` of a tensor that stacks several parameters of ``total`` rows (fused projections)."""

    start: int
    total: int

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """All rows."""
        return (self.total, *shape[1:])

    def read(self, tensor: Tensor, index: Index) -> np.ndarray:
        """Shifts the row slice; an open end means the caller resolved it (see ``resolved``)."""
        rows = index[0]
        return tensor.read((slice(rows.start + self.start, rows.stop + self.start), *index[1:]))

    def write(self, out: np.ndarray, value: np.ndarray) -> None:
        """Fills its rows."""
        out[self.start : self.start + value.shape[0]] = value


WHOLE = View()


@dataclass(frozen=True)
class Rule:
    """One parameter, one tensor (per layer), one view."""

    param: str
    tensor: str
    view: View = WHOLE

    @property
    def stacked(self) -> bool:
        """Whether the parameter belongs to the layers (and has the layer axis in front)."""
        return self.param.startswith("layers.")

    def tensor_name(self, layer: int) -> str:
        """The stored name for ``layer`` (any number for parameters outside the layers)."""
        return self.tensor.format(layer=layer)


def rules(params: Iterable[str], names: dict[str, str], prefix: str = "model.") -> list[Rule]:
    """One whole-tensor rule for each parameter that exists.

    Args:
      params: the decoder's parameter names.
      names: module name in the decoder -> module name in the file, below the layer for layer modules.
      prefix: what stands before every name but the head's.
    """
    made = []
    for param in params:
        module, leaf = param.rsplit(".", 1)
        if module.startswith("layers."):
            tensor = f"{prefix}layers.{{layer}}.{names[module.removeprefix('layers.')]}.{leaf}"
        else:
            head = module == "lm_head"
            tensor = f"{'' if head else prefix}{names[module]}.{leaf}"
        made.append(Rule(param, tensor))
    return made


def resolved(index: Index, shape: tuple[int, ...]) -> Index:
    """``index`` with every open end filled in.

    >>> resolved((slice(None), slice(2, None)), (3, 5))
    (slice(0, 3, 1), slice(2, 5, 1))
    """
    return tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
