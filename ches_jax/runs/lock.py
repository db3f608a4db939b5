"""One process at a time works in a run directory: a lock that says who holds it.

On this machine's file systems the lock is the operating system's (``flock`` on ``OUT/.lock``): it ends with its
process, however that ends, and the processes of one distributed run share it.

In a store the lock is an object ``OUT/.lock`` that only one process can create, and that its holder writes anew every
``BEAT`` seconds. Of several processes of a distributed run the first one holds it for all. Who finds a lock watches it:
if it is written, its holder lives, and the newcomer is refused; if it is not for ``DEAD`` seconds, its holder has died,
and the lock is taken over. No clocks are compared. A holder that finds another's name in the lock ends at once.
"""

import contextlib
import json
import os
import secrets
import socket
import stat
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from ches_jax.errors import ChesError, RunError
from ches_jax.runs import store
from ches_jax.runs.files import dead_here, host, naming, remove_leftovers
from ches_jax.runs.progress import say

NAME = ".lock"
BEAT = 10.0
"""Seconds between two signs of life in a store."""
DEAD = 40.0
"""Seconds without one after which a holder counts as dead."""
HURRY = 5.0
"""Seconds in which a run that has failed gives its lock back."""
WATCH = 1.0
LOST = 1
"""Exit code of a holder whose lock another process has."""


