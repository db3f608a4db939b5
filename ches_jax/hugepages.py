"""Memory in large pages, for a program of many hundred megabytes of short-lived arrays on a CPU.

XLA on a CPU takes the memory of a call from malloc and gives it back after, so that every call meets each of its pages
for the first time again. With pages of 2 MB in place of 4 KB those first times are few: 4 % off the CPU seconds of a
training step; of scoring, no more than the noise (``experiments.benchmarks.training`` and ``scoring``, with
``GLIBC_TUNABLES=glibc.malloc.hugetlb=`` 0 and 1).
"""

import os
import sys

VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"
MARKER = "CHES_RESTARTED"
"""Holds the id of the process that has started again: never twice, whatever becomes of the setting on the way."""

_AT_SECURE = 23


def with_large_pages() -> None:
    """Start this process again with malloc set to use large pages, unless the environment says otherwise.

    The C library reads the setting when a process begins, and never after. Same process id, same arguments, same
    streams; where there is no such library, nothing happens.
    """
    tunables = os.environ.get(VARIABLE, "")
    begun = os.environ.pop(MARKER, None) == str(os.getpid())
    if begun:  # what this process starts does not inherit it
        others = [word for word in tunables.split(":") if word and word != f"{SETTING}=1"]
        os.environ[VARIABLE] = ":".join(others)
    if sys.platform != "linux" or begun or SETTING in tunables or not _may_restart():
        return
    os.environ[MARKER] = str(os.getpid())
    os.environ[VARIABLE] = ":".join(filter(None, (tunables, f"{SETTING}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _may_restart() -> bool:
    """Not where the C library drops the setting (more rights than the user has), nor a script from a pipe."""
    try:
        with open("/proc/self/auxv", "rb") as file:
            numbers = memoryview(file.read()).cast("L").tolist()
    except (OSError, TypeError, ValueError):
        return False
    secure = dict(zip(numbers[::2], numbers[1::2], strict=False)).get(_AT_SECURE, 1)
    return not secure and "-" not in sys.orig_argv[1:2]
