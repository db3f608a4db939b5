"""Checkpoints of a run: state, step and data position; written beside the training, whole or not at all.

Arrays are saved under flat names with their shapes beside them, so that a checkpoint of another architecture is
refused by name, and restored straight onto the shards of whatever mesh the run now has.
"""

import contextlib
import functools
import logging
import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from ches_jax.distributed.processes import exit_process
from ches_jax.errors import ChesError, RunError, many
from ches_jax.runs.files import read_object
from ches_jax.runs.progress import say
from ches_jax.runs.shapes import require_shape
from ches_jax.runs.store import is_store, scheme_of
from ches_jax.train.state import TrainState

FOLDER = "checkpoints"
COMMITTED = "commit_success.txt"
"""What orbax writes last into a checkpoint in a store."""
UNREADABLE = "unreadable-"
"""Before the step, in the name of a checkpoint that could not be read and was put aside."""
ABOUT = {"shapes": {str: str}}
"""The shape of what is read of the metadata of a checkpoint."""
MOST_NUMBERS = 2**40
"""In an array of a checkpoint."""
_SHOWN = re.compile(r" \[(?:http_response_\w+|tensorstore_spec)='.*")
_SHAPE = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<sizes>[0-9, ]*)\]", re.ASCII)
ALONE_SECONDS = 15.0
"""How long a process that could not write its part of a checkpoint waits for the others."""
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


class Best(NamedTuple):
    """What makes a checkpoint the best."""

    metric: str
    """Name of a number of the evaluations."""
    mode: Literal["min", "max"]

    def value(self, metrics: Mapping[str, float]) -> float:
        """Higher is better; a number that is missing or NaN is worst."""
        value = metrics.get(self.metric, math.nan)
        return -math.inf if math.isnan(value) else value if self.mode == "max" else -value


def parse_best(text: str) -> Best:
    """``METRIC[:min|max]``; losses are best when small, accuracies and margins when large, others need min or max.

    >>> parse_best("eval_loss"), parse_best("displacement/lld_rate:min")
    (Best(metric='eval_loss', mode='min'), Best(metric='displacement/lld_rate', mode='min'))
    """
    metric, _, mode = text.partition(":")
    evaluated = metric.startswith(("displacement/", "eval_"))
    if not mode:
        mode = "min" if metric.endswith("loss") else "max" if metric.endswith(("accuracies", "margins")) else ""
    if mode not in ("min", "max") or not evaluated:
        raise ChesError(
            f"--keep-best {text!r}: expected a number of the evaluations and which way is better, such as "
            "eval_loss:min, eval_rewards/accuracies:max or displacement/margin:max"
        )
    return Best(metric, mode)


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


class Checkpoints:
    """The checkpoints of a run directory."""

    def __init__(self, out: Path, keep: int, best: Best | None = None, every: int | None = None):
        """Keeps the last ``keep``, and the best one of those that were saved with an evaluation.

        Args:
          out: the run directory.
          keep: how many of the last ones stay.
          best: what makes a checkpoint the best; each evaluation is then saved.
          every: updates between two checkpoints; None: one is due every ``SECONDS``, and after evaluations for
            ``best``.
        """
        _log_failures_once()
        self.folder = _folder(out)
        self._out = out
        self._ending: threading.Timer | None = None
        _FAILURES.hand_over = self._end_if_others_wait if jax.process_count() > 1 else None
        _require_regular(out / FOLDER)
        self._best = best
        self._every = every
        self._last = time.monotonic()
        if best is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        else:
            policies = [LatestN(keep), BestN(get_metric_fn=best.value, n=1, keep_checkpoints_without_metrics=False)]
            options = ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies), best_fn=best.value, cleanup_tmp_directories=True
            )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

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
        if self._best is None or (step := self._manager.best_step()) is None:
            return None
        metrics = self._manager.metrics(step) or {}
        return {"metric": self._best.metric, "mode": self._best.mode, "step": step, "value": metrics[self._best.metric]}

    def latest(self) -> int | None:
        """Step of the last whole checkpoint."""
        return self._manager.latest_step()

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
        if step in self._manager.all_steps():
            return
        leaves = flat(state)
        about = {"step": step, "position": position, "shapes": _shapes(leaves)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about)),
                metrics=None if self._best is None or metrics is None else dict(metrics),
            )
        except OSError as error:
            raise self._failed(step, error) from None
        except ValueError as error:  # of tensorstore: the checkpoint before, which is waited for
            raise self._failed(None, error) from None

    def wait(self) -> None:
        """Wait until what was begun is whole.

        Raises:
          RunError: it could not be written; earlier checkpoints are intact.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:  # tensorstore tells a full disk as ValueError
            raise self._failed(None, error) from None

    def _end_if_others_wait(self, error: BaseException) -> None:
        """End this process when it could not write its part, unless the others could not either.

        Those whose parts are written wait for it, up to ten minutes, and it for them; and nobody learns then what
        went wrong. When it ends, they end. Where all of them failed, they meet, and each says so before this does.
        """

        def end() -> None:
            print(f"ches: {self._failed(None, error)}", file=sys.stderr, flush=True)
            exit_process(2)

        if self._ending is None:  # one error is logged at several levels
            self._ending = threading.Timer(ALONE_SECONDS, end)
            self._ending.daemon = True
            self._ending.start()

    def _failed(self, step: int | None, error: BaseException) -> RunError:
        whole, which = "", "" if step is None else f" of step {step}"
        # tensorstore names the file at every level, and shows the request
        reason = _SHOWN.sub("", str(error).partition("\n")[0]).rpartition('": ')[2]
        with contextlib.suppress(Exception):  # a store that does not write may not read
            whole = f"; whole ones: steps {', '.join(map(str, saved_steps(self._out))) or 'none'}"
        return RunError(
            f"{self.folder}: the checkpoint{which} could not be written ({reason}){whole}; "
            f"{'--resume when it can be' if is_store(self._out) else 'make room and --resume'}"
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step on the devices of ``like`` (arrays, or shapes with shardings), and the data position.

        Raises:
          RunError: the checkpoint is of another architecture or optimiser.
        """
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
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
        leaves = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))["state"]
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
        if jax.process_count() > 1 or not isinstance(self.folder, Path):
            raise RunError(f"{what}; move it away and --resume from the one before it") from None
        aside = self.folder / f"{UNREADABLE}{step}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        self._manager.reload()
        say(f"{what}; it is {aside.name} now, and the run continues from the one before it")
        return what

    def close(self) -> None:
        """Release threads."""
        self._manager.close()


