"""The rendezvous of processes, as threads of one: an index that is missing, doubled or wrong is reported to all."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ches_jax.distributed.processes import parse_processes, part, start_processes
from ches_jax.distributed.rendezvous import LINE_BYTES, _Caller, rendezvous
from ches_jax.errors import ChesError


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def outcomes(numbers, counts, seconds=60.0):
    """The error of each process, or None."""
    port = free_port()

    def one(number, count):
        try:
            rendezvous(f"here:{port},{count},{number}", "127.0.0.1", port, count, number, seconds)
        except ChesError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(numbers)) as pool:
        errors = list(pool.map(one, numbers, counts))
    with socket.create_server(("", port)):  # free for jax
        return errors


def test_all_processes_meet_and_the_port_is_free_again():
    assert outcomes([0, 1, 2], [3, 3, 3]) == [None] * 3


@pytest.mark.parametrize(
    ("numbers", "counts", "seconds", "message"),
    [
        ([0, 2], [3, 3], 3.0, "process 1 of 3 did not come within 3 s"),
        ([0, 1], [2, 4], 60.0, "process 0 expects 2 processes, process 1 expects 4"),
    ],
)
def test_all_processes_report_why_a_rendezvous_fails(numbers, counts, seconds, message):
    for error in outcomes(numbers, counts, seconds):
        assert error is not None and message in error


def test_two_processes_with_one_number():
    errors = outcomes([0, 1, 1], [3, 3, 3])
    assert "two processes have the number 1" in str(errors[0])
    assert any("two processes have the number 1" in str(error) for error in errors[1:])


def test_no_process_at_the_address_and_a_port_in_use():
    port = free_port()
    with pytest.raises(ChesError, match=f"process 0 was not found at 127.0.0.1:{port} within 0.5 s"):
        rendezvous("words", "127.0.0.1", port, 2, 1, 0.5)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ChesError, match=f"cannot listen at port {port}"):
            rendezvous("words", "127.0.0.1", port, 2, 0, 0.5)


def drip(client, ended):
    while not ended.is_set():
        client.sendall(b"x")
        ended.wait(0.1)


STRANGERS = {
    "speaks HTTP": lambda client, ended: client.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"),
    "drips bytes": drip,
    "nests deeply": lambda client, ended: client.sendall(b"[" * 100_000 + b"\n"),
    "has an infinite number": lambda client, ended: client.sendall(b'{"number": Infinity, "count": 2}\n'),
    "never ends its line": lambda client, ended: client.sendall(b"x" * 2**22),
    "is no UTF-8": lambda client, ended: client.sendall(b"\xff\xfe\n"),
}


@pytest.mark.parametrize("does", STRANGERS)
def test_a_stranger_at_the_port_changes_nothing(does, monkeypatch):
    monkeypatch.setattr("ches_jax.distributed.rendezvous.HELLO_SECONDS", 0.3)
    port, ended, errors = free_port(), threading.Event(), []

    def process(index):
        try:
            rendezvous("words", "127.0.0.1", port, 2, index, 60.0)
        except BaseException as error:
            errors.append(error)

    first = threading.Thread(target=process, args=(0,))
    first.start()
    with connected(port) as client, ThreadPoolExecutor(1) as pool, contextlib.suppress(OSError):
        stranger = pool.submit(STRANGERS[does], client, ended)
        process(1)
        first.join(120)
        ended.set()
        client.close()
        stranger.result()
    assert not errors and not first.is_alive()


def connected(port):
    for _ in range(3000):
        with contextlib.suppress(ConnectionError):
            return socket.create_connection(("127.0.0.1", port), timeout=60)
        time.sleep(0.02)
    raise AssertionError("nobody listens")


@pytest.mark.parametrize("does", ["drips bytes", "never ends its line"])
def test_a_stranger_does_not_hold_process_0_beyond_its_deadline(does):
    port, ended = free_port(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(rendezvous, "words", "127.0.0.1", port, 2, 0, 3.0)
        with connected(port) as client:
            stranger = pool.submit(STRANGERS[does], client, ended)
            with pytest.raises(ChesError, match="process 1 of 2 did not come within 3 s"):
                waiting.result(60)
            ended.set()
        assert stranger.exception() is None or isinstance(stranger.exception(), OSError)


@pytest.mark.parametrize("strangers", [1, 20])
def test_silent_strangers_are_heard_beside_the_others_and_hold_nobody_up(strangers, monkeypatch):
    """Each was waited for once, one after another: a process behind 20 of them came too late."""
    monkeypatch.setattr("ches_jax.distributed.rendezvous.HELLO_SECONDS", 120.0)
    port = free_port()
    with ThreadPoolExecutor(2) as pool, contextlib.ExitStack() as open_connections:
        first = pool.submit(rendezvous, "words", "127.0.0.1", port, 2, 0, 60.0)
        for _ in range(strangers):
            open_connections.enter_context(connected(port))
        rendezvous("words", "127.0.0.1", port, 2, 1, 60.0)
        first.result(60)


def test_a_line_without_an_end_is_not_read_whole():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        caller = _Caller(ours, time.monotonic() + 60)
        theirs.sendall(b"x" * (LINE_BYTES + 1))
        assert [caller.listen(), caller.listen()] == [None, {}]  # hung up on, with no end of the line in sight


def test_a_silent_stranger_is_hung_up_on(monkeypatch):
    monkeypatch.setattr("ches_jax.distributed.rendezvous.HELLO_SECONDS", 0.2)
    port = free_port()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(rendezvous, "words", "127.0.0.1", port, 2, 0, 60.0)
        with connected(port) as silent:
            silent.settimeout(60)
            assert silent.recv(1) == b""
        rendezvous("words", "127.0.0.1", port, 2, 1, 60.0)
        first.result(60)


def test_processes_that_compute_nothing_together_part_once_they_have_met(monkeypatch):
    done = []
    monkeypatch.setattr("ches_jax.distributed.processes.rendezvous", lambda *words: done.append("met"))
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: done[-1:] == ["initialize"])
    for name in ("initialize", "shutdown"):
        monkeypatch.setattr(f"jax.distributed.{name}", lambda name=name, **options: done.append(name))
    start_processes("here:80,2,1")
    assert done == ["met", "initialize"]
    part()
    part()
    assert done == ["met", "initialize", "shutdown"]


@pytest.mark.parametrize(
    "option", ["here", "here:1", "here:x,2,0", "here:99999,2,0", ":80,2,0", "h:80,2,2", "h:80,2,-1", "h:80,2"]
)
def test_an_option_that_is_not_understood(option):
    with pytest.raises(ChesError, match="expected off, auto, or coordinator:port,n,id"):
        parse_processes(option)


def test_no_cluster_to_ask():
    with pytest.raises(ChesError, match="'auto': give coordinator:port,n,id"):
        start_processes("auto")
