"""Devices as a mesh with four logical axes, named in text: ``data=4``, ``fsdp=8``, ``data=2,fsdp=2,tensor=2``.

data    rows of a batch are sharded; every device holds the whole model
fsdp    rows are sharded, and every weight too: it is gathered when it is used
tensor  attention heads and mlp channels are sharded, and with them each matrix product
expert  rows are sharded, and the experts of a mixture; other weights are whole on every device

A mesh that a user made may name its axes otherwise: ``LogicalMesh`` maps the four onto its axes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ches_jax.errors import ChesError, many

AXES = ("data", "fsdp", "tensor", "expert")
ROW_AXES = ("data", "fsdp", "expert")
ROWS = PartitionSpec(ROW_AXES)
"""How the leading axis of a batch lies on the mesh."""


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes from text; axes not named have size 1.

    >>> parse_mesh("data=2,tensor=4")
    {'data': 2, 'fsdp': 1, 'tensor': 4, 'expert': 1}
    """
    sizes: dict[str, int] = {axis: 1 for axis in AXES}  # noqa: C420  (fromkeys would fix the keys' type)
    for part in text.split(","):
        name, _, number = part.partition("=")
        if name.strip() not in AXES or not number.strip().isdigit() or int(number) < 1:
            raise ChesError(f"--mesh {text!r}: expected axis=size pairs with axes {', '.join(AXES)}, such as data=4")
        sizes[name.strip()] = int(number)
    return sizes


def spelled(sizes: Mapping[str, int]) -> str:
    """Axis sizes as ``parse_mesh`` reads them.

    >>> spelled({"data": 2, "fsdp": 8, "tensor": 1})
    'data=2,fsdp=8'
    """
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "data=1"


def mesh_of(devices: np.ndarray, sizes: Mapping[str, int]) -> Mesh:
    """A mesh whose neighbours are neighbours on the network of the chips.

    Of several slices, which only a slow network joins, the slow part is the outermost one of the ``data`` axis: each
    slice is a replica, and weights are sharded within it.

    Raises:
      ChesError: a ``data`` axis that the slices do not divide.
    """
    shape = [sizes.get(axis, 1) for axis in AXES]
    slices = len({getattr(d, "slice_index", None) or 0 for d in devices.flat})
    if devices.flat[0].platform != "tpu":
        grid = devices.reshape(shape)
    elif slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices.tolist(), allow_split_physical_axes=True)
    elif sizes["data"] % slices:
        raise ChesError(f"--mesh {spelled(sizes)}: there are {slices} slices; data must be a multiple of them")
    else:
        inside = [sizes["data"] // slices, *shape[1:]]
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, (slices, 1, 1, 1), devices.tolist(), allow_split_physical_axes=True
        )
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def make_mesh(text: str | None = None, *, everywhere: bool = False) -> Mesh:
    """The mesh of ``text``; by default all devices on the data axis.

    Args:
      text: sizes of axes, see ``parse_mesh``.
      everywhere: over the devices of all processes, all of them; otherwise over those of this process.

    Raises:
      ChesError: more devices than there are, or, over several processes, not all of them.
    """
    devices = jax.devices() if everywhere else jax.local_devices()
    sizes = parse_mesh(text or f"data={len(devices)}")
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ChesError(f"--mesh {text!r} asks for {needed} devices; there are {len(devices)}")
    if everywhere and jax.process_count() > 1 and needed < len(devices):
        raise ChesError(
            f"--mesh {text!r} takes {needed} devices; the {jax.process_count()} processes have {len(devices)}, and all "
            "must be taken"
        )
    return mesh_of(np.array(devices[:needed]), sizes)


def mesh_of_run(text: str | None = None) -> Mesh:
    """The mesh of a verb whose processes can work each for itself, or all on one model that none of them can hold.

    As many devices as this process has, or fewer: its own. As many as all processes have: all of them together.

    Raises:
      ChesError: as ``make_mesh``; a number of devices that is neither.
    """
    here, everywhere = len(jax.local_devices()), len(jax.devices())
    needed = here if text is None else math.prod(parse_mesh(text).values())
    if needed <= here or everywhere == here:
        return make_mesh(text)
    if needed != everywhere:
        raise ChesError(
            f"--mesh {text!r} asks for {needed} devices: a process has {here}, with which it works for itself, and all "
            f"{jax.process_count()} have {everywhere}, with which they work together; give one of these numbers"
        )
    return make_mesh(text, everywhere=True)


def spans_processes(mesh: Mesh) -> bool:
    """Whether the devices of a mesh are those of several processes.

    >>> spans_processes(make_mesh("data=1"))
    False
    """
    return len({device.process_index for device in mesh.devices.flat}) > 1


