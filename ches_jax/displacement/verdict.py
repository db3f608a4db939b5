r"""The verdict on a run: did its chosen responses fall, and how sure is that?

A pair has a regime (:mod:`ches_jax.displacement.changes`); a run has a verdict. The verdict follows from the mean
changes over pairs, each with a bootstrap interval [low, high], and a tolerance eps:

    up            low > eps
    down          high < -eps
    level         -eps <= low, high <= eps
    undecided     the interval does not tell

    displaced       the chosen responses are down: likelihood displacement
    not_displaced   they are not: low >= -eps
    undecided       the interval holds falls beyond -eps and others; or there are too few records for an interval

What the rejected responses and the margin did is said beside the verdict, in the same four words: displacement is
defined under a falling loss, so a run that is displaced while its margin fell too has another trouble first.

Three questions are kept apart: did the chosen responses fall, did the mass go to unwanted ones, did quality fall.
Log-probabilities of pairs answer the first; only all three together are harm.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from ches_jax.displacement.changes import SUMMARY, TOLERANCE, Direction, direction, displacement_summary
from ches_jax.errors import ChesError
from ches_jax.stats import LEVEL, bootstrap

VERDICTS = ("displaced", "not_displaced", "undecided")
RESAMPLES = 2000
FEWEST = 8
"""Records below which a bootstrap interval says little (at 8 it covers 89 % where it says 95 %): no verdict."""
FEW = 30
"""Pairs below which the intervals are called rough."""
FORMER = {"both_down_margin_up": "displaced", "wanted": "not_displaced", "both_up": "not_displaced",
          "flat": "not_displaced", "inverted": "margin<0"}  # fmt: skip
"""Verdicts on a run until 0.1, and what says the same now."""


@dataclass(frozen=True)
class Changes:
    """Changes of log-probabilities since the first model, in nats."""

    chosen: np.ndarray
    """Of each chosen response, [pairs]."""
    rejected: np.ndarray
    source: str
    """Where they come from, for the reader."""
    caveats: tuple[str, ...] = ()
    records: np.ndarray | None = None
    """The record of the data that each pair comes from, [pairs]: pairs of one record share responses, so they are
    resampled together. Default: each pair has its own."""
    unit: str = "pairs"
    """What is counted: ``logged steps`` for a training log, which has means of batches."""


@dataclass(frozen=True)
class Interval:
    """A mean over pairs and its bootstrap interval, nats."""

    mean: float
    low: float
    high: float

    def direction(self, tolerance: float) -> Direction:
        """``up``, ``down``, ``level`` or ``undecided``.

        >>> Interval(-0.35, -1.06, 0.41).direction(0.05)
        'undecided'
        """
        return direction(self.low, self.high, tolerance)

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Diagnosis:
    """The verdict and what it rests on."""

    verdict: str
    """One of ``VERDICTS``."""
    pairs: int
    records: int
    """Of the data, from which the pairs come: fewer than pairs where one record has several responses."""
    unit: str
    source: str
    chosen: Interval
    rejected: Interval
    margin: Interval
    summary: dict[str, float]
    """:func:`ches_jax.displacement.changes.displacement_summary` of the pairs."""
    tolerance: float
    caveats: tuple[str, ...]

    @property
    def directions(self) -> dict[str, Direction]:
        """What chosen, rejected and margin did; all ``undecided`` where there are too few records."""
        intervals = {"chosen": self.chosen, "rejected": self.rejected, "margin": self.margin}
        if self.records < FEWEST:
            return dict.fromkeys(intervals, "undecided")
        return {name: interval.direction(self.tolerance) for name, interval in intervals.items()}

    @property
    def questions(self) -> dict[str, str]:
        """The three questions and what is known."""
        return {
            "did the chosen responses fall?": {"displaced": "yes", "not_displaced": "no"}.get(self.verdict, "unclear"),
            "did the mass go to unwanted responses?": "not measured (needs generated text or probe responses)",
            "did held-out quality fall?": "not measured (needs a judge)",
        }

    def text(self) -> str:
        """For a person: the verdict first, with its criterion."""
        s = {k.removeprefix("displacement/"): v for k, v in self.summary.items()}
        did = self.directions
        count = f"{self.pairs} {self.unit}"
        if self.records < self.pairs:
            count += f" of {self.records} records"
        rates = {"chosen fell": s["lld_rate"]} | {
            k.removesuffix("_rate"): v for k, v in s.items() if k.endswith("_rate") and k != "lld_rate"
        }
        lines = [
            f"verdict: {self.verdict} (mean changes with {LEVEL:.0%} bootstrap intervals, eps {self.tolerance:g} nats)",
            f"  {self.source}: {count}",
            f"  chosen    {self.chosen} nats: {did['chosen']}; median {s['dlogp_chosen_median']:+.3f}",
            f"  rejected  {self.rejected} nats: {did['rejected']}; median {s['dlogp_rejected_median']:+.3f}",
            f"  margin    {self.margin} nats: {did['margin']}",
            f"  {self.unit}: " + ", ".join(f"{k} {v:.0%}" for k, v in rates.items()),
        ]
        if "chosen_share" in s and not self.margin.low <= 0 <= self.margin.high:
            shares = f"{s['chosen_share']:+.0%} from chosen, {s['rejected_share']:+.0%} from rejected"
            lines.append(f"  margin change: {shares}")
        lines += [f"  {question} {answer}" for question, answer in self.questions.items()]
        lines += [f"  note: {caveat}" for caveat in self.caveats]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        did = self.directions
        return {
            "verdict": self.verdict,
            "pairs": self.pairs,
            "records": self.records,
            "unit": self.unit,
            "source": self.source,
            "criterion": {"tolerance": self.tolerance, "level": LEVEL, "resamples": RESAMPLES},
            **{name: {**vars(getattr(self, name)), "direction": did[name]} for name in did},
            **self.summary,
            "questions": self.questions,
            "caveats": list(self.caveats),
        }


def verdict(chosen: Interval, tolerance: float = TOLERANCE) -> str:
    """The verdict that the interval of the chosen responses gives.

    >>> verdict(Interval(-0.99, -1.01, -0.97)), verdict(Interval(0.1, -0.01, 0.3)), verdict(Interval(0.0, -1.0, 1.0))
    ('displaced', 'not_displaced', 'undecided')
    """
    if chosen.direction(tolerance) == "down":
        return "displaced"
    return "not_displaced" if chosen.low >= -tolerance else "undecided"


def diagnose_changes(changes: Changes, tolerance: float = TOLERANCE) -> Diagnosis:
    """The verdict on changes of log-probabilities, wherever they come from.

    Raises:
      ChesError: no pairs, or changes that are NaN or infinite.

    >>> rng = np.random.default_rng(0)
    >>> found = diagnose_changes(Changes(rng.normal(-3, 1, 100), rng.normal(-9, 1, 100), "an example"))
    >>> found.verdict, found.directions
    ('displaced', {'chosen': 'down', 'rejected': 'down', 'margin': 'up'})
    """
    pairs = len(changes.chosen)
    if not pairs:
        raise ChesError(f"{changes.source}: no pairs")
    bad = ~(np.isfinite(changes.chosen) & np.isfinite(changes.rejected))
    if bad.any():
        raise ChesError(
            f"{changes.source}: {bad.sum()} of {pairs} pairs have log-probabilities that are NaN or infinite; "
            "leave those pairs out"
        )
    chosen, rejected, margin = mean_intervals(
        np.stack([changes.chosen, changes.rejected, changes.chosen - changes.rejected]), changes.records
    )
    records = pairs if changes.records is None else len(np.unique(changes.records))
    word = verdict(chosen, tolerance) if records >= FEWEST else "undecided"
    caveats = changes.caveats
    if records < FEWEST:
        what = changes.unit if changes.records is None else "records"
        caveats = (*caveats, f"{records} {what} are too few for an interval (at least {FEWEST}): no verdict")
    elif records < FEW:
        caveats = (*caveats, f"{records} {changes.unit} are few: intervals are rough")
    if word == "displaced" and margin.low <= tolerance:
        caveats = (*caveats, "the margin did not clearly rise: displacement is defined while the loss falls")
    return Diagnosis(
        verdict=word,
        pairs=pairs,
        records=records,
        unit=changes.unit,
        source=changes.source,
        chosen=chosen,
        rejected=rejected,
        margin=margin,
        summary=displacement_summary(changes.chosen, changes.rejected, tolerance),
        tolerance=tolerance,
        caveats=caveats,
    )


def mean_intervals(values: np.ndarray, records: np.ndarray | None = None, seed: int = 0) -> list[Interval]:
    """Mean of each row of [quantities, pairs] with its percentile interval; pairs of one record are drawn together."""
    low, high = bootstrap(
        lambda pairs: values[:, pairs].mean(1), values.shape[1], draws=RESAMPLES, seed=seed, clusters=records
    )
    return [Interval(float(v.mean()), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]


def rule_holds(diagnosis: Diagnosis, rule: str | None) -> bool:
    """Whether a rule of ``--fail-if`` holds: ``lld_rate>0.2``, ``margin<=1e-3``, or a verdict such as ``displaced``.

    A number that is not defined (a share of a margin that did not move) counts as beyond its bound, so that a gate
    does not open on it.

    Raises:
      ChesError: a rule that cannot be read, or a name that no diagnosis has.
    """
    if rule is None:
        return False
    text = rule.strip()
    if text in VERDICTS:
        return diagnosis.verdict == text
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    parts = re.fullmatch(rf"(\w+)\s*([<>]=?)\s*({number})", text)
    name = parts[1] if parts else text
    if parts is None or name not in SUMMARY:
        raise ChesError(_not_a_rule(rule, name))
    value: float = _short(diagnosis.summary).get(name, float("nan"))
    bound = float(parts[3])
    beyond = {">": value > bound, ">=": value >= bound, "<": value < bound, "<=": value <= bound}
    return bool(np.isnan(value)) or beyond[parts[2]]


def _short(summary: Mapping[str, float]) -> dict[str, float]:
    return {k.removeprefix("displacement/"): v for k, v in summary.items()}


def _not_a_rule(rule: str, name: str) -> str:
    message = (
        f"--fail-if {rule!r}: expected NAME>NUMBER (or >=, <, <=) with one of {', '.join(SUMMARY)}; "
        f"or a verdict: {', '.join(VERDICTS)}"
    )
    if name in FORMER:
        rate = f", {name}_rate>0.5 asks for more than half of the pairs"
        return f"{message}. {name!r} is no verdict on a run any more: {FORMER[name]} is the nearest{rate}"
    near = get_close_matches(name, [*SUMMARY, *VERDICTS], n=1)
    return f"{message}. Did you mean {near[0]}?" if near and near[0] != name else message
