"""The lines of the report, the table, the figures and the page, from a result alone."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.framework.intervals import interval, signed
from experiments.framework.item import ReportLine, beyond_the_paper
from experiments.story.config import ARMS
from experiments.story.summary import label, verdict

if TYPE_CHECKING:
    from ches_jax.report.document import Page, Section

GROUPS = {"start": "DPO", "pairs": "pairs left out", "remedies": "remedies", "objectives": "objectives"}


def rows(result: dict[str, Any]) -> list[ReportLine]:
    """The fall, its diagnosis, its causes, and every arm."""
    line, values = partial(beyond_the_paper, result), result["result"]
    held, train = values["sets"]["held_out"], values["sets"]["train"]
    found = values["diagnosis"]
    return [
        line(
            "DPO after SFT",
            f"nats: held-out chosen {signed(held['chosen'])}, margin {signed(held['margin'])}; training chosen "
            f"{signed(train['chosen'])}",
            f"{held['chosen_fell']:.0%} of held-out chosen responses fell",
        ),
        line("its diagnosis", "; ".join(_criteria(found)), f"{found['verdict']}; harm: {found['harm']['answer']}"),
        line("its causes", _concentration(values["causes"]), f"{values['causes']['push_down']:.0%} of pairs push down"),
        *(
            line(
                label(name),
                f"nats: test chosen {interval(one['chosen'])}, margin {interval(one['margin'])}; against DPO "
                f"{signed(one['gain'])}, at equal margin {_equal(one)}; training chosen {one['train_chosen']:+.2f}",
                "the start" if name == "dpo" else verdict(one),
            )
            for name, one in values["arms"].items()
        ),
    ]


def _equal(one: Mapping[str, Any]) -> str:
    return "not defined" if one["at_equal_margin"] is None else signed(one["at_equal_margin"])


def _criteria(found: Mapping[str, Any]) -> Iterator[str]:
    for one in found["harm"]["criteria"]:
        yield f"{one['name']}: {one['outcome']} ({one['evidence']})"


def _grew(margin: Mapping[str, float]) -> str:
    """What a margin did, where its interval tells it."""
    if margin["low"] <= 0 <= margin["high"]:
        return f"is not distinguished from the start ({margin['mean']:+.1f})"
    return f"{'grew' if margin['mean'] > 0 else 'fell'} by {abs(margin['mean']):.1f}"


def _concentration(causes: Mapping[str, Any]) -> str:
    shares = causes["concentration"]["share_of_fall"]
    return "of the forecast fall " + ", ".join(f"the worst {part} hold {share:.0%}" for part, share in shares.items())


def tables(result: dict[str, Any]) -> str:
    """Every arm beside plain DPO."""
    head = ("arm", "chosen", "margin", "accuracy", "chosen less DPO", "margin less DPO", "at equal margin", "training")
    parts = [f"# The story: {result['scale']}\n", "| " + " | ".join((*head, "verdict")) + " |", "| --- " * 9 + "|"]
    for name, one in result["result"]["arms"].items():
        word = "the start" if name == "dpo" else verdict(one)
        parts.append("| " + " | ".join((label(name), *_cells(one), word)) + " |")
    return "\n".join(parts) + "\n"


def _cells(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        interval(one["chosen"]),
        interval(one["margin"]),
        f"{one['accuracy']:.3f}",
        signed(one["gain"]),
        signed(one["margin_gain"]),
        _equal(one),
        f"{one['train_chosen']:+.2f}",
    )


def figures(result: dict[str, Any], name: str, folder: Path) -> list[Path]:
    """The course of the run with every arm beside plain DPO; and chosen against margin."""
    from experiments.framework.figures import save

    return [
        save(_story_figure(result["result"]), folder / f"{name}-story.png"),
        save(_plane_figure(result["result"]), folder / f"{name}-plane.png"),
    ]


def _story_figure(values: dict[str, Any]) -> Any:
    from matplotlib.figure import Figure

    from experiments.framework.figures import COLOURS

    figure = Figure(figsize=(11.5, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    course, held = values["course"], values["sets"]["held_out"]
    for which, style in (("held_out", "-"), ("train", "--")):
        for side, colour in (("chosen", COLOURS[0]), ("rejected", COLOURS[1])):
            words = f"{side}, {'held out' if which == 'held_out' else 'training'}"
            left.plot(course["steps"], course[which][side], style, color=colour, marker="o", ms=3, label=words)
    left.axhline(0, lw=0.8, color="0.5")
    left.set_xlabel("updates")
    left.set_ylabel("change of the log-probability, nats")
    left.set_title(f"DPO after SFT: {held['chosen_fell']:.0%} of held-out chosen responses fall", fontsize=10)
    left.legend(fontsize=8)
    arms = {n: one for n, one in values["arms"].items() if n != "dpo"}
    names = sorted(arms, key=lambda n: -arms[n]["gain"]["mean"])
    colours = dict(zip(GROUPS, (COLOURS[5], COLOURS[2], COLOURS[0], COLOURS[3]), strict=True))
    for y, name in enumerate(names):
        colour = colours[ARMS[name].group]
        _errorbar(right, arms[name]["gain"], y - 0.12, "o", colour)
        if arms[name]["at_equal_margin"] is not None:
            _errorbar(right, arms[name]["at_equal_margin"], y + 0.18, "D", colour, hollow=True)
    right.set_yticks(range(len(names)), [label(n) for n in names], fontsize=8)
    for tick, name in zip(right.get_yticklabels(), names, strict=True):
        tick.set_color(colours[ARMS[name].group])
    right.set_ylim(len(names) - 0.5, -0.5)
    right.axvline(0, lw=0.8, color="0.5")
    right.set_xlabel("nats that held-out chosen responses fall less (left of 0: more)")
    right.set_title("● at the end, ◇ against DPO stopped at the same margin", fontsize=10)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure


def _errorbar(ax: Any, one: Mapping[str, float], y: float, mark: str, colour: str, hollow: bool = False) -> None:
    ends = [[max(0.0, one["mean"] - one["low"])], [max(0.0, one["high"] - one["mean"])]]
    face = "white" if hollow else colour
    ax.errorbar([one["mean"]], [y], xerr=ends, fmt=mark, ms=4, color=colour, mfc=face, lw=1)


def spread(values: Sequence[float], least: float) -> list[float]:
    """The values moved so far apart that no two are closer than ``least``, in their order, and as little as that needs.

    >>> spread([0.0, 5.0, 5.0], 1.0)
    [0.0, 4.5, 5.5]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    groups: list[list[int]] = []  # each lies evenly around the mean of its members
    for i in order:
        groups.append([i])
        while len(groups) > 1:
            (low, a), (high, b) = ((sum(values[j] for j in g) / len(g), (len(g) - 1) / 2) for g in groups[-2:])
            if low + a * least + least <= high - b * least:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    out = [0.0] * len(values)
    for group in groups:
        middle = sum(values[j] for j in group) / len(group)
        for k, j in enumerate(group):
            out[j] = middle + (k - (len(group) - 1) / 2) * least
    return out


