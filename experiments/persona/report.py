"""Tables 1 to 13, the lines of the report and the figures, from a committed result alone."""

from pathlib import Path
from typing import Any

from experiments.framework.intervals import interval
from experiments.framework.item import ReportLine, cell, items_of_the_paper, ran_on, run_command

SHOWN_GAIN = 0.02
"""A gain of probability by answers of the opposite stance counts when its interval lies above this."""
PAPER = {
    "Table 1": "largest decrease 0.21 to 0.96 in six of six",
    "Table 2": "0.10 to 0.99 in five of six (its first row repeats Table 3's)",
    "Table 3": "0.01 to 0.87 in six of six",
}
DETAILS = {"dpo-sft": "Tables 4-6", "dpo-base": "Tables 7-9", "ipo-sft": "Tables 10-12"}


def rows(result: dict[str, Any]) -> list[ReportLine]:
    """A line per table."""
    command, hardware, values = run_command(result), ran_on(result), result["result"]
    lines = []
    for name, contests in values["tables"].items():
        table = next(iter(contests.values()))["table"]
        ours = "; ".join(
            f"{c}: {interval(v['decrease'])}, displaced {v['displaced']} of {v['kept']}" for c, v in contests.items()
        )
        lines.append(ReportLine(f"{table}: {LABELS[name]}", command, hardware, PAPER[table], ours, _verdict(contests)))
    gained = "; ".join(
        f"{c}: opposite stance up to {interval(v['opposite_gain'])}" for c, v in values["tables"]["dpo-sft"].items()
    )
    lines.append(
        ReportLine(
            "Tables 4-12: tokens that gain most",
            command,
            hardware,
            "No/Never: `Yes`, `_Yes` gain (OLMo); Sure/Yes: `Maybe`, `No`, `Never` (Llama)",
            f"after tuning, DPO: {gained}",
            _gain_verdict(values["tables"]["dpo-sft"]),
        )
    )
    norms = "; ".join(
        f"{c}: {v['projection']:.2f}, {v['orthogonal']:.2f}" for c, v in values["directions"]["tuned"].items()
    )
    larger = all(v["orthogonal"] > abs(v["projection"]) for v in values["directions"]["tuned"].values())
    lines.append(
        ReportLine(
            "Table 13: parts of W_y+ - W_y-",
            command,
            hardware,
            "across larger than along in six of six (Yes/No of OLMo: 1.53, 2.01)",
            f"along, across: {norms}",
            "same" if larger else "not for every pair",
        )
    )
    p = values["prompts"]
    lines.append(
        ReportLine(
            "App. D.3: prompt states",
            command,
            hardware,
            "all inner products positive",
            f"{p['positive']:.1%} of {p['prompts']} prompts' pairs",
            "same" if p["positive"] == 1 else "not all",
        )
    )
    if "longer" in values:
        ours = "; ".join(
            f"{kind}: chosen {interval(v['dlogp_chosen'], 1)}, "
            f"opposite stance {interval(v['dlogp_opposite_stance'], 1)} nats"
            for kind, v in values["longer"].items()
        )
        lines.append(
            ReportLine(
                "beyond the paper: answers of several tokens, DPO after tuning",
                command,
                hardware,
                "none",
                ours,
                _phrase_verdict(values["longer"]),
            )
        )
    counted = "every pair of answers in every table by itself: no verdict is corrected for their number"
    lines.append(items_of_the_paper(result, agreements(values), counted))
    return lines


def agreements(values: dict[str, Any]) -> list[str]:
    """What the runs say to each statement of the paper.

    For each pair of answers: is y+ displaced in most of the kept runs (undecided where fewer than half were kept); does
    the opposite stance gain. For all of them: is the part of W_y+ - W_y- across y+ the larger one; are inner products
    of prompt states positive.
    """
    contests = [v for table in values["tables"].values() for v in table.values()]
    found = ["undecided" if v["kept"] < v["runs"] / 2 else _agreed(2 * v["displaced"] > v["kept"]) for v in contests]
    for gain in (v["opposite_gain"] for v in values["tables"]["dpo-sft"].values()):
        if gain is None or gain["low"] <= SHOWN_GAIN <= gain["high"]:
            found.append("undecided")
        else:
            found.append(_agreed(gain["low"] > SHOWN_GAIN))
    found += [_agreed(v["orthogonal"] > abs(v["projection"])) for v in values["directions"]["tuned"].values()]
    return [*found, _agreed(values["prompts"]["positive"] == 1)]


