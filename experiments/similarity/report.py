"""The lines of the report, the tables and the figures, from a committed result alone."""

from pathlib import Path
from typing import Any

from experiments.framework.intervals import correlation, interval
from experiments.framework.item import ReportLine, items_of_the_paper, ran_on, run_command

NAMES = {
    "ches": "CHES",
    "ln_ches": "length-normalised CHES",
    "head_score": "head score",
    "minus_edit_distance": "minus edit distance",
    "last_hidden_inner": "last hidden embedding",
    "random": "random control",
}
PAPER = {
    "ches": "strictly falling with the percentile; severe at the top, a rise at the bottom",
    "ln_ches": "not measured",
    "head_score": "not measured",
    "minus_edit_distance": "not indicative; mostly rises",
    "last_hidden_inner": "not indicative; mostly rises",
    "random": "not measured",
}
FIGURES = {
    "dpo": "Figures 2, 5, 7 (DPO)",
    "ipo": "Figures 6, 7 (IPO)",
    "dpo-lower": "App. H.2, a lower learning rate (DPO)",
    "dpo-higher": "App. H.2, a higher learning rate (DPO)",
}


def rows(result: dict[str, Any]) -> list[ReportLine]:
    """A line per objective and measure, the pair-level correlations, the positivity statistics."""
    command, hardware, values = run_command(result), ran_on(result), result["result"]
    lines = []
    for name, objective in values["objectives"].items():
        for measure, v in objective["measures"].items():
            ends = _ends(v)
            rho = v["spearman_dlogp_chosen"]["of_means"]
            ours = f"nats: lowest {interval(ends[0])}, highest {interval(ends[1])}; rank correlation {_rho(rho)}"
            lines.append(
                ReportLine(
                    f"{FIGURES[name]}: {NAMES[measure]}", command, hardware, PAPER[measure], ours, verdict(measure, v)
                )
            )
        pairs = objective.get("random_pairs")
        if pairs:
            ours = "; ".join(f"{NAMES[m]} {correlation(c)}" for m, c in pairs["spearman"].items())
            equal = "; ".join(f"{NAMES[m]} {_at_equal(c)}" for m, c in pairs["at_equal_lengths"].items())
            lines.append(
                ReportLine(
                    f"beyond the paper, {name}: change of single pairs against score, random windows",
                    command,
                    hardware,
                    "none",
                    f"Spearman over {pairs['pairs']} pairs: {ours}. At equal lengths: {equal}",
                    f"strongest: {_strongest(pairs)}; {pairs['displaced']:.0%} of pairs displaced",
                )
            )
    count = sum(len(o["measures"]) for o in values["objectives"].values())
    lines.append(
        items_of_the_paper(
            result,
            _items(values),
            f"{count} windowed measures are looked at, each by itself: no verdict is corrected for their number",
        )
    )
    c = values["coefficients"]
    lines.append(
        ReportLine(
            "App. G.2: positive inner products and coefficients",
            command,
            hardware,
            "> 99% of inner products (Llama-3-8B); > 69% of alphas on average",
            f"inner products {_share(c['inner'])}; alpha- {_share(c['alpha_minus'])}; alpha+ "
            f"{_share(c['alpha_plus'])}, off its diagonal {_share(c['alpha_plus_off'])} ({c['pairs']} pairs)",
            _positivity(c),
        )
    )
    lengths = values["scores"]["spearman_with_length_difference"]
    lines.append(
        ReportLine(
            "Tables 14-15: pairs at the ends of CHES",
            command,
            hardware,
            "highest: longer y-; lowest: longer y+",
            "; ".join(f"{NAMES[m]} against |y-| - |y+|: {_rho(v)}" for m, v in lengths.items()),
            _extremes(values["extremes"]["ches"]),
        )
    )
    return lines


def verdict(measure: str, v: dict[str, Any]) -> str:
    """What the windows say, by rule: the intervals at both ends, and the rank correlation."""
    low, high = _ends(v)
    rho = v["spearman_dlogp_chosen"]["of_means"]
    cases = {
        "falls at the top, rises at the bottom": high["high"] < 0 < low["low"],
        "rises at the top, falls at the bottom": low["high"] < 0 < high["low"],
        "falls at both ends": high["high"] < 0 and low["high"] < 0,
        "rises at both ends": high["low"] > 0 and low["low"] > 0,
    }
    words = next((w for w, holds in cases.items() if holds), "an end is indistinguishable from zero")
    order = f"rank correlation {_rho(rho)}"
    if abs(rho) > 0.999:
        order = "strictly falling" if rho < 0 else "strictly rising"
    if measure == "random":
        return f"{order} (by chance); {words}"
    if measure == "ches" and rho > -0.999:
        part = "the paper's ends, not its strict order" if cases["falls at the top, rises at the bottom"] else ""
        return f"{order}: {part or 'not the ranking of the paper'}; {words}"
    return f"{order}; {words}"