def _plane_figure(values: dict[str, Any]) -> Any:
    from experiments.framework.figures import COLOURS, axes_row

    figure, (ax,) = axes_row(1, width=5.5, height=4.4)
    plain = values["plain"]
    ax.plot(plain["margin"], plain["chosen"], "-", color="0.4", marker=".", label="DPO, update by update")
    named: list[tuple[str, float, float]] = []
    marks = dict(zip(GROUPS, ((COLOURS[5], "o"), (COLOURS[2], "s"), (COLOURS[0], "o"), (COLOURS[3], "^")), strict=True))
    for group, (colour, mark) in marks.items():
        here = {n: one for n, one in values["arms"].items() if ARMS[n].group == group}
        points = [(one["margin"]["mean"], one["chosen"]["mean"]) for one in here.values()]
        ax.plot(*zip(*points, strict=True), mark, color=colour, ms=5, label=GROUPS[group])
        named += [(name, *point) for name, point in zip(here, points, strict=True) if group != "start"]
    bottom, top = ax.get_ylim()
    line = {"arrowstyle": "-", "color": "0.7", "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
    heights = spread([y for _, _, y in named], 0.034 * (top - bottom))
    for (name, x, y), height in zip(named, heights, strict=True):
        side, align = (-0.08, "right") if ARMS[name].group == "pairs" else (0.08, "left")
        ax.annotate(
            ARMS[name].label,
            (x, y),
            (x + side, height),
            fontsize=6,
            ha=align,
            va="center",
            arrowprops=line,
        )
    ax.axhline(0, lw=0.8, color="0.5")
    ax.set_xlabel("held-out margin, nats")
    ax.set_ylabel("held-out chosen, nats")
    ax.set_title("Above the line: more chosen at the same margin", fontsize=10)
    ax.legend(fontsize=8)
    return figure


STOPPING = re.compile("stopping DPO (there does as much|earlier does more)")
"""Verdicts of arms that give no more than fewer updates of plain DPO."""


def page(result: dict[str, Any]) -> "Page":
    """The story on one page."""
    from ches_jax.report.document import Page
    from ches_jax.report.provenance import provenance

    values = result["result"]
    held, found = values["sets"]["held_out"], values["diagnosis"]
    found_of = {n: verdict(one) for n, one in values["arms"].items() if n != "dpo"}
    stopping = [n for n, words in found_of.items() if STOPPING.search(words)]
    better = [n for n, words in found_of.items() if words.startswith("chosen falls less") and n not in stopping]
    other = [n for n in found_of if n not in better and n not in stopping]
    return Page(
        kind="experiments/story",
        title=f"The story, {result['scale']}: chosen responses that fall",
        headline=f"After SFT, DPO lowered {held['chosen_fell']:.0%} of {held['pairs']} held-out chosen responses, by "
        f"{-held['chosen']['mean']:.1f} nats in the mean; the margin {_grew(held['margin'])}",
        subtitle=f"{result['config']['model']} · {result['config']['pairs']} · {result['scale']}",
        tone="bad" if found["harm"]["answer"] == "harmful" else "unsure",
        answers=[
            (
                "Did chosen fall?",
                _escaped(
                    f"{found['verdict']}: {signed(found['chosen'])} nats held out, margin {signed(found['margin'])}."
                ),
            ),
            ("Was it harmful?", _escaped(f"{found['harm']['answer']}. " + "; ".join(_criteria(found)) + ".")),
            (
                "Which pairs?",
                _escaped(
                    f"{values['causes']['push_down']:.0%} of the training pairs push held-out chosen "
                    f"responses down; {_concentration(values['causes'])}."
                ),
            ),
            ("What helps?", _escaped(_said(values, better) or "Nothing that was tried.")),
            ("What does no more than stopping DPO earlier?", _escaped(_said(values, stopping) or "Nothing.")),
            ("What does not?", _escaped(_said(values, other) or "All that was tried helps.")),
        ],
        notes=(
            f"{len(values['arms']) - 1} arms are compared with one; each interval is one of 95 %, so that about one in "
            "twenty leaves out the truth.",
            "Intervals are over test pairs, for the orders of the data that were run: one small model, one data set.",
        ),
        sections=[*_sections(values), provenance({k: v for k, v in result.items() if k != "result"})],
    )


def _escaped(text: str) -> str:
    from ches_jax.report.html import escape

    return escape(text)


def _said(values: Mapping[str, Any], names: list[str]) -> str:
    """Arms by what was found of them."""
    by_verdict: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda n: -values["arms"][n]["gain"]["mean"]):
        one = values["arms"][name]
        by_verdict.setdefault(verdict(one), []).append(f"{label(name)} ({one['gain']['mean']:+.1f} nats)")
    return " ".join(f"{word[:1].upper()}{word[1:]}: {', '.join(arms)}." for word, arms in by_verdict.items())


