"""The meeting of processes, as threads of one: who is missing, doubled or mistaken is told to all who came."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from ches_jax.distributed.processes import parse_processes, start_processes
from ches_jax.distributed.rendezvous import meet
from ches_jax.errors import ChesError


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def meeting(numbers, counts, seconds=10.0):
    """What each process is told: None where all is well."""
    port = free_port()

    def one(number, count):
        try:
            meet(f"here:{port},{count},{number}", "127.0.0.1", port, count, number, seconds)
        except ChesError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(numbers)) as pool:
        found = list(pool.map(one, numbers, counts))
    with socket.create_server(("", port)):  # free for jax
        return found


def test_all_processes_meet_and_the_port_is_free_again():
    assert meeting([0, 1, 2], [3, 3, 3]) == [None] * 3


@pytest.mark.parametrize(
    ("numbers", "counts", "message"),
    [
        ([0, 2], [3, 3], "process 1 of 3 did not come within 1 s"),
        ([0, 1], [2, 4], "process 0 expects 2 processes, process 1 expects 4"),
    ],
)
def test_a_meeting_that_fails_is_told_to_all(numbers, counts, message):
    for told in meeting(numbers, counts, 1.0):
        assert told is not None and message in told


def test_two_processes_with_one_number():
    told = meeting([0, 1, 1], [3, 3, 3], 3.0)
    assert "two processes have the number 1" in str(told[0])
    assert any("two processes have the number 1" in str(t) for t in told[1:])


def test_nobody_at_the_address_and_a_port_in_use():
    port = free_port()
    with pytest.raises(ChesError, match=f"process 0 was not found at 127.0.0.1:{port} within 0.5 s"):
        meet("words", "127.0.0.1", port, 2, 1, 0.5)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ChesError, match=f"cannot listen at port {port}"):
            meet("words", "127.0.0.1", port, 2, 0, 0.5)


@pytest.mark.parametrize(
    "words", ["here", "here:1", "here:x,2,0", "here:99999,2,0", ":80,2,0", "h:80,2,2", "h:80,2,-1", "h:80,2"]
)
def test_words_that_mean_nothing(words):
    with pytest.raises(ChesError, match="expected off, auto, or coordinator:port,n,id"):
        parse_processes(words)


def test_no_cluster_to_ask():
    with pytest.raises(ChesError, match="'auto': give coordinator:port,n,id"):
        start_processes("auto")
