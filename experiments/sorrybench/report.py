"""What a result says: lines of the report, tables in the paper's layout, figures. Reads results only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.framework.intervals import interval
from experiments.framework.item import ReportLine, cell, items_of_the_paper, ran_on, run_command
from experiments.sorrybench.config import SUBSETS

PAPER_RATES = {
    "initial": "80.5% (Gemma-2B-IT), 74.4% (Llama-3-8B-Instruct)",
    "dpo": "54.8%, 33.4%",
    "dpo+sft": "no drop",
    "dpo-gold": "no drop, above DPO+SFT",
    "dpo-ln_ches": "no drop, above DPO+SFT",
    "ipo": "a drop",
    "ipo+sft": "no drop",
    "ipo-gold": "no drop",
    "ipo-ln_ches": "no drop",
    "dpo-two_refusals": "a drop as on all pairs",
    "dpo-two_compliances": "a drop as on all pairs",
}
"""Refusal rates on the training requests; most are bars without a number."""
PAPER_CHANGES = {
    "dpo": "-59.2 ± 5.3, -48.1 ± 22.1",
    "dpo+sft": "+20.2 ± 2.4, +28.6 ± 0.3",
    "dpo-gold": "+54.6 ± 3.2, +24.9 ± 3.0",
    "dpo-ln_ches": "-45.7 ± 2.5, -27.7 ± 2.7",
    "ipo": "-73.4 ± 11.5, -65.9 ± 18.5",
    "ipo+sft": "+10.1 ± 3.7, +20.3 ± 3.1",
    "ipo-gold": "+27.4 ± 6.6, +26.2 ± 3.5",
    "ipo-ln_ches": "-45.9 ± 1.1, -29.2 ± 3.1",
}
"""Tables 16 and 17: change of ln pi(y+), nats, Gemma and Llama."""
NAMES = {
    "generated": "all pairs",
    "gold": "gold pairs",
    "ln_ches": "lowest length-normalised CHES",
    "head_score": "lowest head score",
    "length": "lowest |y-| - |y+|",
    "random": "random pairs",
    "two_refusals": "two refusals only",
    "two_compliances": "two compliances only",
}


def title(name: str, method: Mapping[str, Any]) -> str:
    """A method in words."""
    words = f"{method['objective'].upper()}{' + SFT' if method['sft'] else ''}, {NAMES[method['data']]}"
    return words + (", as many updates as on all" if name.endswith("-long") else "")


def percent(s: Mapping[str, Any] | None) -> str:
    """A spread of rates."""
    if s is None:
        return "none"
    if s["n"] == 1:
        return f"{s['mean']:.1%}"
    return f"{s['mean']:.1%} [{max(s['low'], 0):.1%}, {min(s['high'], 1):.1%}]"


def trained(values: Mapping[str, Any]) -> dict[str, Any]:
    """The methods that had pairs to train on."""
    return {name: m for name, m in values["methods"].items() if m["pairs"]}


def rows(result: dict[str, Any]) -> list[ReportLine]:
    """Lines of the report."""
    command, hardware, values = run_command(result), ran_on(result), result["result"]
    lines = [
        ReportLine(
            "Fig. 3: refusals before training",
            command,
            hardware,
            PAPER_RATES["initial"],
            f"train {percent(values['initial']['train'])}, test {percent(values['initial']['test'])}"
            f"{_kinds(values['initial'])}",
            "the start",
        )
    ]
    for name, m in trained(values).items():
        paper = "; ".join(p for p in (PAPER_RATES.get(name), _nats(PAPER_CHANGES.get(name))) if p) or "none"
        ours = (
            f"train {percent(m['train'])}, test {percent(m['test'])}; ln pi(y+) {interval(m['dlogp_chosen'])} nats"
            f"{_kinds(m)}; {m['pairs']} pairs, {m['updates']} update{'s' * (m['updates'] != 1)}"
        )
        place = "Fig. 8, Table 17" if m["objective"] == "ipo" else "Fig. 3, Table 16"
        item = f"{place if name in PAPER_RATES else 'beyond the paper'}: {title(name, m)}"
        lines.append(ReportLine(item, command, hardware, paper, ours, verdict(m)))
    scores = values["scores"]["ln_ches"]
    above = scores["above"]
    ours = "; ".join(f"P({k.replace('_', ' ')}) = {v:.2f}" for k, v in above.items())
    lines.append(
        ReportLine(
            "Fig. 4: length-normalised CHES by type of pair",
            command,
            hardware,
            "pairs of one type score higher than mixed ones",
            ours or "no mixed pairs",
            _types(above, {t: v["pairs"] for t, v in scores["by_type"].items()}),
        )
    )
    found = agreements(values)
    if found:
        counted = "refusals and ln pi(y+) of each method by itself: no verdict is corrected for their number"
        lines.append(items_of_the_paper(result, found, counted))
    return lines


def agreements(values: Mapping[str, Any]) -> list[str]:
    """What the intervals say to each statement of the paper on a method: its refusals, its ln pi(y+).

    That refusals do not drop is agreed with where they rise, and undecided where they are indistinguishable from
    unchanged: an interval cannot show that nothing changed.
    """
    found = []
    for name, m in trained(values).items():
        if name in PAPER_RATES:
            expected = "rise" if PAPER_RATES[name].startswith("no drop") else "fall"
            found.append(_agreement(_direction(m["train_change"]), expected))
        if name in PAPER_CHANGES:
            expected = "rise" if PAPER_CHANGES[name].startswith("+") else "fall"
            found.append(_agreement(_direction(m["dlogp_chosen"]), expected))
    return found


def _agreement(direction: str, expected: str) -> str:
    if direction not in ("fall", "rise"):
        return "undecided"
    return "agree" if direction == expected else "opposite"


def _count(s: Mapping[str, Any], of: int) -> str:
    """A spread of numbers of requests, of so many."""
    return interval({**s, "low": max(s["low"], 0), "high": min(s["high"], of)}, 0)


def _nats(text: str | None) -> str | None:
    return None if text is None else f"ln pi(y+) {text}"


def _kinds(m: Mapping[str, Any]) -> str:
    """Shares by the grammar, where there is one."""
    if "kinds" not in m:
        return ""
    return "; by grammar: " + ", ".join(f"{k} {s['mean']:.0%}" for k, s in m["kinds"].items())


def verdict(m: Mapping[str, Any]) -> str:
    """What the intervals over seeds say of refusals and of the likelihood of the preferred responses."""
    refusals, likelihood = m["train_change"], m["dlogp_chosen"]
    words = [f"refusals {_direction(refusals)}", f"ln pi(y+) {_direction(likelihood)}"]
    if "kinds" in m and m["kinds"]["broken"]["mean"] > 0.5:
        words.append("what is left is broken text, not compliance")
    return "; ".join(words)


def _direction(s: Mapping[str, Any]) -> str:
    if s["high"] < 0:
        return "fall"
    return "rise" if s["low"] > 0 else "indistinguishable from unchanged"


def _types(above: Mapping[str, float], pairs: Mapping[str, int]) -> str:
    """Whether pairs of one type score higher, against twice the standard error under chance (Mann-Whitney)."""
    verdicts = []
    for name, share in above.items():
        kind = name.partition(" > ")[0]
        if kind == "undecided":
            continue
        n, m = pairs[kind], pairs["mixed"]
        noise = 2 * ((n + m + 1) / (12 * n * m)) ** 0.5
        verdicts.append("higher" if share > 0.5 + noise else "lower" if share < 0.5 - noise else "indistinguishable")
    if not verdicts:
        return "no mixed pairs"
    if set(verdicts) == {"indistinguishable"}:
        return "indistinguishable"
    if "higher" not in verdicts:
        return "not as in the paper"
    return "as in the paper" if set(verdicts) == {"higher"} else "in part as in the paper"


def tables(result: dict[str, Any]) -> str:
    """Refusal rates, Tables 16 and 17, learning rates, what the filters keep, scores by type."""
    values = result["result"]
    r, p = values["requests"], values["pairs"]
    types = ", ".join(f"{n} {t.replace('_', ' ')}" for t, n in p["types"].items())
    parts = [
        f"# Unlearned refusals, {result['scale']}\n",
        f"`{run_command(result)}`; {ran_on(result)}.\n",
        f"{r['train']} requests to train on and {r['test']} to test on, of {r['usable']} that can be used. "
        f"{values['responses']['texts']} responses, {values['responses']['refusal_rate']:.1%} refusals; "
        f"{p['pairs']} pairs ({types}; {p['same']} requests gave the same response twice). Means over "
        f"{len(result['seeds'])} seeds with 95% intervals by Student's t; one response per request, temperature 0.7.\n",
        "## Refusal rates (Figures 3 and 8)\n",
        "| method | pairs | updates | train | test | change, train | refusal to compliance | compliance to refusal |",
        "|---|---|---|---|---|---|---|---|",
        f"| before training | | | {percent(values['initial']['train'])} | {percent(values['initial']['test'])} | | | |",
    ]
    methods = {cell(title(n, m)): m for n, m in trained(values).items()}
    parts += [
        f"| {n} | {m['pairs']} | {m['updates']} | {percent(m['train'])} | {percent(m['test'])} | "
        f"{interval(m['train_change'], 3)} | {_count(m['turned']['refusal_to_compliance'], r['train'])} | "
        f"{_count(m['turned']['compliance_to_refusal'], r['train'])} |"
        for n, m in methods.items()
    ]
    if "kinds" in values["initial"]:
        parts += [
            "\n## What the replies are, by the grammar of the bundled world\n",
            "| method | refusal | compliance | broken | tokens |",
            "|---|---|---|---|---|",
        ]
        shown = {"before training": values["initial"], **methods}
        parts += [
            f"| {n} | "
            + " | ".join(percent(m["kinds"][k]) for k in ("refusal", "compliance", "broken"))
            + f" | {interval(m['tokens'], 0)} |"
            for n, m in shown.items()
        ]
    parts += [
        "\n## Change of log-probabilities on the pairs trained on (Tables 16 and 17), nats\n",
        "| method | ln pi(y+) | ln pi(y-) | loss | by type: ln pi(y+) |",
        "|---|---|---|---|---|",
    ]
    parts += [
        f"| {n} | {interval(m['dlogp_chosen'])} | {interval(m['dlogp_rejected'])} | {interval(m['loss_change'], 3)} | "
        + ", ".join(
            f"{t.replace('_', ' ')} ({v['pairs']}) {v['dlogp_chosen']['mean']:+.2f}" for t, v in m["by_type"].items()
        )
        + " |"
        for n, m in methods.items()
    ]
    for pairs, rate in values["rates"].items():
        parts.append(
            f"\n## Learning rate for the {NAMES[pairs] if pairs == 'gold' else 'generated pairs'}: {rate['lr']:g}\n"
        )
        if not rate["tried"]:
            parts.append("As in the paper; not searched.")
            continue
        parts.append("DPO; taken is the largest that lowers the loss over the epoch and leaves responses that end.\n")
        parts.append("| rate | loss | ln pi(y+) | refusals, train | by grammar |\n|---|---|---|---|---|")
        parts += [
            f"| {lr} | {t['loss_change']:+.3f} | {interval(t['dlogp_chosen'])} | {percent(t['train'])} | "
            f"{_kinds(t).removeprefix('; by grammar: ')} |"
            for lr, t in rate["tried"].items()
        ]
    kept = values["kept"]
    names = list(kept["all"])
    parts += [
        "\n## What the filters keep\n",
        "| filter | " + " | ".join(n.replace("_", " ") for n in names) + " |",
        "|---|" + "---|" * len(names),
        *(
            f"| {cell(NAMES.get(f, f))} | " + " | ".join(f"{kept[f][n]:.4g}" for n in names) + " |"
            for f in ("all", *SUBSETS)
        ),
        "\n## Scores by type of pair (Figure 4)\n",
        "| score | type | pairs | lowest | quartiles | highest | P(above mixed) |",
        "|---|---|---|---|---|---|---|",
    ]
    for score, s in values["scores"].items():
        for t, v in s["by_type"].items():
            low, *middle, high = v["quartiles"]
            above = s["above"].get(f"{t} > mixed")
            between = ", ".join(f"{q:.4g}" for q in middle)
            parts.append(
                f"| {score} | {t.replace('_', ' ')} | {v['pairs']} | {low:.4g} | {between} | {high:.4g} | "
                f"{'' if above is None else f'{above:.2f}'} |"
            )
    return "\n".join(parts) + "\n"


def figures(result: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """Figures 3 and 8: refusal rates by method, bars from smallest to largest; Figure 4: scores by type of pair."""
    from experiments.framework.figures import COLOURS, axes_row, save

    values = result["result"]
    written = []
    for objective in ("dpo", "ipo"):
        methods = {n: m for n, m in trained(values).items() if m["objective"] == objective}
        if not methods:
            continue
        bars = {"before": values["initial"]["train"], **{n: m["train"] for n, m in methods.items()}}
        labels = {"before": "before training", **{n: title(n, m).partition(", ")[2] for n, m in methods.items()}}
        for n, m in methods.items():
            if m["sft"]:
                labels[n] += " + SFT"
        figure, (ax,) = axes_row(1, width=6.0, height=0.3 * len(bars) + 1.2)
        height = list(range(len(bars)))[::-1]
        means = [b["mean"] for b in bars.values()]
        errors = [[b["mean"] - b["min"] for b in bars.values()], [b["max"] - b["mean"] for b in bars.values()]]
        ax.barh(
            height, means, xerr=errors, color=[COLOURS[5], *[COLOURS[0]] * len(methods)], capsize=2, error_kw={"lw": 1}
        )
        ax.set_yticks(height, [labels[n] for n in bars])
        ax.set_xlim(0, 1)
        ax.axvline(means[0], color="#1a1a1a", linewidth=0.6, linestyle=":")
        ax.set_xlabel("refusal rate on the training requests", fontsize=8)
        ax.set_title(f"{objective.upper()}: mean over {len(result['seeds'])} seeds, smallest to largest", fontsize=8)
        written.append(save(figure, folder / f"{name}-refusals-{objective}.png"))
    shown = ("ln_ches", "head_score")
    figure, axes = axes_row(len(shown), width=3.4, shared=False)  # one is thousands of times the other
    for ax, score in zip(axes, shown, strict=True):
        by_type = values["scores"][score]["by_type"]
        boxes = [
            {
                "whislo": q[0],
                "q1": q[1],
                "med": q[2],
                "q3": q[3],
                "whishi": q[4],
                "label": f"{t.replace('_', chr(10))}\n({v['pairs']})",
            }
            for t, v in by_type.items()
            for q in [v["quartiles"]]
        ]
        ax.bxp(boxes, showfliers=False)
        ax.set_title({"ln_ches": "length-normalised CHES", "head_score": "head score"}[score], fontsize=8)
    written.append(save(figure, folder / f"{name}-scores.png"))
    return written
