"""Checkpoints on a file system that all processes share: orbax writes them beside the training."""

import functools
import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ches_jax.distributed.processes import exit_process
from ches_jax.errors import RunError
from ches_jax.runs.files import read_object
from ches_jax.train.best import Best

UNREADABLE = "unreadable-"
"""Before the step, in the name of a checkpoint that could not be read and was put aside."""
ALONE_SECONDS = 15.0
"""How long a process that could not write its part of a checkpoint waits for the others."""
Leaves = dict[str, Any]


class _Failures(logging.Filter):
    """Takes errors that orbax logs off the screen, and hands them to the checkpoints of the run."""

    hand_over: Callable[[BaseException], None] | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.ERROR or "orbax" not in record.pathname:
            return True
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and self.hand_over is not None:
            self.hand_over(error)
        return False


_FAILURES = _Failures()


@functools.cache
def _log_failures_once() -> None:
    """Keep what failed writers say besides the error they raise off the screen.

    When one array cannot be written, orbax logs the error it is about to raise, and closes its event loop; the writers
    of the others find it closed, and each prints a traceback that says nothing of the cause.
    """
    before = sys.unraisablehook

    def hook(event: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(event.exc_value, RuntimeError) and str(event.exc_value) == "Event loop is closed"):
            before(event)

    sys.unraisablehook = hook
    logging.getLogger("absl").addFilter(_FAILURES)
    logging.getLogger("asyncio").addFilter(lambda r: "never retrieved" not in r.getMessage())


class SavedHere:
    """The checkpoints in a folder; ``checkpoints.Checkpoints`` says what its methods are for."""

    def __init__(
        self, folder: Path, keep: int, best: Best | None, in_words: Callable[[int | None, BaseException], RunError]
    ):
        """``in_words`` tells what could not be written."""
        _log_failures_once()
        self.folder = folder
        self._in_words = in_words
        self._ending: threading.Timer | None = None
        _FAILURES.hand_over = self._end_if_others_wait if jax.process_count() > 1 else None
        require_regular(folder)
        if best is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        else:
            policies = [LatestN(keep), BestN(get_metric_fn=best.value, n=1, keep_checkpoints_without_metrics=False)]
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies), best_fn=best.value, cleanup_tmp_directories=True
            )
        self._manager = ocp.CheckpointManager(folder, options=options)

    def steps(self) -> list[int]:
        """Of the whole checkpoints, and of the one that is being written."""
        return list(self._manager.all_steps())

    def whole(self) -> list[int]:
        """Of the whole ones, rising."""
        return steps_in(self.folder)

    def latest(self) -> int | None:
        """The last step."""
        return self._manager.latest_step()

    def best(self) -> tuple[int, dict[str, float]] | None:
        """The best step and its metrics."""
        step = self._manager.best_step()
        return None if step is None else (step, self._manager.metrics(step) or {})

    def save(self, step: int, leaves: Leaves, about: dict[str, Any], metrics: Mapping[str, float] | None) -> None:
        """Start writing.

        Raises:
          OSError, ValueError: it, or the one before it, could not be written.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about)),
            metrics=None if metrics is None else dict(metrics),
        )

    def writing(self) -> bool:
        """False: orbax makes a checkpoint whole by itself."""
        return False

    def settle(self) -> None:
        """Nothing, as ``writing``."""

    def wait(self) -> None:
        """Until what was begun is whole.

        Raises:
          OSError, ValueError: it could not be written; tensorstore tells a full disk as ValueError.
        """
        self._manager.wait_until_finished()

    def about(self, step: int) -> dict[str, Any]:
        """What ``save`` was given of a step."""
        return self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]

    def read(self, step: int, target: Leaves) -> Leaves:
        """The arrays of a step, as ``target`` says: shapes with shardings by name."""
        return self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]

    def put_aside(self, step: int) -> str | None:
        """Give a checkpoint another name, which is returned; None where several processes must agree on the last."""
        if jax.process_count() > 1:
            return None
        aside = self.folder / f"{UNREADABLE}{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        self._manager.reload()
        return aside.name

    def close(self) -> None:
        """Release threads."""
        self._manager.close()

    def _end_if_others_wait(self, error: BaseException) -> None:
        """End this process when it could not write its part, unless the others could not either.

        Those whose parts are written wait for it, up to ten minutes, and it for them; and nobody learns then what
        went wrong. When it ends, they end. Where all of them failed, they meet, and each says so before this does.
        """

        def end() -> None:
            print(f"ches: {self._in_words(None, error)}", file=sys.stderr, flush=True)
            exit_process(2)

        if self._ending is None:  # one error is logged at several levels
            self._ending = threading.Timer(ALONE_SECONDS, end)
            self._ending.daemon = True
            self._ending.start()


def require_regular(folder: Path) -> None:
    """Refuse a stranger's pipe or device among the files of checkpoints, which orbax would wait for.

    Raises:
      RunError: names it.
    """
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if not path.is_file():
                raise RunError(f"{path}: not a regular file; remove this checkpoint, or start again with a new --out")


def steps_in(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, rising."""
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isascii() and p.name.isdigit())


def about_in(folder: Path, step: int) -> tuple[Path, dict[str, Any]]:
    """What is written of a step, and where; the files of its checkpoint are looked at first.

    Raises:
      RunError: it cannot be read.
    """
    require_regular(folder / str(step))
    path = folder / str(step) / "about" / "metadata"
    return path, read_object(path, RunError, "a checkpoint of a run")


def read_in(folder: Path, step: int, target: Leaves) -> Leaves:
    """Some of the arrays of a step; of one that is not there, orbax gives back what was passed in."""
    with ocp.PyTreeCheckpointer() as reader:
        arguments = ocp.checkpoint_utils.construct_restore_args(target)
        return reader.restore(
            folder.absolute() / str(step) / "state",
            args=ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True),
        )
