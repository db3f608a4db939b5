"""The page of a score run: what its scores are, and what they are worth."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from ches_jax.errors import RunError
from ches_jax.report import sections, tables
from ches_jax.report.html import escape, page, paragraphs
from ches_jax.report.pairs import pair_card, read_texts, read_tokens
from ches_jax.report.summary import correlation
from ches_jax.runs.files import replacing
from ches_jax.scores.formulas import score_column
from ches_jax.scores.table import read_table, table_path
from ches_jax.select.scored_rows import SourceRow, dropped_when_scored, keys, read_run

SHOWN = 10
"""Pairs shown at each end of a score."""


def score_report(run_dir: Path | str, out: Path | str | None = None, rows: Iterable[SourceRow] | None = None) -> Path:
    """Writes ``report.html`` and ``figures/*.png`` from the directory of a score run.

    Args:
      run_dir: a directory of ``ches score`` (``scores.parquet``; ``run.json`` and ``dropped.jsonl`` where
        there are any).
      out: where to write; the run directory itself when not given. Reports are written over.
      rows: the rows that were scored, for their texts; opened from the run when not given. A page without
        texts is written where they cannot be read.

    Returns:
      The path of the page.

    Raises:
      RunError: not a directory of a score run, or its table has no rows.
    """
    run_dir = table_path(run_dir).parent
    table, metadata = read_table(run_dir)
    if not len(table):
        raise RunError(f"{run_dir}: the score table has no rows; there is nothing to report")
    out = run_dir if out is None else Path(out)
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)

    def keep(name: str, png: bytes) -> bytes:
        (folder / f"{name}.png").write_bytes(png)
        return png

    ends = {
        by: tables.extremes(score_column(table, by), SHOWN)
        for by in ("ches", "ln_ches")
        if by in table.schema.names
    }  # fmt: skip
    surface = []
    if {"ches", "edit_distance"} <= set(table.schema.names):
        surface = tables.small_edit_high_ches(table)[0][:SHOWN].tolist()
    positions = sorted({*surface, *(int(p) for both in ends.values() for side in both for p in side)})
    texts, note = read_texts(run_dir, table, positions, rows)
    table_keys = keys(table)
    tokens, by = read_tokens(run_dir, [table_keys[p] for p in positions])
    cards = {p: pair_card(table, p, texts.get(p), tokens, by) for p in positions}
    note = f'<p class="note">Texts are not shown: {escape(note)}</p>' if note else ""
    extremes = note + "".join(sections.extremes_section(by, *both, cards) for by, both in ends.items())
    run = read_run(run_dir)

    body = [
        ("reading", "What CHES is and how to read it", paragraphs(*sections.READING)),
        ("scores", "Scores", sections.quantile_section(table)),
        ("distributions", "Distributions", sections.distribution_section(table, keep)),
        ("categories", "Categories", sections.category_section(table, keep)),
        ("lengths", "Length", sections.length_section(table, keep)),
        ("surface", "Surface and model", sections.surface_section(table, keep, cards, SHOWN)),
        ("pairs", "Most and least similar pairs", extremes),
        ("health", "Data health", sections.health_section(table, _reasons(run_dir))),
        ("limits", "What this does not show", paragraphs(*sections.LIMITS)),
        ("provenance", "Provenance", sections.provenance_section(metadata, run)),
    ]
    text = page("CHES scores of preference pairs", _lead(table), [part for part in body if part[2]])
    with replacing(out / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return out / "report.html"


def _lead(table: pa.Table) -> str:
    text = f"{len(table)} pairs, {tables.scored_rows(table)} with a score."
    by_length = {row.score: row for row in tables.length_rows(table)}
    if "ches" in by_length:
        text += (
            f" Spearman correlation with the length difference (rejected - chosen): "
            f"ches {correlation(by_length['ches'].difference)}"
        )
        if "ln_ches" in by_length:
            text += f", ln_ches {correlation(by_length['ln_ches'].difference)}"
        text += "."
    return paragraphs(text)


def _reasons(run_dir: Path) -> dict[str, int]:
    return dict(Counter(dropped_when_scored(run_dir).values()))
