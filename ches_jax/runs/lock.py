"""One process at a time works in a run directory: a lock that says who holds it.

The lock is the operating system's (``flock`` on ``OUT/.lock``): it ends with its process, however that ends. The
processes of one distributed run share it.
"""

import contextlib
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from ches_jax.errors import RunError
from ches_jax.runs.files import remove_leftovers

NAME = ".lock"


class RunLock:
    """The lock of a run directory, as a context; the directory is made when the lock is taken.

    So a run that is refused for its input makes no directory, and one whose directory is in use ends before any work.
    """

    def __init__(self, out: Path, shared: bool = False):
        """Of ``out``; ``shared`` between the processes of one run."""
        self.out = out
        self._shared = shared
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def require_free(self) -> None:
        """Take the lock at once where somebody has held it before.

        Raises:
          RunError: as ``take``.
        """
        if (self.out / NAME).exists():
            self.take()

    def take(self) -> None:
        """Take the lock, if it is not held already, and clear away what killed processes left half written.

        Raises:
          RunError: another process works here; tells which.
        """
        if self._file is not None:
            return
        if self.out.exists() and not self.out.is_dir():
            raise RunError(f"{self.out}: is a file; --out names a directory")
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / NAME
        while True:
            file = path.open("a+", encoding="utf-8")
            if not _flock(file, self._shared):
                holder = _holder(file)
                file.close()
                raise RunError(
                    f"{self.out}: another process works here ({holder}); wait for its end, or give a new --out"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            file.close()  # its holder removed it in this moment
        self._file = file
        file.truncate(0)
        json.dump(
            {"host": socket.gethostname(), "process": os.getpid(), "command": sys.argv, "since": time.ctime()}, file
        )
        file.flush()
        if not self._shared:
            for folder in (self.out, *(p for p in self.out.iterdir() if p.is_dir())):
                remove_leftovers(folder)

    def release(self) -> None:
        """Let the next one in; nothing is left."""
        if self._file is not None:
            if not self._shared:
                (self.out / NAME).unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _flock(file: IO[str], shared: bool) -> bool:
    """Whether the lock is ours; also where the file system (or system) has none to give."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        about = json.loads(file.read(10_000))
        command = " ".join(map(str, about["command"]))
        return f"process {about['process']} on {about['host']} since {about['since']}: {command}"
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return "it has not said who it is"
