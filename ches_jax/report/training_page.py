"""The page of a training run: how far its pairs moved, which way, and the verdict."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ches_jax.displacement.changes import FILE_NAME, PARTS, REGIMES
from ches_jax.displacement.readers.training_run import read_run
from ches_jax.displacement.verdict import Diagnosis, diagnose_changes
from ches_jax.errors import ChesError, RunError
from ches_jax.report.figures import BLUE, INK, ORANGE, PALETTE, panels, png
from ches_jax.report.html import data_table, gallery, page, paragraphs, picture
from ches_jax.report.sections import flat
from ches_jax.report.summary import number
from ches_jax.runs.files import replacing
from ches_jax.scores.table import FILE_NAME as SCORES

if TYPE_CHECKING:
    import pyarrow as pa

SHOWN = 20
"""Pairs whose chosen responses fell most."""
SETS = {"held_out": "held-out pairs", "train": "training pairs"}
READING = (
    "A run of preference optimisation is displaced when the log-probabilities of its chosen responses fall while the "
    "loss falls: the mass goes to responses that nobody chose. The changes below are since update 0, summed over the "
    "tokens of a response, in nats.",
    "Regimes of a pair: wanted (chosen up, rejected down), both_up and both_down_margin_up (both moved the same way "
    "and the margin grew), inverted (the margin fell), flat (neither moved by more than the tolerance).",
)
LIMITS = (
    "That chosen responses fell is not yet harm: whether the mass went to unwanted responses takes generated texts or "
    "probe responses, and whether quality fell takes a judge. Training pairs move more than held-out ones.",
)


def is_training_run(folder: Path) -> bool:
    """Whether a directory holds a displacement log (and no score table)."""
    return not (folder / SCORES).exists() and ((folder / FILE_NAME).exists() or (folder / PARTS).is_dir())


def training_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes ``report.html`` and ``figures/*.png`` for a run of ``ches train``, finished or not.

    Raises:
      RunError: the displacement log has no pairs.
    """
    table = _read_log(run_dir)
    if not len(table):
        raise RunError(f"{run_dir}: the displacement log has no pairs; there is nothing to report")
    out = run_dir if out is None else out
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    log = {name: table[name].to_numpy() for name in ("step", "dlogp_chosen", "dlogp_rejected", "margin", "index")}
    log |= {name: np.array(table[name].to_pylist()) for name in ("set", "regime", "row_id")}
    sets = [name for name in SETS if (log["set"] == name).any()]
    figures = {
        "changes": (_changes_figure(log, sets), _changes_in_words(log, sets),
                    "mean change of ln pi(chosen) and ln pi(rejected); shaded: the middle half of the pairs"),
        "regimes": (_regimes_figure(log, sets), _regimes_in_words(log, sets), "share of pairs in each regime"),
    }  # fmt: skip
    if losses := _losses(run_dir):
        words = ", ".join(f"{name} from {number(v[0][1])} to {number(v[-1][1])}" for name, v in losses.items())
        figures["loss"] = (_loss_figure(losses), f"The loss over the updates: {words}.", "loss")
    pictures = []
    for name, (image, alt, caption) in figures.items():
        (folder / f"{name}.png").write_bytes(image)
        pictures.append(picture(image, alt, caption, wide=name != "loss"))
    lead, verdict = _verdict_section(run_dir)
    body = [
        ("reading", "How to read this", paragraphs(*READING)),
        ("verdict", "Verdict", verdict),
        ("course", "Over the updates", gallery(pictures)),
        ("pairs", "Chosen responses that fell most", _fallen_section(table, log, sets[0])),
        ("limits", "What this does not show", paragraphs(*LIMITS)),
        ("provenance", "Provenance", _provenance_section(run_dir)),
    ]
    text = page("Displacement in a training run", paragraphs(lead), [part for part in body if part[2]])
    with replacing(out / "report.html") as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return out / "report.html"


def _read_log(run_dir: Path) -> "pa.Table":
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = run_dir / FILE_NAME
    paths = [whole] if whole.exists() else sorted((run_dir / PARTS).glob("step-*.parquet"))
    if not paths:
        raise RunError(f"{run_dir}: no {FILE_NAME}; expected a directory of `ches train`")
    try:
        return pa.concat_tables([pq.read_table(path) for path in paths])
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{run_dir}: its displacement log cannot be read ({error})") from None


def _verdict_section(run_dir: Path) -> tuple[str, str]:
    """The line under the title, and the intervals behind it."""
    try:
        diagnosis = diagnose_changes(read_run(run_dir))
    except ChesError as error:
        return "No verdict.", paragraphs(str(error))
    rows = [[name, *_interval(diagnosis, name)] for name in diagnosis.directions]
    header = ["mean change, nats", "", "mean", "95% from", "to"]
    lead = f"Verdict: {diagnosis.verdict}, from {diagnosis.pairs} {diagnosis.unit} of {diagnosis.source}."
    return lead, data_table(header, rows, text_columns=2) + paragraphs(
        *(f"{question.capitalize()} {answer}." for question, answer in diagnosis.questions.items()),
        *(f"Note: {caveat}." for caveat in diagnosis.caveats),
    )


def _interval(diagnosis: Diagnosis, name: str) -> list[str]:
    interval = getattr(diagnosis, name)
    return [diagnosis.directions[name], *(f"{v:+.3f}" for v in (interval.mean, interval.low, interval.high))]


