"""What moved: the figures and the table of pairs that pages of changes share (a training run, a diagnosis)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ches_jax.displacement.changes import REGIMES, regimes
from ches_jax.report import elements, svg
from ches_jax.report.answers import SETS, set_name
from ches_jax.report.axes import nats, percent, readable
from ches_jax.report.html import data_table, figure, gallery, paragraphs
from ches_jax.report.pair_table import Column, PairTable
from ches_jax.report.score_page import SIGNED, label
from ches_jax.report.summary import correlation
from ches_jax.scores.leading import leading_score
from ches_jax.stats import spearman

REGIME_WORDS = {
    "wanted": "wanted: chosen up, rejected down",
    "both_up": "both up, margin up",
    "both_down_margin_up": "both down, margin up",
    "inverted": "inverted: margin down",
    "together": "together: both moved, margin did not",
    "flat": "flat: neither moved",
    "": "single response",
}


@dataclass(frozen=True, kw_only=True)
class Moved:
    """Pairs with the changes of their log-probabilities, nats, [pairs] each."""

    sets: np.ndarray
    """Words of ``SETS``."""
    row_ids: Sequence[str]
    index: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    """More numbers: lengths, log-probabilities, scores of the first model."""
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Categories, flags."""
    texts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tolerance: float = 0.05

    @property
    def regimes(self) -> np.ndarray:
        """The regime of each pair."""
        return regimes(self.chosen, self.rejected, self.tolerance)

    @property
    def present(self) -> list[str]:
        """The sets that are there, held-out pairs first."""
        there = set(self.sets.tolist())
        return [name for name in SETS if name in there] + sorted(there - set(SETS))


