"""Which stored tensor fills which parameter: a table that is read for loading and for saving.

A rule names a parameter (``layers.self_attn.q_proj.weight``, without the layer number), the tensor it comes from
(``model.layers.{layer}.self_attn.q_proj.weight``) and a *view*: the part of the tensor, in the parameter's orientation.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ches_jax.hf.tensors import Index, Tensor
from ches_jax.models.stacks import below_stack


@dataclass(frozen=True)
class View:
    """The whole tensor as it is."""

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape the stored tensor must have for a parameter (of one layer) of ``shape``."""
        return shape

    def read(self, tensor: Tensor, index: Index) -> np.ndarray:
        """The slice ``index`` of the parameter."""
        return tensor.read(index)

    def read_into(self, tensor: Tensor, index: Index, out: np.ndarray) -> None:
        """The same slice, into ``out`` (contiguous, in the stored dtype)."""
        out[...] = self.read(tensor, index)

    def write(self, out: np.ndarray, value: np.ndarray) -> None:
        """Put the whole parameter into the stored tensor ``out``."""
        out[...] = value

    def outputs(self, count: int) -> tuple[np.ndarray, int]:
        """Indices of the parameter's ``count`` outputs among those of the stored matrix, and how many that has."""
        return np.arange(count), count


@dataclass(frozen=True)
class RowSlice(View):
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

    def outputs(self, count: int) -> tuple[np.ndarray, int]:
        """Its rows."""
        return self.start + np.arange(count), self.total


