"""The page of generated texts and of judgments: how many there are, how they ended, did they refuse, each of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.errors import RunError
from ches_jax.report import elements, svg
from ches_jax.report.axes import percent, readable
from ches_jax.report.document import Page, Section
from ches_jax.report.html import data_table, figure, gallery
from ches_jax.report.pair_table import Column, PairTable
from ches_jax.report.provenance import model_name, provenance, read_record, short_path
from ches_jax.runs.shapes import read_json_lines

_ROW = {"index?": int, "sample?": int, "refusal?": bool, "token_ids?": [object]}
VERDICTS = {True: "refused", False: "answered", None: "undecided"}
"""What the page calls a judgment."""


def response_page(run_dir: Path) -> Page:
    """The page of a directory of ``ches generate`` or ``ches judge``.

    Raises:
      RunError: its file cannot be read, or holds no texts.
    """
    judged = (run_dir / "judgments.jsonl").is_file()
    path = run_dir / ("judgments.jsonl" if judged else "responses.jsonl")
    rows = read_json_lines(path, _ROW, RunError)
    if not rows:
        raise RunError(f"{path}: holds no texts; there is nothing to report")
    record = read_record(run_dir)
    config = record.get("config") or {}
    table = _table(run_dir, rows, judged)
    lengths = np.array([len(str(r.get("text", ""))) for r in rows], dtype=float)
    drawn = figure(
        "lengths",
        "Lengths of the texts",
        svg.histogram(lengths, x="characters", of="texts"),
        f"Histogram of the lengths of {len(rows)} texts; median {readable(float(np.median(lengths)), 0)} characters.",
        f"Median {readable(float(np.median(lengths)), 0)} characters, {int((lengths == 0).sum()):,} empty.",
    )
    if judged:
        headline, answers, body = _judged(record, rows)
    else:
        headline, answers, body = _generated(run_dir, rows)
    sections = [
        Section(
            anchor="texts",
            heading="All texts",
            body=elements.table_body("Every text, one row each; a click or Enter unfolds it."),
        ),
        Section(anchor="figures", heading="In figures", body=gallery([drawn, *body])),
        provenance(record),
    ]
    what = short_path(config.get("responses") or config.get("prompts") or config.get("pairs"))
    return Page(
        kind="ches judge" if judged else "ches generate",
        title=f"{headline}: {run_dir.name}",
        headline=headline,
        subtitle=elements.subtitle(
            model_name(record) if not judged else _method(config), what, f"{len(rows):,} texts", str(run_dir)
        ),
        answers=answers,
        sections=sections,
        pairs=table,
    )


def _table(run_dir: Path, rows: Sequence[Mapping[str, Any]], judged: bool) -> PairTable:
    index = np.array([i if r.get("index") is None else r["index"] for i, r in enumerate(rows)])
    columns = [Column(name="index", label="row", values=index, down=False, meaning="row of the prompts, from 0")]
    several = any(r.get("sample") for r in rows)
    if several:
        columns.append(
            Column(name="sample", label="sample", values=np.array([r.get("sample") or 0 for r in rows]), minor=True)
        )
    words: dict[str, list[str]] = {
        "judgment": [VERDICTS.get(r.get("refusal"), "undecided") for r in rows] if judged else [],
        "because": [str(r.get("reason") or "") for r in rows] if judged else [],
        "ended": [str(r.get("finish_reason") or "") for r in rows],
        "category": [str(r.get("category") or "") for r in rows],
    }
    for name, values in words.items():
        if any(values):
            columns.append(
                Column(
                    name=name, label=name, values=values, kind="word", minor=name != "judgment", shown=name != "because"
                )
            )
    if any("token_ids" in r for r in rows):
        columns.append(
            Column(name="tokens", label="tokens", values=np.array([len(r.get("token_ids") or []) for r in rows]))
        )
    if any(isinstance(r.get("logp"), float) for r in rows):
        logp = np.array([float(r["logp"]) if isinstance(r.get("logp"), float) else np.nan for r in rows])
        columns.append(Column(name="logp", label="ln π", values=logp, unit="nats", minor=True))
    texts = {"prompt": [str(r.get("prompt") or "") for r in rows], "response": [str(r.get("text") or "") for r in rows]}
    if not any(texts["prompt"]):
        del texts["prompt"]
    key = ["index", "sample"] if several else ["index"]
    if len({tuple(c.values[i] for c in columns if c.name in key) for i in range(len(rows))}) < len(rows):
        columns.append(Column(name="line", label="line", values=np.arange(len(rows)), shown=False, down=False))
        key = ["line"]
    return PairTable(
        name=f"{run_dir.name}_texts",
        rows=len(rows),
        columns=columns,
        key=key,
        sort=("index", 1),
        texts=texts,
        row_ids=[str(r.get("row_id", "")) for r in rows],
        one="text",
        unit="texts",
    )


def _generated(run_dir: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[str, str]], list[str]]:
    prompts = len({r.get("index") for r in rows})
    ended = Counter(str(r.get("finish_reason") or "unknown") for r in rows)
    cut = ended.get("length", 0)
    empty = sum(1 for r in rows if not str(r.get("text", "")).strip())
    answers = [
        (
            "Did the texts end?",
            f"{percent(1 - cut / len(rows))} ended by themselves; {cut:,} of {len(rows):,} were cut at the "
            "longest length (<code>--max-new-tokens</code>).",
        ),
        ("Anything odd?", f"{empty:,} empty texts."),
        (
            "What next?",
            f"Judge them: <code>ches judge --responses {elements.shown(run_dir / 'responses.jsonl')} --out j</code>",
        ),
    ]
    body = [f"<div>{data_table(['ended because of', 'texts'], [[k, f'{n:,}'] for k, n in ended.most_common()])}</div>"]
    return f"{len(rows):,} texts of {prompts:,} prompts", answers, body


def _judged(
    record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> tuple[str, list[tuple[str, str]], list[str]]:
    summary = record.get("summary") or {}
    counts = Counter(VERDICTS.get(r.get("refusal"), "undecided") for r in rows)
    decided = counts["refused"] + counts["answered"]
    rate = summary.get("refusal_rate", counts["refused"] / decided if decided else float("nan"))
    low, high = summary.get("interval") or (float("nan"), float("nan"))
    headline = (
        f"{percent(float(rate))} of {len(rows):,} responses refused"
        if decided
        else f"None of {len(rows):,} responses could be judged"
    )
    answers = [
        (
            "Did they refuse?",
            f"{counts['refused']:,} refused, {counts['answered']:,} answered"
            f"{f' <small>[95 %: {percent(low)} to {percent(high)}]</small>' if low == low else ''}, "
            f"{counts['undecided']:,} undecided.",
        ),
        ("What next?", "Judge the texts of the other model too and give both to <code>ches diagnose</code>."),
    ]
    groups = summary.get("by_category") or {}
    body = []
    if groups:
        table = [
            [
                name or "(none)",
                f"{g['responses']:,}" if g.get("responses") is not None else "–",
                percent(g["refusal_rate"]) if g.get("refusal_rate") is not None else "–",
                _interval(g.get("interval")),
            ]
            for name, g in groups.items()
        ]
        body.append(f"<div>{data_table(['category', 'texts', 'refused', '95 % interval'], table)}</div>")
    return headline, answers, body


def _interval(ends: Sequence[float] | None) -> str:
    return f"{percent(ends[0])} to {percent(ends[1])}" if ends else "–"


def _method(config: Mapping[str, Any]) -> str:
    """By what was judged."""
    for name in ("labels", "model", "rules"):
        if config.get(name):
            return f"judged by {name} {short_path(config[name])}"
    return "judged by phrases"
