"""Files of a run that grow while it works: kept on this machine, and pushed whole to where the run lies in a store.

A store has no appending and no renaming. So the logs of a training run are written here, and before each checkpoint
what has changed is uploaded: the logs in the store are never behind a checkpoint there, and a resumed run cuts
them back to it. For a run directory on this machine both are one folder and nothing is copied.
"""

import shutil
import tempfile
from pathlib import Path

from ches_jax.runs import store

_ELSEWHERE = ("checkpoints/", ".lock")
"""What is written to the store itself."""


class Workspace:
    """The working folder ``here`` of a run at ``place``; a context that removes what is only a copy."""

    def __init__(self, place: Path, last: str):
        """``last`` is the file whose presence says that the run is finished: it is uploaded after all others."""
        self.place = place
        self._last = last
        self._pushed: dict[str, tuple[int, int]] = {}
        self._copied = store.is_store(place)
        self.here = Path(tempfile.mkdtemp(prefix="ches-run-")) if self._copied else place

    def __enter__(self) -> "Workspace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._copied:
            shutil.rmtree(self.here, ignore_errors=True)

    def pull(self) -> None:
        """Bring what the run has left in the store."""
        if self._copied:
            store.download(self.place, self.here, _ELSEWHERE)
            self._pushed = self._state()

    def push(self) -> None:
        """Upload what has changed, and remove there what was removed here.

        Raises:
          ChesError: the store cannot be written.
        """
        if not self._copied:
            return
        state = self._state()
        changed = [name for name, about in state.items() if self._pushed.get(name) != about]
        for name in sorted(changed, key=lambda n: (n == self._last, n)):
            store.put(self.here / name, self.place / name)
            self._pushed[name] = state[name]
        for name in self._pushed.keys() - state.keys():
            store.remove(self.place / name)
            del self._pushed[name]

    def _state(self) -> dict[str, tuple[int, int]]:
        files = (p for p in self.here.rglob("*") if p.is_file())
        about = ((p.relative_to(self.here).as_posix(), p.stat()) for p in files)
        return {name: (s.st_size, s.st_mtime_ns) for name, s in about if not name.startswith(_ELSEWHERE)}
