"""Devices as a mesh with three axes, asked for in words: ``data=4``, ``fsdp=8``, ``data=2,fsdp=2,tensor=2``.

data    rows of a batch are dealt out; every device holds the whole model
fsdp    rows are dealt out and every weight is dealt out too, gathered when it is used
tensor  each matrix product is dealt out over heads and mlp channels
"""

import math
from dataclasses import dataclass

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


def make_mesh(text: str | None = None) -> Mesh:
    """The mesh of ``text``; by default all local devices on the data axis."""
    devices = jax.local_devices()
    sizes = parse_mesh(text) if text else {"data": len(devices), "fsdp": 1, "tensor": 1}
    wanted = math.prod(sizes.values())
    if wanted > len(devices):
        raise ChesError(f"--mesh {text!r} asks for {wanted} devices; there are {len(devices)}")
    grid = np.array(devices[:wanted]).reshape([sizes[a] for a in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is rows of a batch."""
    return NamedSharding(mesh, ROWS)


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are dealt."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is."""

    id: int = 0
    count: int = 1


def start_processes(words: str) -> Process:
    """Join the processes of a run: ``off``, ``auto`` (the cluster knows), or ``coordinator:port,n,id``.

    Only on request: a guess from a half-set environment hangs or crashes.
    """
    if words == "off":
        return Process()
    if words == "auto":
        jax.distributed.initialize()
    else:
        address, _, rest = words.partition(",")
        count, _, number = rest.partition(",")
        if ":" not in address or not count.isdigit() or not number.isdigit() or int(number) >= int(count):
            raise ChesError(f"--distributed {words!r}: expected off, auto, or coordinator:port,n,id with id below n")
        jax.distributed.initialize(address, int(count), int(number))
    return Process(jax.process_index(), jax.process_count())
