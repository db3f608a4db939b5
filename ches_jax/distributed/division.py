"""How the processes of a run share its work: each for itself, or all on every batch."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from ches_jax.distributed.mesh import spans_processes
from ches_jax.distributed.processes import Process
from ches_jax.errors import ChesError


def team_of(mesh: Mesh) -> Process:
    """The processes that compute together what is computed on ``mesh``: this one alone, or all.

    >>> from ches_jax.distributed.mesh import make_mesh
    >>> team_of(make_mesh("data=1"))
    Process(id=0, count=1)

    Raises:
      ChesError: the devices are those of some of the processes.
    """
    owners = {device.process_index for device in mesh.devices.flat}
    if len(owners) == 1:
        return Process()
    if len(owners) < jax.process_count():
        raise ChesError(
            f"mesh={dict(mesh.shape)}: has devices of {len(owners)} of {jax.process_count()} processes; expected those "
            "of one or of all"
        )
    return Process(jax.process_index(), jax.process_count())


@dataclass(frozen=True)
class Division:
    """Who computes with this process, and who beside it.

    >>> from ches_jax.distributed.mesh import make_mesh
    >>> division = Division.on(make_mesh("data=1"), Process(1, 2))
    >>> division.team.first, division.turns.id, division.count, division.first
    (True, 1, 2, False)
    """

    team: Process
    """Those that compute each batch together; the first one writes."""
    turns: Process
    """Those that take chunks in turn."""

    @classmethod
    def on(cls, mesh: Mesh, process: Process) -> "Division":
        """Together where the mesh is of several processes, else in turn."""
        return cls(process, Process()) if spans_processes(mesh) else cls(Process(), process)

    @property
    def count(self) -> int:
        """Processes in all."""
        return self.team.count * self.turns.count

    @property
    def first(self) -> bool:
        """Whether this is process 0."""
        return self.team.first and self.turns.first

    def takes(self, chunk: int) -> bool:
        """Whether the chunk of this number is one of this process's.

        >>> [Division(Process(), Process(1, 2)).takes(chunk) for chunk in range(3)]
        [False, True, False]
        """
        return chunk % self.turns.count == self.turns.id
