"""The lines of the report, the table and the figure, from a committed result alone."""

from functools import partial
from pathlib import Path
from typing import Any

from experiments.forecast.config import VARIANTS
from experiments.framework.intervals import correlation, interval, signed
from experiments.framework.item import ReportLine, beyond_the_paper

NAMES = {
    "first order": "forecast, first order",
    "second order": "forecast, second order",
    "pilot": "pilot, measured",
    "head_score": "head score, own pair",
    "ches": "CHES",
    "ln_ches": "length-normalised CHES",
    "edit_distance": "edit distance",
    "chosen_tokens": "length of the chosen (shorter rises)",
    "logp_chosen": "ln pi(chosen) at the start",
}
FILTERS = {
    "all": "nothing left out",
    "influence": "highest influence",
    "ln_ches": "highest length-normalised CHES",
    "ches": "highest CHES",
    "head_score": "highest head score",
    "rejected_tokens": "longest rejected",
    "random": "random pairs",
    "least_influence": "lowest influence (the wrong way round)",
    "soft_influence": "nothing; weights by influence",
    "with_sft": "nothing; an SFT term",
}
COMPARED = ("first order", "pilot", "head_score", "ches", "ln_ches")
"""Predictors of the table of objectives and optimisers."""
GOAL = {"forecast": 8, "influence": 7}
"""Forward passes of the training pairs that each may cost."""


def rows(result: dict[str, Any]) -> list[ReportLine]:
    """Displacement before and after SFT, forecasts, own-pair scores, costs, filters."""
    line, values = partial(beyond_the_paper, result), result["result"]
    lines = []
    rates = list(values["lrs"])
    for rate in rates:
        of = values["lrs"][rate]
        held, train = of["sets"]["held_out"], of["sets"]["train"]
        lines.append(
            line(
                f"DPO at {rate} after SFT",
                f"nats: held-out chosen {signed(held['chosen'])}, margin {signed(held['margin'])}; training chosen "
                f"{signed(train['chosen'])}",
                f"{held['chosen_fell']:.0%} of held-out chosen responses fell",
            )
        )
        for which, name in (("held_out", "held-out"), ("train", "training")):
            predictors = of["sets"][which]["predictors"]
            best = predictors["first order"]
            cal = best["calibration"]
            ours = "; ".join(
                f"{NAMES[n]} {correlation(predictors[n])}" for n in ("first order", "second order", "pilot")
            )
            ours += "; at equal lengths " + ", ".join(
                correlation(predictors[n]["equal_lengths"]) for n in ("first order", "second order", "pilot")
            )
            lines.append(
                line(
                    f"forecast at {rate}, {name} pairs, Spearman",
                    f"{ours}; first order: slope {cal['slope']:.2f}, R2 {cal['r2']:.2f}",
                    _verdict(best, predictors["pilot"]) if which == "held_out" else "",
                )
            )
            own = "; ".join(f"{NAMES[n]} {correlation(predictors[n])}" for n in ("head_score", "ches", "ln_ches"))
            lines.append(line(f"own-pair scores at {rate}, {name} pairs, Spearman", own, _own_verdict(predictors)))
    untuned = values["untuned"]
    lines.append(
        line(
            f"the same DPO at {rates[-1]} without SFT",
            f"nats: held-out chosen {signed(untuned['held_out']['chosen'])}, training chosen "
            f"{signed(untuned['train']['chosen'])}",
            f"{untuned['held_out']['chosen_fell']:.0%} of held-out chosen responses fell",
        )
    )
    costs = values["costs"]
    lines.append(
        line(
            "costs in forward passes of the training pairs with dense attention, CPU time",
            ", ".join(f"{name.replace('_', ' ')} {value:.1f}" for name, value in costs.items() if name != "forward"),
            "; ".join(f"{n} {'within' if costs[n] <= most else 'above'} {most}" for n, most in GOAL.items()),
        )
    )
    for name, one in values["filters"].items():
        lines.append(
            line(
                f"filter, {FILTERS[name]}",
                f"nats: test chosen {interval(one['chosen'])}, margin {interval(one['margin'])}"
                + (
                    ""
                    if name == "all"
                    else f"; against all, chosen {signed(one['both'])}, margin "
                    f"{signed(one['margin_gain'])}; p {_p(one['p_holm'])} among {len(values['filters']) - 1}"
                ),
                "what all are compared with" if name == "all" else _filter_verdict(one),
            )
        )
    for name, of in values.get("variants", {}).items():
        predictors = of["sets"]["held_out"]["predictors"]
        ours = "; ".join(f"{NAMES[n]} {correlation(predictors[n])}" for n in COMPARED)
        held = of["sets"]["held_out"]
        lines.append(
            line(
                f"{VARIANTS[name].label}, held-out pairs",
                f"nats: chosen {signed(held['chosen'])}, margin {signed(held['margin'])}; Spearman: {ours}",
                f"{held['chosen_fell']:.0%} of held-out chosen fell; "
                + _verdict(predictors["first order"], predictors["pilot"]),
            )
        )
    return lines


