"""Embedding and unembedding on a mesh: the tables stay sharded, and what is small beside them travels.

A table [V, D] lies on the mesh as ``sharding.partition_spec`` says: the vocabulary over ``tensor``, the width over
``fsdp``, over which the rows of the batch are sharded too.

A lookup sends token ids along ``fsdp``, finds its part of the vector of each, and sends the parts to the rows they are
of: T D numbers for T tokens, and not V D. For logits the parts of the unembedding are turned once, from columns to
rows, so that each device holds all of some tokens' vectors (``Vocabulary``): it computes the logits of those tokens
for the states of all rows of ``fsdp``, and three numbers a position are added up. (Where the states of those rows are
more than the unembedding, they stay and it travels: ``unembedding_pieces``.)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from ches_jax.distributed.mesh import ROW_AXES, LogicalMesh
from ches_jax.models.precision import accumulate, matmul_precision
from ches_jax.models.sharding import partition_spec

TABLE = "embed_tokens.weight"
"""A parameter that lies as every table of the vocabulary does."""


def looked_up(
    table: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    dtype: DTypeLike,
    logical: LogicalMesh | None,
    name: str = TABLE,
) -> Float[Array, "B T D"]:
    """The rows of a table that ``tokens`` name, exactly those of one device.

    Args:
      table: lies as ``partition_spec`` says of ``name``.
      tokens: row numbers.
      dtype: of the result.
      logical: where table and rows of the batch lie; None: on one device.
      name: of the parameter.
    """
    if logical is None:
        return jnp.take(table, tokens, axis=0).astype(dtype)
    spec, rows = partition_spec(name, table.shape, logical), logical.rows(tokens.shape[0])
    over_ids, over_width = _names(spec, 0), _names(spec, 1)
    travels = over_width if rows != PartitionSpec(None) else ()

    def on_device(table: Array, tokens: Array) -> Array:
        tokens = _gather(tokens, travels)
        if over_ids:
            here = tokens - lax.axis_index(over_ids) * len(table)
            inside = (here >= 0) & (here < len(table))
            found = jnp.take(table, jnp.clip(here, 0, len(table) - 1), axis=0).astype(dtype)
            # all but one of the parts are zeros: the sum rounds nothing
            found = lax.psum(jnp.where(inside[..., None], found, jnp.zeros_like(found)), over_ids)
        else:
            found = jnp.take(table, tokens, axis=0).astype(dtype)
        return lax.all_to_all(found, travels, 0, 2, tiled=True) if travels else found

    by_row = logical.spec(rows)
    run = jax.shard_map(
        on_device,
        mesh=logical.current,
        in_specs=(spec, by_row),
        out_specs=PartitionSpec(*by_row, None, None if travels else _entry(over_width)),
    )
    return run(table, tokens)


def products(
    hidden: Float[Array, "B D"], table: Float[Array, "V D"], logical: LogicalMesh, name: str = TABLE
) -> Float[Array, "B V"]:
    """``h W^T`` of one state of each row, in the dtype of the states; the table stays where it lies.

    Where its columns lie over axes of the rows, each device takes those columns of all their states, and the products
    are added up in float32: B V numbers travel for B rows, and not V D.

    Args:
      hidden: states, sharded by rows.
      table: lies as ``partition_spec`` says of ``name``.
      logical: where both lie.
      name: of the parameter.
    """
    spec, rows = partition_spec(name, table.shape, logical), logical.rows(hidden.shape[0])
    over_width = _names(spec, 1)
    travels = over_width if rows != PartitionSpec(None) else ()

    def on_device(hidden: Array, table: Array) -> Array:
        if travels:
            hidden = lax.all_to_all(hidden, travels, 1, 0, tiled=True)
        precision, acc = matmul_precision(hidden.dtype), accumulate(hidden.dtype)
        contract = (((1,), (1,)), ((), ()))
        table = table.astype(hidden.dtype)
        parts = lax.dot_general(hidden, table, contract, precision=precision, preferred_element_type=acc)
        if travels:
            parts = lax.psum_scatter(parts, travels, scatter_dimension=0, tiled=True)
        elif over_width:
            parts = lax.psum(parts, over_width)
        return parts.astype(hidden.dtype)

    by_row = logical.spec(rows)
    run = jax.shard_map(
        on_device,
        mesh=logical.current,
        in_specs=(PartitionSpec(*by_row, None if travels else _entry(over_width)), spec),
        out_specs=PartitionSpec(*by_row, _entry(_names(spec, 0))),
        check_vma=False,
    )
    return run(hidden, table)


@dataclass(frozen=True)
class Vocabulary:
    """Which part of the vocabulary a device computes the logits of, for which rows; inside ``shard_map``.

    Without axes a device has the whole vocabulary, and every method gives what it is given.
    """

    size: int
    """V."""
    over: tuple[str, ...] = ()
    """Axes of the mesh over which the vocabulary lies, the outermost first."""
    turned: tuple[str, ...] = ()
    """Those of them over which the stored unembedding has its columns."""
    gathered: tuple[str, ...] = ()
    """Those of them over which the rows of the batch are sharded."""
    rows: tuple[str, ...] = ()
    """All axes over which the rows of the batch are sharded."""

    def part(self, weight: Float[Array, "V_t D_f"]) -> Float[Array, "V_p D"]:
        """From the stored part of the unembedding to all columns of fewer rows, of zeros where V does not divide."""
        if not self.turned:
            return weight
        parts = lax.axis_size(self.turned)
        weight = jnp.pad(weight, ((0, -len(weight) % parts), (0, 0)))
        return lax.all_to_all(weight, self.turned, 0, 1, tiled=True)

    def stored(self, gradient: Float[Array, "V_p D"], count: int) -> Float[Array, "V_t D_f"]:
        """The gradient by the stored part, of ``count`` rows, from that by ``part`` of it."""
        summed = tuple(name for name in self.rows if name not in self.gathered)
        gradient = lax.psum(gradient, summed) if summed else gradient
        return lax.all_to_all(gradient, self.turned, 1, 0, tiled=True)[:count] if self.turned else gradient

    def all_rows(self, a: Shaped[Array, "B ..."]) -> Shaped[Array, "all ..."]:
        """What the devices that share these rows' vocabulary have, one after the other."""
        return _gather(a, self.gathered)

    def own_rows(self, a: Shaped[Array, "all ..."]) -> Shaped[Array, "B ..."]:
        """This device's rows of ``all_rows``."""
        if not self.gathered:
            return a
        count = len(a) // lax.axis_size(self.gathered)
        return lax.dynamic_slice_in_dim(a, lax.axis_index(self.gathered) * count, count)

    def sum_of_rows(self, a: Float[Array, "all ..."]) -> Float[Array, "B ..."]:
        """The sum over all parts of the vocabulary, of this device's rows."""
        a = self.sum_of_parts(a)
        return lax.psum_scatter(a, self.gathered, scatter_dimension=0, tiled=True) if self.gathered else a

    def sum_of_parts(self, a: Array) -> Array:
        """The sum over the parts of the vocabulary that devices with the same rows have."""
        return lax.psum(a, self.stays) if self.stays else a

    def total(self, a: Array) -> Array:
        """The sum over all parts of the vocabulary."""
        return lax.psum(a, self.over) if self.over else a

    def largest(self, a: Array) -> Array:
        """The largest over all parts of the vocabulary; without a gradient."""
        return lax.pmax(lax.stop_gradient(a), self.over) if self.over else a

    def number(self, count: int) -> Int[Array, " V_p"]:
        """The token of each of the ``count`` rows of this part; V where it is none."""
        if not self.over:
            return jnp.arange(count, dtype=jnp.int32)
        inside = (lax.axis_index(self.turned) * count if self.turned else 0) + jnp.arange(count, dtype=jnp.int32)
        return self.number_of(inside)

    def number_of(self, inside: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """The token of each of these rows, of the parts of ``turned`` one after the other; V of padding."""
        first = lax.axis_index(self.outer) * self.stored_rows if self.outer else 0
        return jnp.where(inside < self.stored_rows, first + inside, self.size)

    @property
    def stays(self) -> tuple[str, ...]:
        """Axes of ``over`` along which all devices have the same rows: these parts of the vocabulary never travel."""
        return tuple(name for name in self.over if name not in self.gathered)

    @property
    def outer(self) -> tuple[str, ...]:
        """Axes over which the stored unembedding has its rows."""
        return tuple(name for name in self.over if name not in self.turned)

    @property
    def stored_rows(self) -> int:
        """Rows of the stored part of the unembedding."""
        return self.size // (lax.axis_size(self.outer) if self.outer else 1)

    @property
    def sharing(self) -> int:
        """Devices whose rows ``all_rows`` gives."""
        return lax.axis_size(self.gathered) if self.gathered else 1


@dataclass(frozen=True)
class Place:
    """How states, unembedding and one number a position lie on a mesh, for ``shard_map``."""

    vocabulary: Vocabulary
    weight: PartitionSpec
    rows: PartitionSpec


def place_of(logical: LogicalMesh, rows: int, shape: tuple[int, ...]) -> Place:
    """Where ``rows`` rows of states and an unembedding of that shape lie.

    >>> place_of(LogicalMesh.of(jax.make_mesh((1,), ("fsdp",))), 4, (8, 2)).vocabulary
    Vocabulary(size=8, over=(), turned=(), gathered=(), rows=())
    """
    weight, by_row = partition_spec(TABLE, shape, logical), logical.rows(rows)
    outer, turned = (tuple(n for n in _names(weight, i) if logical.mesh.shape[n] > 1) for i in (0, 1))
    sharded = () if by_row == PartitionSpec(None) else tuple(n for axis in ROW_AXES for n in logical.names(axis))
    gathered = tuple(name for name in turned if name in sharded)
    return Place(Vocabulary(shape[0], (*outer, *turned), turned, gathered, sharded), weight, logical.spec(by_row))


def _names(spec: PartitionSpec, axis: int) -> tuple[str, ...]:
    entry = spec[axis] if axis < len(spec) else None
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _entry(names: tuple[str, ...]) -> str | tuple[str, ...] | None:
    return names or None


def _gather(a: Array, names: tuple[str, ...]) -> Array:
    return lax.all_gather(a, names, axis=0, tiled=True) if names else a
