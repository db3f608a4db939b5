"""The page of a training run: did chosen fall, how it went over the updates, where the mass went, all watched pairs."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.data.sources import pairs_of_run
from ches_jax.displacement.changes import REGIMES, Changes
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.displacement.readers.training_run import read_log_of_run
from ches_jax.displacement.verdict import diagnose_changes
from ches_jax.errors import ChesError, RunError
from ches_jax.report import answers, elements, essays, svg
from ches_jax.report import change_sections as parts
from ches_jax.report.answers import SETS, Diagnoses, set_name
from ches_jax.report.axes import readable
from ches_jax.report.change_sections import Course, Moved
from ches_jax.report.document import Page, Section
from ches_jax.report.html import figure, gallery, paragraphs
from ches_jax.report.probe_section import probe_section
from ches_jax.report.provenance import model_name, provenance, read_record, short_path
from ches_jax.report.texts import texts_by_id
from ches_jax.runs.files import open_regular
from ches_jax.runs.shapes import misfit
from ches_jax.select.scored_rows import SourceRow
from ches_jax.stats import mean as mean_of


def training_page(run_dir: Path) -> Page:
    """The page of a run of ``ches train``, finished or not.

    Raises:
      RunError: the displacement log has no pairs, or cannot be read.
    """
    table = read_log_of_run(run_dir)
    if not len(table):
        raise RunError(f"{run_dir}: the displacement log has no pairs; there is nothing to report")
    if lacking := [name for name in ("row_id", "index", "regime") if name not in table.column_names]:
        raise RunError(f"{run_dir}: the displacement log has no column {', '.join(lacking)}, which a page needs")
    record = read_record(run_dir)
    config = record.get("config") or {}
    moved, note = _last(run_dir, table, config)
    courses = _courses(table)
    pairs = parts.pair_table(moved, f"{run_dir.name}_pairs", elements.show_command(run_dir))
    diagnoses = _answers(run_dir, moved)
    losses = _losses(run_dir)
    model = run_dir / "model"
    first_step = int(max(table["step"].to_numpy()))
    change, absolute = parts.course_figures(courses)
    counts = record.get("counts") or {}
    dropped = {"dropped before training": int(counts.get("dropped") or 0)}
    margins = [parts.margin_figure(c) for c in courses if np.isfinite(c.rejected).all()]
    body = [
        Section(anchor="course", heading="Over the updates", body=gallery([change, parts.pair_scatter(moved, pairs)])),
        Section(anchor="pairs", heading="All watched pairs", body=elements.table_body()),
        Section(
            anchor="margin",
            heading="The margin and the regimes",
            body=gallery([*margins, *(parts.regime_figure(c) for c in courses), absolute, _loss_figure(losses)]),
        ),
        Section(
            anchor="harm", heading="Where the mass went", body=answers.harm_section(diagnoses) + probe_section(run_dir)
        ),
        Section(
            anchor="against",
            heading="What was known before, against what happened",
            body=parts.score_section(moved, pairs),
        ),
        Section(anchor="health", heading="Data health", body=parts.health_section(moved, dropped)),
        Section(anchor="reading", heading="How to read this", body=paragraphs(*essays.CHANGE_READING), folded=True),
        Section(
            anchor="limits", heading="What this does not show", body=paragraphs(*essays.CHANGE_LIMITS), folded=True
        ),
        provenance(record),
    ]
    headline, tone = answers.headline(diagnoses, f"after {first_step} updates")
    return Page(
        kind="ches train",
        title=f"{headline}: {run_dir.name}",
        headline=headline,
        subtitle=elements.subtitle(
            model_name(record),
            str(record.get("loss") or config.get("loss") or ""),
            f"{first_step} updates",
            short_path(config.get("pairs")),
            ", ".join(f"{int((moved.sets == s).sum()):,} {set_name(s)} pairs watched" for s in moved.present),
            str(run_dir),
        ),
        answers=[
            ("Did chosen fall?", answers.did_chosen_fall(diagnoses)),
            ("A bug?", answers.run_health(losses, str(config.get("loss", "")), str(record.get("status", "")))),
            ("Harm?", answers.harm(diagnoses, answers.commands(str(model) if model.is_dir() else "MODEL"))),
            ("What to do?", answers.advice(diagnoses, parts.worst_links(moved, pairs))),
        ],
        tone=tone,
        notes=[note] if note else [],
        sections=[s for s in body if s.body],
        pairs=pairs,
    )


def _last(run_dir: Path, table: pa.Table, config: Mapping[str, Any]) -> tuple[Moved, str]:
    """The pairs of each set at their last evaluation, and a note where their texts cannot be had."""
    step, sets = table["step"].to_numpy(), np.array(table["set"].to_pylist())
    last = np.zeros(len(table), dtype=bool)
    for name in np.unique(sets):
        last |= (sets == name) & (step == step[sets == name].max())
    rows = table.take(np.flatnonzero(last))
    ids = rows["row_id"].to_pylist()
    texts, categories, note = _texts(config, ids)
    names = ("chosen_tokens", "rejected_tokens", "logp_chosen", "logp_rejected")
    numbers = {n: rows[n].to_numpy().astype(np.float64) for n in names if n in rows.column_names}
    numbers |= elements.joined(run_dir, ids)
    return Moved(
        sets=sets[last],
        row_ids=ids,
        index=rows["index"].to_numpy(),
        chosen=rows["dlogp_chosen"].to_numpy(),
        rejected=rows["dlogp_rejected"].to_numpy(),
        numbers=numbers,
        words={"category": categories},
        texts=texts,
        tolerance=float(config.get("tolerance") or 0.05),
    ), note


def _texts(config: Mapping[str, Any], ids: Sequence[str]) -> tuple[dict[str, list[str]], list[str], str]:
    try:
        texts, categories = texts_by_id(_source(config), ids)
    except (ChesError, OSError) as error:
        return {}, [], f"Texts are not shown: {error}"
    if not any(texts["chosen"]) and not any(texts["rejected"]):
        return {}, [], "Texts are not shown: the watched rows are not in the pairs file any more."
    return texts, categories, ""


def _source(config: Mapping[str, Any]) -> Iterator[SourceRow]:
    """The training rows, then the held-out ones where they are a file of their own."""
    if not config.get("pairs"):
        raise RunError("no run.json names the pairs that were trained on")
    for name in ("pairs", "eval_pairs"):
        if config.get(name):
            limit = config.get("limit") if name == "pairs" else None
            yield from itertools.chain.from_iterable(pairs_of_run({**config, "pairs": config[name], "limit": limit}))


def _courses(table: pa.Table) -> list[Course]:
    """Means at each evaluation of each set, held-out pairs first."""
    step, sets = table["step"].to_numpy(), np.array(table["set"].to_pylist())
    names = ("dlogp_chosen", "dlogp_rejected", "logp_chosen", "logp_rejected")
    log = {n: table[n].to_numpy() if n in table.column_names else np.full(len(table), np.nan) for n in names}
    regime = np.array(table["regime"].to_pylist())
    courses = []
    for name in [*(s for s in SETS if (sets == s).any()), *sorted(set(sets.tolist()) - set(SETS))]:
        steps = np.unique(step[sets == name])
        at = [(sets == name) & (step == s) for s in steps]
        mean = {n: np.array([mean_of(values[rows]) for rows in at]) for n, values in log.items()}
        middle = {side: _quartiles([log[f"dlogp_{side}"][rows] for rows in at]) for side in ("chosen", "rejected")}
        shares = [parts.regime_shares(regime[rows]) for rows in at]
        courses.append(
            Course(
                set=name,
                steps=steps,
                chosen=mean["dlogp_chosen"],
                rejected=mean["dlogp_rejected"],
                logp_chosen=mean["logp_chosen"],
                logp_rejected=mean["logp_rejected"],
                middle={side: ends for side, ends in middle.items() if np.isfinite(ends).all()},
                shares={r: np.array([s[r] for s in shares]) for r in REGIMES} if (regime != "").any() else {},
            )
        )
    return courses


def _quartiles(groups: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    finite = [g[np.isfinite(g)] for g in groups]
    low, high = ([float(np.quantile(g, q)) if g.size else float("nan") for g in finite] for q in (0.25, 0.75))
    return np.array(low), np.array(high)


def _answers(run_dir: Path, moved: Moved) -> Diagnoses:
    """What ``ches diagnose`` says of the run, by set; where it says nothing, why, for each set."""
    try:
        answer = diagnose(DiagnoseConfig(path=str(run_dir), tolerance=moved.tolerance)).to_json()
    except ChesError:
        return {name: _diagnosis(run_dir, moved, name) for name in moved.present}
    beside = answer.get("beside")
    return {part["set"]: part for part in ([answer, beside] if beside else [answer])}


def _diagnosis(run_dir: Path, moved: Moved, name: str) -> Mapping[str, Any] | str:
    """The verdict on one set, or why there is none."""
    inside = (moved.sets == name) & np.isfinite(moved.chosen) & np.isfinite(moved.rejected)
    if not inside.any():
        return "single responses, of which no two make a pair"
    if not moved.chosen[inside].any() and not moved.rejected[inside].any():
        return "holds step 0 only; there is no change to judge yet"
    changes = Changes(
        chosen=moved.chosen[inside],
        rejected=moved.rejected[inside],
        source=f"{run_dir}, {set_name(name)}",
        records=moved.index[inside],
    )
    try:
        return diagnose_changes(changes, moved.tolerance).to_json()
    except ChesError as error:
        return str(error)


def _losses(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(update, value) of the training and the held-out loss, from ``metrics.jsonl`` as far as it is written."""
    path = run_dir / "metrics.jsonl"
    losses: dict[str, list[tuple[int, float]]] = {}
    if not path.exists():
        return losses
    with open_regular(path, RunError, "JSON lines") as file:
        text = file.read().decode("utf-8", "replace")
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a run that was killed
            continue
        for name in ("loss", "eval_loss"):
            if misfit(entry, {"step": int, name: float}) is None:
                losses.setdefault(name, []).append((entry["step"], float(entry[name])))
    return losses


def _loss_figure(losses: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    if not losses:
        return ""
    names = {"loss": "training", "eval_loss": "held out"}
    series = [
        svg.Series(
            name=names[n],
            x=np.array([s for s, _ in v]),
            y=np.array([x for _, x in v]),
            colour=k,
            dashed=k == 1,
            marks=n == "eval_loss",
        )
        for k, (n, v) in enumerate(losses.items())
    ]
    words = ", ".join(f"{names[n]} from {readable(v[0][1], 3)} to {readable(v[-1][1], 3)}" for n, v in losses.items())
    return figure(
        "loss", "Loss", svg.lines(series, x="update", y="loss"), f"The loss over the updates: {words}.", f"{words}."
    )
