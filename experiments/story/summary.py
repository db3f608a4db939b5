"""From the runs to the numbers: the fall, its causes, and each arm beside plain DPO, at its end and at equal margin."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ches_jax.stats import bootstrap
from experiments.forecast.summary import aligned
from experiments.framework.intervals import spread
from experiments.framework.item import Work
from experiments.story.config import ARMS, StoryScale

DRAWS = 1000
SIDES = ("chosen", "rejected")


def summarise(work: Work) -> dict[str, Any]:
    """Everything that report and page say."""
    dpo = work.value("dpo")
    return {
        "pairs": work.value("pairs"),
        "sft": work.value("sft"),
        "course": {
            "steps": dpo["steps"],
            **{which: {side: found[side] for side in SIDES} for which, found in dpo["sets"].items()},
        },
        "sets": {which: _means(found["end"]) for which, found in dpo["sets"].items()},
        "diagnosis": work.value("diagnosis"),
        "causes": work.value("causes"),
        **_arms(work),
    }


def _means(changes: Mapping[str, Sequence]) -> dict[str, Any]:
    """Mean changes in nats with bootstrap intervals over pairs, each of its own prompt."""
    chosen, rejected = (np.array(changes[f"dlogp_{side}"]) for side in SIDES)
    columns = np.stack([chosen, rejected, chosen - rejected])
    names = (*SIDES, "margin")
    return {**_named(names, columns), "chosen_fell": float((chosen < 0).mean()), "pairs": columns.shape[1]}


def _named(names: Sequence[str], columns: np.ndarray) -> dict[str, dict[str, float]]:
    low, high = bootstrap(lambda rows: columns[:, rows].mean(1), columns.shape[1], draws=DRAWS)
    ends = zip(names, columns.mean(1), low, high, strict=True)
    return {n: {"mean": float(m), "low": float(a), "high": float(b)} for n, m, a, b in ends}


def _arms(work: Work) -> dict[str, Any]:
    """Every arm, over orders of the data and test pairs; and the mean course of plain DPO."""
    config: StoryScale = work.config
    runs = {name: [work.value(f"arm/{name}/{seed}") for seed in config.orders] for name in config.arms}
    ids = runs["dpo"][0]["row_id"]
    courses = np.stack([_course(run, ids) for run in runs["dpo"]])
    ends = {n: np.stack([[aligned(run, ids, f"dlogp_{s}") for s in SIDES] for run in some]) for n, some in runs.items()}
    trained = {name: float(np.mean([run["train_chosen"] for run in some])) for name, some in runs.items()}
    chosen, rejected = courses.mean((0, 3))
    return {
        "plain": {"chosen": chosen.tolist(), "margin": (chosen - rejected).tolist()},
        "arms": {name: {**arm(ends[name], courses), "train_chosen": trained[name]} for name in ends},
    }


def _course(run: Mapping[str, Any], ids: Sequence[str]) -> np.ndarray:
    """[sides, evaluations, pairs] in the order of the rows."""
    place = {row_id: i for i, row_id in enumerate(run["row_id"])}
    return np.array([run["course"][side] for side in SIDES])[..., [place[i] for i in ids]]


def arm(ends: np.ndarray, courses: np.ndarray) -> dict[str, Any]:
    """One arm beside plain DPO.

    Args:
      ends: [orders, sides, pairs] changes at the end of the arm, nats.
      courses: [orders, sides, evaluations, pairs] changes of plain DPO after every update.

    Returns:
      Means over the orders, and with intervals over pairs: ``gain`` and ``margin_gain``, chosen and margin less those
      of plain DPO at its end; ``at_equal_margin``, chosen less that of plain DPO when its margin was the arm's, null
      where it never was.
    """
    chosen, rejected = ends.mean(0)
    course = courses.mean(0)
    plain = course[:, -1]
    gain, margin_gain = chosen - plain[0], chosen - rejected - (plain[0] - plain[1])
    pairs = chosen.shape[0]

    def equal(rows: np.ndarray) -> float:
        mean = course[:, :, rows].mean(2)
        here = float(chosen[rows].mean())
        return here - at_margin(here - float(rejected[rows].mean()), mean[0], mean[0] - mean[1])

    found = equal(np.arange(pairs))
    low, high = bootstrap(equal, pairs, draws=DRAWS)
    known = bool(np.isfinite(found) and np.isfinite(low) and np.isfinite(high))
    return {
        "chosen": spread(ends[:, 0].mean(1).tolist()),
        "margin": spread((ends[:, 0] - ends[:, 1]).mean(1).tolist()),
        "accuracy": float((chosen > rejected).mean()),
        "chosen_fell": float((chosen < 0).mean()),
        **_named(("gain", "margin_gain"), np.stack([gain, margin_gain])),
        "at_equal_margin": {"mean": found, "low": float(low), "high": float(high)} if known else None,
    }


def at_margin(margin: float, chosen: np.ndarray, margins: np.ndarray) -> float:
    """The chosen of a course when its margin first reached a value, between evaluations on a line; NaN if it never did.

    >>> at_margin(1.5, np.array([0.0, -4.0, -6.0]), np.array([0.0, 1.0, 2.0]))
    -5.0
    >>> at_margin(3.0, np.array([0.0, -4.0]), np.array([0.0, 1.0]))
    nan
    """
    if margin <= margins[0]:
        return float(chosen[0]) if margin == margins[0] else float("nan")
    reached = np.flatnonzero(margins >= margin)
    if not reached.size:
        return float("nan")
    i = int(reached[0])
    part = (margin - margins[i - 1]) / (margins[i] - margins[i - 1])
    return float(chosen[i - 1] + part * (chosen[i] - chosen[i - 1]))


def verdict(one: Mapping[str, Any]) -> str:
    """What an arm is worth, from its intervals."""
    gain, margin, equal = one["gain"], one["margin_gain"], one["at_equal_margin"]
    if gain["high"] < 0:
        return "chosen falls more"
    if gain["low"] <= 0:
        return "not distinguished from DPO"
    if margin["low"] > 0:
        return "chosen falls less, with more margin"
    if margin["high"] >= 0:
        return "chosen falls less, margin not distinguished"
    if equal is None:
        return "chosen falls less, paid in margin"
    if equal["low"] > 0:
        return "chosen falls less, at less margin; better than stopping DPO there"
    if equal["high"] < 0:
        return "chosen falls less, at less margin; stopping DPO earlier does more"
    return "chosen falls less, at less margin; stopping DPO there does as much"


def label(name: str) -> str:
    """An arm in words; controls are named."""
    return ARMS[name].label + (" (control)" if ARMS[name].control else "")
