"""The process of a distributed run as a child of one that waits for it, and says in words how it ended.

Where another process of the run has died, the coordination service of jax aborts those that live, from C++: no code of
Python runs between its detection and the signal. So another process has to report it. The parent is forked before
anything is loaded and only waits; it passes its signals on to the child, and the child dies with it.
"""

import io
import itertools
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence

OPTION = "--distributed"
PASSED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_SET_DEATH_SIGNAL = 1  # of prctl
_LINE = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ ")
"""How a line of a C++ log begins."""
_SERVICE = (b"coordination_service", b"distributed/client", b"distributed service", b"distributed_runtime")
"""What lines of jax's coordination service bear."""


def supervised(command: Callable[[], int], words: Sequence[str]) -> int:
    """A command; in a child where its words ask for several processes.

    Args:
      command: what is done; its value is an exit code.
      words: the command line.

    Returns:
      The exit code; 2 where jax ended the child because another process of the run has stopped.
    """
    if not of_several_processes(words) or not hasattr(os, "fork"):
        return command()
    read, write = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if not child:
        os.close(read)
        _be_the_child(parent, write)
        return command()
    os.close(write)
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), lambda number, _: _pass_on(child, number))
    log = _ServiceLog()
    reader = threading.Thread(target=log.copy, args=(read, 2), daemon=True)
    reader.start()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reader.join(1.0)  # a process that the child has left behind may hold the other end
    if status >= 0:
        return status
    text, code = ending(-status, log.seen)
    print(f"ches: {text}", file=sys.stderr, flush=True)
    return code


def of_several_processes(words: Sequence[str]) -> bool:
    """Whether a command line joins processes.

    >>> of_several_processes(["train", "--distributed", "10.0.0.1:8476,2,1"]), of_several_processes(["train"])
    (True, False)
    """
    values = [word.partition("=")[2] for word in words if word.startswith(f"{OPTION}=")]
    values += [after for word, after in itertools.pairwise(words) if word == OPTION]
    return bool(values) and values[-1] != "off"


def ending(number: int, service: bool) -> tuple[str, int]:
    """What a child that a signal has ended died of, in words, and the exit code of its parent.

    Args:
      number: of the signal.
      service: whether jax's coordination service has said anything.

    >>> ending(signal.SIGABRT, True)[1], ending(signal.SIGTERM, False)
    (2, ('stopped by SIGTERM', 143))
    """
    name = signal.Signals(number).name
    if number == signal.SIGABRT and service:
        return (
            "another process of this run has stopped, or cannot be reached; this one cannot continue without it (see "
            "the output of the others for the reason; with --resume the run continues from what is saved)"
        ), 2
    if number == signal.SIGKILL:
        return "ended by SIGKILL: somebody's kill -9, or the system because memory ran out", 137
    if number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        return f"stopped by {name}", 128 + number
    return (
        f"the process was ended by {name}, which is a mistake of ches or of a library: please report it",
        128 + number,
    )


def _pass_on(child: int, number: int) -> None:
    try:
        os.kill(child, number)
    except ProcessLookupError:
        return


def _be_the_child(parent: int, log: int) -> None:
    """Die with the parent, take signals through it, and let C++ write to ``log`` while Python has the terminal."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)
    os.setpgid(0, 0)  # Ctrl-C comes once, from the parent
    terminal = os.dup(2)
    os.dup2(log, 2)
    os.close(log)
    sys.stderr = io.TextIOWrapper(
        open(terminal, "wb", buffering=0),  # noqa: SIM115
        encoding=sys.stderr.encoding,
        errors=sys.stderr.errors,
        write_through=True,
    )


class _ServiceLog:
    """What C++ writes, line by line; lines of the coordination service are kept back: the parent has better words."""

    seen = False

    def copy(self, source: int, target: int) -> None:
        """All that comes from one descriptor to another, but for the service's lines and what continues them."""
        held = False
        with open(source, "rb", buffering=0) as raw, io.BufferedReader(raw) as lines:
            for line in lines:
                if _LINE.match(line):
                    held = any(word in line for word in _SERVICE)
                    self.seen |= held
                if not held:
                    os.write(target, line)
