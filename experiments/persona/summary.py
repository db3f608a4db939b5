"""From the logs of the runs to the numbers of Tables 1 to 13: pure functions, and ``summarise`` which reads the stages.

The log of one run has one entry per number of updates done, 0 to T: entry t is the model after t updates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.framework.intervals import spread
from experiments.framework.item import Work
from experiments.persona.config import STEPS, Contest, PersonaScale, Setting
from experiments.persona.data import STANCES, stance_of_word

SHOWN = 3
OPPOSITE = {"agree": "disagree", "disagree": "agree"}


class Decrease(NamedTuple):
    """The largest fall of a probability within a run."""

    size: float
    start: float
    end: float
    start_step: int
    end_step: int


def is_monotone(losses: Sequence[float]) -> bool:
    """Whether the loss never rose between consecutive updates: only such runs are counted.

    >>> is_monotone([0.7, 0.5, 0.5]), is_monotone([0.7, 0.5, 0.6])
    (True, False)
    """
    return bool(np.all(np.diff(np.asarray(losses, np.float64)) <= 0))


def largest_decrease(values: Sequence[float]) -> Decrease:
    r"""The largest :math:`v_t - v_{t'}` over :math:`t < t'`; its size is not positive where the values never fall.

    >>> largest_decrease([0.2, 0.9, 0.5, 0.6])
    Decrease(size=0.4, start=0.9, end=0.5, start_step=1, end_step=2)
    """
    v = np.asarray(values, np.float64)
    if v.size < 2:
        raise ValueError("a decrease needs two values")
    best_start = np.maximum.accumulate(v[:-1])
    falls = best_start - v[1:]
    end = int(np.argmax(falls)) + 1
    start = int(np.argmax(v[:end]))
    return Decrease(float(v[start] - v[end]), float(v[start]), float(v[end]), start, end)


class Gain(NamedTuple):
    """A token among the largest gains of some runs."""

    token: str
    gain: float
    """Mean over the runs that have it among theirs."""
    runs: int


def gains_over_runs(runs: Sequence[Sequence[tuple[str, float]]]) -> list[Gain]:
    """The union of the runs' lists: how often each token is there and its mean gain there; the commonest first.

    >>> gains_over_runs([[("a", 0.2), ("b", 0.1)], [("a", 0.4), ("c", 0.1)]])[0]
    Gain(token='a', gain=0.30000000000000004, runs=2)
    """
    by_token: dict[str, list[float]] = {}
    for run in runs:
        for token, gain in run:
            by_token.setdefault(token, []).append(gain)
    gains = [Gain(token, float(np.mean(v)), len(v)) for token, v in by_token.items()]
    return sorted(gains, key=lambda g: (-g.runs, -g.gain, g.token))


def summarise(work: Work) -> dict[str, Any]:
    """All tables, from the values of the stages."""
    config: PersonaScale = work.config
    contests = config.contests_of_model()
    tables = {
        name: {
            c.name: contest_table(
                [work.value(f"single/{name}/{c.name}/{seed}") for seed in config.seeds],
                c,
                setting,
                stance_of_word(config, c.chosen),
                config.updates,
            )
            for c in contests
        }
        for name, setting in config.settings.items()
    }
    tuning = work.value("tuning")
    numbers = {
        "tuning": {
            "statements": tuning["statements"],
            "updates": len(tuning["losses"]),
            "loss": [tuning["losses"][0], tuning["losses"][-1]],
        },
        "tables": tables,
        "directions": work.value("directions"),
        "prompts": work.value("prompts"),
    }
    if config.phrases is not None:
        numbers["longer"] = {
            kind: phrase_table(
                [work.value(f"longer/{kind}/{seed}") for seed in config.seeds],
                chosen,
                rejected,
                config.phrases.agree,
                config.updates,
            )
            for kind, chosen, rejected in config.phrases.pairs()
        }
    return numbers


def contest_table(
    runs: Sequence[dict[str, Any]], contest: Contest, setting: Setting, stance: str, updates: int
) -> dict[str, Any]:
    """One line of Tables 1 to 3, with what Tables 4 to 12 say about it.

    Args:
      runs: one per seed.
      contest: the two answers.
      setting: of the runs.
      stance: of the preferred answer.
      updates: the counted ones.
    """
    kept = [r for r in runs if is_monotone(r["losses"][: updates + 1])]
    falls = [largest_decrease(r["chosen"]) for r in kept]
    steps = [t for t in STEPS if t <= updates]
    return {
        "table": setting.table,
        "loss": setting.loss,
        "lr": setting.lr,
        "chosen": contest.chosen,
        "rejected": contest.rejected,
        "stance": stance,
        "runs": len(runs),
        "kept": len(kept),
        "decrease": spread([max(f.size, 0.0) for f in falls]),  # none where the probability only rose
        "from": spread([f.start for f in falls]),
        "to": spread([f.end for f in falls]),
        "change": spread([r["chosen"][updates] - r["chosen"][0] for r in kept]),
        "displaced": sum(r["chosen"][updates] < r["chosen"][0] for r in kept),
        "loss_change": spread([r["losses"][updates] - r["losses"][0] for r in kept]),
        "mass": {
            str(t): {s: spread([r["masses"][s][t] - r["masses"][s][0] for r in kept]) for s in STANCES} for t in steps
        },
        "opposite_gain": spread([_largest_rise(r["masses"][OPPOSITE[stance]]) for r in kept]),
        "gains": {str(t): _gains([r["gains"][str(t)] for r in kept]) for t in steps},
        "course": {name: _course([r[name] for r in kept], ends=True) for name in ("chosen", "rejected")}
        | {s: _course([r["masses"][s] for r in kept]) for s in STANCES},
    }


def _largest_rise(values: Sequence[float]) -> float:
    """The most that a value rose above where it began."""
    return max(values) - values[0]


def _gains(runs: Sequence[Sequence[tuple[str, float, str]]]) -> list[dict[str, Any]]:
    """A cell of Tables 4 to 12: the three tokens of every run that gained most, with their meaning."""
    stances = {token: stance for run in runs for token, _, stance in run}
    gains = gains_over_runs([[(token, gain) for token, gain, _ in run[:SHOWN]] for run in runs])
    return [{**gain._asdict(), "stance": stances[gain.token]} for gain in gains]


def _course(runs: Sequence[Sequence[float]], ends: bool = False) -> dict[str, list[float]] | None:
    """Mean (and smallest and largest) over the runs after each update, to four digits."""
    if not runs:
        return None
    v = np.asarray(runs, np.float64)
    shown = {"mean": v.mean(0), **({"min": v.min(0), "max": v.max(0)} if ends else {})}
    return {name: [round(float(x), 4) for x in values] for name, values in shown.items()}


def phrase_table(
    runs: Sequence[dict[str, Any]], chosen: str, rejected: str, agree: Sequence[str], updates: int
) -> dict[str, Any]:
    """What training on one pair of longer answers did to them and to all others, in nats."""
    kept = [r for r in runs if is_monotone(r["losses"][: updates + 1])]
    stance = "agree" if chosen in agree else "disagree"

    def stance_of(phrase: str) -> str:
        return "agree" if phrase in agree else "disagree"

    def others(same: bool) -> list[float]:
        return [
            float(np.mean(changes))
            for r in kept
            if (changes := [v for p, v in r["others"].items() if (stance_of(p) == stance) is same])
        ]

    return {
        "chosen": chosen,
        "rejected": rejected,
        "runs": len(runs),
        "kept": len(kept),
        "decrease": spread([max(largest_decrease(r["logp_chosen"]).size, 0.0) for r in kept]),
        "dlogp_chosen": spread([r["logp_chosen"][-1] - r["logp_chosen"][0] for r in kept]),
        "dlogp_rejected": spread([r["logp_rejected"][-1] - r["logp_rejected"][0] for r in kept]),
        "dlogp_same_stance": spread(others(True)),
        "dlogp_opposite_stance": spread(others(False)),
        "displaced": sum(r["logp_chosen"][-1] < r["logp_chosen"][0] for r in kept),
    }
