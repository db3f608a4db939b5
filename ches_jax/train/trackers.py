"""The numbers of a run for TensorBoard and Weights & Biases, beside ``metrics.jsonl``.

The packages are optional (``pip install 'ches-jax[tensorboard]'``, ``[wandb]``) and imported when they are used.
A resumed run repeats the updates after its checkpoint, with the same numbers: none of them is shown twice.
"""

import importlib
import importlib.util
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ches_jax.errors import ChesError
from ches_jax.runs.directory import read_json, write_json
from ches_jax.train.metrics import JsonLines, Tracker

PACKAGES: Mapping[str, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not known or not installed.

    Raises:
      ChesError: what to install.
    """
    for name in names:
        if name not in PACKAGES:
            raise ChesError(f"--tracker {name!r}: expected one of {', '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ChesError(
                f"--tracker {name}: the package {PACKAGES[name]} is not installed; pip install 'ches-jax[{name}]'"
            )


class TensorBoard:
    """Scalars in event files; a resumed run tells readers to forget what came after its checkpoint."""

    def __init__(self, folder: Path, resume_step: int | None = None):
        """Begins a new event file in ``folder``."""
        writer: Any = importlib.import_module("tensorboardX")
        self._writer = writer.SummaryWriter(str(folder), purge_step=0 if resume_step is None else resume_step + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers; they are on disk when this returns."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, found again by the id that the run directory keeps.

    Project, entity, mode and the like are the service's own environment variables (``WANDB_PROJECT``, ``WANDB_MODE``).
    """

    def __init__(self, out: Path, config: Mapping[str, Any], history: Sequence[tuple[int, Mapping[str, Any]]] = ()):
        """``history``: lines of a resumed run, sent again where the service does not have them (it was offline)."""
        wandb: Any = importlib.import_module("wandb")
        file = out / "wandb.json"
        if not file.exists():
            write_json(file, {"id": secrets.token_hex(8)})
        self._run = wandb.init(
            id=read_json(file)["id"], resume="allow", name=out.name, dir=str(out), config=dict(config)
        )
        self._first = self._run.step if self._run.resumed else 0
        for step, values in history:
            self.log(step, values)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers, unless the service has those of this step."""
        if step >= self._first:
            self._run.log(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class Trackers:
    """All others, then ``metrics.jsonl``: what that has, they were given."""

    def __init__(self, lines: JsonLines, others: Sequence[Tracker] = ()):
        """Takes opened trackers."""
        self.lines = lines
        self._others = others

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Pass the numbers on."""
        for tracker in (*self._others, self.lines):
            tracker.log(step, values)

    def last(self) -> dict[str, Any]:
        """The values of the last line."""
        return self.lines.last()

    def close(self) -> None:
        """Close all."""
        for tracker in (self.lines, *self._others):
            tracker.close()


def open_trackers(
    names: Sequence[str], out: Path, config: Mapping[str, Any], lines: JsonLines, resume_step: int | None
) -> Trackers:
    """The trackers of a run directory; ``lines`` has been cut behind ``resume_step``."""
    make: Mapping[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(out / "tensorboard", resume_step),
        "wandb": lambda: WeightsAndBiases(out, json.loads(json.dumps(config)), lines.lines()),
    }
    return Trackers(lines, [make[name]() for name in dict.fromkeys(names)])
