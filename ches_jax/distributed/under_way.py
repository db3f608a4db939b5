"""How many batches are computed at a time.

An accelerator computes one while the host prepares the next. On a CPU much of a pass, attention above all, and nearly
all of a step that makes one token, is operations too small for several threads: with one batch after the other the
second core waits, and what is handed to it costs more than it saves. So batches are computed side by side there, each
started by a thread of its own.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
from jax.sharding import Mesh

SIDE_BY_SIDE = 4
"""Batches that are computed at once on a CPU at most, and one for each core: each needs memory of its own."""

Result = TypeVar("Result")


class UnderWay:
    """Starts computations on the devices of a mesh, up to ``count`` at a time.

    >>> from ches_jax.distributed.mesh import make_mesh
    >>> under_way = UnderWay(make_mesh("data=1"))
    >>> result = under_way(lambda: jax.numpy.ones(3).sum())
    >>> float(result())
    3.0
    """

    def __init__(self, mesh: Mesh):
        """One thread a batch where the mesh is one CPU device; several devices are kept busy by their own threads."""
        alone = mesh.size == 1 and next(iter(mesh.devices.flat)).platform == "cpu"
        self.count = min(SIDE_BY_SIDE, _cores()) if alone else 1
        self._threads = ThreadPoolExecutor(self.count) if self.count > 1 else None

    def __call__(self, launch: Callable[[], Result]) -> Callable[[], Result]:
        """Calls ``launch``, now or as soon as a thread is free; gives what waits for its result."""
        if self._threads is None:
            result = launch()
            return lambda: result
        return self._threads.submit(lambda: jax.block_until_ready(launch())).result


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
