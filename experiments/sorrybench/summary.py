"""From the runs to the numbers of the figures: pure functions, and ``summarise`` which reads the stages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.framework.intervals import spread
from experiments.framework.item import Work
from experiments.sorrybench.config import SUBSETS, TYPES, SorryScale


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
            "objective": method.objective,
            "data": method.pairs,
            "sft": method.sft,
            **method_summary(runs, initial),
        }
    rates = {
        p: rate_summary(work.value(f"rate/{p}")) for p in ("generated", *(("gold",) if config.gold is not None else ()))
    }
    return {
        "requests": work.value("requests"),
        "responses": {**work.value("responses"), **work.value("judgments")},
        "pairs": work.value("pairs"),
        "rates": rates,
        "initial": answer_summary(list(initial.values())),
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
    numbers: dict[str, Any] = answer_summary(list(done.values())) | {
        n: spread([r[n] for r in done.values()]) for n in names
    }
    for split in ("train", "test"):
        numbers[f"{split}_change"] = spread([r[split] - initial[s][split] for s, r in done.items()])
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
        **numbers,
        "turned": {k: spread([f[k] for f in flips]) for k in flips[0]},
        "by_type": by_type,
    }


def answer_summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What models answered: refusal rates of both splits, lengths, kinds where they are known."""
    numbers: dict[str, Any] = {n: spread([r[n] for r in runs]) for n in ("train", "test", "tokens", "cut")}
    if all("kinds" in r for r in runs):
        numbers["kinds"] = {k: spread([r["kinds"][k] for r in runs]) for k in runs[0]["kinds"]}
    return numbers


def rate_summary(value: Mapping[str, Any]) -> dict[str, Any]:
    """The learning rate and what each one tried did."""
    tried = {
        lr: {
            "loss_change": max(r["loss_change"] for r in runs),
            "dlogp_chosen": spread([r["dlogp_chosen"] for r in runs]),
            **answer_summary(runs),
        }
        for lr, runs in value.get("runs", {}).items()
    }
    return {"lr": value["lr"], "tried": tried}


def score_summary(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Any]:
    """Quartiles of each score by type of pair, and how often one type's score is above another's (Figure 4)."""
    summary: dict[str, Any] = {}
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
        summary[name] = {"by_type": quartiles, "above": above}
    return summary


def kept_types(scores: Mapping[str, Mapping[str, Sequence[float]]], subsets: Mapping[str, Any]) -> dict[str, Any]:
    """How many pairs of each type a filter keeps (the random one: on average), beside how many there are."""
    of = {i: t for t in TYPES for i in subsets[t]}
    total = {t: len(subsets[t]) for t in TYPES if t in scores}

    def counts(rows: Sequence[int]) -> dict[str, float]:
        return {t: sum(of[i] == t for i in rows) for t in total}

    kept: dict[str, Any] = {"all": total}
    for name in SUBSETS:
        if name == "random":
            each = [counts(rows) for rows in subsets["random"].values()]
            kept[name] = {t: float(np.mean([c[t] for c in each])) for t in total}
        else:
            kept[name] = counts(subsets[name])
    return kept
