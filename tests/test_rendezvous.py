"""The rendezvous of processes, as threads of one: an index that is missing, doubled or wrong is reported to all."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from ches_jax.distributed.processes import parse_processes, start_processes
from ches_jax.distributed.rendezvous import rendezvous
from ches_jax.errors import ChesError


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def outcomes(numbers, counts, seconds=10.0):
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
    ("numbers", "counts", "message"),
    [
        ([0, 2], [3, 3], "process 1 of 3 did not come within 1 s"),
        ([0, 1], [2, 4], "process 0 expects 2 processes, process 1 expects 4"),
    ],
)
def test_all_processes_report_why_a_rendezvous_fails(numbers, counts, message):
    for error in outcomes(numbers, counts, 1.0):
        assert error is not None and message in error


def test_two_processes_with_one_number():
    errors = outcomes([0, 1, 1], [3, 3, 3], 3.0)
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


@pytest.mark.parametrize(
    "option", ["here", "here:1", "here:x,2,0", "here:99999,2,0", ":80,2,0", "h:80,2,2", "h:80,2,-1", "h:80,2"]
)
def test_an_option_that_is_not_understood(option):
    with pytest.raises(ChesError, match="expected off, auto, or coordinator:port,n,id"):
        parse_processes(option)


def test_no_cluster_to_ask():
    with pytest.raises(ChesError, match="'auto': give coordinator:port,n,id"):
        start_processes("auto")
