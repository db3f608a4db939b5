"""A rendezvous of the processes of a run before ``jax.distributed`` starts, for error messages that say who is missing.

jax ends a process that finds no coordinator with a stack trace. Here process 0 listens at the coordinator's port until
all others have sent their index; then the port is free again for jax.
"""

import json
import socket
import time
from typing import Any

from ches_jax.errors import ChesError

PAUSE = 0.2
"""Seconds between two attempts to connect."""
HELLO_SECONDS = 5.0
"""How long a client may take to say who it is."""
LINE_BYTES = 4096
"""Longest line that is read from a client, who may be anyone."""


def rendezvous(option: str, host: str, port: int, count: int, index: int, timeout: float) -> None:
    """Return when all ``count`` processes have connected.

    Args:
      option: the value of ``--distributed``, for messages.
      host: where process 0 runs.
      port: where it listens.
      count: how many processes there are.
      index: which of them this is.
      timeout: seconds to wait.

    Raises:
      ChesError: a port in use, no process at the address, processes that did not connect, that have the index of
        another or expect another count.
    """
    deadline = time.monotonic() + timeout
    if index == 0:
        _listen(option, port, count, deadline, timeout)
    else:
        _connect(option, host, port, count, index, deadline, timeout)


def _listen(option: str, port: int, count: int, deadline: float, timeout: float) -> None:
    try:
        server = socket.create_server(("", port))
    except OSError as error:
        raise ChesError(
            f"--distributed {option!r}: cannot listen at port {port} ({error.strerror}); take another"
        ) from None
    peers: dict[int, socket.socket] = {}
    with server:
        try:
            while len(peers) < count - 1:
                server.settimeout(max(0.01, deadline - time.monotonic()))
                try:
                    peer, _ = server.accept()
                except TimeoutError:
                    missing = ", ".join(str(i) for i in range(1, count) if i not in peers)
                    problem = f"process {missing} of {count} did not come within {timeout:g} s"
                    raise _failure(peers, f"--distributed {option!r}: {problem}") from None
                except OSError:
                    continue
                try:
                    hello = _read_line(peer, min(deadline, time.monotonic() + HELLO_SECONDS))
                except OSError:
                    hello = {}
                number, expected = (hello.get(name) for name in ("number", "count"))
                if not (type(number) is int and type(expected) is int):
                    peer.close()
                    continue  # a client of something else
                problem = None
                if expected != count:
                    problem = f"process 0 expects {count} processes, process {number} expects {expected}"
                elif number in peers or not 0 < number < count:
                    problem = f"two processes have the number {number}"
                if problem is not None:
                    peers[-1] = peer
                    raise _failure(peers, f"--distributed {option!r}: {problem}")
                peers[number] = peer
            _answer(peers, "")
        finally:
            for peer in peers.values():
                peer.close()


def _read_line(peer: socket.socket, deadline: float) -> dict[str, Any]:
    """The JSON object that the other side sends as one line; empty where it is anything else, or too long.

    Raises:
      TimeoutError: it is not whole by the deadline, however slowly it drips.
      ConnectionError: the other side closed the connection.
    """
    data = b""
    while not data.endswith(b"\n"):
        if time.monotonic() > deadline:
            raise TimeoutError("no answer")
        peer.settimeout(max(0.01, deadline - time.monotonic()))
        some = peer.recv(LINE_BYTES)
        if not some:
            raise ConnectionError("it closed the connection")
        data += some
        if len(data) > LINE_BYTES:
            return {}
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _answer(peers: dict[int, socket.socket], problem: str) -> None:
    """Send a problem (or none) to all peers and wait until they have closed: the port is then free at once."""
    for peer in peers.values():
        try:
            peer.sendall((json.dumps({"problem": problem}) + "\n").encode())
            peer.settimeout(5.0)
            peer.recv(1)
        except OSError:
            continue


def _failure(peers: dict[int, socket.socket], problem: str) -> ChesError:
    """The error, sent to all peers too."""
    _answer(peers, problem)
    return ChesError(problem)


def _connect(option: str, host: str, port: int, count: int, index: int, deadline: float, timeout: float) -> None:
    last = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), port), timeout=5.0) as peer:
                peer.sendall((json.dumps({"number": index, "count": count}) + "\n").encode())
                # as long as process 0 waits for the others, and a little for its answer to arrive
                answer = _read_line(peer, deadline + HELLO_SECONDS)
        except OSError as error:
            last = error.strerror or str(error)
            time.sleep(PAUSE)
            continue
        problem = answer.get("problem")
        if not isinstance(problem, str):
            raise ChesError(
                f"--distributed {option!r}: what listens at {host}:{port} is not process 0 of a run"
            ) from None
        if problem:
            raise ChesError(problem)
        return
    raise ChesError(
        f"--distributed {option!r}: process 0 was not found at {host}:{port} within {timeout:g} s ({last}); it must "
        "run there, with the same coordinator:port and number of processes"
    )
