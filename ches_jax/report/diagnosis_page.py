"""The page of a diagnosis: the answer, its course, the pairs, and whether it was harm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.errors import RunError
from ches_jax.report import answers, elements, essays, svg
from ches_jax.report import change_sections as parts
from ches_jax.report.answers import Diagnoses, set_name
from ches_jax.report.axes import nats
from ches_jax.report.change_sections import Moved
from ches_jax.report.document import Page, Section
from ches_jax.report.html import figure, gallery, paragraphs
from ches_jax.report.provenance import provenance, read_record
from ches_jax.report.texts import SIDES
from ches_jax.runs.files import read_object, read_parquet
from ches_jax.runs.shapes import require_shape

ANSWER, PAIRS = "diagnosis.json", "pairs.parquet"
_COLUMNS = pa.schema([pa.field("dlogp_chosen", pa.float64()), pa.field("dlogp_rejected", pa.float64())])
_TEXTS = [pa.field(name, pa.string()) for name in ("set", "row_id", "regime", "category", *SIDES)]
_MORE = pa.schema([*_TEXTS, pa.field("index", pa.int64()), pa.field("flags", pa.list_(pa.string()))])
_INTERVAL = dict.fromkeys(("mean", "low", "high"), (float, None))
_SHAPE = {
    "verdict": str, "unit": str, "pairs": int, "source?": str, "set?": str, "criterion?": {"tolerance?": float},
    "chosen": _INTERVAL, "rejected": _INTERVAL, "margin": _INTERVAL, "displacement/lld_rate?": float,
    "harm?": {"answer": str, "criteria?": [{"name": str, "outcome": str, "evidence": str}]},
    "advice?": [{"do": str, "because": str, "price": str}], "caveats?": [str],
    "curve?": {"steps": [float], "chosen": [float], "rejected": [float]},
}  # fmt: skip
"""Of one set; the answer holds that of another beside it."""
_KNOWN = {"row_id", "index", "set", "regime", "dlogp_chosen", "dlogp_rejected", "dmargin", *SIDES, "flags", "category"}


def diagnosis_page(run_dir: Path) -> Page:
    """The page of what ``ches diagnose --out`` wrote.

    Raises:
      RunError: its files cannot be read.
    """
    path = run_dir / ANSWER
    answer = read_object(path, RunError, "a directory of ches diagnose --out")
    require_shape(path, answer, {**_SHAPE, "beside?": _SHAPE}, RunError)
    diagnoses: Diagnoses = {answer.get("set") or "held_out": answer}
    if answer.get("beside"):
        diagnoses = {**diagnoses, answer["beside"].get("set") or "train": answer["beside"]}
    moved = _pairs(run_dir / PAIRS, float((answer.get("criterion") or {}).get("tolerance") or 0.05))
    return _page(run_dir, answer, diagnoses, moved)


def _page(run_dir: Path, answer: Mapping[str, Any], diagnoses: Diagnoses, moved: Moved | None) -> Page:
    record = read_record(run_dir)
    pairs = None if moved is None else parts.pair_table(moved, f"{run_dir.name}_pairs", elements.show_command(run_dir))
    links = [] if moved is None or pairs is None else parts.worst_links(moved, pairs)
    figures = [_curve(diagnoses), *(_margin(name, a) for name, a in answers.answers_of(diagnoses))]
    if moved is not None and pairs is not None:
        figures.insert(1, parts.pair_scatter(moved, pairs))
    body = [Section(anchor="course", heading="What moved", body=gallery(figures))]
    if moved is not None and pairs is not None:
        body.append(Section(anchor="pairs", heading="All pairs", body=elements.table_body()))
    body.append(
        Section(anchor="harm", heading="Where the mass went, and was it harm", body=answers.harm_section(diagnoses))
    )
    if moved is not None and pairs is not None:
        against = "What was known before, against what happened"
        body.append(Section(anchor="against", heading=against, body=parts.score_section(moved, pairs)))
        body.append(Section(anchor="health", heading="Data health", body=parts.health_section(moved, {})))
    shown = {k: v for k, v in answer.items() if k not in ("worst", "curve", "beside", "advice")}
    limits = paragraphs(*essays.CHANGE_LIMITS)
    body += [
        Section(anchor="reading", heading="How to read this", body=paragraphs(*essays.CHANGE_READING), folded=True),
        Section(anchor="limits", heading="What this does not show", body=limits, folded=True),
        provenance(record, shown),
    ]
    caveats = [str(c) for c in answer.get("caveats") or ()]
    text, tone = answers.headline(diagnoses)
    return Page(
        kind="ches diagnose",
        title=f"{text}: {run_dir.name}",
        headline=text,
        subtitle=elements.subtitle(str(answer.get("source") or ""), str(run_dir)),
        answers=[
            ("Did chosen fall?", answers.did_chosen_fall(diagnoses)),
            ("A bug?", _bug_words(answer)),
            ("Harm?", answers.harm(diagnoses, answers.commands("MODEL"))),
            ("What to do?", answers.advice(diagnoses, links)),
        ],
        tone=tone,
        notes=[caveat[:1].upper() + caveat[1:] + "." for caveat in caveats],
        sections=[s for s in body if s.body],
        pairs=pairs,
    )


def _bug_words(answer: Mapping[str, Any]) -> str:
    if answer["verdict"] == "chosen_down":
        return "Perhaps: the margin did not rise, so the loss did not fall. Look at the data: <code>ches doctor</code>."
    return "No sign of one in these numbers; the data are examined by <code>ches doctor</code>."


def _pairs(path: Path, tolerance: float) -> Moved | None:
    """The pairs of the diagnosis; None for one of a log, which has means of batches."""
    if not path.is_file():
        return None
    table = read_parquet(path, RunError, "the pairs of `ches diagnose --out`", _COLUMNS, _MORE)
    if not len(table):
        return None
    names = table.column_names
    numbers = {
        n: _numbers(table, n)
        for n in names
        if n not in _KNOWN and (pa.types.is_floating(table[n].type) or pa.types.is_integer(table[n].type))
    }
    texts = {s: [text or "" for text in table[s].to_pylist()] for s in SIDES if s in names}
    words = {
        n: [", ".join(v) if isinstance(v, list) else v or "" for v in table[n].to_pylist()]
        for n in ("category", "flags")
        if n in names
    }
    return Moved(
        sets=np.array([s or "train" for s in table["set"].to_pylist()], str)
        if "set" in names
        else np.array(["train"] * len(table)),
        row_ids=[i or "" for i in table["row_id"].to_pylist()] if "row_id" in names else [""] * len(table),
        index=_index(table),
        chosen=_numbers(table, "dlogp_chosen"),
        rejected=_numbers(table, "dlogp_rejected"),
        numbers=numbers,
        words=words,
        texts=texts if len(texts) == len(SIDES) else {},
        tolerance=tolerance,
    )


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return table[name].cast(pa.float64(), safe=False).to_numpy()  # what a float64 rounds of a large integer


def _index(table: pa.Table) -> np.ndarray:
    if "index" not in table.column_names or table["index"].null_count:
        return np.arange(len(table))
    return table["index"].to_numpy()


def _curve(diagnoses: Diagnoses) -> str:
    """The course of a log or a run, where the answer has one."""
    series = []
    for name, answer in answers.answers_of(diagnoses):
        curve = answer.get("curve")
        if not curve or len(curve["steps"]) < 2:
            continue
        steps = np.array(curve["steps"], float)
        held_out, alone = name == "held_out", len(answers.answers_of(diagnoses)) == 1
        for side, colour in (("chosen", 0), ("rejected", 1)):
            line = svg.Series(
                name=f"{side}, {set_name(name)}",
                x=steps,
                y=np.array(curve[side], float),
                colour=colour,
                dashed=colour == 1,
                marks=held_out,
                faint=not held_out and not alone,
            )
            series.append(line)
    if not series:
        return ""
    ends = "; ".join(f"{s.name} {nats(float(s.y[-1]))} at step {int(s.x[-1])}" for s in series)
    return figure(
        "course_of_changes",
        "Change of ln π over the run, nats",
        svg.lines(series, x="step", y="change, nats", zero=True),
        f"Mean change of log-probabilities over the steps, in nats; {ends}.",
        f"{ends}.",
    )


def _margin(name: str, answer: Mapping[str, Any]) -> str:
    """What the change of the margin is made of, at the end."""
    chosen, rejected = answer["chosen"].get("mean"), answer["rejected"].get("mean")
    if chosen is None or rejected is None:
        return ""
    return parts.margin_bar(name, chosen, rejected)
