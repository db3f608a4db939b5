"""A run that is made chunk by chunk, by one process or several: what ``ches score``, ``generate`` and ``judge`` share.

Several processes take chunks in turn, each with its own devices and without collectives, and ``ches merge`` joins what
they wrote; on a mesh over the devices of all of them they compute every batch together, and the first one writes
(``distributed.division``). A run that was killed resumes with the chunks that are missing, by any number of processes.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ches_jax.distributed.division import Division
from ches_jax.distributed.mesh import mesh_of_run, spelled
from ches_jax.distributed.processes import Process, part
from ches_jax.runs import chunks
from ches_jax.runs.directory import RUN, device_name, open_run, versions
from ches_jax.runs.lock import RunLock
from ches_jax.runs.store import output_place

C = TypeVar("C", bound=tuple, covariant=True)


class Chunked(Protocol[C]):
    """Data by the chunk."""

    def __call__(self, first: int, wanted: Callable[[int], bool], at_end: Callable[[int], None], /) -> Iterator[C]:
        """The chunks from number ``first`` on that are wanted, each a tuple that begins with its number.

        ``at_end`` is called with the number of all chunks when the data have come to their end.
        """
        ...


class ChunkedRun:
    r"""A context that holds the lock of the run directory; its methods are called in this order.

    >>> from tempfile import TemporaryDirectory
    >>> def two(first, wanted, at_end):
    ...     yield from ((number,) for number in range(first, 2) if wanted(number))
    ...     at_end(2)
    >>> with TemporaryDirectory() as folder, ChunkedRun("judge", folder + "/run", "data=1", Process()) as run:
    ...     with run.opening():
    ...         identity = {"config": {"responses": "r.jsonl"}}
    ...     run.agree(identity)
    ...     run.begin(identity)
    ...     for (number,) in run.missing(two, lambda: None):
    ...         chunks.write(run.out, number, [{"row": number}])
    ...     run.end(lambda out, facts: chunks.join(out, "all.jsonl"), {})
    ...     (run.out / "all.jsonl").read_text()
    '{"row": 0}\n{"row": 1}\n'
    """

    def __init__(self, verb: str, out: str | Path, mesh: str | None, process: Process):
        """Of this process; leaves the others where each works for itself.

        Raises:
          ChesError: as ``mesh_of_run`` and ``output_place``.
        """
        self.verb = verb
        self.mesh = mesh_of_run(mesh)
        self.division = Division.on(self.mesh, process)
        self.in_turn = self.division.turns.count > 1
        if self.in_turn:
            part()
        self.lock = RunLock(output_place(out), shared=self.in_turn, first=self.division.turns.first)
        self.finished = False
        """Whether the run had come to its end before."""
        self.versions: dict[str, str] = {}
        """Of the packages, when the run began."""
        self.done: dict[int, int] = {}
        """Rows of the chunks that were there at the beginning."""

    def __enter__(self) -> "ChunkedRun":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.lock.__exit__(kind, error, trace)

    @property
    def out(self) -> Path:
        """The run directory."""
        return self.lock.out

    @property
    def team(self) -> Process:
        """The processes that compute each batch together."""
        return self.division.team

    @property
    def facts(self) -> dict[str, Any]:
        """Where it was computed, for ``run.json``."""
        return {"device": device_name(), "mesh": dict(self.mesh.shape), "processes": self.division.count}

    @contextmanager
    def opening(self) -> Iterator[None]:
        """A block that opens and checks what is read: a ``ChesError`` of one process of the team is one of all."""
        with self.team.sharing_errors():
            if self.team.first:
                self.lock.require_free()
            yield

    def agree(self, identity: Mapping[str, Any]) -> None:
        """Check that the processes of the team run the same.

        Raises:
          OtherProcessError: what differs.
        """
        self.team.agree({**identity, "mesh": spelled(self.mesh.shape), "versions": versions()})

    def begin(self, identity: dict[str, Any], resume: bool = False, other_versions: bool = False) -> None:
        """Take the run directory, and see what is there.

        Raises:
          RunError: as ``open_run`` and ``RunLock.take``.
        """
        begun = None
        with self.team.sharing_errors():
            if self.team.first:
                begun = self._begin(identity, resume, other_versions)
        self.finished, self.versions, done = self.team.exchange(begun)[0]
        self.done = {int(number): rows for number, rows in done.items()}

    def _begin(self, identity: dict[str, Any], resume: bool, other_versions: bool) -> list[Any]:
        self.lock.take()
        # the other processes join the directory that the first one makes
        began = open_run(self.out, self.verb, identity, resume or self.in_turn, other_versions=other_versions)
        if (self.out / RUN).exists():
            chunks.clear(self.out)
            return [True, {}, {}]
        chunks.make_folders(self.out)
        return [False, began.get("versions") or versions(), chunks.done(self.out)]

    @property
    def first_missing(self) -> int:
        """The first chunk that is not done."""
        return next(number for number in itertools.count() if number not in self.done)

    def missing(self, data: Chunked[C], unchanged: Callable[[], None]) -> Iterator[C]:
        """The chunks that are missing and are this process's; behind the last one the end of the data is marked.

        Args:
          data: all chunks. The caller writes each one (of a team its first process) before it takes the next.
          unchanged: raises where what was opened has changed.
        """
        computed: list[int] = []
        ends: list[int] = []

        def wanted(number: int) -> bool:
            return self.division.takes(number) and number not in self.done

        for chunk in data(self.first_missing, wanted, ends.append):
            yield chunk
            computed.append(chunk[0])
        if self.team.first:
            chunks.end_of_data(self.out, ends[0], computed, unchanged)

    def end(self, finish: Callable[[Path, Mapping[str, Any]], None], facts: Mapping[str, Any]) -> None:
        """Have the chunks joined; where processes take them in turn, ``ches merge`` does it when all have ended.

        Args:
          finish: joins them and writes ``run.json`` with the facts.
          facts: about the computation.
        """
        with self.team.sharing_errors():
            if self.team.first and not self.in_turn:
                finish(self.out, {**self.facts, **facts})
            elif self.team.first and "work" in facts:
                chunks.add_work(self.out, self.division.turns.id, facts["work"])
