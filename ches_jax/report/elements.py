"""What several pages share: the place of the table, scatter figures, links to rows, columns joined from other files."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa

from ches_jax.errors import RunError
from ches_jax.report.html import escape
from ches_jax.report.pair_table import Column, Numbers, PairTable
from ches_jax.runs.files import read_parquet
from ches_jax.scores.table import JOINED


def table_body(caption: str = "Every pair, one row each; a click or Enter on the arrow unfolds it.") -> str:
    """Where the page's script builds the table."""
    return (
        '<div class="controls" id="table-controls"></div>'
        '<p><output id="count" aria-live="polite"></output> <span class="soft" id="bounds"></span></p>'
        '<div class="box" tabindex="0" role="region" aria-label="table of pairs">'
        f"<table><caption>{escape(caption)}</caption>"
        "<thead><tr></tr></thead><tbody></tbody></table></div>"
    )


def scatter(
    name: str,
    title: str,
    pairs: PairTable,
    x: str,
    y: str,
    *,
    by: str = "",
    regimes: bool = False,
    choose: bool = False,
    alt: str = "",
    caption: str = "",
) -> str:
    """Where the page's script draws one point for each pair.

    Args:
      name: of the file that is saved.
      title: above the figure.
      pairs: the table of the page.
      x: column across.
      y: column upwards.
      by: column of words that decides colour and shape.
      regimes: whether the quarters are named, for two changes.
      choose: whether the reader can choose the columns.
      alt: words for those who cannot see it.
      caption: below the figure.
    """
    labels = {c.name: c.label for c in pairs.columns}
    alt = alt or f"Each {pairs.one} a point: {labels[y]} against {labels[x]}."
    legend = _legend(pairs, by)
    chosen = _choice(pairs, "x", "across", x) + _choice(pairs, "y", "upwards", y) if choose else ""
    controls = f'<div class="controls">{chosen}</div>' if chosen else ""
    data = f'data-name="{escape(name)}" data-x="{escape(x)}" data-y="{escape(y)}" data-by="{escape(by)}"'
    return (
        f'<figure class="points" {data} data-regimes="{int(regimes)}" data-alt="{escape(alt)}">'
        f'<header><strong>{escape(title)}</strong></header>{controls}<div class="plot"></div>'
        f"<figcaption>{escape(caption)} {legend}A click on a point opens its {escape(pairs.one)}."
        '<span class="clipped"></span></figcaption></figure>'
    )


SHAPES = ("● circles", "■ squares", "▲ triangles", "✚ crosses")


def _legend(pairs: PairTable, by: str) -> str:
    if not by:
        return ""
    words = sorted(set(next(c for c in pairs.columns if c.name == by).values))
    if not 1 < len(words) <= len(SHAPES):
        return ""
    parts = [f'<span class="group{i}">{SHAPES[i]}: {escape(w)}</span>' for i, w in enumerate(words)]
    return ", ".join(parts) + ". "


def _choice(pairs: PairTable, which: str, words: str, now: str) -> str:
    options = "".join(
        f'<option value="{escape(c.name)}"{" selected" * (c.name == now)}>{escape(c.label)}</option>'
        for c in pairs.columns
        if c.kind == "number" and c.name != "index"
    )
    return f'<label>{words}<select data-axis="{which}">{options}</select></label>'


def row_key(pairs: PairTable, position: int) -> str:
    """What names a pair in links: its key columns, joined."""
    return _key([column.values[position] for column in _key_columns(pairs)])


def row_keys(pairs: PairTable) -> Iterator[str]:
    """``row_key`` of each pair, in order."""
    return map(_key, zip(*map(_each, _key_columns(pairs)), strict=True))


def _key(parts: Sequence[Any]) -> str:
    return "-".join(str(part).replace(" ", "_") for part in parts)


def _key_columns(pairs: PairTable) -> list[Column]:
    columns = {c.name: c for c in pairs.columns}
    return [columns[name] for name in pairs.key]


def _each(column: Column) -> Iterator[Any]:
    """The values of a column, one at a time."""
    return iter(np.asarray(column.values) if isinstance(column.values, Numbers) else column.values)


def row_link(pairs: PairTable, position: int) -> str:
    """A link to a pair in the table."""
    key = row_key(pairs, position)
    return f'<a href="#row-{escape(quote(key))}">{escape(pairs.one)} {escape(key)}</a>'


def joined(folder: Path, row_ids: Sequence[str]) -> dict[str, np.ndarray]:
    """Columns of ``JOINED`` for rows by their id, [rows] each, NaN where a file does not have a row."""
    out: dict[str, np.ndarray] = {}
    for file, names in JOINED.items():
        if not (folder / file).is_file():
            continue
        needed = pa.schema([pa.field("row_id", pa.string())])
        numbers = pa.schema([pa.field(name, pa.float64()) for name in names])
        table = read_parquet(folder / file, RunError, "a table of another verb", needed, numbers)
        place = {row_id: i for i, row_id in enumerate(table["row_id"].to_pylist())}
        at = np.array([place.get(row_id, -1) for row_id in row_ids])
        for name in names:
            if name in table.schema.names and (at >= 0).any():
                values = table[name].to_numpy()
                out[name] = np.where(at >= 0, values[at], np.nan)
    return out


def number_column(name: str, label: str, values: np.ndarray, **more: object) -> Column:
    """A column of changes in nats."""
    return Column(name=name, label=label, values=values, unit="nats", signed=True, **more)  # type: ignore[arg-type]


def quoted(path: Path | str) -> str:
    """A path for a command line."""
    return shlex.quote(str(path))


def show_command(run_dir: Path) -> str:
    """The command that prints one pair of a run, without the pair."""
    return f"ches show {quoted(run_dir)}"


def shown(path: Path | str) -> str:
    """A path for a command line, as HTML."""
    return escape(quoted(path))


def subtitle(*parts: str) -> str:
    """Facts under the headline, those that are known."""
    return " · ".join(part for part in parts if part)
