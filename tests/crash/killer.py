"""Ends the process by SIGKILL before its n-th operation on files: as kill -9 or a power cut at that moment would.

An operation is an open for writing, a rename, a removal, a new or removed directory, a truncation, an fsync, of a path
below a folder. Python tells them to an audit hook; fsync, which it does not tell, is wrapped. What C++ writes between
two of them is not counted: it goes to files that Python has opened, named or is about to rename.
"""

import os
import signal
import sys
import threading
from pathlib import Path

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NAMED = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}


class Killer:
    """Counts the operations below a folder; kills before number ``at`` (from 0), never where that is None."""

    def __init__(self, folder: Path, at: int | None):
        self.folder = str(folder.resolve())
        self.at = at
        self.seen: list[str] = []
        self._lock = threading.RLock()
        self._busy = threading.local()

    def install(self) -> None:
        """Begin; there is no way back."""
        real = os.fsync

        def fsync(descriptor: int) -> None:
            self._meet(
                "fsync",
                os.readlink(f"/proc/self/fd/{descriptor if isinstance(descriptor, int) else descriptor.fileno()}"),
            )
            real(descriptor)

        os.fsync = fsync
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple) -> None:
        if getattr(self._busy, "now", False):
            return
        if event == "open":
            path, mode, flags = arguments
            writes = flags & WRITING if isinstance(flags, int) else any(c in (mode or "") for c in "wax+")
            if writes and isinstance(path, str | bytes | os.PathLike):
                self._meet("open", path)
        elif event in NAMED:
            self._meet(event, arguments[0])

    def _meet(self, event: str, path: object) -> None:
        self._busy.now = True
        try:
            full = os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type]
            if not full.startswith(self.folder):
                return
            with self._lock:
                if len(self.seen) == self.at:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.seen.append(f"{event} {full[len(self.folder) + 1 :]}")
        finally:
            self._busy.now = False
