"""``metrics.jsonl``: one line per update or evaluation; a resumed run continues where its checkpoint was.

Lines hold no times, so that a run that was killed and resumed ends with the same bytes as one that was not.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ches_jax.errors import RunError
from ches_jax.runs.files import naming, open_regular, replacing

FILE_NAME = "metrics.jsonl"


class Tracker(Protocol):
    """Where the numbers of a run go: a file, TensorBoard, Weights & Biases (``trackers``)."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take the numbers of a step."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class NullTracker:
    """The tracker of a process that writes nothing."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Forget the numbers."""

    def last(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


def _step(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


class JsonLines:
    """The tracker every run has."""

    def __init__(self, path: Path, resume_step: int | None = None):
        """Begin a file, or cut the one that is there behind the lines of ``resume_step``.

        Raises:
          RunError: a line of it is damaged; only the last one may be cut short, as a killed run leaves it. Lines of
            updates before the checkpoint are missing.
        """
        self.path = path
        kept, steps = b"", set()
        if resume_step is not None and path.exists():
            with open_regular(path, RunError, "the numbers of a run") as file:
                lines = file.read().splitlines(keepends=True)
            for number, line in enumerate(lines, 1):
                step = _step(line)
                if step is None and number == len(lines):
                    break
                if step is None:
                    raise RunError(f"{path}, line {number}: damaged; start again with a new --out")
                if step <= resume_step:
                    kept += line
                    steps.add(step)
        if resume_step is not None and (missing := set(range(resume_step + 1)) - steps):
            raise RunError(
                f"{path}: has no lines of {len(missing)} steps up to the checkpoint of step {resume_step} (such as "
                f"{min(missing)}); put the file back, or remove checkpoints/{resume_step} to resume from the one before"
            )
        with replacing(path) as temporary:
            temporary.write_bytes(kept)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line."""
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def close(self) -> None:
        """Nothing is open between lines."""

    def lines(self) -> list[tuple[int, dict[str, Any]]]:
        """Steps and values of all lines."""
        every = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return [(line.pop("step"), line) for line in every]

    def last(self) -> dict[str, Any]:
        """The values of the last line."""
        lines = self.lines()
        return lines[-1][1] if lines else {}
