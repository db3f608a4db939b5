"""Checkpoints of a run: state, step and data position; written beside the training, whole or not at all.

Arrays are saved under flat names with their shapes beside them, so that a checkpoint of another architecture is
refused by name, and restored straight onto the shards of whatever mesh the run now has.
"""

import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from ches_jax.errors import RunError, many
from ches_jax.train.state import TrainState

FOLDER = "checkpoints"


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

    def __init__(self, out: Path, keep: int):
        """Keeps the last ``keep``."""
        self.folder = (out / FOLDER).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """Step of the last whole checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, position: dict[str, Any]) -> None:
        """Start writing; returns when the arrays have been copied. A checkpoint that is there is left alone.

        Raises:
          RunError: nothing could be written; earlier checkpoints are intact.
        """
        if step in self._manager.all_steps():
            return
        leaves = flat(state)
        about = {"step": step, "position": position, "shapes": _shapes(leaves)}
        try:
            self._manager.save(
                step, args=ocp.args.Composite(state=ocp.args.StandardSave(leaves), about=ocp.args.JsonSave(about))
            )
        except OSError as error:
            raise self._failed(step, error) from None

    def wait(self) -> None:
        """Wait until what was begun is whole.

        Raises:
          RunError: it could not be written; earlier checkpoints are intact.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:  # tensorstore tells a full disk as ValueError
            raise self._failed(None, error) from None

    def _failed(self, step: int | None, error: Exception) -> RunError:
        which = "" if step is None else f" of step {step}"
        reason = str(error).partition("\n")[0]
        return RunError(
            f"{self.folder}: the checkpoint{which} could not be written ({reason}); whole ones: steps "
            f"{', '.join(map(str, self._manager.all_steps())) or 'none'}; make room and --resume"
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
        found = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)))["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [found[n] for n in target]), about["position"]

    def close(self) -> None:
        """Release threads."""
        self._manager.close()
