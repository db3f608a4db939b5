"""The displacement log of `ches train`, and of the trainer callbacks that write the same table."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from ches_jax.displacement.changes import FILE_NAME, PARTS, Changes, Curve
from ches_jax.errors import RunError
from ches_jax.runs.files import read_parquet

SETS = {"held_out": "held-out", "train": "training"}
COLUMNS = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("set", pa.string(), nullable=False),
        pa.field("dlogp_chosen", pa.float64()),
        pa.field("dlogp_rejected", pa.float64()),
        pa.field("chosen_tokens", pa.int64(), nullable=False),
        pa.field("rejected_tokens", pa.int64(), nullable=False),
    ]
)
"""What a displacement log has to have."""
MORE = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("logp_chosen", pa.float64()),
        pa.field("logp_rejected", pa.float64()),
        pa.field("regime", pa.string(), nullable=False),
    ]
)
"""What it may have beside them."""
ABOUT = ("row_id", "index", "chosen_tokens", "rejected_tokens")


def is_run(path: Path) -> bool:
    """Whether a directory holds a displacement log, finished or not."""
    return path.is_dir() and ((path / FILE_NAME).exists() or any((path / PARTS).glob("step-*.parquet")))


def read_run(folder: Path) -> Changes:
    """The last evaluation of a training run, finished or not: held-out pairs where there are any, training ones beside.

    Raises:
      RunError: no displacement log, only one step in it, or single responses of which no two make a pair.
    """
    return changes_of_table(read_log_of_run(folder), str(folder))


def read_log_of_run(folder: Path) -> pa.Table:
    """The displacement log of a run, finished or not: every evaluation.

    Raises:
      RunError: there is none, or it is damaged.
    """
    path = folder / FILE_NAME
    paths = [path] if path.exists() else sorted((folder / PARTS).glob("step-*.parquet"))
    if not paths:
        raise RunError(f"{folder}: no {FILE_NAME}; expected a directory of `ches train`")
    parts = [read_log_table(path) for path in paths]
    try:
        return pa.concat_tables(parts)
    except pa.ArrowInvalid:
        raise RunError(f"{folder}: the parts of its displacement log have other columns than each other") from None


def read_log_table(path: Path) -> pa.Table:
    """One file of a displacement log.

    Raises:
      RunError: it is none, or is damaged.
    """
    return read_parquet(path, RunError, "the displacement log of a run of `ches train`", COLUMNS, MORE)


TRAINING_ALONE = "training pairs: a run with --holdout or --eval-pairs tells more"


def changes_of_table(table: pa.Table, source: str) -> Changes:
    """The last evaluation in a displacement table.

    Raises:
      RunError: as ``read_run``.
    """
    step, sets = np.array(table["step"]), np.array(table["set"].to_pylist())
    last = int(step.max()) if len(step) else 0
    if last == _first_step(table):
        raise RunError(f"{source}: holds step {last} only; there is no change to judge yet")
    present = [name for name in SETS if ((step == last) & (sets == name)).any()]
    of_sets = [_of_set(table, source, name, step, sets, last) for name in present]
    of_sets = [changes for changes in of_sets if changes is not None]
    if not of_sets:
        raise RunError(
            f"{source}: trained on single responses, of which no two make a pair; displacement/* in metrics.jsonl has "
            "the changes of good and of bad ones"
        )
    judged, *others = of_sets
    if not judged.held_out:
        judged = replace(judged, caveats=(TRAINING_ALONE, *judged.caveats))
    return replace(judged, beside=others[0] if others else None)


def _of_set(table: pa.Table, source: str, name: str, step: np.ndarray, sets: np.ndarray, last: int) -> Changes | None:
    numbers = {n: np.array(table[n], float) for n in ("dlogp_chosen", "dlogp_rejected")}
    pairs = (np.array(table["chosen_tokens"]) > 0) & (np.array(table["rejected_tokens"]) > 0) & (sets == name)
    take = pairs & (step == last)
    if not take.any():
        return None
    caveats: tuple[str, ...] = ()
    if single := int(((sets == name) & (step == last) & ~pairs).sum()):
        caveats = (*caveats, f"{single} single responses are not counted")
    steps = np.unique(step[pairs])
    chosen, rejected = (np.array([v[pairs & (step == s)].mean() for s in steps]) for v in numbers.values())
    curve = Curve(steps, chosen, rejected)
    return Changes(
        numbers["dlogp_chosen"][take],
        numbers["dlogp_rejected"][take],
        f"{source}, {SETS[name]} pairs, update {last} against {_first_step(table)}",
        caveats,
        np.array(table["index"])[take] if "index" in table.column_names else None,
        held_out=name == "held_out",
        curve=curve,
        rows={n: np.array(table[n].to_pylist())[take] for n in ABOUT if n in table.column_names},
        start=_start(table, numbers, take),
    )


def _first_step(table: pa.Table) -> int:
    """The step that changes are counted from: the smallest, where nothing has changed; 0 for a table that lacks it."""
    step = np.array(table["step"])
    if not len(step):
        return 0
    changes = np.concatenate(
        [np.array(table[n], float)[step == step.min()] for n in ("dlogp_chosen", "dlogp_rejected")]
    )
    return int(step.min()) if (np.isnan(changes) | (changes == 0)).all() else 0


def _start(table: pa.Table, changes: dict[str, np.ndarray], take: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Log-probabilities at step 0: what they are now less their change."""
    if not {"logp_chosen", "logp_rejected"} <= set(table.column_names):
        return None
    chosen, rejected = (
        np.array(table[n], float)[take] - changes[f"d{n}"][take] for n in ("logp_chosen", "logp_rejected")
    )
    return chosen, rejected
