"""The processes of a run meet before jax is told of them, so that who is missing can be said in words.

jax ends a process that finds no coordinator with a stack trace. Here process 0 listens at the coordinator's port until
all others have told it their number; then the port is free again for jax.
"""

import json
import socket
import time

from ches_jax.errors import ChesError

PAUSE = 0.2
"""Seconds between two attempts to connect."""


def meet(words: str, host: str, port: int, count: int, number: int, seconds: float) -> None:
    """Return when all ``count`` processes are there.

    Args:
      words: the option, for messages.
      host: where process 0 runs.
      port: where it listens.
      count: how many processes there are.
      number: which of them this is.
      seconds: how long to wait.

    Raises:
      ChesError: a port in use, nobody at the address, processes that did not come, that have the number of another or
        expect another number of processes.
    """
    deadline = time.monotonic() + seconds
    if number == 0:
        _gather(words, port, count, deadline, seconds)
    else:
        _report(words, host, port, count, number, deadline, seconds)


def _gather(words: str, port: int, count: int, deadline: float, seconds: float) -> None:
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ChesError(
            f"--distributed {words!r}: cannot listen at port {port} ({error.strerror}); take another"
        ) from None
    there: dict[int, socket.socket] = {}
    with server:
        try:
            while len(there) < count - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    peer, _ = server.accept()
                    peer.settimeout(max(0.01, min(5.0, deadline - time.monotonic())))
                    found = json.loads(peer.makefile().readline())
                    number, expected = int(found["number"]), int(found["count"])
                except TimeoutError:
                    if time.monotonic() < deadline:
                        continue  # somebody who says nothing
                    missing = ", ".join(str(i) for i in range(1, count) if i not in there)
                    problem = f"process {missing} of {count} did not come within {seconds:g} s"
                    raise _told(there, f"--distributed {words!r}: {problem}") from None
                except (ValueError, KeyError, TypeError, OSError):
                    continue  # somebody else's client
                problem = None
                if expected != count:
                    problem = f"process 0 expects {count} processes, process {number} expects {expected}"
                elif number in there or not 0 < number < count:
                    problem = f"two processes have the number {number}"
                if problem is not None:
                    there[-1] = peer
                    raise _told(there, f"--distributed {words!r}: {problem}")
                there[number] = peer
            _tell(there, "")
        finally:
            for peer in there.values():
                peer.close()


def _tell(there: dict[int, socket.socket], problem: str) -> None:
    """Tell all who came, and wait until they have hung up: the port is then free at once."""
    for peer in there.values():
        try:
            peer.sendall((json.dumps({"problem": problem}) + "\n").encode())
            peer.settimeout(5.0)
            peer.recv(1)
        except OSError:
            continue


def _told(there: dict[int, socket.socket], problem: str) -> ChesError:
    _tell(there, problem)
    return ChesError(problem)


def _report(words: str, host: str, port: int, count: int, number: int, deadline: float, seconds: float) -> None:
    last = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), port), timeout=5.0) as peer:
                peer.sendall((json.dumps({"number": number, "count": count}) + "\n").encode())
                # process 0 waits for the others so long; a little more for its answer to travel
                peer.settimeout(max(0.01, deadline - time.monotonic()) + 5.0)
                answer = peer.makefile().readline()
        except OSError as error:
            last = error.strerror or str(error)
            time.sleep(PAUSE)
            continue
        if not answer:
            last = "it hung up"
            time.sleep(PAUSE)
            continue
        try:
            problem = json.loads(answer)["problem"]
        except (ValueError, KeyError, TypeError):
            raise ChesError(f"--distributed {words!r}: what listens at {host}:{port} is no process 0 of ches") from None
        if problem:
            raise ChesError(problem)
        return
    raise ChesError(
        f"--distributed {words!r}: process 0 was not found at {host}:{port} within {seconds:g} s ({last}); it must run "
        "there, with the same coordinator:port and number of processes"
    )
