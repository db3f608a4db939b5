"""Where the probability went: probe prompts whose next-token distribution a training run followed."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.errors import RunError
from ches_jax.report import svg
from ches_jax.report.axes import percent, readable
from ches_jax.report.html import data_table, figure, gallery, paragraphs
from ches_jax.runs.files import read_parquet

FILE_NAME, PARTS = "probes.parquet", "probes"
_MOVED = pa.list_(pa.struct([("text", pa.string()), ("before", pa.float64()), ("now", pa.float64())]))
COLUMNS = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("prompt", pa.string()),
        pa.field("argmax_mass", pa.float64(), nullable=False),
        pa.field("total_variation", pa.float64(), nullable=False),
        pa.field("gaining", _MOVED),
        pa.field("losing", _MOVED),
    ]
)
SHOWN = 12
"""Prompts that are listed, those whose distribution moved most first."""


def probe_section(run_dir: Path) -> str:
    """Entropy and total variation over the run, and the tokens that gained and lost most; empty without probes."""
    table = _read(run_dir)
    if table is None or not len(table):
        return ""
    step = table["step"].to_numpy()
    steps = np.unique(step)
    tv, mass = table["total_variation"].to_numpy(), table["argmax_mass"].to_numpy()
    moved = [float(tv[step == s].mean()) for s in steps]
    sure = [float(mass[step == s].mean()) for s in steps]
    series = [
        svg.Series(name="moved (total variation)", x=steps, y=np.array(moved), colour=0),
        svg.Series(name="on the likeliest token", x=steps, y=np.array(sure), colour=1, dashed=True),
    ]
    words = (
        f"At the end {percent(moved[-1])} of the probability of the first token has moved; the likeliest token holds "
        f"{percent(sure[-1])} (at first {percent(sure[0])})."
    )
    drawn = figure(
        "probes",
        "First tokens of responses to the probe prompts",
        svg.lines(series, x="update", y="probability", zero=True),
        words,
        words,
    )
    last = table.take(np.flatnonzero(step == steps[-1]))
    order = np.argsort(-last["total_variation"].to_numpy(), kind="stable")[:SHOWN]
    rows = [_row(row) for row in last.take(order).to_pylist()]
    head = ["prompt (its end)", "gained most", "lost most", "moved"]
    count = len(last)
    note = f"{min(SHOWN, count)} of {count} probe prompts, those that moved most. Probability before and now."
    return gallery([drawn]) + paragraphs(note) + data_table(head, rows, text_columns=3)


def _row(row: dict[str, Any]) -> list[str]:
    return [
        _end(row["prompt"]),
        *("; ".join(_moved(t) for t in (row[name] or [])[:3]) for name in ("gaining", "losing")),
        readable(row["total_variation"], 2),
    ]


def _end(prompt: str | None) -> str:
    text = " ".join((prompt or "").split())
    return text if len(text) <= 110 else "…" + text[-109:]


def _moved(token: dict[str, Any]) -> str:
    return f"“{token['text']}” {readable(token['before'], 2)} → {readable(token['now'], 2)}"


def _read(run_dir: Path) -> pa.Table | None:
    whole = run_dir / FILE_NAME
    paths = [whole] if whole.is_file() else sorted((run_dir / PARTS).glob("step-*.parquet"))
    tables = [read_parquet(path, RunError, "the probes of `ches train`", COLUMNS) for path in paths]
    return pa.concat_tables(tables) if tables else None