def _steps(log: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    return np.unique(log["step"][log["set"] == name])


def _at(log: Mapping[str, np.ndarray], name: str, step: int, column: str) -> np.ndarray:
    """The finite numbers of a column in one set at one evaluation."""
    values = log[column][(log["set"] == name) & (log["step"] == step)]
    return values[np.isfinite(values)]


def _changes_figure(log: Mapping[str, np.ndarray], sets: Sequence[str]) -> bytes:
    figure, axes = panels(1, len(sets), (3.6, 2.8), sharey=True)
    for ax, name in zip(axes, sets, strict=True):
        ax.axhline(0, color=INK, linewidth=0.6)
        for side, colour in (("chosen", BLUE), ("rejected", ORANGE)):
            by_step = [(s, _at(log, name, s, f"dlogp_{side}")) for s in _steps(log, name)]
            by_step = [(s, values) for s, values in by_step if values.size]
            if by_step:
                steps = [s for s, _ in by_step]
                low, high = zip(*(np.quantile(values, [0.25, 0.75]) for _, values in by_step), strict=True)
                ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
                ax.plot(steps, [v.mean() for _, v in by_step], color=colour, marker="o", markersize=3, label=side)
        ax.set(xlabel="update", ylabel="change, nats")
        ax.set_title(SETS[name], fontsize=9)
        ax.legend(frameon=False, fontsize=8)
    return png(figure)


def _changes_in_words(log: Mapping[str, np.ndarray], sets: Sequence[str]) -> str:
    parts = []
    for name in sets:
        last = int(_steps(log, name)[-1])
        means = [
            f"{side} {values.mean():+.3f}"
            for side in ("chosen", "rejected")
            if (values := _at(log, name, last, f"dlogp_{side}")).size
        ]
        parts.append(f"{SETS[name]} at update {last}: {', '.join(means)} nats")
    return f"Mean change of log-probabilities over the updates; {'; '.join(parts)}."


def _shares(log: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """Share of each regime at each evaluation, [evaluations, regimes]; zeros where no pair has one."""
    rows = []
    for step in _steps(log, name):
        regimes = log["regime"][(log["set"] == name) & (log["step"] == step)]
        counts = np.array([(regimes == regime).sum() for regime in REGIMES], float)
        rows.append(counts / max(counts.sum(), 1))
    return np.array(rows)


def _regimes_figure(log: Mapping[str, np.ndarray], sets: Sequence[str]) -> bytes:
    figure, axes = panels(1, len(sets), (3.6, 2.8), sharey=True)
    for ax, name in zip(axes, sets, strict=True):
        steps, shares = _steps(log, name), _shares(log, name)
        bottom = np.zeros(len(steps))
        for k, regime in enumerate(REGIMES):
            ax.bar(range(len(steps)), shares[:, k], bottom=bottom, color=PALETTE[k], width=0.9, label=regime)
            bottom += shares[:, k]
        shown = range(0, len(steps), max(1, len(steps) // 6))
        ax.set_xticks([*shown], [str(steps[i]) for i in shown])
        ax.set(xlabel="update", ylabel="share of pairs", ylim=(0, 1))
        ax.set_title(SETS[name], fontsize=9)
    axes[-1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return png(figure)


def _regimes_in_words(log: Mapping[str, np.ndarray], sets: Sequence[str]) -> str:
    parts = [
        f"{SETS[name]}: {', '.join(f'{r} {s:.0%}' for r, s in zip(REGIMES, _shares(log, name)[-1], strict=True))}"
        for name in sets
    ]
    return f"Share of pairs in each regime over the updates; at the last, {'; '.join(parts)}."


def _losses(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """(update, value) of the training and the held-out loss, from ``metrics.jsonl`` as far as it is written."""
    path = run_dir / "metrics.jsonl"
    losses: dict[str, list[tuple[int, float]]] = {}
    if not path.exists():
        return losses
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a run that was killed
            continue
        for name in ("loss", "eval_loss"):
            if isinstance(entry.get(name), int | float):
                losses.setdefault(name, []).append((entry["step"], float(entry[name])))
    return losses


def _loss_figure(losses: Mapping[str, Sequence[tuple[int, float]]]) -> bytes:
    figure, (axes,) = panels(1, 1, (3.6, 2.8))
    names = {"loss": ("training", BLUE), "eval_loss": ("held-out", ORANGE)}
    for name, values in losses.items():
        label, colour = names[name]
        axes.plot(*zip(*values, strict=True), color=colour, label=label, linewidth=1.2)
    axes.set(xlabel="update", ylabel="loss")
    axes.legend(frameon=False, fontsize=8)
    return png(figure)


def _fallen_section(table: "pa.Table", log: Mapping[str, np.ndarray], name: str) -> str:
    last = _steps(log, name)[-1]
    positions = np.flatnonzero((log["set"] == name) & (log["step"] == last) & (log["dlogp_chosen"] < 0))
    positions = positions[np.argsort(log["dlogp_chosen"][positions], kind="stable")][:SHOWN]
    if not positions.size:
        return paragraphs(f"None of the {SETS[name]} lost probability of its chosen response at update {last}.")
    columns = ("dlogp_chosen", "dlogp_rejected", "margin")
    rows = [
        [row["regime"], row["row_id"][:12], row["index"], *(_signed(row[c]) for c in columns), row["chosen_tokens"],
         row["rejected_tokens"]]
        for row in table.take(positions).to_pylist()
    ]  # fmt: skip
    header = ["regime", "row_id", "row", "chosen, nats", "rejected", "margin", "chosen tokens", "rejected tokens"]
    words = f"Of the {SETS[name]} at update {last}, the largest falls first."
    return paragraphs(words) + data_table(header, rows, text_columns=2)


def _signed(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:+.3f}"


def _provenance_section(run_dir: Path) -> str:
    path = run_dir / "run.json"
    try:
        run: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return data_table(["what", "value"], flat(run)[:200], text_columns=2)
