"""A forecast by several processes: all compute on one mesh, the first one reads and writes the run directory."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from ches_jax.distributed.lead import Followed
from ches_jax.distributed.mesh import spelled
from ches_jax.distributed.processes import Process
from ches_jax.runs import chunks
from ches_jax.runs.directory import RUN, open_run, read_json, versions
from ches_jax.runs.lock import RunLock


def begin(
    lock: RunLock,
    verb: str,
    identity: dict[str, Any],
    mesh: Mesh,
    process: Process,
    *,
    resume: bool,
    other_versions: bool,
) -> bool:
    """Whether the run directory, now the first process's, holds the finished run already.

    Raises:
      OtherProcessError: processes that run something else; what the first one raises.
      RunError: as ``open_run`` and ``RunLock.take``.
    """
    process.agree({**identity, "mesh": spelled(mesh.shape), "versions": versions()})
    done = False
    with process.sharing_errors():
        if process.first:
            lock.take()
            open_run(lock.out, verb, identity, resume, other_versions=other_versions)
            done = (lock.out / RUN).exists() and read_json(lock.out / RUN).get("status") == "done"
            if done:
                chunks.clear(lock.out)
    return process.exchange(done)[0]


def of_first(out: Path, process: Process) -> Path:
    """The run directory, in the first process.

    Raises:
      Followed: in the others.

    >>> of_first(Path("run"), Process(1, 2))
    Traceback (most recent call last):
    ches_jax.distributed.lead.Followed: process 0 has written run
    """
    if not process.first:
        raise Followed(f"process 0 has written {out}")
    return out
