"""A training run of the library as the experiments use it: run it, keep its numbers, throw its weights away."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ches_jax.train.config import TrainConfig
    from ches_jax.train.observe.observer import Watch


class Stopped(Exception):
    """The run was stopped by a signal; the message says how to resume it."""


@dataclass(frozen=True)
class Finished:
    """What a run logged."""

    losses: list[float]
    """Entry t: the loss after t updates, on the pairs of update t + 1."""
    log: dict[str, np.ndarray]
    """Columns of the displacement log."""

    def of(self, which: str, step: int | None = None) -> dict[str, np.ndarray]:
        """The log of one set (``train``, ``held_out``) at one evaluation; default: at the last."""
        step = int(self.log["step"].max()) if step is None else step
        rows = (self.log["set"] == which) & (self.log["step"] == step)
        return {name: values[rows] for name, values in self.log.items()}

    def course(self, which: str, column: str) -> np.ndarray:
        """[evaluations, pairs] of one column, in the order of steps and pairs."""
        rows = self.log["set"] == which
        steps = np.unique(self.log["step"][rows])
        return self.log[column][rows].reshape(len(steps), -1)


def run_training(config: "TrainConfig", *, quiet: bool = True, observe: "Watch | None" = None) -> Finished:
    """Train and read the logs. A killed run continues; with an observer, which must see it all, it starts anew.

    The folder is removed, but for the exported model where the config exports one.
    """
    import pyarrow.parquet as pq

    from ches_jax.train import loop

    assert config.out is not None
    if observe is not None:
        shutil.rmtree(config.out, ignore_errors=True)
    try:
        out = loop.train(config, resume=True, quiet=quiet, observers=[] if observe is None else [observe])
    except loop.Stopped as e:
        raise Stopped("stopped by SIGTERM; continue with --resume") from e
    logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    table = pq.read_table(out / "displacement.parquet")
    log = {name: np.array(table[name].to_pylist()) for name in table.column_names}
    if not config.export:
        shutil.rmtree(out)
    else:
        shutil.rmtree(out / "checkpoints")
    return Finished([e["loss"] for e in logged if "loss" in e], log)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSON Lines file, whole or not at all."""
    from ches_jax.runs.files import replacing

    with replacing(path) as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
    return path


@contextmanager
def compiled_once(folder: Path) -> Iterator[None]:
    """Programs that many runs have in common are compiled by the first, and kept in ``folder`` for a resumed one."""
    import jax

    settings = {"jax_compilation_cache_dir": str(folder), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
