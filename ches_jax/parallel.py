"""Devices as a mesh with three axes, asked for in words: ``data=4``, ``fsdp=8``, ``data=2,fsdp=2,tensor=2``.

data    rows of a batch are dealt out; every device holds the whole model
fsdp    rows are dealt out and every weight is dealt out too, gathered when it is used
tensor  each matrix product is dealt out over heads and mlp channels
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ches_jax.errors import ChesError, many
from ches_jax.rendezvous import meet

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


class OtherProcessError(ChesError):
    """Another process of the run has met an error."""


CHUNK = 2**24
HEARTBEAT_SECONDS = 30
"""A process that was not heard of for so long is taken for dead, and the others stop."""
CONNECT_SECONDS = 120
PATIENCE_SECONDS = 24 * 3600
"""How long a process that has finished waits for the others."""


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is; what all of them must do together."""

    id: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """The one that writes files."""
        return self.id == 0

    def exchange(self, value: Any, error: str | None = None) -> list[Any]:
        """JSON values of all processes, in their order; every process must call it.

        Raises:
          OtherProcessError: another process called it with an ``error``.
        """
        if self.count == 1:
            return [value]
        from jax.experimental.multihost_utils import process_allgather

        data = np.frombuffer(json.dumps({"value": value, "error": error}).encode(), np.uint8)
        sizes = np.asarray(process_allgather(np.array([len(data)], np.int32)))[:, 0]
        padded = np.zeros(-(-max(sizes) // CHUNK) * CHUNK if max(sizes) > CHUNK else max(sizes), np.uint8)
        padded[: len(data)] = data
        parts = [process_allgather(padded[i : i + CHUNK]) for i in range(0, len(padded), CHUNK)]
        found = [json.loads(row[:n].tobytes()) for row, n in zip(np.concatenate(parts, 1), sizes, strict=True)]
        failed = [(i, f["error"]) for i, f in enumerate(found) if f["error"] is not None]
        if failed and error is None:
            raise OtherProcessError(f"process {failed[0][0]} of {self.count}: {failed[0][1]}")
        return [f["value"] for f in found]

    def any(self, value: bool) -> bool:
        """Whether it is true in some process."""
        return any(self.exchange(value))

    def agree(self, value: dict[str, Any]) -> None:
        """All processes must have the same JSON value.

        Raises:
          ChesError: what differs, in all of them.
        """
        mine = json.loads(json.dumps(value))
        for i, other in enumerate(self.exchange(mine)):
            different = [f"{k}: {other.get(k)!r} there, {mine.get(k)!r} here" for k in mine if mine[k] != other.get(k)]
            if different:
                raise OtherProcessError(many(f"process {i} runs something else than process {self.id}", different))

    @contextmanager
    def together(self) -> Iterator[None]:
        """A ``ChesError`` that one process meets in the block is raised in all of them."""
        try:
            yield
            self.exchange(None)
        except OtherProcessError:
            raise
        except ChesError as error:
            self.exchange(None, str(error))
            raise

    def on_host(self, tree: Any) -> Any:
        """Arrays that may lie on devices of several processes as arrays of the first one; of the others, nothing."""
        if self.count == 1:
            return tree
        from jax.experimental.multihost_utils import process_allgather

        def fetch(x: Any) -> Any:
            whole = np.asarray(process_allgather(x, tiled=True))
            return whole if self.first else None

        return jax.tree.map(fetch, tree)


def start_processes(words: str) -> Process:
    """Join the processes of a run: ``off``, ``auto`` (the cluster knows), or ``coordinator:port,n,id``.

    Only on request: a guess from a half-set environment hangs or crashes.

    Raises:
      ChesError: words that mean nothing, no cluster to ask, a coordinator that cannot be reached.
    """
    if words == "off":
        return Process()
    known: dict[str, Any] = {}
    if words != "auto":
        known = parse_processes(words)
    if not jax.distributed.is_initialized():
        if known:
            host, _, port = known["coordinator_address"].rpartition(":")
            meet(words, host, int(port), known["num_processes"], known["process_id"], CONNECT_SECONDS)
        # SIGTERM is the run's own affair
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                **known,
                initialization_timeout=CONNECT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=PATIENCE_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            hint = (
                "give coordinator:port,n,id where no cluster tells them" if words == "auto" else "jax could not start"
            )
            raise ChesError(f"--distributed {words!r}: {hint} ({reason})") from None
    return Process(jax.process_index(), jax.process_count())


def parse_processes(words: str) -> dict[str, Any]:
    """Arguments of ``jax.distributed.initialize`` from ``coordinator:port,n,id``.

    >>> parse_processes("10.0.0.1:8476,2,1")
    {'coordinator_address': '10.0.0.1:8476', 'num_processes': 2, 'process_id': 1}
    """
    address, *numbers = words.split(",")
    host, _, port = address.rpartition(":")
    good = host and port.isdigit() and 0 < int(port) < 2**16 and len(numbers) == 2 and all(map(str.isdigit, numbers))
    if not good or int(numbers[1]) >= int(numbers[0]):
        raise ChesError(
            f"--distributed {words!r}: expected off, auto, or coordinator:port,n,id with the address of process 0, the "
            "number of processes and the number of this one, from 0 to n - 1"
        )
    return {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}


def several_processes() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def lost_peer(error: Exception) -> str | None:
    """What to tell of an error that a computation over several processes met; None for any other."""
    if not several_processes() or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    reason = str(error).partition("\n")[0]
    return f"a computation over {jax.process_count()} processes failed; most likely one of them has stopped ({reason})"


def leave(code: int) -> None:
    """End this process now where it is one of several and has failed: an ordinary exit would wait for the others."""
    if not several_processes():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(2)  # the others hear of errors through this one: they tell theirs first
    os._exit(code)