@dataclass(frozen=True)
class LogicalMesh:
    """A mesh with any axis names, and which of them play the parts of ``data``, ``fsdp``, ``tensor`` and ``expert``."""

    mesh: Mesh
    axes: tuple[tuple[str, tuple[str, ...]], ...]
    """For each logical axis the mesh axes it stands for; none where the mesh has no such axis."""

    @classmethod
    def of(cls, mesh: Mesh, axes: Mapping[str, str | Iterable[str]] | None = None) -> "LogicalMesh":
        """``mesh`` with its axes understood.

        Args:
          mesh: axes of any type but ``Manual``, explicit or auto.
          axes: logical axis -> name (or names) of the mesh; default: axes named as the logical ones are what they
            are called. Mesh axes of size 1 need no part.

        Raises:
          ChesError: a mesh without devices or with manual axes, a name that does not exist, an axis with two parts or
            with none. All that is wrong with the names in one message.

        Example:
          >>> mesh = jax.make_mesh((1, 1), ("replica", "model"))
          >>> logical = LogicalMesh.of(mesh, {"data": "replica", "tensor": "model"})
          >>> logical.spec(PartitionSpec(("data", "fsdp"), "tensor"))
          P('replica', 'model')
        """
        if not isinstance(mesh, Mesh):
            raise ChesError(
                f"mesh={mesh!r}: expected a jax.sharding.Mesh of devices, such as jax.make_mesh((4,), ('fsdp',))"
            )
        if AxisType.Manual in mesh.axis_types:
            raise ChesError(f"mesh={dict(mesh.shape)}: has manual axes; make it with auto or explicit ones")
        parts = (
            {name: (name,) for name in AXES if name in mesh.shape}
            if axes is None
            else {name: (value,) if isinstance(value, str) else tuple(value) for name, value in axes.items()}
        )
        used = [name for names in parts.values() for name in names]
        problems = [
            *(f"axes has {name!r}; expected {', '.join(AXES)}" for name in parts if name not in AXES),
            *(f"axes names {name!r}, which the mesh does not have" for name in used if name not in mesh.shape),
            *(f"mesh axis {name!r} is given two parts" for name in mesh.shape if used.count(name) > 1),
            *(
                f"mesh axis {name!r} (size {size}) is none of {', '.join(AXES)}; say which part it plays, such as "
                f"axes={{'fsdp': {name!r}}}"
                for name, size in mesh.shape.items()
                if name not in used and size > 1
            ),
        ]
        if problems:
            raise ChesError(many(f"mesh={dict(mesh.shape)}", problems))
        return cls(mesh, tuple((name, parts.get(name, ())) for name in AXES))

    def size(self, *names: str) -> int:
        """Number of devices along logical axes together.

        >>> LogicalMesh.of(jax.make_mesh((1,), ("fsdp",))).size("tensor")
        1
        """
        return math.prod(self.mesh.shape[n] for name in names for n in dict(self.axes)[name])

    def spec(self, spec: PartitionSpec) -> PartitionSpec:
        """A partition over logical axes in the names of the mesh."""
        table = dict(self.axes)

        def names(entry: Any) -> Any:
            logical = () if entry is None else (entry,) if isinstance(entry, str) else entry
            physical = tuple(n for name in logical for n in table[name])
            return None if not physical else physical[0] if len(physical) == 1 else physical

        return PartitionSpec(*map(names, spec))

    @property
    def current(self) -> Any:
        """The mesh as the computation that is being traced sees it: explicit axes may be auto ones there."""
        context = jax.sharding.get_abstract_mesh()
        return self.mesh if context.empty else context

    def names(self, axis: str) -> tuple[str, ...]:
        """The axes of the mesh that a logical axis stands for, those of one device left out."""
        return tuple(name for name in dict(self.axes)[axis] if self.mesh.shape[name] > 1)

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """The sharding of an array by a partition over logical axes."""
        return NamedSharding(self.current, self.spec(spec))

    def rows(self, count: int) -> PartitionSpec:
        """How ``count`` rows of a batch lie: sharded where they divide, else whole on every device."""
        return ROWS if count % self.size(*ROW_AXES) == 0 else PartitionSpec(None)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of arrays whose leading axis is rows of a batch."""
    return NamedSharding(mesh, ROWS)


def row_shards(mesh: Mesh) -> int:
    """Number of shards of the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def weights_are_whole(mesh: Mesh) -> bool:
    """Whether every device holds all weights."""
    return all(mesh.shape[axis] == 1 for axis in AXES if axis != "data")


@lru_cache
def local_shards(mesh: Mesh) -> tuple[int, ...]:
    """Which of the ``row_shards`` shards of a batch lie on this process's devices."""
    parts = row_sharding(mesh).addressable_devices_indices_map((row_shards(mesh),)).values()
    return tuple(sorted({range(row_shards(mesh))[index[0]][0] for index in parts if index is not None}))


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays of this process's rows (``local_shards``, in their order) as global arrays sharded by rows."""
    local, shards, sharding = len(local_shards(mesh)), row_shards(mesh), row_sharding(mesh)

    def put(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, x, (x.shape[0] // local * shards, *x.shape[1:]))

    return jax.tree.map(put, tree)


def put_own_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays of all rows, which every process has whole, as arrays sharded by rows."""
    sharding = row_sharding(mesh)
    if not spans_processes(mesh):
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda part: x[part]), tree)


def rows_here(a: jax.Array) -> np.ndarray:
    """Those rows of an array sharded by rows (``row_sharding``) that lie on this process's devices (``numbers_here``).

    >>> rows_here(put_own_rows(np.arange(4), make_mesh("data=1"))).tolist()
    [0, 1, 2, 3]
    """
    if a.is_fully_addressable:
        return np.asarray(a)
    parts = {shard.index[0].start: shard.data for shard in a.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def bytes_here(tree: Any) -> int:
    """Bytes of arrays on this process's devices; what several of these hold counts several times.

    >>> bytes_here(put_replicated(np.zeros(3, np.float32), make_mesh("data=1")))
    12
    """
    return sum(shard.data.nbytes for array in jax.tree.leaves(tree) for shard in array.addressable_shards)


def numbers_here(mesh: Mesh, count: int) -> np.ndarray:
    """Which of the ``count`` rows of a batch lie on this process's devices, in order.

    >>> numbers_here(make_mesh("data=1"), 3).tolist()
    [0, 1, 2]
    """
    return np.arange(count).reshape(row_shards(mesh), -1)[list(local_shards(mesh))].reshape(-1)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Arrays that are equal in every process, replicated on every device."""
    sharding = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), np.shape(x)), tree)