class RunLock:
    """The lock of a run directory, as a context; the directory is made when the lock is taken.

    So a run that is refused for its input makes no directory, and one whose directory is in use ends before any work.
    """

    def __init__(self, out: Path, shared: bool = False, first: bool = True):
        """Of ``out``; ``shared`` between the processes of one run, of which this is the ``first`` or not."""
        self.out = out
        self._shared = shared
        self._file: IO[str] | None = None
        self._held = _StoreLock(out) if store.is_store(out) else None
        self._ours = first or not shared

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Releases; an error of the system that names no place, such as one of a store, names the run."""
        self.release(failed=kind is not None)
        if isinstance(error, OSError) and error.filename is None:
            with naming(self.out):
                raise error

    def require_free(self) -> None:
        """Take the lock at once where somebody has held it before.

        Raises:
          RunError: as ``take``.
        """
        if store.is_there(self.out / NAME):
            self.take()

    def take(self) -> None:
        """Take the lock, if it is not held already, and clear away what killed processes left half written.

        Raises:
          RunError: another process works here; tells which.
        """
        if self._held is not None:
            if self._ours:
                self._held.take()
            return
        if self._file is not None:
            return
        if self.out.exists() and not self.out.is_dir():
            raise RunError(f"{self.out}: is a file; --out names a directory")
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / NAME
        while True:
            file = _opened(path)
            if not _flock(file, self._shared):
                holder = _holder(file)
                file.close()
                raise _occupied(self.out, holder)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
            file.close()  # its holder removed it in this moment
        self._file = file
        with naming(path):
            file.truncate(0)
            os.write(file.fileno(), json.dumps(_about()).encode())  # what a buffer held would be tried again at closing
        if not self._shared:
            for folder in (self.out, *(p for p in self.out.iterdir() if p.is_dir())):
                remove_leftovers(folder)

    def release(self, failed: bool = False) -> None:
        """Let the next one in; nothing is left. A run that has ``failed`` does not wait for a store to take it."""
        if self._held is not None:
            self._held.release(HURRY if failed else None)
        if self._file is not None:
            if not self._shared:
                (self.out / NAME).unlink(missing_ok=True)
            self._file.close()
            self._file = None


def require_unheld(out: Path) -> None:
    """Look whether another process works in a directory, without taking its lock: before anything is loaded.

    In a store nothing is looked at, for that takes long; nor does a process of a distributed run mind its siblings.

    Raises:
      RunError: somebody does; tells which.
    """
    path = out / NAME
    if store.is_store(out) or not path.is_file():  # a pipe would wait for a writer
        return
    with contextlib.suppress(OSError), path.open(encoding="utf-8") as file:
        if not _flock(file, shared=True):
            raise _occupied(out, _holder(file))


class _StoreLock:
    """An object that one process can create, and keeps alive by writing it anew."""

    def __init__(self, out: Path):
        self.out = out
        self.path = out / NAME
        self._nonce = secrets.token_hex(8)
        self._stop: threading.Event | None = None
        self._beats = 0

    def take(self) -> None:
        """Create the object, or take it over from the dead.

        Raises:
          RunError: its holder lives.
        """
        if self._stop is not None:
            return
        while not store.create(self.path, self._text()):
            self._outlive()
        self._stop = threading.Event()
        threading.Thread(target=self._live, args=(self._stop,), daemon=True, name="lock").start()

    def release(self, seconds: float | None = None) -> None:
        """Remove it, if it is still ours and the store takes it in so many seconds.

        One that stays counts as dead after ``DEAD`` seconds.
        """
        if self._stop is None:
            return
        self._stop.set()
        self._stop = None
        remover = threading.Thread(target=self._remove, daemon=True, name="unlock")
        remover.start()
        remover.join(seconds)

    def _remove(self) -> None:
        with contextlib.suppress(Exception):  # each file system has errors of its own
            if _field(self._read(), "nonce") == self._nonce:
                store.remove(self.path)

    def _text(self) -> str:
        self._beats += 1
        return json.dumps({**_about(), "nonce": self._nonce, "beat": self._beats})

    def _read(self) -> str:
        """What the lock says; empty where there is none."""
        try:
            return store.read_text(self.path)
        except FileNotFoundError:
            return ""

    def _outlive(self) -> None:
        """Return when the lock is gone or its holder has died, in which case it is removed.

        Raises:
          RunError: it is written while it is watched.
        """
        before, since = self._read(), time.monotonic()
        dead = dead_here(_field(before, "machine"), _field(before, "process"))
        if before and not dead:
            say(f"{self.out}: {_named(before)} holds the lock; watching whether it lives (up to {DEAD:g} s)")
        while before and not dead:
            time.sleep(WATCH)
            now = self._read()
            if now and _field(now, "nonce") == _field(before, "nonce") and now != before:
                raise _occupied(self.out, _named(now))
            if now != before:  # gone, or taken by another newcomer
                return
            dead = time.monotonic() - since > DEAD
        if before and self._read() == before:
            store.remove(self.path)

    def _live(self, stop: threading.Event) -> None:
        """Write the object anew, until it is released; end the process when another holds it."""
        while not stop.wait(BEAT):
            try:
                text = self._read()
                if stop.is_set():
                    return
                if text and _field(text, "nonce") != self._nonce:
                    say(f"{_occupied(self.out, _named(text))}; this one ends")
                    os._exit(LOST)
                store.write_text(self.path, self._text())
            except (OSError, ChesError):  # what is written meanwhile fails by itself
                continue


def _about() -> dict[str, Any]:
    return {
        "host": socket.gethostname(), "machine": host(), "process": os.getpid(), "command": sys.argv,
        "since": time.ctime(),
    }  # fmt: skip


def _occupied(out: Path, holder: str) -> RunError:
    return RunError(f"{out}: another process works here ({holder}); wait for its end, or give a new --out")


def _opened(path: Path) -> IO[str]:
    """The file of the lock, made where there is none.

    Raises:
      RunError: something else is there.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise RunError(f"{path}: is no regular file, as the lock of a run is; remove it")
    return open(path, "a+", encoding="utf-8", opener=_not_elsewhere)


def _not_elsewhere(path: str, flags: int) -> int:
    """A stranger's link in place of the lock is not followed: what it names would be emptied."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


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
        return _named(file.read(10_000))
    except OSError:
        return "it has not said who it is"


def _named(text: str) -> str:
    """Who wrote a lock, in words."""
    try:
        about = json.loads(text)
        command = " ".join(map(str, about["command"]))
        return f"process {about['process']} on {about['host']} since {about['since']}: {command}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return "it has not said who it is"


def _field(text: str, name: str) -> Any:
    """One value that a lock tells; None where it does not."""
    try:
        return json.loads(text)[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