def _strongest(pairs: dict[str, Any]) -> str:
    known = {m: c for m, c in pairs["spearman"].items() if c}
    best = min(known, key=lambda m: known[m]["rho"])
    return f"{NAMES[best]} ({known[best]['rho']:+.2f})"


def _positivity(c: dict[str, Any]) -> str:
    inner = "inner products as in the paper" if c["inner"]["mean"] > 0.99 else "fewer positive inner products"
    alpha = (c["alpha_minus"]["mean"] + c["alpha_plus"]["mean"]) / 2
    return f"{inner}; alphas on average {alpha:.0%}"


def _extremes(ends: dict[str, Any]) -> str:
    longer = {end: sum(p["rejected_tokens"] > p["chosen_tokens"] for p in pairs) for end, pairs in ends.items()}
    n = len(ends["highest"])
    return f"longer y- in {longer['highest']} of the {n} highest and {longer['lowest']} of the {n} lowest"


def tables(result: dict[str, Any]) -> str:
    """Every window of every measure, correlations, extremes."""
    values = result["result"]
    parts = [f"# Which pairs cause displacement, {result['scale']}\n", f"`{run_command(result)}`; {ran_on(result)}.\n"]
    s = values["scores"]
    flags = ", ".join(f"{k} {v}" for k, v in s["flags"].items()) or "none"
    parts.append(
        f"{values['pairs']['pairs']} pairs; mean lengths {s['mean_chosen_tokens']:.0f} and "
        f"{s['mean_rejected_tokens']:.0f} tokens; flags: {flags}. Changes in nats, mean over {len(result['seeds'])} "
        "seeds with 95% intervals by Student's t; one epoch per window.\n"
    )
    for name, objective in values["objectives"].items():
        parts.append(f"## {FIGURES[name]}: change of ln pi(y+), learning rate {objective['lr']:g}\n")
        parts.append(
            "| score | 0 | 25 | 50 | 75 | 100 | rank correlation | of each seed |\n|---|---|---|---|---|---|---|---|"
        )
        for column, what in (("dlogp_chosen", ""), ("per_token", ", per token")):
            for measure, v in objective["measures"].items():
                cells = [interval(w[column], 2 if column == "dlogp_chosen" else 3) for w in v["windows"].values()]
                ranked = v[f"spearman_{column}"]
                parts.append(
                    f"| {NAMES[measure]}{what} | {' | '.join(cells)} | {_rho(ranked['of_means'])} | "
                    f"{interval(ranked['seeds'])} |"
                )
        parts.append(
            "\n| score | percentile | ln pi(y-) | margin | share displaced | loss |\n|---|---|---|---|---|---|"
        )
        for measure, v in objective["measures"].items():
            parts += [
                f"| {NAMES[measure]} | {float(q) * 100:.0f} | {interval(w['dlogp_rejected'])} | "
                f"{interval(w['margin'])} | {interval(w['displaced'])} | {interval(w['loss_change'], 3)} |"
                for q, w in v["windows"].items()
            ]
        pairs = objective.get("random_pairs")
        if pairs:
            parts.append(
                f"\n### Single pairs of the random windows: {pairs['pairs']}, {pairs['displaced']:.0%} displaced\n"
            )
            parts.append("| score | Spearman with the change of ln pi(y+) | at equal lengths |\n|---|---|---|")
            parts += [
                f"| {NAMES[m]} | {correlation(c)} | {_at_equal(pairs['at_equal_lengths'][m])} |"
                for m, c in pairs["spearman"].items()
            ]
            parts.append(f"| \\|y-\\| - \\|y+\\| | {correlation(pairs['length_difference'])} | |")
        parts.append("")
    parts.append("## Windows\n")
    parts.append(
        "| score | percentile | range | tokens of y+ | tokens of y- | kinds of pairs |\n|---|---|---|---|---|---|"
    )
    for measure, windows in values["windows"].items():
        parts += [
            f"| {NAMES[measure]} | {float(q) * 100:.0f} | {w['score'][0]:.4g} to {w['score'][1]:.4g} | "
            f"{w['chosen_tokens']:.0f} | {w['rejected_tokens']:.0f} | "
            + ", ".join(f"{k} {n}" for k, n in sorted(w.get("categories", {}).items(), key=lambda kv: -kv[1])[:3])
            + " |"
            for q, w in windows.items()
        ]
    parts.append("\n## Pairs at the ends of a score (Tables 14, 15)\n")
    parts.append("| score | end | row | tokens of y+ | tokens of y- | value | kind |\n|---|---|---|---|---|---|---|")
    for measure, ends in values["extremes"].items():
        parts += [
            f"| {NAMES[measure]} | {end} | {p['row']} ({p['row_id']}) | {p['chosen_tokens']} | "
            f"{p['rejected_tokens']} | {p['score']:.4g} | {p.get('category', '')} |"
            for end, pairs in ends.items()
            for p in pairs
        ]
    between = values["scores"]["spearman_between"]
    parts.append("\n## Scores among each other (Spearman)\n")
    parts.append("| scores | correlation |\n|---|---|")
    parts += [f"| {' and '.join(NAMES[m] for m in k.split())} | {_rho(v)} |" for k, v in between.items()]
    return "\n".join(parts) + "\n"


