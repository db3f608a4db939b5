"""The pages of directories of ``ches forecast`` and ``ches influence``: what a run would do, before it is made."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.displacement.pair_table import SIDES, read_texts
from ches_jax.errors import RunError
from ches_jax.report import elements, svg
from ches_jax.report.axes import readable
from ches_jax.report.document import Page, Section
from ches_jax.report.html import command, data_table, escape, figure, gallery, paragraphs
from ches_jax.report.pair_table import Column, PairTable
from ches_jax.report.provenance import model_name, provenance, read_record, short_path
from ches_jax.runs.files import read_parquet
from ches_jax.scores.table import FORECAST, INFLUENCE

SETS = {"train": "training", "probe": "held-out"}
FORECAST_LABELS = {
    "forecast_chosen": "forecast of chosen",
    "forecast_rejected": "forecast of rejected",
    "pilot_chosen": "pilot, chosen",
    "pilot_rejected": "pilot, rejected",
    "logp_chosen": "ln π chosen at the start",
    "logp_rejected": "ln π rejected at the start",
}
INFLUENCE_LABELS = {
    "influence": "influence",
    "from_chosen": "by its chosen response",
    "from_rejected": "by its rejected response",
}
LENGTHS = {"chosen_tokens": "chosen tokens", "rejected_tokens": "rejected tokens"}
FORECAST_LIMITS = (
    "A forecast takes every gradient at the start. Ranks hold better than sizes, which are overstated at high learning "
    "rates; on training pairs the mean of the first order can have the wrong sign after fine-tuning (--order 2).",
    "A pilot (--pilot N) measures the first updates: for ranks of held-out pairs it was as good here.",
)
INFLUENCE_LIMITS = (
    "Influence is first order and of these probes: what is not among them is not protected. A filter gains less than "
    "the influences promise, since most pairs push down and an optimiser that normalises gives the others' updates the "
    "same length (experiments/README.md). Compare with as many pairs at random and by length.",
)


def forecast_page(run_dir: Path) -> Page:
    """The page of a directory of ``ches forecast``.

    Raises:
      RunError: its table cannot be read, or has no rows.
    """
    table, record = _read(run_dir / FORECAST), read_record(run_dir)
    summary: Mapping[str, Any] = record.get("summary") or {}
    sets = np.array(table["set"].to_pylist(), dtype=object)
    which = "probe" if (sets == "probe").any() else "train"
    chosen = table["forecast_chosen"].to_numpy()
    of = chosen[sets == which]
    words = "lower" if of.mean() < 0 else "raise"
    pairs = _pairs(run_dir, table, record, FORECAST_LABELS, ("forecast_chosen", 1))
    histograms = {SETS[name]: chosen[sets == name] for name in SETS if (sets == name).any()}
    figures = [
        figure(
            "forecasts",
            "Forecast change of ln π(chosen)",
            svg.two_histograms(histograms, x="forecast, nats"),
            f"How the forecast changes of chosen responses are spread, {' and '.join(histograms)} pairs apart.",
        ),
        elements.scatter(
            "forecast_of_both",
            "Chosen and rejected",
            pairs,
            "forecast_rejected",
            "forecast_chosen",
            by="set",
            choose=True,
        ),
    ]
    return Page(
        kind="ches forecast",
        title=f"Forecast: {run_dir.name}",
        headline=f"This run would {words} the chosen responses of {of.size:,} {SETS[which]} pairs by "
        f"{readable(abs(float(of.mean())), 2)} nats in the mean; {float((of < 0).mean()):.0%} would fall",
        subtitle=_subtitle(record),
        tone="bad" if of.mean() < 0 else "good",
        answers=[
            ("Why?", escape(_sentence(summary.get("reason") or "not known for this loss"))),
            ("How sure?", escape(_sentence(summary.get("calibration") or "not measured"))),
            ("Which pairs?", f"Those that would fall most: {_links(pairs)}."),
            (
                "What next?",
                "<code>ches influence</code> with the same options says which training pairs do it; "
                "<code>ches train</code> makes the run.",
            ),
        ],
        notes=[_sentence(w) for w in summary.get("warnings") or ()],
        sections=[
            Section(anchor="forecast", heading="What would move", body=gallery(figures) + _set_table(summary)),
            Section(anchor="pairs", heading="All pairs", body=elements.table_body()),
            Section(anchor="limits", heading="What this does not show", body=paragraphs(*FORECAST_LIMITS), folded=True),
            provenance(record),
        ],
        pairs=pairs,
    )


def influence_page(run_dir: Path) -> Page:
    """The page of a directory of ``ches influence``.

    Raises:
      RunError: its table cannot be read, or has no rows.
    """
    table, record = _read(run_dir / INFLUENCE), read_record(run_dir)
    values = table["influence"].to_numpy()
    down, total = float((values > 0).mean()), float(values.sum())
    probes = (record.get("counts") or {}).get("probes")
    concentration: Mapping[str, Any] = record.get("concentration") or {}
    shares = concentration.get("share_of_fall") or {}
    pairs = _pairs(run_dir, table, record, INFLUENCE_LABELS, ("influence", -1))
    select = f"ches select --scores {elements.quoted(run_dir)} --keep lowest:0.75 --out kept"
    held = [[part, readable(100 * share, 0) + " %"] for part, share in shares.items() if share is not None]
    figures = [
        figure(
            "influences",
            "Influence of the training pairs",
            svg.histogram(values, x="nats by which a pair lowers the probes' chosen"),
            f"How the influences of {values.size:,} pairs are spread; {down:.0%} are above 0.",
            "Right of 0: training on the pair lowers the mean ln π(chosen) of the probes.",
        ),
        elements.scatter(
            "influence_by_side",
            "By its two responses",
            pairs,
            "from_rejected",
            "from_chosen",
            choose=True,
        ),
    ]
    sum_of_all = f"lower them by {readable(total, 2)} nats" if total > 0 else "do not lower them"
    return Page(
        kind="ches influence",
        title=f"Influence: {run_dir.name}",
        headline=f"{down:.0%} of {values.size:,} training pairs push the probes' chosen responses down; all together "
        f"they {sum_of_all}",
        subtitle=_subtitle(record, f"{probes:,} probes" if probes else ""),
        tone="bad" if total > 0 else "good",
        answers=[
            ("Which pairs?", f"Those that push most: {_links(pairs)}."),
            (
                "A few, or all?",
                escape(
                    "Of the forecast fall "
                    + ", ".join(f"the worst {part} of the pairs hold {share}" for part, share in held)
                    + ". The more even, the less can leaving some out do."
                )
                if held
                else "No pair pushes down.",
            ),
            ("What next?", f"Leave the worst out, beside a control of as many at random:{command(select)}"),
        ],
        notes=[_sentence(w) for w in record.get("warnings") or ()],
        sections=[
            Section(anchor="influence", heading="What pushes", body=gallery(figures)),
            Section(anchor="pairs", heading="All pairs", body=elements.table_body()),
            Section(
                anchor="limits", heading="What this does not show", body=paragraphs(*INFLUENCE_LIMITS), folded=True
            ),
            provenance(record),
        ],
        pairs=pairs,
    )


def _read(path: Path) -> pa.Table:
    table = read_parquet(path, RunError, "a table of ches forecast or ches influence")
    if not len(table):
        raise RunError(f"{path}: has no rows; there is nothing to report")
    return table


def _sentence(text: str) -> str:
    text = text.rstrip(".") + "."
    return text[:1].upper() + text[1:]


def _subtitle(record: Mapping[str, Any], *more: str) -> str:
    config = record.get("config") or {}
    run = f"{config.get('loss', '')}, {config.get('optimizer', '')} at {config.get('lr', '')}"
    return elements.subtitle(model_name(record), short_path(config.get("pairs")), run, *more)


def _links(pairs: PairTable) -> str:
    return ", ".join(elements.row_link(pairs, int(p)) for p in pairs.leading_rows()[:3])


def _set_table(summary: Mapping[str, Any]) -> str:
    """Means of each set, forecast and pilot."""
    rows = []
    for name, one in (summary.get("sets") or {}).items():
        numbers = [one["forecast_chosen"], one["forecast_rejected"], one["forecast_margin"]]
        numbers += [one.get("pilot_chosen", float("nan")), one.get("pilot_rejected", float("nan"))]
        cells = [readable(v, 2, signed=True) for v in numbers]
        rows.append([SETS.get(name, name), f"{one['pairs']:,}", *cells, f"{one['chosen_falls']:.0%}"])
    head = ["pairs", "count", "chosen", "rejected", "margin", "pilot, chosen", "pilot, rejected", "chosen falls in"]
    return data_table(head, rows, caption="Mean forecasts, nats") if rows else ""


def _pairs(
    run_dir: Path, table: pa.Table, record: Mapping[str, Any], labels: Mapping[str, str], sort: tuple[str, int]
) -> PairTable:
    names = table.column_names
    several = "set" in names and len(set(table["set"].to_pylist())) > 1
    columns = [
        Column(
            name="index", label="row", values=table["index"].to_numpy(), down=False, meaning="row of the data, from 0"
        )
    ]
    if "set" in names:
        words = [SETS.get(s, s) for s in table["set"].to_pylist()]
        columns.append(Column(name="set", label="set", values=words, kind="word", shown=several))
    for name, label in labels.items():
        if name in names and table[name].null_count < len(table):
            values = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)
            columns.append(
                elements.number_column(
                    name, label, values, minor=name != sort[0], down=sort[1] < 0, shown=not name.startswith("logp")
                )
            )
    for name, label in LENGTHS.items():
        if name in names:
            columns.append(Column(name=name, label=label, values=table[name].to_numpy(), unit="tokens", minor=True))
    if "category" in names and any(table["category"].to_pylist()):
        values = [v or "" for v in table["category"].to_pylist()]
        columns.append(Column(name="category", label="category", values=values, kind="word", minor=True))
    texts = _texts(table, record.get("config") or {})
    return PairTable(
        name=f"{run_dir.name}_pairs",
        rows=len(table),
        columns=columns,
        key=["set", "index"] if several else ["index"],
        sort=sort,
        texts=texts,
        row_ids=table["row_id"].to_pylist(),
        show=elements.show_command(run_dir),
        show_key="" if several else "index",
    )


def _texts(table: pa.Table, config: Mapping[str, Any]) -> dict[str, Sequence[str]]:
    """The texts of the pairs and of the probes, as far as their files can still be read."""
    found = dict(read_texts(config))
    if config.get("probes"):
        found |= read_texts({**config, "pairs": config["probes"], "limit": None})
    rows = table["row_id"].to_pylist()
    if not any(row in found for row in rows):
        return {}
    return {side: [found.get(row, {}).get(side, "") for row in rows] for side in SIDES}
