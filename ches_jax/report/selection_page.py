"""The page of a selection: what was kept of what, how it differs from all pairs, and each pair kept or dropped."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.data.messages import side_text
from ches_jax.errors import RunError
from ches_jax.report import elements
from ches_jax.report.axes import digits_of, percent, readable
from ches_jax.report.document import Page, Section
from ches_jax.report.html import data_table, escape, gallery
from ches_jax.report.pair_table import Column, PairTable
from ches_jax.report.provenance import provenance, short_path
from ches_jax.report.score_page import label
from ches_jax.report.texts import SIDES
from ches_jax.runs.files import read_object
from ches_jax.runs.shapes import misfit, read_json_lines, require_shape

_LENGTHS = {"chosen_tokens?": float, "rejected_tokens?": float, "rejected_minus_chosen?": float}
_SHAPE = {
    "rule?": {"by?": str, "keep?": str, "control?": str}, "counts?": {"table?": int},
    "mean_lengths?": {"kept?": _LENGTHS, "all?": _LENGTHS}, "source?": {"pairs?": str},
    "categories?": {str: {"scored": int, "kept": int}},
}  # fmt: skip


def selection_page(run_dir: Path) -> Page:
    """The page of a directory of ``ches select``.

    Raises:
      RunError: its files cannot be read.
    """
    path = run_dir / "selection.json"
    chosen = require_shape(path, read_object(path, RunError, "a directory of ches select"), _SHAPE, RunError)
    kept = read_json_lines(run_dir / "pairs.jsonl", {}, RunError)
    dropped = run_dir / "dropped.jsonl"
    dropped = read_json_lines(dropped, {}, RunError) if dropped.is_file() else []
    rule, counts = chosen.get("rule") or {}, chosen.get("counts") or {}
    by = rule.get("by") or ""
    table = _table(run_dir, kept, by)
    of = len(kept) if counts.get("table") is None else counts["table"]
    lengths = chosen.get("mean_lengths") or {}
    control = str(rule.get("control", "none"))
    answers = [
        (
            "What was kept?",
            f"{len(kept):,} of {of:,} pairs ({percent(len(kept) / max(1, of))}): "
            f"<code>{escape(rule.get('keep', ''))}</code> of "
            f"{escape(label(by))}{escape('' if control == 'none' else f', as a {control} control')}.",
        ),
        ("Did the lengths change?", _length_words(lengths)),
        (
            "What next?",
            "Train on it and on a control of equal size: "
            f"<code>ches train --pairs {elements.shown(run_dir / 'pairs.jsonl')}</code>, "
            "and <code>ches select ... --control random</code>.",
        ),
    ]
    reasons = Counter(str(row.get("reason", "")) for row in dropped)
    parts = [
        _lengths_table(lengths),
        data_table(["dropped because of", "pairs"], [[k, f"{n:,}"] for k, n in reasons.most_common(20)])
        if reasons
        else "",
        _categories(chosen.get("categories") or {}),
    ]
    sections = [
        Section(
            anchor="kept", heading="Kept and dropped, in numbers", body=gallery([f"<div>{p}</div>" for p in parts if p])
        ),
        Section(anchor="pairs", heading="All kept pairs", body=elements.table_body()),
        provenance(chosen),
    ]
    headline = f"{len(kept):,} of {of:,} pairs kept, {rule.get('keep', '')} of {label(by)}"
    source = (chosen.get("source") or {}).get("pairs")
    return Page(
        kind="ches select",
        title=f"{headline}: {run_dir.name}",
        headline=headline,
        subtitle=elements.subtitle(short_path(source), f"{len(dropped):,} dropped", str(run_dir)),
        answers=answers,
        sections=[s for s in sections if s.body],
        pairs=table,
    )


def _length_words(lengths: Mapping[str, Any]) -> str:
    """Mean lengths of what was kept against all."""
    kept, every = lengths.get("kept") or {}, lengths.get("all") or {}
    changes = []
    for name in ("chosen_tokens", "rejected_tokens"):
        if kept.get(name) is not None and every.get(name) is not None:
            changes.append(f"{label(name)} {readable(every[name], 0)} → {readable(kept[name], 0)}")
    known = [n for n in ("chosen_tokens", "rejected_tokens") if every.get(n) and kept.get(n) is not None]
    changed = [abs(kept[n] / every[n] - 1) for n in known]
    word = '<span class="tones">Yes</span>: ' if changed and max(changed) > 0.1 else "Hardly: "
    return f"{word}{escape(', '.join(changes))} on average." if changes else "Not recorded."


def _lengths_table(lengths: Mapping[str, Any]) -> str:
    kept, every = lengths.get("kept") or {}, lengths.get("all") or {}
    rows = [
        [label(n), readable(every[n], 1), readable(kept[n], 1)]
        for n in every
        if _finite(every[n]) and _finite(kept.get(n))
    ]
    return data_table(["mean", "of all", "of the kept"], rows) if rows else ""


def _finite(value: Any) -> bool:
    return misfit(value, float) is None


def _categories(found: Mapping[str, Mapping[str, int]]) -> str:
    rows = [
        [name or "(none)", f"{c['scored']:,}", f"{c['kept']:,}", percent(c["kept"] / max(1, c["scored"]))]
        for name, c in found.items()
    ]
    return data_table(["category", "pairs", "kept", "share"], rows) if rows else ""


def _table(run_dir: Path, kept: Sequence[Mapping[str, Any]], by: str) -> PairTable | None:
    if not kept:
        return None
    ids = [str(row.get("row_id", "")) for row in kept]
    columns = [
        Column(
            name="line", label="line", values=np.arange(len(kept)), down=False, meaning="line of pairs.jsonl, from 0"
        )
    ]
    for name in (by, "weight"):
        if name and all(_finite(row.get(name)) for row in kept):
            values = np.array([float(row[name]) for row in kept])
            columns.append(Column(name=name, label=label(name), values=values, meaning=f"{digits_of(values)} decimals"))
    if any(row.get("category") for row in kept):
        columns.append(
            Column(
                name="category",
                label="category",
                values=[str(r.get("category") or "") for r in kept],
                kind="word",
                minor=True,
            )
        )
    texts = {side: [side_text(row, side) for row in kept] for side in SIDES}
    sort = (by, -1) if any(c.name == by for c in columns) else ("line", 1)
    return PairTable(
        name=f"{run_dir.name}_pairs",
        rows=len(kept),
        columns=columns,
        key=["line"],
        sort=sort,
        texts=texts,
        row_ids=ids,
    )
