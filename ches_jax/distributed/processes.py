"""The processes of one run: how they start, agree, exchange values, and end together."""

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

from ches_jax.distributed.rendezvous import meet
from ches_jax.errors import ChesError, many


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
