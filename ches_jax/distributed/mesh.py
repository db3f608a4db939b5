"""Devices as a mesh with three axes, asked for in words: ``data=4``, ``fsdp=8``, ``data=2,fsdp=2,tensor=2``.

data    rows of a batch are dealt out; every device holds the whole model
fsdp    rows are dealt out and every weight is dealt out too, gathered when it is used
tensor  each matrix product is dealt out over heads and mlp channels
"""

import math
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ches_jax.errors import ChesError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))
"""How the leading axis of a batch lies on the mesh."""


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes from words; axes not named have size 1.

    >>> parse_mesh("data=2,tensor=4")
    {'data': 2, 'fsdp': 1, 'tensor': 4}
    """
    sizes: dict[str, int] = {axis: 1 for axis in AXES}  # noqa: C420  (fromkeys would fix the keys' type)
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() not in AXES or not number.strip().isdigit() or int(number) < 1:
            raise ChesError(f"--mesh {text!r}: expected axis=size pairs with axes {', '.join(AXES)}, such as data=4")
        sizes[name.strip()] = int(number)
    return sizes


def make_mesh(text: str | None = None, *, everywhere: bool = False) -> Mesh:
    """The mesh of ``text``; by default all devices on the data axis.

    Args:
      text: sizes of axes, see ``parse_mesh``.
      everywhere: over the devices of all processes, of which it must take all; otherwise over this process's own.
    """
    devices = jax.devices() if everywhere else jax.local_devices()
    sizes = parse_mesh(text) if text else {"data": len(devices), "fsdp": 1, "tensor": 1}
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        raise ChesError(f"--mesh {text!r} asks for {wanted} devices; there are {len(devices)}")
    if everywhere and jax.process_count() > 1 and wanted < len(devices):
        raise ChesError(
            f"--mesh {text!r} takes {wanted} devices; the {jax.process_count()} processes have {len(devices)}, and all "
            "must be taken"
        )
    grid = np.array(devices[:wanted]).reshape([sizes[a] for a in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is rows of a batch."""
    return NamedSharding(mesh, ROWS)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are dealt."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@lru_cache
def held_shards(mesh: Mesh) -> tuple[int, ...]:
    """Which of the ``row_shards`` parts of a batch lie on this process's devices."""
    parts = row_sharding(mesh).addressable_devices_indices_map((row_shards(mesh),)).values()
    return tuple(sorted({range(row_shards(mesh))[index[0]][0] for index in parts if index is not None}))


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays of the rows that this process holds (``held_shards``, in their order) as arrays of all rows."""
    held, shards, where = len(held_shards(mesh)), row_shards(mesh), row_sharding(mesh)

    def put(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(where, x, (x.shape[0] // held * shards, *x.shape[1:]))

    return jax.tree.map(put, tree)


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process has alike, whole on every device."""
    where = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, np.asarray(x), np.shape(x)), tree)
