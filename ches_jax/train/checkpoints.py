"""Checkpoints of a run: state, step and data position; written beside the training, whole or not at all.

Arrays are saved under flat names with their shapes beside them, so that a checkpoint of another architecture is
refused by name, and restored straight onto the shards of whatever mesh the run now has.
"""

import contextlib
import math
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from ches_jax.distributed.processes import Process
from ches_jax.errors import ChesError, RunError, many
from ches_jax.runs.progress import say
from ches_jax.runs.shapes import require_shape
from ches_jax.runs.store import is_store
from ches_jax.train import saved_here, saved_in_store
from ches_jax.train.best import Best
from ches_jax.train.saved_here import SavedHere
from ches_jax.train.saved_in_store import SavedInStore
from ches_jax.train.state import TrainState

FOLDER = "checkpoints"
ALONE = Process()
ABOUT = {"shapes": {str: str}}
"""The shape of what is read of the metadata of a checkpoint."""
MOST_NUMBERS = 2**40
"""In an array of a checkpoint."""
_SHOWN = re.compile(r" \[(?:http_response_\w+|tensorstore_spec)='.*")
_SHAPE = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[0-9, ]*)\]", re.ASCII)
SECONDS = 600.0
"""Without ``save_every``: how long after a checkpoint the next one is due, so that no death costs more than that."""


def flat(state: Any) -> dict[str, Any]:
    """Leaves by name: ``params.layers.mlp.up_proj.weight``, ``opt_state.0.square.norm.weight``."""
    out = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = re.sub(r"[^A-Za-z0-9_]+", ".", jax.tree_util.keystr(path)).strip(".")
        if name in out:
            raise ValueError(f"two leaves of the state are named {name!r}")
        out[name] = leaf
    return out


def _shapes(leaves: dict[str, Any]) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in leaves.items()}


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(
        self, out: Path, keep: int, best: Best | None = None, every: int | None = None, process: Process = ALONE
    ):
        """Keeps the last ``keep``, and the best one of those that were saved with an evaluation.

        Args:
          out: the run directory.
          keep: how many of the last ones stay.
          best: what makes a checkpoint the best; each evaluation is then saved.
          every: updates between two checkpoints; None: one is due every ``SECONDS``, and after evaluations for
            ``best``.
          process: which of how many this is; all of them call ``save``, ``settle`` and ``wait`` after the same updates.
        """
        self.folder = _folder(out)
        self._out = out
        self._best = best
        self._every = every
        self._last = time.monotonic()
        self._saved: SavedHere | SavedInStore = (
            SavedInStore(self.folder, keep, best, process, self._failed)
            if is_store(out)
            else SavedHere(self.folder, keep, best, self._failed)
        )

    def require_metric(self, metrics: Mapping[str, float]) -> None:
        """Refuse a best metric that the evaluations do not give.

        Raises:
          ChesError: lists what they give.
        """
        if self._best is not None and self._best.metric not in metrics:
            raise ChesError(
                f"--keep-best {self._best.metric}: the evaluations do not give that; they give {', '.join(metrics)}"
            )

    def best(self) -> dict[str, Any] | None:
        """Step and value of the best checkpoint; None where none is looked for or none was saved."""
        if self._best is None or (found := self._saved.best()) is None:
            return None
        step, metrics = found
        return {"metric": self._best.metric, "mode": self._best.mode, "step": step, "value": metrics[self._best.metric]}

    def latest(self) -> int | None:
        """Step of the last whole checkpoint."""
        return self._saved.latest()

    def due(self, step: int, evaluated: bool) -> bool:
        """Whether a checkpoint is due after ``step`` updates, which were evaluated or not."""
        return bool((evaluated and self._best is not None) or (self._every and step % self._every == 0))

    def overdue(self) -> bool:
        """Whether the last checkpoint is so old that another is due by the clock."""
        return self._every is None and time.monotonic() - self._last > SECONDS

    def save(
        self, step: int, state: TrainState, position: dict[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Start writing; returns when the arrays have been copied. A checkpoint that is there is left alone.

        Args:
          step: updates done.
          state: what is saved.
          position: where the data stand.
          metrics: of the evaluation of this very state, if there was one.

        Raises:
          RunError: nothing could be written; earlier checkpoints are intact.
        """
        self._last = time.monotonic()
        if step in self._saved.steps():
            return
        leaves = flat(state)
        about = {"step": step, "position": position, "shapes": _shapes(leaves)}
        try:
            self._saved.save(step, leaves, about, None if self._best is None else metrics)
        except OSError as error:
            raise self._failed(step, error) from None
        except ValueError as error:  # of tensorstore: the checkpoint before, which is waited for
            raise self._failed(None, error) from None

    def writing(self) -> bool:
        """Whether this process still writes its part of a checkpoint; when no process does, all call ``settle``."""
        return self._saved.writing()

    def settle(self) -> None:
        """Make the checkpoint whole whose parts all processes have written, if there is one.

        Raises:
          RunError: a part could not be written.
        """
        self._saved.settle()

    def wait(self) -> None:
        """Wait until what was begun is whole.

        Raises:
          RunError: it could not be written; earlier checkpoints are intact.
        """
        try:
            self._saved.wait()
        except (OSError, ValueError) as error:  # tensorstore tells a full disk as ValueError
            raise self._failed(None, error) from None

    def _failed(self, step: int | None, error: BaseException) -> RunError:
        whole, which = "", "" if step is None else f" of step {step}"
        # tensorstore names the file at every level, and shows the request
        reason = _SHOWN.sub("", str(error).partition("\n")[0]).rpartition('": ')[2]
        with contextlib.suppress(OSError):  # what does not write may not read
            whole = f"; whole ones: steps {', '.join(map(str, self._saved.whole())) or 'none'}"
        return RunError(
            f"{self.folder}: the checkpoint{which} could not be written ({reason}){whole}; "
            f"{'--resume when it can be' if is_store(self._out) else 'make room and --resume'}"
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step on the devices of ``like`` (arrays, or shapes with shardings), and the data position.

        Raises:
          RunError: the checkpoint is of another architecture or optimiser.
        """
        about = self._saved.about(step)
        target = flat(like)
        there, here = about["shapes"], _shapes(target)
        problems = [
            f"{n}: {there.get(n, 'not there')}, the run has {here.get(n, 'none')}"
            for n in sorted({*there, *here})
            if there.get(n) != here.get(n)
        ]
        if problems:
            subject = f"{self.folder / str(step)}: a checkpoint of another architecture or optimiser"
            raise RunError(many(subject, problems))
        shapes = {n: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for n, a in target.items()}
        leaves = self._saved.read(step, shapes)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[n] for n in target]), about["position"]

    def resume(self, initial: TrainState, position_of: Callable[[int], dict[str, Any]]) -> tuple[TrainState, int]:
        """The last whole checkpoint's state and step, or the initial state and 0.

        Args:
          initial: the state before the first update, which says where arrays lie.
          position_of: where the data of this run stand after so many updates.

        Raises:
          RunError: the checkpoint is of other data, another architecture or optimiser; none can be read.
        """
        unreadable = None
        while (step := self.latest()) is not None:
            try:
                state, position = self.restore(step, initial)
            except RunError:
                raise
            except Exception as error:  # orbax, tensorstore, JSON and zstd each have types of their own
                unreadable = self._put_aside(step, error)
                continue
            if position != position_of(step):
                raise RunError(
                    f"{self.folder / str(step)}: its data position is {position}, this run's {position_of(step)}"
                )
            return state, step
        if unreadable is not None:
            raise RunError(f"{unreadable}; there is no other: start again with a new --out")
        return initial, 0

    def _put_aside(self, step: int, error: Exception) -> str:
        """A checkpoint that cannot be read gets another name, so that the one before it is the last; says so.

        Raises:
          RunError: several processes are at work, whose last checkpoints must not differ; a store, which does not
            rename.
        """
        what = _unreadable(self.folder / str(step), error)
        if (aside := self._saved.put_aside(step)) is None:
            raise RunError(f"{what}; move it away and --resume from the one before it") from None
        say(f"{what}; it is {aside} now, and the run continues from the one before it")
        return what

    def close(self) -> None:
        """Release threads."""
        self._saved.close()


