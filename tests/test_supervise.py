"""A command of several processes is a child; its parent passes on its exit code, its signals and its last words."""

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from ches_jax.supervise import _ServiceLog, of_several_processes, supervised

SCRIPT = (
    "import os, signal, sys, time; from ches_jax.supervise import supervised\n"
    "def act():\n    {}\n"
    "sys.exit(supervised(act, ['train', '--distributed', 'auto']))"
)
SERVICE = "E1128 17:59:15.003419   13852 coordination_service_agent.cc:289] Polled an error\\n1\\nof this task\\n"


def start(body) -> Any:
    words = [sys.executable, "-c", SCRIPT.format(body)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("words", "several"),
    [
        ("train --distributed auto", True),
        ("score --distributed=a:1,2,0", True),
        ("train --distributed off", False),
        ("train --distributed auto --distributed off", False),
        ("train --distributed", False),
        ("", False),
    ],
)
def test_who_is_supervised(words, several):
    assert of_several_processes(words.split()) is several
    if not several:  # in this very process
        assert supervised(os.getpid, words.split()) == os.getpid()


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print('a word', file=sys.stderr); return 3", 3, "a word\n"),
        (
            "os.write(2, b'E1128 17:59:15.0 1 other.cc:1] seen\\n'); return 0",
            0,
            "E1128 17:59:15.0 1 other.cc:1] seen\n",
        ),
        (f"os.write(2, b'{SERVICE}'); os.abort()", 2, "another process of this run has stopped"),
        ("os.abort()", 134, "ended by SIGABRT, which is a mistake"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "memory ran out"),
    ],
)
def test_how_a_child_ended_is_reported_by_its_parent(body, code, said):
    process = start(body)
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == code and said in stderr
    assert "Polled" not in stderr and "of this task" not in stderr and stderr.count("\n") == 1


def test_a_signal_to_the_parent_reaches_the_child():
    process = start("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); print('up', flush=True); "
                    "signal.sigwait([signal.SIGTERM]); print('heard'); return 143")  # fmt: skip
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=300)
    assert (process.returncode, said, errors) == (143, "heard\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="a death signal is of Linux")
def test_a_child_does_not_outlive_its_parent():
    with start("print(os.getpid(), flush=True); time.sleep(20); print('outlived')") as process:
        process.stdout.readline()
        process.kill()
        assert process.stdout.read() == ""  # comes when nobody holds the other end any more


def test_lines_of_the_service_and_what_continues_them_are_kept_back(tmp_path):
    other = b"W0101 00:00:00.5 7 x.cc:1] slow\ncontinued\n"
    read, write = os.pipe()
    os.write(write, b"first\n" + SERVICE.encode().decode("unicode_escape").encode() + other)
    os.close(write)
    target = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    log = _ServiceLog()
    log.copy(read, target)
    os.close(target)
    assert log.seen and (tmp_path / "out").read_bytes() == b"first\n" + other


@pytest.mark.parametrize(("code", "said"), [(130, "ches: stopped\n"), (2, "ches: stopped\nthe end\n")])
def test_after_an_interrupt_python_takes_nothing_down(code, said):
    """Threads that compile on abort the process then: "pure virtual method called", and SIGABRT in place of 130."""
    script = (
        "import atexit, sys, ches_jax.__main__ as command\n"
        f"def act():\n    print('ches: stopped'); return {code}\n"
        "command._main, sys.argv = act, ['ches', 'score']\n"
        "atexit.register(print, 'the end')\n"
        "sys.exit(command.run())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, said)