def _verdict(forecast: dict[str, Any], pilot: dict[str, Any]) -> str:
    met = forecast["rho"] >= 0.9 and forecast["equal_lengths"]["rho"] >= 0.85
    text = f"goal of 0.90 and 0.85 at equal lengths {'met' if met else 'not met'}"
    if forecast["low"] > pilot["high"]:
        return f"{text}; better than the pilot"
    if forecast["high"] < pilot["low"]:
        return f"{text}; the pilot is better"
    return f"{text}; pilot not distinguished"


def _own_verdict(predictors: dict[str, Any]) -> str:
    words = []
    for name in ("head_score", "ches", "ln_ches"):
        one = predictors[name]
        sign = "right sign" if one["low"] > 0 else "wrong sign" if one["high"] < 0 else "not distinguished from 0"
        words.append(f"{NAMES[name]}: {sign}")
    return "; ".join(words)


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _filter_verdict(one: dict[str, Any]) -> str:
    """By the p value among all filters (Holm), over draws and test pairs."""
    if one["p_holm"] >= 0.05:
        return "not distinguished from all pairs"
    return f"held-out chosen fall {'less' if one['both']['mean'] > 0 else 'more'}"


def tables(result: dict[str, Any]) -> str:
    """Every predictor at every rate, and every filter."""
    parts = [f"# Forecasts: {result['scale']}\n"]
    for rate, of in result["result"]["lrs"].items():
        for which, one_set in of["sets"].items():
            parts.append(f"## DPO at {rate}, {which.replace('_', '-')} pairs ({one_set['pairs']})\n")
            parts.append(f"{of['reason']}.\n")
            parts.append("| predictor | Spearman | at equal lengths | slope, R2 |\n| --- | --- | --- | --- |")
            for name, one in one_set["predictors"].items():
                cal = one.get("calibration")
                fit = "" if cal is None else f"{cal['slope']:.2f}, {cal['r2']:.2f}"
                parts.append(f"| {NAMES[name]} | {correlation(one)} | {correlation(one['equal_lengths'])} | {fit} |")
            parts.append("")
    if result["result"]["filters"]:
        parts.append("## Filters, test pairs\n")
        draws = len(result["seeds"])
        parts.append(
            f"Nats; {draws} draws of the pool, each with an order of its own; 95% intervals: of chosen and margin over "
            "draws (Student's t), of what is gained against all pairs over draws and test pairs together. Verdicts "
            "follow from p, corrected for the number of filters (Holm). The draws share four fifths of their pairs.\n"
        )
        parts.append(
            "| left out | chosen | margin | accuracy | chosen against all | margin against all | p | less fall |\n"
            + "| --- " * 8
            + "|"
        )
        for name, one in result["result"]["filters"].items():
            parts.append(
                f"| {FILTERS[name]} | {interval(one['chosen'])} | {interval(one['margin'])} | {one['accuracy']:.3f} | "
                + (
                    "| | | |"
                    if name == "all"
                    else f"{signed(one['both'])} | {signed(one['margin_gain'])} | "
                    f"{_p(one['p_holm'])} | {one['less_fall']:z.0%} |"
                )
            )
    return "\n".join([*parts, *_variant_tables(result)]) + "\n"