def _rho(value: float | None) -> str:
    return "undefined" if value is None or value != value else f"{value:+.2f}"


def _at_equal(c: dict[str, float] | float | None) -> str:
    """At equal lengths; results of earlier versions have no interval."""
    return correlation(c) if isinstance(c, dict) else _rho(c)


def agreement(measure: str, v: dict[str, Any]) -> str:
    """What the windows of a measure say to the paper's statement of it: agree, opposite or undecided."""
    low, high = _ends(v)
    rho = v["spearman_dlogp_chosen"]["of_means"]
    if measure == "ches":
        if high["high"] < 0 < low["low"] and rho < -0.999:
            return "agree"
        return "opposite" if high["low"] > low["high"] else "undecided"
    if abs(rho) < 0.999 and high["low"] > 0 and low["low"] > 0:
        return "agree"
    return "opposite" if rho < -0.999 and high["high"] < 0 < low["low"] else "undecided"


def _ends(v: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The lowest and the highest window, with intervals over pairs where the result has them, else over seeds."""
    ends = v.get("over_pairs") or {q: w["dlogp_chosen"] for q, w in v["windows"].items()}
    return ends["0"], ends["1"]


def _items(values: dict[str, Any]) -> list[str]:
    """What this result says to each of the paper's items."""
    found = [
        agreement(measure, v)
        for objective in values["objectives"].values()
        for measure, v in objective["measures"].items()
        if PAPER[measure] != "not measured"
    ]
    c = values["coefficients"]
    found += ["agree" if c["inner"]["mean"] > 0.99 else "opposite"]
    alphas = [(c["alpha_minus"][end] + c["alpha_plus"][end]) / 2 for end in ("low", "high")]
    found += ["agree" if alphas[0] > 0.69 else "opposite" if alphas[1] < 0.69 else "undecided"]
    return found


def _share(s: dict[str, float]) -> str:
    return f"{s['mean']:.1%} [{s['low']:.1%}, {s['high']:.1%}]"


def figures(result: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """Figures 2 and 5 to 7: a panel per score, the change of ln pi(y+) by percentile, bars from smallest to largest.

    One figure for DPO, and one for the objectives that were run on the windows of CHES alone.
    """
    objectives = result["result"]["objectives"]
    main = {NAMES[m]: v for m, v in objectives["dpo"]["measures"].items()}
    ches = {f"{k}, {v['lr']:g}": v["measures"]["ches"] for k, v in objectives.items()}
    seeds = f"{len(result['seeds'])} seeds, bars from smallest to largest; under the name, rank correlation"
    return [
        _bars(
            main, f"DPO, learning rate {objectives['dpo']['lr']:g}: mean over {seeds}", folder / f"{name}-scores.png"
        ),
        _bars(ches, f"windows of CHES, by objective: mean over {seeds}", folder / f"{name}-ches.png", shared=False),
    ]


def _bars(panels: dict[str, Any], title: str, path: Path, shared: bool = True) -> Path:
    from experiments.framework.figures import COLOURS, axes_row, save

    figure, axes = axes_row(len(panels), width=2.1, shared=shared)
    for ax, colour, (label, v) in zip(axes, COLOURS, panels.items(), strict=False):
        points = [w["dlogp_chosen"] for w in v["windows"].values()]
        heights = [p["mean"] for p in points]
        bars = [[p["mean"] - p["min"] for p in points], [p["max"] - p["mean"] for p in points]]
        ax.bar(range(len(points)), heights, yerr=bars, color=colour, capsize=3, width=0.7, error_kw={"lw": 1})
        ax.axhline(0, color="#1a1a1a", linewidth=0.8)
        ax.set_xticks(range(len(points)), [f"{float(q) * 100:.0f}" for q in v["windows"]])
        ax.set_title(f"{label}\n{_rho(v['spearman_dlogp_chosen']['of_means'])}", fontsize=8)
        ax.set_xlabel("percentile", fontsize=8)
    axes[0].set_ylabel("change of ln pi(y+), nats", fontsize=8)
    figure.suptitle(title, fontsize=8)
    return save(figure, path)
