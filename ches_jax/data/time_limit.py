"""A limit on the time of code that a stranger wrote: a chat template is a program, and its loops may have no end.

One watchdog thread looks at what is under way twice a second and raises an exception in the thread that takes too long;
entering and leaving a limit costs a microsecond. Python code ends within half a second of its limit; a single call into
C ends when it returns.
"""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class TooLong(Exception):
    """The code inside ``time_limit`` took longer than it may."""


_deadlines: dict[int, float] = {}
"""Thread -> when its time is over."""
_lock = threading.Lock()
_started = threading.Event()
_PAUSE = 0.5


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Ends the block with ``TooLong`` when it takes more than so many seconds; blocks do not nest.

    >>> with time_limit(10):
    ...     1 + 1
    2

    Raises:
      TooLong: inside the block.
    """
    thread = threading.get_ident()
    with _lock:
        _deadlines[thread] = time.monotonic() + seconds
        if not _started.is_set():
            threading.Thread(target=_watch, daemon=True, name="time limit").start()
            _started.set()
    try:
        yield
    finally:
        with _lock:
            if _deadlines.pop(thread, None) is None:
                _raise_in(thread, None)  # it came in the last moment: what was to be raised is taken back


def _watch() -> None:
    while True:
        time.sleep(_PAUSE)
        with _lock:
            now = time.monotonic()
            for thread in [thread for thread, deadline in _deadlines.items() if deadline < now]:
                del _deadlines[thread]
                _raise_in(thread, TooLong)


def _raise_in(thread: int, kind: type[Exception] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(kind) if kind is not None else None
    )
