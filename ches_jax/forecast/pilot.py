"""A pilot: the first updates of the run, made, and every pair measured after them. The forecast's rival."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from ches_jax.displacement.changes import FILE_NAME
from ches_jax.errors import ChesError, RunError
from ches_jax.forecast.setup import PairChanges
from ches_jax.runs.files import read_parquet
from ches_jax.train.config import TrainConfig
from ches_jax.train.loop import train
from ches_jax.train.observe.displacement_log import SCHEMA
from ches_jax.types import TokenPair


def require_pilot(config: TrainConfig, updates: int) -> None:
    """Refuse a pilot that would not be the beginning of the run.

    Raises:
      ChesError: says why.
    """
    if updates < 0:
        raise ChesError(f"--pilot {updates}: expected the number of updates, 0 for none")
    if updates and config.schedule != "constant":
        raise ChesError(
            f"--pilot with --schedule {config.schedule}: the learning rate depends on the length of the run, and a "
            "pilot's would be another; use --schedule constant"
        )


def run_pilot(config: TrainConfig, updates: int, out: Path, *, resume: bool, quiet: bool) -> Path:
    """Make the first ``updates`` updates of the run that ``config`` describes; returns its directory."""
    there = resume and out.exists()
    return train(replace(config, steps=updates, out=str(out), save_every=None), resume=there, quiet=quiet)


def pilot_changes(out: Path, pairs: Sequence[TokenPair], which: str) -> PairChanges:
    """Changes of the pairs of a set (``train``, ``held_out``) over a pilot, in their order.

    Raises:
      RunError: the pilot's displacement log is damaged, or of other pairs.
    """
    names = ("step", "set", "row_id", "dlogp_chosen", "dlogp_rejected")
    wanted = pa.schema([SCHEMA.field(name) for name in names])
    columns = read_parquet(out / FILE_NAME, RunError, "the displacement log of a pilot", wanted).to_pydict()
    last = max(columns["step"], default=0)
    rows = zip(*(columns[name] for name in names), strict=True)
    found = {row_id: (c, r) for step, name, row_id, c, r in rows if step == last and name == which}
    if any(p.row_id not in found for p in pairs):
        raise RunError(f"{out / FILE_NAME}: lacks pairs of this run; remove {out} and start again with --resume")
    return PairChanges(*np.array([found[p.row_id] for p in pairs], np.float64).reshape(len(pairs), 2).T)