@dataclass(frozen=True)
class TransposedSlice(View):
    """A transposed matrix, or part of one: columns ``start : start + n`` of ``total``, as rows of the parameter.

    GPT-2 stores its matrices [in, out].
    """

    start: int
    total: int

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[in, all columns] for a parameter [out, in]."""
        return (shape[1], self.total)

    def read(self, tensor: Tensor, index: Index) -> np.ndarray:
        """Rows of the parameter are columns of the tensor."""
        rows, columns = index
        return tensor.read((columns, slice(rows.start + self.start, rows.stop + self.start))).T

    def write(self, out: np.ndarray, value: np.ndarray) -> None:
        """Fills its columns."""
        out[:, self.start : self.start + value.shape[0]] = value.T

    def outputs(self, count: int) -> tuple[np.ndarray, int]:
        """Its columns."""
        return self.start + np.arange(count), self.total


@dataclass(frozen=True)
class Interleaved(View):
    """Some of the blocks of rows that follow each other again and again: q, k, v of head 0, of head 1, ... (GPT-NeoX).

    The parameter has the blocks of the first of ``taken``, then those of the second, ...

    >>> Interleaved((1, 2), (1, 0)).outputs(6)  # 'a b b a b b' as 'b b b b a a'
    (array([1, 2, 4, 5, 0, 3]), 6)
    """

    sizes: tuple[int, ...]
    """Rows of each block, in the tensor's order."""
    taken: tuple[int, ...]

    def _rounds(self, count: int) -> int:
        """How often all blocks come, for a parameter of ``count`` rows."""
        return count // sum(self.sizes[t] for t in self.taken)

    def _stored(self, count: int) -> np.ndarray:
        """Indices in the tensor of the parameter's ``count`` rows."""
        rounds = np.arange(self._rounds(count))[:, None] * sum(self.sizes)
        starts = [sum(self.sizes[:t]) for t in self.taken]
        blocks = [rounds + start + np.arange(self.sizes[t]) for start, t in zip(starts, self.taken, strict=True)]
        return np.concatenate([block.reshape(-1) for block in blocks])

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """All blocks."""
        return (self._rounds(shape[0]) * sum(self.sizes), *shape[1:])

    def read(self, tensor: Tensor, index: Index) -> np.ndarray:
        """Reads from the first to the last row it needs and selects the parameter's."""
        taken = sum(self.sizes[t] for t in self.taken)
        rows = self._stored(tensor.shape[0] // sum(self.sizes) * taken)[index[0]]
        first = int(rows.min())
        return tensor.read((slice(first, int(rows.max()) + 1), *index[1:]))[rows - first]

    def write(self, out: np.ndarray, value: np.ndarray) -> None:
        """Fills its rows."""
        out[self._stored(value.shape[0])] = value

    def outputs(self, count: int) -> tuple[np.ndarray, int]:
        """Its rows."""
        return self._stored(count), self.tensor_shape((count,))[0]


@dataclass(frozen=True)
class ExpertPart(View):
    """The matrices (or biases) of all experts in one tensor, perhaps with those of another projection.

    A parameter [experts, out, in] is found at ``start``, ``start + step``, ... of the ``total`` outputs of the tensor,
    [experts, total, in], or [experts, in, total] where that is ``turned``.
    """

    start: int = 0
    step: int = 1
    total: int | None = None
    """None: as many as the parameter has."""
    turned: bool = False

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """All outputs, in the tensor's order of axes."""
        experts, outputs, *rest = shape
        whole = (experts, outputs if self.total is None else self.total, *rest)
        return (whole[0], whole[2], whole[1]) if self.turned else whole

    def read(self, tensor: Tensor, index: Index) -> np.ndarray:
        """Reads from the first to the last output it needs and selects the part's."""
        experts, rows, *rest = index
        first, last = (self.start + self.step * i for i in (rows.start, rows.stop - 1))
        span = slice(first, last + 1)
        if self.turned:
            return tensor.read((experts, *rest, span)).swapaxes(1, 2)[:, :: self.step]
        return tensor.read((experts, span, *rest))[:, :: self.step]

    def write(self, out: np.ndarray, value: np.ndarray) -> None:
        """Fills its outputs."""
        rows = out.swapaxes(1, 2) if self.turned else out
        rows[:, self.start : self.start + self.step * value.shape[1] : self.step] = value

    def outputs(self, count: int) -> tuple[np.ndarray, int]:
        """Its outputs, those of one expert."""
        return self.start + self.step * np.arange(count), count if self.total is None else self.total


@dataclass(frozen=True)
class Squeezed(View):
    """A tensor with an axis of length one after the first, which the parameter has not (depthwise convolutions)."""

    def tensor_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """With the axis."""
        return (shape[0], 1, *shape[1:])

    def read(self, tensor: Tensor, index: Index) -> np.ndarray:
        """Without it."""
        return tensor.read((index[0], slice(None), *index[1:]))[:, 0]

    def write(self, out: np.ndarray, value: np.ndarray) -> None:
        """Puts it back."""
        out[:, 0] = value


@dataclass(frozen=True)
class Whole(View):
    """The whole tensor as it is, read without a copy."""

    def read_into(self, tensor: Tensor, index: Index, out: np.ndarray) -> None:
        """Straight from the file."""
        tensor.read_into(out, index)


WHOLE = Whole()


@dataclass(frozen=True)
class Rule:
    """One parameter, one tensor (for each layer of its stack, and each expert where the name says so), one view."""

    param: str
    tensor: str
    view: View = WHOLE

    @property
    def stacked(self) -> bool:
        """Whether the parameter belongs to the layers (and has the layer axis in front)."""
        return below_stack(self.param) is not None

    @property
    def by_expert(self) -> bool:
        """Whether each expert has a tensor of its own (and the parameter the expert axis next)."""
        return "{expert}" in self.tensor

    @property
    def lead(self) -> int:
        """Axes in front of the parameter along which there is a tensor for each index."""
        return int(self.stacked) + int(self.by_expert)

    def tensor_name(self, layer: int, expert: int = 0) -> str:
        """The stored name for a layer of the model and an expert (any number where the name has none)."""
        return self.tensor.format(layer=layer, expert=expert)

    def names(self, shape: tuple[int, ...], layers: Sequence[int]) -> dict[tuple[int, ...], str]:
        """The stored tensors by their indices along the leading axes, for a parameter of ``shape`` of these layers.

        >>> Rule("layers.mlp.experts.up_proj.weight", "l{layer}.e{expert}").names((1, 2, 7, 5), [4])
        {(0, 0): 'l4.e0', (0, 1): 'l4.e1'}
        """
        experts = range(shape[self.lead - 1]) if self.by_expert else (0,)
        out = {}
        for at, layer in enumerate(layers if self.stacked else (0,)):
            for expert in experts:
                index = ((at,) if self.stacked else ()) + ((expert,) if self.by_expert else ())
                out[index] = self.tensor_name(layer, expert)
        return out


def rules(
    params: Iterable[str],
    names: Mapping[str, str],
    *,
    prefix: str = "model.",
    layers: str = "layers",
    views: Mapping[str, View] | None = None,
) -> list[Rule]:
    """One rule for each parameter that exists.

    Args:
      params: the decoder's parameter names.
      names: module name in the decoder -> module name in the file, below the layer for layer modules; parameters whose
        stored name is another one than that of their module with ``.weight`` or ``.bias`` have an entry of their own.
      prefix: what stands before every name but the head's.
      layers: the file's name for the list of layers.
      views: parameters (below the layer) that are a slice of their tensor or its transpose.
    """
    table = []
    for param in params:
        inner = below_stack(param)
        module, _, leaf = (inner or param).rpartition(".")
        if inner is None:
            tensor = f"{'' if module == 'lm_head' else prefix}{names[module]}.{leaf}"
        else:
            stored = names.get(inner) or f"{names[module]}.{leaf}"
            tensor = f"{prefix}{layers}.{{layer}}.{stored}"
        table.append(Rule(param, tensor, (views or {}).get(f"{module}.{leaf}", WHOLE)))
    return table


def resolved(index: Index, shape: tuple[int, ...]) -> Index:
    """``index`` with every open end filled in.

    >>> resolved((slice(None), slice(2, None)), (3, 5))
    (slice(0, 3, 1), slice(2, 5, 1))
    """
    return tuple(slice(*s.indices(n)) for s, n in zip(index, shape, strict=True))
