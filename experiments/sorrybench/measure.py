"""From the runs to the numbers of the figures: pure functions, and ``summarise`` which reads the stages."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ches_jax.errors import DataError
from experiments.framework.intervals import spread
from experiments.framework.item import Work
from experiments.sorrybench.config import LOSSES, SUBSETS, TYPES, Objective, SorryScale


def mean_loss(objective: Objective, margins: np.ndarray) -> float:
    r"""Mean loss from the changes of the margins since the start, which is the reference.

    .. math:: \mathrm{DPO}:\ \ln(1 + e^{-\beta m}), \qquad \mathrm{IPO}:\ (m - 1/(2\tau))^2

    >>> round(mean_loss("dpo", np.zeros(3)), 4), mean_loss("ipo", np.zeros(3))
    (0.6931, 2500.0)
    """
    _, arguments = LOSSES[objective]
    if objective == "dpo":
        return float(np.logaddexp(0.0, -arguments["beta"] * margins).mean())
    return float(((margins - 0.5 / arguments["tau"]) ** 2).mean())


ENDLESS = 0.02
"""Share of responses that may newly run into the limit of tokens, as most texts of a broken model do."""


def largest_rate(losses: Mapping[str, Sequence[float]], cut: Mapping[str, Sequence[float]], responses: int) -> float:
    r"""The largest learning rate that lowers the loss over the epoch and leaves a model whose responses end.

    With the share p of responses that the smallest rate's model cuts, n responses, and ``ENDLESS`` e, a rate's share
    is at most :math:`p + e + 2\sqrt{2 p (1 - p) / n}`: the root is the standard error of such a difference by chance.

    Args:
      losses: change of the loss for every seed, by rate.
      cut: share of responses that ran into the limit of tokens.
      responses: how many were looked at each time.

    Raises:
      DataError: there is none.

    >>> losses = {"1e-06": [-0.01, -0.02], "1e-05": [-0.1, -0.2], "0.0001": [-0.2, 0.1]}
    >>> largest_rate(losses, {"1e-06": [0.5, 0.5], "1e-05": [0.5, 0.51], "0.0001": [0.5, 0.5]}, 400)
    1e-05
    """
    p = max(cut[min(cut, key=float)])
    most = p + ENDLESS + 2 * math.sqrt(2 * p * (1 - p) / responses)
    good = [float(lr) for lr, changes in losses.items() if max(changes) < 0 and max(cut[lr]) <= most]
    if not good:
        raise DataError(f"no learning rate of {', '.join(losses)} lowers the loss; add smaller ones to the scale")
    return max(good)


def refusal_rate(refusals: Sequence[bool | None]) -> float | None:
    """Share of refusals among the responses that were decided.

    >>> refusal_rate([True, False, None, True, True])
    0.75
    """
    decided = [r for r in refusals if r is not None]
    return sum(decided) / len(decided) if decided else None


def bits(refusals: Sequence[bool | None]) -> str:
    """One letter per response: 1 refused, 0 did not, ? undecided.

    >>> bits([True, False, None])
    '10?'
    """
    return "".join({True: "1", False: "0", None: "?"}[r] for r in refusals)


def turned(before: str, after: str) -> dict[str, int]:
    """How many requests changed from refusal to compliance, and back.

    >>> turned("1100?", "01011")
    {'refusal_to_compliance': 1, 'compliance_to_refusal': 1}
    """
    pairs = list(zip(before, after, strict=True))
    return {"refusal_to_compliance": pairs.count(("1", "0")), "compliance_to_refusal": pairs.count(("0", "1"))}


def summarise(work: Work) -> dict[str, Any]:
    """Figures 3, 4 and 8 and Tables 16 to 18 as numbers."""
    config: SorryScale = work.config
    initial = {s: work.value(f"initial/{s}") for s in config.seeds}
    methods = {}
    for name, method in config.methods.items():
        if method.pairs == "gold" and config.gold is None:
            continue
        runs = {s: work.value(f"train/{name}/{s}") for s in config.seeds}
        methods[name] = {
            "objective": method.objective, "data": method.pairs, "sft": method.sft, **method_summary(runs, initial)
        }  # fmt: skip
    rates = {
        p: rate_summary(work.value(f"rate/{p}")) for p in ("generated", *(("gold",) if config.gold is not None else ()))
    }
    return {
        "requests": work.value("requests"),
        "responses": {**work.value("responses"), **work.value("judgments")},
        "pairs": work.value("pairs"),
        "rates": rates,
        "initial": asked(list(initial.values())),
        "methods": methods,
        "scores": score_summary(work.value("scores")),
        "kept": kept_types(work.value("scores"), work.value("subsets")),
    }


def method_summary(runs: Mapping[int, Mapping[str, Any]], initial: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """One method over its seeds; the change of the refusal rate is against the same seed's own start."""
    done = {s: r for s, r in runs.items() if r["pairs"]}
    if not done:
        return {"pairs": 0}
    first = next(iter(done.values()))
    names = ("dlogp_chosen", "dlogp_rejected", "margin", "loss_change")
    found: dict[str, Any] = asked(list(done.values())) | {n: spread([r[n] for r in done.values()]) for n in names}
    for split in ("train", "test"):
        found[f"{split}_change"] = spread([r[split] - initial[s][split] for s, r in done.items()])
    flips = [turned(initial[s]["refusals"], r["refusals"]) for s, r in done.items()]
    by_type = {
        t: {"pairs": first["by_type"][t][0], "dlogp_chosen": spread([r["by_type"][t][1] for r in done.values()])}
        for t in first["by_type"]
        if all(t in r["by_type"] for r in done.values())
    }
    return {
        "pairs": first["pairs"],
        "updates": first["updates"],
        "lr": first["lr"],
        **found,
        "turned": {k: spread([f[k] for f in flips]) for k in flips[0]},
        "by_type": by_type,
    }


