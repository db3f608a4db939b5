r"""The verdict on a run: did its chosen responses fall while its loss fell, and how sure is that?

A pair has a regime (:mod:`ches_jax.displacement.changes`); a run has a verdict. It follows from the mean changes, each
with an interval [low, high] (:mod:`ches_jax.displacement.intervals`), and a tolerance eps:

    up            low > eps
    down          high < -eps
    level         -eps <= low, high <= eps
    undecided     the interval does not tell, or there are too few units for one

    displaced       chosen down, margin up: likelihood displacement
    chosen_down     chosen down, margin not up, or not surely: the loss did not fall; another trouble first
    not_displaced   chosen not down: low >= -eps
    undecided       the interval of chosen holds falls beyond -eps and others

Displacement is defined under a falling loss (Razin et al., Definition 1). A margin that rises is that condition as far
as pairs can tell it: -ln sigmoid is convex, so a DPO loss below ln 2 has a margin above 0 in the mean.

Three questions are kept apart: did the chosen responses fall, did the mass go to unwanted ones, did quality fall.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from ches_jax.displacement import TOLERANCE, intervals
from ches_jax.displacement.breakdown import Part
from ches_jax.displacement.calibration import Calibration
from ches_jax.displacement.changes import SUMMARY, Changes, Curve, Direction, displacement_summary
from ches_jax.displacement.evidence import HARM, UNMEASURED, Harm
from ches_jax.displacement.intervals import FEWEST, Interval
from ches_jax.displacement.on_policy import OnPolicy
from ches_jax.displacement.ranking import Ranking
from ches_jax.errors import ChesError
from ches_jax.stats import LEVEL

VERDICTS = ("displaced", "chosen_down", "not_displaced", "undecided")
FEW = 30
"""Pairs below which the intervals are called rough."""
NAMES = ("chosen", "rejected", "margin")
FORMER = {
    "both_down_margin_up": "displaced",
    "wanted": "not_displaced",
    "both_up": "not_displaced",
    "flat": "not_displaced",
    "inverted": "margin<0",
}
"""Verdicts on a run until 0.1, and what says the same now."""
METHODS = {
    "pairs": "bootstrap-t or Student's t, the wider, over records",
    "steps": "blocks of the last steps",
    "evaluations": "noise from evaluation to evaluation",
}


@dataclass(frozen=True)
class Diagnosis:
    """The verdict and what it rests on."""

    verdict: str
    """One of ``VERDICTS``."""
    pairs: int
    """Units: pairs, or steps or evaluations of a log."""
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
    scale: str = "nats"
    held_out: bool = False
    curve: Curve | None = None
    beside: "Diagnosis | None" = None
    """The training pairs beside the held-out ones."""
    harm: Harm = UNMEASURED
    parts: tuple[Part, ...] = ()
    """The changes by category and by length."""
    calibration: Calibration | None = None
    on_policy: OnPolicy | None = None
    """The split of a fall into the divergence and half the margin."""
    ranking: Ranking | None = None
    """Which pairs the models rank rightly."""
    unseen: Interval | None = None
    """Mean change of responses that no training saw, nats."""
    advice: tuple[tuple[str, str, str], ...] = ()
    """What to do, from what it follows, and its price."""
    worst: tuple[Mapping[str, Any], ...] = ()
    """The pairs whose chosen responses fell most."""

    @property
    def directions(self) -> dict[str, Direction]:
        """What chosen, rejected and margin did; all ``undecided`` where there are too few units."""
        return {name: getattr(self, name).direction(self.tolerance) for name in NAMES}

    @property
    def three_properties(self) -> dict[str, Interval] | None:
        """Changes of the rejected, the chosen and unseen responses, where there are unseen ones.

        Unseen are the responses of ``--unseen``, else answers of the first model. Yan et al., 3D-Properties
        (https://arxiv.org/abs/2406.07327): drastic drop, degradation into suppression, dispersion.
        """
        unseen = self.unseen
        if unseen is None and self.on_policy is not None and not self.on_policy.own:
            unseen = -self.on_policy.kl
        if unseen is None or self.scale != "nats":
            return None
        return {"drop": self.rejected, "degradation": self.chosen, "dispersion": unseen}

    @property
    def headline(self) -> str:
        """The answer in one line."""
        unit = self.unit if self.pairs != 1 else self.unit.removesuffix("s")
        where = f"{'held out' if self.held_out else 'training'}, {self.pairs} {unit}"
        if self.scale != "nats":
            return f"{self.verdict}: chosen {self.directions['chosen']} ({where}; {_SCALES[self.scale]})"
        return f"{self.verdict}: chosen {self.chosen} nats ({where})"

    @property
    def questions(self) -> dict[str, str]:
        """The three questions and what is known."""
        fell = {"displaced": "yes", "chosen_down": "yes", "not_displaced": "no"}.get(self.verdict, "unclear")
        return {
            "did the chosen responses fall?": fell,
            "did the mass go to unwanted responses?": self.harm.where_the_mass_went,
            "did held-out quality fall?": self.harm.quality,
        }

    def text(self) -> str:
        """For a person: the verdict first, with its criterion."""
        unit = "" if self.scale == "nats" else f", {_SCALES[self.scale]}"
        lines = [
            f"verdict: {self.verdict} (mean changes, {LEVEL:.0%} intervals from {METHODS[self.unit]}, "
            f"eps {self.tolerance:g} nats{unit})",
            f"  {self.source}",
        ]
        for part in (self, self.beside):
            if part is not None:
                lines += part.lines(counts=part is self and self.beside is not None)
        if self.calibration is not None:
            lines.append(f"    {self.calibration.line()}")
        if self.ranking is not None:
            lines.append(f"    {self.ranking.line()}")
        if (moved := self.three_properties) is not None:
            lines.append(
                f"    3D-properties: drop of the rejected {moved['drop']}, of the chosen {moved['degradation']}, "
                f"of unseen responses {moved['dispersion']} nats"
            )
        if self.on_policy is not None:
            lines.append(f"    {self.on_policy.line(self.chosen.mean)}")
        lines += [f"    {part.line()}" for part in self.parts]
        lines += [f"  {question} {answer}" for question, answer in self.questions.items()]
        if any(c.outcome != "not measured" for c in self.harm.criteria):
            lines += [f"  {line}" for line in self.harm.lines()]
        lines += [f"  worst: row {row['index']} {row['chosen']:+.2f} nats {row['text']}" for row in self.worst[:3]]
        for what, why, price in self.advice:
            lines += [f"  do: {what}", f"      because {why}; costs {price}"]
        notes = (*self.caveats, *(n for n in (self.beside.caveats if self.beside else ()) if n not in self.caveats))
        lines += [f"  note: {caveat}" for caveat in notes]
        return "\n".join(lines)

    def lines(self, counts: bool) -> list[str]:
        """One set of pairs; ``counts``: it is the one that the verdict rests on."""
        count = f"{self.pairs} {self.unit}"
        if self.records < self.pairs:
            count += f" of {self.records} records"
        lines = [f"  {'held out' if self.held_out else 'training'}, {count}" + ("   <- what counts" if counts else "")]
        medians = _short(self.summary)
        for name in NAMES:
            interval, did = getattr(self, name), self.directions[name]
            median = medians.get(f"dlogp_{name}_median")
            tail = "" if median is None or self.unit != "pairs" else f"; median {median:+.3f}"
            value = f"{interval} nats: {did}" if self.scale == "nats" else f"{did} (rewards {interval})"
            lines.append(f"    {name:8}  {value}{_sign(interval, did)}{tail}")
        if self.unit == "pairs" and "lld_rate" in medians:
            rates = {"chosen fell": medians["lld_rate"]} | {
                k.removesuffix("_rate"): v for k, v in medians.items() if k.endswith("_rate") and k != "lld_rate"
            }
            lines.append("    pairs: " + ", ".join(f"{k} {v:.0%}" for k, v in rates.items()))
        if "chosen_share" in medians and self.margin.known and not self.margin.low <= 0 <= self.margin.high:
            shares = f"{medians['chosen_share']:+.0%} from chosen, {medians['rejected_share']:+.0%} from rejected"
            lines.append(f"    margin change: {shares}")
        if self.curve is not None and len(self.curve.steps) > 2:
            lines.append(f"    course: chosen {_course(self.curve)}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """For a script. Means and intervals are in nats, and null where they are not known in nats."""
        did, own = self.directions, self.scale == "nats"
        numbers = {name: getattr(self, name).to_json() for name in NAMES}
        unknown = dict.fromkeys(("mean", "low", "high"))
        out = {
            "verdict": self.verdict,
            "pairs": self.pairs,
            "records": self.records,
            "unit": self.unit,
            "set": "held_out" if self.held_out else "train",
            "source": self.source,
            "scale": self.scale,
            "criterion": {"tolerance": self.tolerance, "level": LEVEL, "method": METHODS[self.unit], "fewest": FEWEST},
            **{name: {**(numbers[name] if own else unknown), "direction": did[name]} for name in NAMES},
            **({} if own else {"rewards": numbers}),
            **self.summary,
            "questions": self.questions,
            "harm": self.harm.to_json(),
            "parts": [part.to_json() for part in self.parts],
            "calibration": None if self.calibration is None else self.calibration.to_json(),
            "on_policy": None if self.on_policy is None else self.on_policy.to_json(),
            "ranking": None if self.ranking is None else self.ranking.to_json(),
            "three_properties": {k: v.to_json() for k, v in (self.three_properties or {}).items()} or None,
            "advice": [dict(zip(("do", "because", "price"), line, strict=True)) for line in self.advice],
            "worst": [dict(row) for row in self.worst],
            "caveats": list(self.caveats),
        }
        if self.curve is not None:
            out["curve"] = {n: getattr(self.curve, n).tolist() for n in ("steps", "chosen", "rejected")}
        if self.beside is not None:
            out["beside"] = self.beside.to_json()
        return out


_SCALES = {"sign": "directions only", "per token": "per token: directions only"}


def _sign(interval: Interval, did: Direction) -> str:
    """What an interval tells that reaches over a bound and not over zero."""
    if did == "undecided" and interval.known and not interval.low <= 0 <= interval.high:
        return f" (surely {'below' if interval.high < 0 else 'above'} 0, perhaps by less than eps)"
    return ""


def _course(curve: Curve) -> str:
    at = {"first": 0, "lowest": int(curve.chosen.argmin()), "highest": int(curve.chosen.argmax()), "last": -1}
    return ", ".join(f"{word} {curve.chosen[i]:+.3f} at step {curve.steps[i]}" for word, i in at.items())


def verdict(chosen: Interval, margin: Interval, tolerance: float = TOLERANCE) -> str:
    """The verdict that the intervals of the chosen responses and of the margin give.

    >>> up, down = Interval(2.0, 1.9, 2.1), Interval(-0.99, -1.01, -0.97)
    >>> verdict(down, up), verdict(down, down), verdict(up, down), verdict(Interval(0.0, -1.0, 1.0), up)
    ('displaced', 'chosen_down', 'not_displaced', 'undecided')
    """
    if chosen.direction(tolerance) == "down":
        return "displaced" if margin.direction(tolerance) == "up" else "chosen_down"
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
    count = len(changes.chosen)
    if not count:
        raise ChesError(f"{changes.source}: no pairs")
    bad = ~(np.isfinite(changes.chosen) & np.isfinite(changes.rejected))
    if bad.any():
        raise ChesError(
            f"{changes.source}: {bad.sum()} of {count} {changes.unit} have log-probabilities that are NaN or infinite; "
            "leave those out"
        )
    values = np.stack([changes.chosen, changes.rejected, changes.chosen - changes.rejected])
    records = count
    if changes.unit == "pairs":
        found = intervals.of_pairs(values, changes.records)
        records = count if changes.records is None else len(np.unique(changes.records))
    else:
        found = (intervals.of_steps if changes.unit == "steps" else intervals.of_evaluations)(values)
    counted = values if changes.unit == "pairs" else values[:, -intervals.end(count) :]
    tolerance = tolerance if changes.scale == "nats" else 0.0
    caveats = changes.caveats
    if records < FEWEST:
        what = changes.unit if changes.records is None else "records"
        caveats = (*caveats, f"{records} {what} are too few for an interval (at least {FEWEST}): no verdict")
    elif records < FEW and changes.unit == "pairs":
        caveats = (*caveats, f"{records} {changes.unit} are few: intervals are rough")
    word = verdict(found[0], found[2], tolerance)
    if word == "chosen_down":
        caveats = (*caveats, "the margin did not clearly rise: displacement is defined while the loss falls")
    return Diagnosis(
        verdict=word,
        pairs=count,
        records=records,
        unit=changes.unit,
        source=changes.source,
        chosen=found[0],
        rejected=found[1],
        margin=found[2],
        summary=displacement_summary(counted[0], counted[1], tolerance) if changes.scale == "nats" else {},
        tolerance=tolerance,
        caveats=caveats,
        scale=changes.scale,
        held_out=changes.held_out,
        curve=changes.curve,
        beside=None if changes.beside is None else diagnose_changes(changes.beside, tolerance),
    )


def rule_holds(diagnosis: Diagnosis, rule: str | None) -> bool:
    """Whether a rule of ``--fail-if`` holds: ``lld_rate>0.2``, ``margin<=1e-3``, or a word such as ``displaced``.

    A number that is not defined (a share of a margin that did not move, nats of a log without beta) counts as beyond
    its bound, so that a gate does not open on it.

    Raises:
      ChesError: a rule that cannot be read, or a name that no diagnosis has.
    """
    if rule is None:
        return False
    text = rule.strip()
    if text in VERDICTS:
        return diagnosis.verdict == text
    if text in HARM:
        return diagnosis.harm.answer == text
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
    words = (*VERDICTS, *HARM)
    message = (
        f"--fail-if {rule!r}: expected NAME>NUMBER (or >=, <, <=) with one of {', '.join(SUMMARY)}; "
        f"or a verdict: {', '.join(words)}"
    )
    if name in FORMER:
        rate = f", {name}_rate>0.5 asks for more than half of the pairs"
        return f"{message}. {name!r} is no verdict on a run any more: {FORMER[name]} is the nearest{rate}"
    near = get_close_matches(name, [*SUMMARY, *words], n=1)
    return f"{message}. Did you mean {near[0]}?" if near and near[0] != name else message