def _sections(values: dict[str, Any]) -> "Iterator[Section]":
    import numpy as np

    from ches_jax.report import svg
    from ches_jax.report.document import Section
    from ches_jax.report.html import data_table, figure, gallery, paragraphs

    course = values["course"]
    curves = [
        svg.Series(
            name=f"{side}, {words}",
            x=np.array(course["steps"]),
            y=np.array(course[which][side]),
            colour=k,
            dashed=which == "train",
        )
        for which, words in (("held_out", "held out"), ("train", "training"))
        for k, side in enumerate(("chosen", "rejected"))
    ]
    drawn = figure(
        "course",
        "Change of the log-probabilities",
        svg.lines(curves, x="updates", y="nats", zero=True),
        "Mean change of chosen and rejected responses over the updates, held out and in training.",
    )
    plain = values["plain"]
    points = [svg.Series(name="DPO, update by update", x=np.array(plain["margin"]), y=np.array(plain["chosen"]))]
    for k, group in enumerate(("pairs", "remedies", "objectives"), 1):
        here = [one for n, one in values["arms"].items() if ARMS[n].group == group]
        x, y = (np.array([one[side]["mean"] for one in here]) for side in ("margin", "chosen"))
        points.append(svg.Series(name=GROUPS[group], x=x, y=y, colour=k, line=False))
    plane = figure(
        "plane",
        "Held-out chosen against margin",
        svg.lines(points, x="margin, nats", y="chosen, nats", zero=True),
        "Mean held-out chosen against margin: plain DPO after each update as a line, each arm at its end as a point.",
        "A point above the line keeps more of the chosen responses at the same margin than DPO that is stopped early.",
    )
    yield Section(anchor="course", heading="The fall", body=gallery([drawn, plane]))
    causes = [
        [
            f"{one['influence']:+.3f}",
            f"{one['from_chosen']:+.3f}",
            f"{one['from_rejected']:+.3f}",
            one["prompt"],
            one["chosen"],
            one["rejected"],
        ]
        for one in values["causes"]["worst"]
    ]
    head = ["influence, nats", "by its chosen", "by its rejected", "prompt", "chosen", "rejected"]
    words = paragraphs(
        "Influence: nats by which training on the pair lowers the mean chosen of the probes, first order."
    )
    yield Section(anchor="causes", heading="The pairs that cause it", body=words + data_table(head, causes, 6))
    head = [
        "arm",
        "verdict",
        "chosen",
        "margin",
        "accuracy",
        "chosen less DPO",
        "margin less DPO",
        "at equal margin",
        "training chosen",
    ]
    for group, title in (("pairs", "Pairs left out"), ("remedies", "Remedies"), ("objectives", "Objectives")):
        arms = {n: one for n, one in values["arms"].items() if ARMS[n].group in (group, "start")}
        cells = [[label(n), "the start" if n == "dpo" else verdict(one), *_cells(one)] for n, one in arms.items()]
        yield Section(anchor=group, heading=title, body=data_table(head, cells, 2))