def require_place(out: Path) -> None:
    """Refuse a store that checkpoints are not written to.

    Raises:
      RunError: orbax writes to paths and to ``gs://``.
    """
    if scheme_of(out) not in ("", "gs"):
        raise RunError(f"--out {out}: checkpoints of training are written to a path or to gs://")


def _folder(out: Path) -> Any:
    """The folder of a run's checkpoints as orbax takes it: a path, or its own for a store."""
    if not is_store(out):
        return (out / FOLDER).absolute()
    from etils import epath

    return epath.Path(str(out / FOLDER))


def _require_regular(folder: Path) -> None:
    """Refuse a stranger's pipe or device among the files of checkpoints, which orbax would wait for.

    Raises:
      RunError: names it.
    """
    if is_store(folder):
        return
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            if not path.is_file():
                raise RunError(f"{path}: not a regular file; remove this checkpoint, or start again with a new --out")


def saved_steps(out: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, rising; the run may be under way."""
    folder = _folder(out)
    named = (p for p in folder.glob("*") if p.name.isascii() and p.name.isdigit()) if folder.exists() else ()
    # in a store a checkpoint has its name from the first byte on, and this file when it is whole
    return sorted(int(p.name) for p in named if not is_store(out) or (p / COMMITTED).exists())


def read_trained(out: Path, step: int) -> dict[str, jax.Array]:
    """The trained parameters of a checkpoint by name, on the first device; nothing else is read, nothing is written.

    Raises:
      RunError: it is damaged; steps of the other checkpoints are named.
    """
    folder, about = _folder(out) / str(step), out / FOLDER / str(step) / "about" / "metadata"
    _require_regular(out / FOLDER / str(step))
    written = require_shape(about, read_object(about, RunError, "a checkpoint of a run"), ABOUT, RunError)
    place = SingleDeviceSharding(jax.local_devices()[0])
    target = {
        name: jax.ShapeDtypeStruct(*_written(about, text), sharding=place)
        for name, text in written["shapes"].items()
        if name.startswith("params.")
    }
    try:
        with ocp.PyTreeCheckpointer() as reader:
            arguments = ocp.checkpoint_utils.construct_restore_args(target)
            leaves = reader.restore(
                folder / "state",
                args=ocp.args.PyTreeRestore(item=target, restore_args=arguments, partial_restore=True),
            )
    except Exception as error:  # orbax, tensorstore, JSON and zstd each have types of their own
        others = ", ".join(str(other) for other in saved_steps(out) if other != step) or "none"
        raise RunError(f"{_unreadable(folder, error)}; other checkpoints: steps {others}") from None
    # of an array that is not there, orbax gives back what was passed in
    if lacking := [name for name in target if not isinstance(leaves.get(name), jax.Array)]:
        raise RunError(many(f"{folder}: the checkpoint lacks arrays that it names", lacking))
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