def _agreed(is_so: bool) -> str:
    return "agree" if is_so else "opposite"


LABELS = {"dpo-sft": "DPO after tuning", "dpo-base": "DPO on the base model", "ipo-sft": "IPO after tuning"}


def _verdict(contests: dict[str, Any]) -> str:
    """Which pairs are displaced (Definition 1: less probable at the end than at the start) in most kept runs."""
    shown = [c for c, v in contests.items() if 2 * v["displaced"] > v["kept"]]
    few = [f"{c} (only {v['kept']} runs kept)" for c, v in contests.items() if v["kept"] < v["runs"] / 2]
    text = _which(shown, list(contests), "y+ displaced in most runs")
    return f"{text}; {', '.join(few)}" if few else text


def _gain_verdict(contests: dict[str, Any]) -> str:
    shown = [c for c, v in contests.items() if v["opposite_gain"] and v["opposite_gain"]["low"] > SHOWN_GAIN]
    return _which(shown, list(contests), "mass to the opposite stance")


def _phrase_verdict(kinds: dict[str, Any]) -> str:
    shown = [k for k, v in kinds.items() if v["dlogp_chosen"] and v["dlogp_chosen"]["high"] < 0]
    return _which(shown, list(kinds), "displaced")


def _which(shown: list[str], names: list[str], effect: str) -> str:
    missing = [c for c in names if c not in shown]
    if not missing:
        return f"{effect}: all"
    return f"{effect}: {', '.join(shown) or 'none'}; not {', '.join(missing)}"


def tables(result: dict[str, Any]) -> str:
    """All tables in the paper's layout."""
    values = result["result"]
    parts = [f"# Single prompts, {result['scale']}\n", f"`{run_command(result)}`; {ran_on(result)}.\n"]
    parts.append(
        "Means over kept runs (those whose loss never rose) with 95% intervals by Student's t. Meaning of tokens is by "
        "letters alone (the word lists of `config.py`).\n"
    )
    for name, contests in values["tables"].items():
        first = next(iter(contests.values()))
        parts.append(f"## {first['table']}: {LABELS[name]} ({first['loss']}, learning rate {first['lr']:g})\n")
        parts.append(
            "| y+ | y- | kept runs | largest decrease of pi(y+) | start -> end | displaced at the end | gained, same "
            "stance | gained, opposite stance | gained, other |\n|---|---|---|---|---|---|---|---|---|"
        )
        for v in contests.values():
            listed = {s: _named(v, s) for s in ("same", "opposite", "rest")}
            parts.append(
                f"| {v['chosen']} | {v['rejected']} | {v['kept']} of {v['runs']} | {interval(v['decrease'])} | "
                f"{_mean(v['from'])} -> {_mean(v['to'])} | {v['displaced']} | {listed['same']} | {listed['opposite']} "
                f"| {listed['rest']} |"
            )
        parts.append(f"\n### {DETAILS[name]}: the three tokens of each run that gained most\n")
        for contest, v in contests.items():
            parts.append(f"**({contest.replace('-', ', ')}), {v['kept']} kept runs**\n")
            parts.append("| step | tokens: mean gain (runs) |\n|---|---|")
            parts += [
                f"| {t} | {'; '.join(_cell(g) for g in gains[:10])}{'; ...' if len(gains) > 10 else ''} |"
                for t, gains in v["gains"].items()
            ]
            parts.append("")
        parts.append("### Change of the probability of each stance\n")
        parts.append("| pair | step | agree | disagree | open | other |\n|---|---|---|---|---|---|")
        for contest, v in contests.items():
            parts += [
                f"| {contest} | {t} | " + " | ".join(interval(m) for m in mass.values()) + " |"
                for t, mass in v["mass"].items()
            ]
        parts.append("")
    parts.append("## Table 13: W_y+ - W_y- along and across W_y+\n")
    parts.append("| model | (y+, y-) | along | across |\n|---|---|---|---|")
    for model, contests in values["directions"].items():
        parts += [f"| {model} | {c} | {v['projection']:.3f} | {v['orthogonal']:.3f} |" for c, v in contests.items()]
    if "longer" in values:
        parts.append("\n## Answers of several tokens: changes in nats\n")
        parts.append(
            "| pair | kept | y+ | y- | largest decrease of ln pi(y+) | others, same stance | others, opposite stance | "
            "displaced |\n|---|---|---|---|---|---|---|---|"
        )
        parts += [
            f"| {kind}: `{v['chosen']}` over `{v['rejected']}` | {v['kept']} of {v['runs']} | "
            f"{interval(v['dlogp_chosen'])} | {interval(v['dlogp_rejected'])} | {interval(v['decrease'])} | "
            f"{interval(v['dlogp_same_stance'])} | {interval(v['dlogp_opposite_stance'])} | {v['displaced']} |"
            for kind, v in values["longer"].items()
        ]
    return "\n".join(parts) + "\n"