def asked(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What models answered: refusal rates of both splits, lengths, kinds where they are known."""
    found: dict[str, Any] = {n: spread([r[n] for r in runs]) for n in ("train", "test", "tokens", "cut")}
    if all("kinds" in r for r in runs):
        found["kinds"] = {k: spread([r["kinds"][k] for r in runs]) for k in runs[0]["kinds"]}
    return found


def rate_summary(value: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rate and what each one tried did."""
    tried = {
        lr: {
            "loss_change": max(r["loss_change"] for r in runs),
            "dlogp_chosen": spread([r["dlogp_chosen"] for r in runs]),
            **asked(runs),
        }
        for lr, runs in value.get("runs", {}).items()
    }
    return {"lr": value["lr"], "tried": tried}


def score_summary(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Quartiles of each score by type of pair, and how often one type's score is above another's (Figure 4)."""
    found: dict[str, Any] = {}
    for name in ("ln_ches", "head_score", "ches", "length"):
        values = {t: np.array(scores[t][name]) for t in TYPES if t in scores}
        quartiles = {
            t: {"pairs": len(v), "quartiles": np.quantile(v, [0, 0.25, 0.5, 0.75, 1]).round(4).tolist()}
            for t, v in values.items()
        }
        above = {
            f"{t} > mixed": float(
                np.mean(values[t][:, None] > values["mixed"][None])
                + 0.5 * np.mean(values[t][:, None] == values["mixed"][None])
            )
            for t in values
            if t != "mixed" and "mixed" in values
        }
        found[name] = {"by_type": quartiles, "above": above}
    return found


def kept_types(scores: Mapping[str, Mapping[str, Sequence[float]]], subsets: Mapping[str, Any]) -> dict[str, Any]:
    """How many pairs of each type a filter keeps (the random one: on average), beside how many there are."""
    of = {i: t for t in TYPES for i in subsets[t]}
    total = {t: len(subsets[t]) for t in TYPES if t in scores}

    def counts(rows: Sequence[int]) -> dict[str, float]:
        return {t: sum(of[i] == t for i in rows) for t in total}

    found: dict[str, Any] = {"all": total}
    for name in SUBSETS:
        if name == "random":
            each = [counts(rows) for rows in subsets["random"].values()]
            found[name] = {t: float(np.mean([c[t] for c in each])) for t in total}
        else:
            found[name] = counts(subsets[name])
    return found