@dataclass(frozen=True, kw_only=True)
class Course:
    """Means over the pairs of one set at its evaluations, [evaluations] each, nats."""

    set: str
    steps: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    logp_chosen: np.ndarray
    logp_rejected: np.ndarray
    middle: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """By side: lower and upper quartile of the change."""
    shares: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By regime: the share of pairs."""


def pair_table(moved: Moved, name: str, show: str = "") -> PairTable:
    """All pairs, the largest falls of the chosen response first."""
    margin = moved.chosen - moved.rejected
    scores = {n: v for n, v in moved.numbers.items() if not n.endswith("tokens") and not n.startswith("logp")}
    leading = leading_score(list(scores))
    columns = [
        Column(name="index", label="row", values=moved.index, down=False, meaning="row of the data, from 0"),
        Column(name="set", label="set", values=[set_name(s) for s in moved.sets], kind="word"),
        elements.number_column(
            "chosen_change",
            "Δ chosen",
            moved.chosen,
            down=False,
            meaning="change of ln π(chosen) since the first model, nats",
        ),
        elements.number_column(
            "rejected_change",
            "Δ rejected",
            moved.rejected,
            minor=True,
            down=False,
            meaning="change of ln π(rejected) since the first model, nats",
        ),
        elements.number_column(
            "margin_change", "Δ margin", margin, minor=True, down=False, meaning="Δ chosen minus Δ rejected, nats"
        ),
        Column(
            name="regime",
            label="regime",
            values=[REGIME_WORDS[r].split(":")[0] for r in moved.regimes],
            kind="word",
            minor=True,
        ),
    ]
    if "chosen_tokens" in moved.numbers:
        with np.errstate(divide="ignore", invalid="ignore"):
            per_token = np.where(
                moved.numbers["chosen_tokens"] > 0, moved.chosen / moved.numbers["chosen_tokens"], np.nan
            )
        columns.append(
            elements.number_column("chosen_per_token", "Δ chosen per token", per_token, shown=False, down=False)
        )
    for n, values in moved.numbers.items():
        shown = leading is not None and n == leading.name
        unit = "nats" if n.startswith(("logp", "forecast")) else "tokens" if n.endswith("tokens") else ""
        columns.append(
            Column(name=n, label=label(n), values=values, unit=unit, shown=shown, minor=True, signed=n in SIGNED)
        )
    for n, words in moved.words.items():
        if any(words):
            columns.append(Column(name=n, label=n, values=words, kind="word", minor=True, shown=n == "category"))
    keys = ["set", "index"] if len(moved.present) > 1 else ["index"]
    return PairTable(
        name=name,
        rows=len(moved.index),
        columns=columns,
        key=keys,
        sort=("chosen_change", 1),
        texts=moved.texts,
        row_ids=moved.row_ids,
        show=show,
        show_key="index" if keys == ["index"] else "",
    )


def pair_scatter(moved: Moved, pairs: PairTable) -> str:
    """Both changes of each pair, the regimes named."""
    parts = []
    for name in moved.present:
        inside = moved.sets == name
        fell = (moved.chosen[inside] < -moved.tolerance).mean()
        parts.append(f"{set_name(name)}: {int(inside.sum()):,} pairs, chosen fell in {percent(float(fell))}")
    return elements.scatter(
        "changes_of_pairs",
        "Each pair: how far both responses moved",
        pairs,
        "chosen_change",
        "rejected_change",
        by="set" if len(moved.present) > 1 else "",
        regimes=True,
        alt=f"Change of ln π(rejected) against change of ln π(chosen), each pair a point; {'; '.join(parts)}.",
        caption="Left half (shaded): chosen fell. Below the dashed diagonal: the margin grew.",
    )


def course_figures(courses: Sequence[Course], first: str = "update") -> tuple[str, str]:
    """Log-probabilities over the steps: as change since the first model, and absolute."""
    change, absolute = [], []
    for c in courses:
        held_out = c.set == "held_out"
        for side, colour in (("chosen", 0), ("rejected", 1)):
            name = f"{side}, {set_name(c.set)}"
            common = {
                "colour": colour,
                "dashed": colour == 1,
                "marks": held_out or len(courses) == 1,
                "faint": not held_out and len(courses) > 1,
            }
            change.append(
                svg.Series(
                    name=name,
                    x=c.steps,
                    y=getattr(c, side),
                    band=c.middle.get(side) if held_out or len(courses) == 1 else None,
                    **common,
                )
            )
            absolute.append(svg.Series(name=name, x=c.steps, y=getattr(c, f"logp_{side}"), **common))
    ends = "; ".join(
        f"{set_name(c.set)} at {first} {int(c.steps[-1])}: chosen {nats(float(c.chosen[-1]))}, "
        f"rejected {nats(float(c.rejected[-1]))}"
        for c in courses
        if len(c.steps)
    )
    shaded = "Shaded: the middle half of the pairs. " if any(c.middle for c in courses) else ""
    with_marks = "Lines with dots: held out; without: training. " if len(courses) > 1 else ""
    one = figure(
        "course_of_changes",
        "Change of ln π over the run, nats",
        svg.lines(change, x=first, y="change, nats", zero=True),
        f"Mean change of log-probabilities since the first model, in nats; {ends}.",
        f"{with_marks}{shaded}{ends}.",
    )
    two = figure(
        "course_of_log_probabilities",
        "ln π itself",
        svg.lines(absolute, x=first, y="ln π, nats"),
        f"Mean log-probability of the chosen and of the rejected responses over the run, in nats; {ends}.",
        "Means over the pairs, summed over the tokens of a response.",
    )
    return one, two


def margin_figure(course: Course, first: str = "update") -> str:
    """What the change of the margin is made of: what the chosen and what the rejected response brought."""
    parts = {"from chosen (Δ chosen)": course.chosen, "from rejected (− Δ rejected)": -course.rejected}
    later = course.steps > 0 if (course.steps > 0).any() else course.steps >= 0
    drawn = svg.stacked({n: v[later] for n, v in parts.items()}, course.steps[later].astype(int), x=first, y="nats")
    at = f"at {first} {int(course.steps[-1])} "
    return _margin(course.set, drawn, at, float(course.chosen[-1]), float(course.rejected[-1]))


def margin_bar(name: str, chosen: float, rejected: float) -> str:
    """The same at the end alone, from the two mean changes of a set."""
    parts = {"from chosen (Δ chosen)": np.array([chosen]), "from rejected (− Δ rejected)": np.array([-rejected])}
    return _margin(name, svg.stacked(parts, np.array(["end"]), x="", y="nats"), "", chosen, rejected)


def _margin(name: str, drawn: str, at: str, chosen: float, rejected: float) -> str:
    words = (
        f"{at}the margin changed by {nats(chosen - rejected)} nats: {nats(chosen)} from chosen, "
        f"{nats(-rejected)} from rejected"
    )
    return figure(
        f"margin_{name}",
        f"What the margin is made of, {set_name(name)}",
        drawn,
        f"Change of the margin in its two parts; {words}.",
        f"{words[0].upper()}{words[1:]}. A bar below zero works against the margin.",
    )


def worst_links(moved: Moved, pairs: PairTable, count: int = 3) -> list[str]:
    """Links to the pairs whose chosen response fell most, of the set that counts."""
    inside = np.flatnonzero((moved.sets == moved.present[0]) & (moved.chosen < 0))
    order = inside[np.argsort(moved.chosen[inside], kind="stable")][:count]
    return [elements.row_link(pairs, int(p)) for p in order]


def regime_figure(course: Course, first: str = "update") -> str:
    """Shares of the regimes over the run."""
    if not course.shares:
        return ""
    later = course.steps > 0 if (course.steps > 0).any() else course.steps >= 0
    words = "; ".join(f"{REGIME_WORDS[r].split(':')[0]} {percent(float(s[-1]))}" for r, s in course.shares.items())
    return figure(
        f"regimes_{course.set}",
        f"Regimes of pairs, {set_name(course.set)}",
        svg.stacked(
            {REGIME_WORDS[r].split(":")[0]: s[later] for r, s in course.shares.items()},
            course.steps[later].astype(int),
            x=first,
            y="share of pairs",
        ),
        f"Share of pairs in each regime over the run; at the end {words}.",
        f"At the end: {words}.",
    )


def score_section(moved: Moved, pairs: PairTable) -> str:
    """Scores of the first model and the lengths against the change of the chosen response."""
    numeric = [n for n in moved.numbers if not n.startswith("logp_a")]
    if not numeric:
        return ""
    counted = moved.sets == moved.present[0]
    rows = []
    for n in numeric:
        cells = [
            correlation(spearman(moved.numbers[n][moved.sets == s], moved.chosen[moved.sets == s]))
            for s in moved.present
        ]
        rows.append([label(n), *cells])
    leading = leading_score([n for n in numeric if np.isfinite(moved.numbers[n][counted]).any()])
    x = leading.name if leading is not None else "chosen_tokens" if "chosen_tokens" in numeric else numeric[0]
    drawn = elements.scatter(
        "scores_against_change",
        "A number known before against what happened",
        pairs,
        x,
        "chosen_change",
        by="set" if len(moved.present) > 1 else "",
        choose=True,
    )
    head = ["rank correlation with Δ chosen", *map(set_name, moved.present)]
    note = (
        "A score that tells which chosen responses fall has a strong correlation; its sign says which end is at risk."
    )
    return gallery([drawn, f"<div>{data_table(head, rows)}{paragraphs(note)}</div>"])


def health_section(moved: Moved, dropped: Mapping[str, int]) -> str:
    """Lengths, counts, what was dropped."""
    rows = [[set_name(s), f"{int((moved.sets == s).sum()):,}"] for s in moved.present]
    missing = int((~np.isfinite(moved.chosen) | ~np.isfinite(moved.rejected)).sum())
    rows += [["without a change of both responses", f"{missing:,}"], *([why, f"{n:,}"] for why, n in dropped.items())]
    parts = [f"<div>{data_table(['pairs', 'number'], rows)}</div>"]
    lengths = {
        n.removesuffix("_tokens"): v for n, v in moved.numbers.items() if n in ("chosen_tokens", "rejected_tokens")
    }
    if lengths:
        medians = ", ".join(f"{n} {readable(float(np.median(v)), 0)}" for n, v in lengths.items())
        parts.insert(
            0,
            figure(
                "lengths",
                "Lengths of the responses",
                svg.two_histograms(lengths, x="tokens"),
                f"Distributions of the lengths of responses; medians: {medians} tokens.",
                f"Medians: {medians} tokens.",
            ),
        )
    if moved.words.get("flags") and any(moved.words["flags"]):
        counts: dict[str, int] = {}
        for flag in moved.words["flags"]:
            if flag:
                counts[flag] = counts.get(flag, 0) + 1
        parts.append(f"<div>{data_table(['flag', 'pairs'], [[k, f'{n:,}'] for k, n in counts.items()])}</div>")
    return gallery(parts)


def regime_shares(names: np.ndarray) -> dict[str, float]:
    """The share of each regime among some pairs; single responses do not count.

    >>> regime_shares(np.array(["wanted", "flat", ""]))["wanted"]
    0.5
    """
    counted = max(1, int((names != "").sum()))
    return {r: float((names == r).sum() / counted) for r in REGIMES}