def _mean(s: Any) -> str:
    return "none" if s is None else f"{s['mean']:.2f}"


def _cell(g: dict[str, Any]) -> str:
    return f"`{_escaped(g['token'])}` {g['gain']:.1e} ({g['runs']})"


def _escaped(token: str) -> str:
    """A token that does not end its cell of the table."""
    return cell(token).replace("`", "'")


def _named(v: dict[str, Any], which: str) -> str:
    """Tokens of the lists that gained at least 0.01 on average, by their meaning beside the preferred answer's."""
    own, opposite = v["stance"], {"agree": "disagree", "disagree": "agree"}[v["stance"]]
    stances = {"same": [own], "opposite": [opposite], "rest": ["open", "other"]}[which]
    gains: dict[str, float] = {}
    for gained in v["gains"].values():
        for g in gained:
            if g["stance"] in stances and g["gain"] >= 0.01 and g["runs"] * 2 >= v["kept"]:
                gains[g["token"]] = max(gains.get(g["token"], 0.0), g["gain"])
    best = sorted(gains, key=lambda t: -gains[t])[:4]
    return ", ".join(f"`{_escaped(t)}`" for t in best) or "none"


def figures(result: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """One figure per setting: probabilities along the updates, a panel per pair."""
    from experiments.framework.figures import COLOURS, axes_row, save

    written = []
    for setting, contests in result["result"]["tables"].items():
        figure, axes = axes_row(len(contests))
        for ax, v in zip(axes, contests.values(), strict=True):
            shown = {
                "y+ (all runs: band)": "chosen",
                "y- (all runs: band)": "rejected",
                "all that agree": "agree",
                "all that disagree": "disagree",
                "open answers": "open",
                "other tokens": "other",
            }
            for colour, (label, key) in zip(COLOURS, shown.items(), strict=False):
                course = v["course"][key]
                if course is None:
                    continue
                steps = range(len(course["mean"]))
                own = key in ("chosen", "rejected")
                ax.plot(
                    steps,
                    course["mean"],
                    color=colour,
                    label=label,
                    linewidth=2 if own else 1.2,
                    linestyle="-" if own else "--",
                )
                if own:
                    ax.fill_between(steps, course["min"], course["max"], color=colour, alpha=0.12, linewidth=0)
            ax.set_title(f"y+ {v['chosen']}, y- {v['rejected']}; {v['kept']} of {v['runs']} runs kept", fontsize=9)
            ax.set_xlabel("updates")
            ax.set_ylim(0, 1)
        axes[0].set_ylabel("next-token probability")
        axes[-1].legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.02, 1))
        written.append(save(figure, folder / f"{name}-{setting}.png"))
    return written
