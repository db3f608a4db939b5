"""The processes of one run: how they start, compare configurations, exchange values, and end when one fails."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ches_jax.distributed.rendezvous import rendezvous
from ches_jax.errors import ChesError, many, os_error_text


class OtherProcessError(ChesError):
    """Another process of the run raised an error."""


CHUNK = 2**24
HEARTBEAT_SECONDS = 30
"""A process that sends no heartbeat for this long counts as dead, and the others stop."""
CONNECT_SECONDS = 120
SHUTDOWN_SECONDS = 24 * 3600
"""How long a process that has finished waits for the others."""


@dataclass(frozen=True)
class Process:
    """Which of how many processes this is, and the operations that all of them call together.

    >>> Process().exchange({"loss": 0.7})
    [{'loss': 0.7}]
    """

    id: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is process 0, which writes the files."""
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
        messages = [json.loads(row[:n].tobytes()) for row, n in zip(np.concatenate(parts, 1), sizes, strict=True)]
        failed = [(i, f["error"]) for i, f in enumerate(messages) if f["error"] is not None]
        if failed and error is None:
            raise OtherProcessError(f"process {failed[0][0]} of {self.count}: {failed[0][1]}")
        return [f["value"] for f in messages]

    def any_of(self, *values: bool) -> tuple[bool, ...]:
        """For each value whether it is true in at least one process."""
        return tuple(any(some) for some in zip(*self.exchange(values), strict=True))

    def agree(self, value: dict[str, Any]) -> None:
        """Check that all processes have the same JSON value.

        Raises:
          OtherProcessError: what differs; every process raises it.
        """
        local = json.loads(json.dumps(value))
        for i, other in enumerate(self.exchange(local)):
            different = [f"{k}: {other.get(k)!r} there, {v!r} here" for k, v in local.items() if v != other.get(k)]
            if different:
                raise OtherProcessError(many(f"process {i} runs something else than process {self.id}", different))

    @contextmanager
    def sharing_errors(self) -> Iterator[None]:
        """A ``ChesError``, or an error of the system, that one process raises in the block is raised in all of them."""
        try:
            yield
        except OtherProcessError:
            raise
        except (ChesError, OSError) as error:
            self.exchange(None, os_error_text(error) if isinstance(error, OSError) else str(error))
            raise
        self.exchange(None)

    def on_host(self, tree: Any) -> Any:
        """Arrays that are sharded over several processes as NumPy arrays in process 0; None in the others."""
        if self.count == 1:
            return tree
        from jax.experimental.multihost_utils import process_allgather

        def fetch(x: Any) -> Any:
            whole = np.asarray(process_allgather(x, tiled=True))
            return whole if self.first else None

        return jax.tree.map(fetch, tree)

    def from_first(self, tree: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
        """Arrays by name, which process 0 has, in all processes; the others give None.

        >>> Process().from_first({"a": np.ones(1)})
        {'a': array([1.])}
        """
        if self.count == 1:
            assert tree is not None
            return tree
        from jax.experimental.multihost_utils import broadcast_one_to_all

        kinds = self.exchange(None if tree is None else {k: [v.shape, str(v.dtype)] for k, v in tree.items()})[0]
        here = tree or {k: np.zeros(shape, dtype) for k, (shape, dtype) in kinds.items()}
        return {k: np.asarray(broadcast_one_to_all(here[k], is_source=self.first)) for k in kinds}


def start_processes(option: str) -> Process:
    """Join the processes of a run.

    Only on request: a guess from a half-set environment hangs or crashes.

    Args:
      option: ``off`` (one process), ``auto`` (from the cluster's environment), or ``coordinator:port,n,id``.

    Raises:
      ChesError: another option, no cluster environment, a coordinator that cannot be reached.
    """
    if option == "off":
        return Process()
    known: dict[str, Any] = {}
    if option != "auto":
        known = parse_processes(option)
    if not jax.distributed.is_initialized():
        if known:
            host, _, port = known["coordinator_address"].rpartition(":")
            rendezvous(option, host, int(port), known["num_processes"], known["process_id"], CONNECT_SECONDS)
        # the run handles SIGTERM itself
        jax.config.update("jax_enable_preemption_service", False)
        try:
            jax.distributed.initialize(
                **known,
                initialization_timeout=CONNECT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
        except (ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            hint = (
                "give coordinator:port,n,id where no cluster sets them" if option == "auto" else "jax could not start"
            )
            raise ChesError(f"--distributed {option!r}: {hint} ({reason})") from None
    return Process(jax.process_index(), jax.process_count())


def start_run(option: str, out: str | None) -> Process:
    """``start_processes`` of a verb whose processes write one run directory.

    Raises:
      ChesError: as ``start_processes``; several processes without a run directory.
    """
    process = start_processes(option)
    if process.count > 1 and out is None:
        raise ChesError("--distributed: give the run directory with --out")
    return process


def part() -> None:
    """Leave the others, where nothing is computed together: one that dies then takes no other with it."""
    if jax.distributed.is_initialized():
        jax.devices()  # tells each process of all devices, which needs the others
        jax.distributed.shutdown()


def parse_processes(option: str) -> dict[str, Any]:
    """Arguments of ``jax.distributed.initialize`` from ``coordinator:port,n,id``.

    >>> parse_processes("10.0.0.1:8476,2,1")
    {'coordinator_address': '10.0.0.1:8476', 'num_processes': 2, 'process_id': 1}
    """
    address, *numbers = option.split(",")
    host, _, port = address.rpartition(":")
    valid = host and port.isdigit() and 0 < int(port) < 2**16 and len(numbers) == 2 and all(map(str.isdigit, numbers))
    if not valid or int(numbers[1]) >= int(numbers[0]):
        raise ChesError(
            f"--distributed {option!r}: expected off, auto, or coordinator:port,n,id with the address of process 0, "
            "the number of processes and the number of this one, from 0 to n - 1"
        )
    return {"coordinator_address": address, "num_processes": int(numbers[0]), "process_id": int(numbers[1])}


def several_processes() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def peer_failure(error: Exception) -> str | None:
    """A message for an error of a computation over several processes; None for any other error."""
    reason = str(error).partition("\n")[0]
    # a broken exchange between CPUs comes as ValueError where the program is run, not waited for
    broken = isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "Gloo" in reason)
    if not several_processes() or not broken:
        return None
    return f"a computation over {jax.process_count()} processes failed; most likely one of them has stopped ({reason})"


def exit_process(code: int) -> None:
    """End a failed process at once if it is one of several: an ordinary exit would wait for the others."""
    if not several_processes():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(2)  # the others learn of errors through this one: let them report theirs first
    os._exit(code)