def _recipes(result: dict[str, Any]) -> dict[str, Any]:
    """Plain DPO, then every other loss and optimiser; empty where there are no others."""
    values = result["result"]
    if not values.get("variants"):
        return {}
    plain = {f"DPO, RMSProp at {rate}": of for rate, of in values["lrs"].items()}
    return {**plain, **{VARIANTS[name].label: of for name, of in values["variants"].items()}}


def _variant_tables(result: dict[str, Any]) -> list[str]:
    """Plain DPO and every other loss and optimiser, on held-out and on training pairs."""
    recipes = _recipes(result)
    if not recipes:
        return []
    parts = []
    for which in ("held_out", "train"):
        columns = ["loss and optimiser", "chosen, nats", "margin, nats", *(NAMES[n] for n in COMPARED), "slope, R2"]
        parts.append(f"## Other losses and optimisers, {which.replace('_', '-')} pairs\n")
        parts.append("Spearman with the change of ln pi(chosen); below it, at equal lengths.\n")
        parts.append(f"| {' | '.join(columns)} |\n" + "| --- " * len(columns) + "|")
        for label, of in recipes.items():
            one = of["sets"][which]
            found = [one["predictors"][n] for n in COMPARED]
            cal = found[0]["calibration"]
            cells = [signed(one["chosen"]), signed(one["margin"])]
            cells += [f"{correlation(p)}<br>{correlation(p['equal_lengths'])}" for p in found]
            cells += [f"{cal['slope']:.2f}, {cal['r2']:.2f}"]
            parts.append(f"| {' | '.join([label, *cells])} |")
        parts.append("")
    return parts


def figures(result: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """Rank correlations of all predictors on held-out and training pairs."""
    import numpy as np

    from experiments.framework.figures import axes_row, save

    rates = result["result"]["lrs"]
    figure, axes = axes_row(len(rates), width=3.4, height=3.2)
    for ax, (rate, of) in zip(axes, rates.items(), strict=True):
        for k, which in enumerate(("held_out", "train")):
            predictors = of["sets"][which]["predictors"]
            y = np.arange(len(predictors)) + 0.2 * (2 * k - 1)
            rho = np.array([one["rho"] for one in predictors.values()])
            ends = np.array([[one["rho"] - one["low"], one["high"] - one["rho"]] for one in predictors.values()]).T
            ax.errorbar(rho, y, xerr=np.clip(ends, 0, None), fmt="o", ms=4, label=which.replace("_", "-"))
        ax.set_yticks(np.arange(len(NAMES)), list(NAMES.values()))
        ax.set_ylim(len(NAMES) - 0.5, -0.5)
        ax.axvline(0, lw=0.8, color="0.5")
        ax.set_title(f"DPO at {rate} after SFT")
        ax.set_xlim(-1, 1.05)
        ax.set_xticks([-1, -0.5, 0, 0.5, 1])
        ax.set_xlabel("Spearman with the change\nof ln pi(chosen)")
    axes[0].legend(fontsize=8, loc="lower left")
    drawn = [save(figure, folder / f"{name}-predictors.png")]
    return [*drawn, *_variant_figures(result, name, folder)]


def _variant_figures(result: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """What tells the change of held-out pairs under each loss and optimiser."""
    import numpy as np

    from experiments.framework.figures import axes_row, save

    recipes = _recipes(result)
    if not recipes:
        return []
    figure, (ax,) = axes_row(1, width=5.0, height=4.2)
    for k, predictor in enumerate(COMPARED):
        found = [of["sets"]["held_out"]["predictors"][predictor] for of in recipes.values()]
        rho = np.array([one["rho"] for one in found])
        ends = np.array([[one["rho"] - one["low"], one["high"] - one["rho"]] for one in found]).T
        y = np.arange(len(found)) + 0.14 * (k - (len(COMPARED) - 1) / 2)
        ax.errorbar(rho, y, xerr=np.clip(ends, 0, None), fmt="osD^v"[k], ms=4, label=NAMES[predictor])
    ax.set_yticks(np.arange(len(recipes)), list(recipes))
    ax.invert_yaxis()
    ax.axvline(0, lw=0.8, color="0.5")
    ax.set_xlim(-1, 1)
    ax.set_xlabel("Spearman with the change of ln pi(chosen), held-out pairs")
    figure.legend(*ax.get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=2)
    return [save(figure, folder / f"{name}-objectives.png")]
