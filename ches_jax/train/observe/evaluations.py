"""Tables that a run writes at its evaluations: one part each, joined when the run ends."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.errors import RunError
from ches_jax.runs.files import read_parquet, replacing


def part(folder: Path, step: int) -> Path:
    """The file of the evaluation after ``step`` updates."""
    return folder / f"step-{step:08d}.parquet"


def write_table(table: pa.Table, path: Path) -> None:
    """Whole or not at all."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def join(folder: Path, path: Path) -> Path:
    """All parts of a folder as one table, in the order of steps."""
    parts = sorted(folder.glob("step-*.parquet"))
    write_table(pa.concat_tables([read_parquet(p, RunError, "an evaluation of this run") for p in parts]), path)
    return path
