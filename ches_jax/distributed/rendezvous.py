"""A rendezvous of the processes of a run before ``jax.distributed`` starts, for error messages that say who is missing.

jax ends a process that finds no coordinator with a stack trace. Here process 0 listens at the coordinator's port until
all others have sent their index; then the port is free again for jax.
"""

import json
import selectors
import socket
import time
from dataclasses import dataclass
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
    """Wait for all others; whoever else comes to the port is heard beside them, and holds nobody up."""
    try:
        server = socket.create_server(("", port), backlog=128)
    except OSError as error:
        raise ChesError(
            f"--distributed {option!r}: cannot listen at port {port} ({error.strerror}); take another"
        ) from None
    peers: dict[int, socket.socket] = {}
    with server, selectors.DefaultSelector() as selector:
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        heard: dict[socket.socket, _Caller] = {}
        try:
            while len(peers) < count - 1:
                now = time.monotonic()
                if now > deadline:
                    missing = ", ".join(str(i) for i in range(1, count) if i not in peers)
                    problem = f"process {missing} of {count} did not come within {timeout:g} s"
                    raise _failure(peers, f"--distributed {option!r}: {problem}")
                for caller in [caller for caller in heard.values() if now > caller.until]:
                    _hang_up(caller, heard, selector)
                for ready, _ in selector.select(min(PAUSE, deadline - now)):
                    if ready.fileobj is server:
                        _answer_the_door(server, heard, selector)
                        continue
                    caller = heard[ready.fileobj]  # type: ignore[index]
                    hello = caller.listen()
                    if hello is None:
                        continue
                    number, expected = (hello.get(name) for name in ("number", "count"))
                    if not (type(number) is int and type(expected) is int):
                        _hang_up(caller, heard, selector)  # a client of something else
                        continue
                    selector.unregister(caller.socket)
                    del heard[caller.socket]
                    caller.socket.setblocking(True)
                    problem = None
                    if expected != count:
                        problem = f"process 0 expects {count} processes, process {number} expects {expected}"
                    elif number in peers or not 0 < number < count:
                        problem = f"two processes have the number {number}"
                    if problem is not None:
                        peers[-1] = caller.socket
                        raise _failure(peers, f"--distributed {option!r}: {problem}")
                    peers[number] = caller.socket
            _answer(peers, "")
        finally:
            for one in (*peers.values(), *heard):
                one.close()


@dataclass
class _Caller:
    """Who has connected and not yet said who it is."""

    socket: socket.socket
    until: float
    """When it has to have said it."""
    data: bytes = b""

    def listen(self) -> dict[str, Any] | None:
        """What it says, once its line is whole; None before; empty where it is nobody of ours."""
        try:
            some = self.socket.recv(LINE_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return {}
        self.data += some
        if self.data.endswith(b"\n"):
            return _object(self.data)
        return {} if not some or len(self.data) > LINE_BYTES else None


def _answer_the_door(
    server: socket.socket, heard: dict[socket.socket, _Caller], selector: selectors.BaseSelector
) -> None:
    try:
        client, _ = server.accept()
    except OSError:
        return
    client.setblocking(False)
    heard[client] = _Caller(client, time.monotonic() + HELLO_SECONDS)
    selector.register(client, selectors.EVENT_READ)


def _hang_up(caller: _Caller, heard: dict[socket.socket, _Caller], selector: selectors.BaseSelector) -> None:
    selector.unregister(caller.socket)
    del heard[caller.socket]
    caller.socket.close()


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line; empty where it is anything else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


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
    return _object(data)


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