def _folder(out: Path) -> Path:
    """The folder of a run's checkpoints; orbax wants the whole of its path."""
    return out / FOLDER if is_store(out) else (out / FOLDER).absolute()


def saved_steps(out: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, rising; the run may be under way."""
    return _files(out).steps_in(out / FOLDER)


def _files(out: Path) -> ModuleType:
    """What reads the checkpoints of a run."""
    return saved_in_store if is_store(out) else saved_here


def read_trained(out: Path, step: int) -> dict[str, jax.Array]:
    """The trained parameters of a checkpoint by name, on the first device; nothing else is read, nothing is written.

    Raises:
      RunError: it is damaged; steps of the other checkpoints are named.
    """
    folder = out / FOLDER
    about, written = _files(out).about_in(folder, step)
    require_shape(about, written, ABOUT, RunError)
    place = SingleDeviceSharding(jax.local_devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(*_written(about, text), sharding=place)
        for name, text in written["shapes"].items()
        if name.startswith("params.")
    }
    try:
        leaves = _files(out).read_in(folder, step, target)
    except Exception as error:  # orbax, tensorstore, JSON, zstd and each store have types of their own
        others = ", ".join(str(other) for other in saved_steps(out) if other != step) or "none"
        raise RunError(f"{_unreadable(folder / str(step), error)}; other checkpoints: steps {others}") from None
    # of an array that is not there, what was passed in comes back
    if lacking := [name for name in target if not isinstance(leaves.get(name), jax.Array)]:
        raise RunError(many(f"{folder / str(step)}: the checkpoint lacks arrays that it names", lacking))
    return {name.removeprefix("params."): value for name, value in leaves.items()}


def _written(about: Path, text: str) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of an array, from what ``_shapes`` wrote.

    Raises:
      RunError: it did not write that.
    """
    match = _SHAPE.fullmatch(text)
    try:
        sizes = tuple(int(size) for size in match["sizes"].split(", ") if size) if match else (-1,)
        dtype = jax.numpy.dtype(match["dtype"] if match else "")
    except (TypeError, ValueError):
        sizes, dtype = (-1,), None
    if dtype is None or min(sizes, default=0) < 0 or math.prod(sizes) > MOST_NUMBERS:
        raise RunError(f"{about}: is damaged, or not written by this program: {text[:60]!r} is no dtype and sizes")
    return sizes, dtype


def _unreadable(folder: Any, error: Exception) -> str:
    reason = str(error).partition("\n")[0][:200]
    return f"{folder}: the checkpoint cannot be read ({type(error).__name__}: {reason})"
