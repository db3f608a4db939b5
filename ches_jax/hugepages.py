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


def with_large_pages() -> None:
    """Start this process again with malloc told to ask for large pages, unless it has been told anything about them.

    The C library reads the setting when a process begins, and never after. Same process id, same arguments, same
    streams; where there is no such library, nothing happens.
    """
    tunables = os.environ.get(VARIABLE, "")
    if sys.platform != "linux" or SETTING in tunables:
        return
    os.environ[VARIABLE] = ":".join(filter(None, (tunables, f"{SETTING}=1")))
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
