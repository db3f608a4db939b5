"""Logs in CSV: exports of Weights & Biases and trackio, and metrics of other trainers."""

import csv
import io
import re
from pathlib import Path
from typing import Any

from ches_jax.displacement.readers.log import Log, log_of, tag_of_download
from ches_jax.displacement.readers.metric_names import STEPS, metric
from ches_jax.errors import ChesError

SPREAD = ("__MIN", "__MAX")
"""Columns beside each metric in an export of Weights & Biases."""
ONE_CHART = {"wall time", "step", "value"}
"""Columns of one chart that TensorBoard saved."""
DECIMAL_COMMA = re.compile(r"-?\d+,\d+([eE][-+]?\d+)?")


def read_csv_log(path: Path, text: str, held_out: str | None = None) -> Log:
    """A table with a column for each metric and one for the step.

    Columns of a chart exported from Weights & Biases are called ``run name - metric``.

    Raises:
      ChesError: no header, or columns of several runs.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(text), delimiter=_delimiter(text)))
    except csv.Error as error:
        raise ChesError(f"{path}: not a readable CSV file ({error})") from None
    if not rows or not rows[0]:
        raise ChesError(f"{path}: a CSV file without rows")
    runs: dict[str, None] = {}
    renamed: dict[str, str] = {}
    if {str(column).lower() for column in rows[0]} == ONE_CHART:
        rows = [{tag_of_download(path) if c == "Value" else c: v for c, v in row.items()} for row in rows]
    for column in rows[0]:
        if column is None or column.endswith(SPREAD):
            continue
        run, dash, name = column.rpartition(" - ")
        renamed[column] = name if dash else column
        if dash and metric(name) is not None:
            runs[run] = None
    if len(runs) > 1:
        raise ChesError(f"{path}: holds {len(runs)} runs ({', '.join(runs)}); export one of them")
    cut = rows[-1] if None in rows[-1].values() else None
    notes = ("its last row is cut off and was left out",) if cut is not None else ()
    entries = [
        {renamed[c]: v for c, v in row.items() if c in renamed and v not in ("", None)}
        for row in (rows if cut is None else rows[:-1])
    ]
    if _delimiter(text) != ",":
        entries = [{name: _with_point(v) for name, v in entry.items()} for entry in entries]
    return log_of(f"{path} (CSV)", entries, held_out=held_out, notes=notes, run=next(iter(runs), ""))


def _with_point(cell: Any) -> Any:
    """A number with a decimal comma, as spreadsheets of many countries write it, with a point."""
    return cell.replace(",", ".") if isinstance(cell, str) and DECIMAL_COMMA.fullmatch(cell) else cell


def looks_like_csv(text: str) -> bool:
    r"""Whether the first line is a header with a metric or a step among its columns.

    >>> looks_like_csv("Step,run - eval/rewards/chosen\n1,0.5"), looks_like_csv("{'loss': 0.5, 'step': 1}")
    (True, False)
    """
    try:
        head = next(csv.reader(text.splitlines()[:1], delimiter=_delimiter(text)), [])
    except csv.Error:
        return False
    names = [column.rpartition(" - ")[2] for column in head]
    return len(head) > 1 and any(n.lower() in STEPS or metric(n) is not None for n in names)


def _delimiter(text: str) -> str:
    """What separates the columns of the header: a comma, a semicolon or a tab."""
    head = text.partition("\n")[0]
    return max(",;\t", key=head.count)
