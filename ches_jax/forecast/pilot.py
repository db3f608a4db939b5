"""A pilot: the first updates of the run, made, and every pair measured after them. The forecast's rival."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ches_jax.displacement.changes import FILE_NAME
from ches_jax.errors import ChesError
from ches_jax.forecast.setup import PairChanges
from ches_jax.runs.files import parquet_source
from ches_jax.train.config import TrainConfig
from ches_jax.train.loop import train
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
    """Changes of the pairs of a set (``train``, ``held_out``) over a pilot, in their order."""
    import pyarrow.parquet as pq

    table = pq.read_table(
        parquet_source(out / FILE_NAME), columns=["step", "set", "row_id", "dlogp_chosen", "dlogp_rejected"]
    )
    columns = table.to_pydict()
    last = max(columns["step"])
    rows = zip(*(columns[n] for n in ("step", "set", "row_id", "dlogp_chosen", "dlogp_rejected")), strict=True)
    found = {row_id: (c, r) for step, name, row_id, c, r in rows if step == last and name == which}
    return PairChanges(*np.array([found[p.row_id] for p in pairs], np.float64).reshape(len(pairs), 2).T)
