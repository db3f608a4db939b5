"""What the first screen of a page of changes says, from the JSON answers of a diagnosis (``Diagnosis.to_json``).

Each function takes answers by set: the answer, or words on why there is none. What counts comes first.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ches_jax.report import elements
from ches_jax.report.axes import nats, percent, readable
from ches_jax.report.document import Tone
from ches_jax.report.html import escape

Answer = Mapping[str, Any]
Diagnoses = Mapping[str, Answer | str]
"""By set."""
SETS = {"held_out": "held out", "train": "training"}
"""Sets of pairs, what counts first, and what the page calls them."""
VERDICT_WORDS: dict[str, tuple[str, Tone]] = {
    "displaced": ("The chosen responses fell", "bad"),
    "chosen_down": ("The chosen responses fell and the margin did not rise", "bad"),
    "not_displaced": ("The chosen responses did not fall", "good"),
    "undecided": ("Whether the chosen responses fell is undecided", "unsure"),
}
"""How a verdict begins the page, and its tone."""
SHORT = {"displaced": "yes", "chosen_down": "yes", "not_displaced": "no", "undecided": "unclear"}


def set_name(name: str) -> str:
    """What the page calls a set.

    >>> set_name("held_out"), set_name("valid")
    ('held out', 'valid')
    """
    return SETS.get(name, name)


def answers_of(diagnoses: Diagnoses) -> list[tuple[str, Answer]]:
    """The sets that have an answer."""
    return [(name, answer) for name, answer in diagnoses.items() if not isinstance(answer, str)]


def headline(diagnoses: Diagnoses, when: str = "") -> tuple[str, Tone]:
    """The answer in one sentence, without a full stop, and how it sounds.

    >>> fell = {"verdict": "displaced", "unit": "pairs", "chosen": {"mean": -0.5, "low": -0.6, "high": -0.4}}
    >>> headline({"held_out": fell}, "after 10 updates")[0]
    'The chosen responses fell on held-out pairs: -0.50 nats after 10 updates'
    """
    known = answers_of(diagnoses)
    if not known:
        return "No verdict on this run yet", "plain"
    name, answer = known[0]
    words, tone = VERDICT_WORDS.get(answer["verdict"], (str(answer["verdict"]), "plain"))
    text = f"{words} {_where(name, answer)}"
    if (mean := answer["chosen"].get("mean")) is not None:
        text += f": {nats(mean)} nats" + (f" {when}" if when else "")
    for other, beside in known[1:]:
        if beside["verdict"] != answer["verdict"] and beside["chosen"].get("mean") is not None:
            text += f"; {_where(other, beside)} {nats(beside['chosen']['mean'])}"
    if (answer.get("harm") or {}).get("answer") == "harmful":
        text, tone = f"{text}; it was harmful", "bad"
    elif (answer.get("harm") or {}).get("answer") == "benign":
        text += "; it was benign"
    return text, tone


def _where(name: str, answer: Answer) -> str:
    if answer.get("unit", "pairs") != "pairs":
        return "in the held-out log" if name == "held_out" else "in the training log"
    return "on held-out pairs" if name == "held_out" else f"on {set_name(name)} pairs"


def did_chosen_fall(diagnoses: Diagnoses) -> str:
    """The first question, for each set, as HTML."""
    parts = []
    for name, answer in diagnoses.items():
        title = set_name(name)[:1].upper() + set_name(name)[1:]
        if isinstance(answer, str):
            parts.append(f"{escape(title)}: no verdict ({escape(answer)}).")
            continue
        word = SHORT.get(answer["verdict"], "unclear")
        if answer["chosen"].get("mean") is None:
            parts.append(f'{escape(title)}: <span class="tones">{word}</span> (directions only; say --beta for nats).')
            continue
        rate = answer.get("displacement/lld_rate")
        count = f"{answer['pairs']:,} {escape(answer['unit'])}"
        counted = f"{percent(float(rate))} of {count}" if rate is not None and answer["unit"] == "pairs" else count
        parts.append(
            f'{escape(title)}: <span class="tones">{word}</span>, {interval(answer["chosen"])} nats, {counted}, '
            f"margin {interval(answer['margin'])}."
        )
    return " ".join(parts)


def interval(estimate: Mapping[str, Any]) -> str:
    """A mean and its interval, as HTML.

    >>> interval({"mean": -0.5, "low": -0.6, "high": -0.4})
    '-0.50 <small>[-0.60, -0.40]</small>'
    >>> interval({"mean": None, "low": None, "high": None})
    'not known'
    """
    if estimate["mean"] is None:
        return "not known"
    if estimate.get("low") is None or estimate.get("high") is None:
        return nats(estimate["mean"])
    return f"{nats(estimate['mean'])} <small>[{nats(estimate['low'])}, {nats(estimate['high'])}]</small>"


def harm(diagnoses: Diagnoses, commands: str) -> str:
    """The third question; ``commands`` (HTML) say how it is measured where it was not."""
    known = answers_of(diagnoses)
    answer = (known[0][1].get("harm") or {}) if known else {}
    measured = [c for c in answer.get("criteria", ()) if c["outcome"] != "not measured"]
    if not measured:
        return f"Not measured. {commands}"
    criteria = "; ".join(f"{c['name']}: {c['outcome']} ({c['evidence']})" for c in measured)
    return f'<span class="tones">{escape(answer["answer"])}</span>: {escape(criteria)}. <a href="#harm">Criteria</a>.'


def advice(diagnoses: Diagnoses, links: Sequence[str]) -> str:
    """What to do, from what it follows, at what price; ``links`` (HTML) lead to the pairs to look at first."""
    known = answers_of(diagnoses)
    worst = f" Look first at {', '.join(links)}." if links else ""
    if not known:
        return "Train until there is an evaluation after the first one."
    lines = known[0][1].get("advice") or ()
    if lines:
        texts = [f"{line['do']} ({line['because']}; costs {line['price']})." for line in lines[:3]]
        # a command is typed as it stands
        texts = [text if text.startswith("ches ") else text[:1].upper() + text[1:] for text in texts]
        return "<br>".join(map(escape, texts)) + worst
    verdict = known[0][1]["verdict"]
    if verdict == "not_displaced":
        return f"Nothing needs to change for the chosen responses.{worst}"
    if verdict == "undecided":
        return f"Hold out more pairs or train longer before a change: the interval contains falls and rises.{worst}"
    beside = dict(known).get("train")
    if known[0][0] == "held_out" and beside is not None and beside["verdict"] == "not_displaced":
        return (
            "The training pairs did not fall, the held-out ones did: the margin was memorised. Fewer updates or more "
            f"pairs come before any filtering of pairs.{worst}"
        )
    return (
        "Measure harm before anything is changed. Then, in the order of their price: a likelihood term on the chosen "
        "response (<code>--sft 0.1</code>), a smaller learning rate, or fewer pairs by their influence "
        f"(<code>ches influence</code>, <code>ches select</code>).{worst}"
    )


def harm_section(diagnoses: Diagnoses) -> str:
    """All criteria of harm, measured or not; empty where the answer has none."""
    from ches_jax.report.html import data_table, paragraphs

    known = answers_of(diagnoses)
    answer = (known[0][1].get("harm") or {}) if known else {}
    if not answer.get("criteria"):
        return ""
    rows = [[c["name"], c["outcome"], c["evidence"]] for c in answer["criteria"]]
    note = (
        "Harmful: some criterion is met. Benign: none is met, and the margin and texts were measured. Else undecided."
    )
    return paragraphs(note) + data_table(["criterion of harm", "outcome", "evidence"], rows, text_columns=3)


def commands(model: str) -> str:
    """How harm is measured, as HTML."""
    return (
        f"Generate with both models and judge: <code>ches generate --model {elements.shown(model)} --prompts PROMPTS "
        "--out g &amp;&amp; ches judge --responses g/responses.jsonl --out j</code>, then <code>ches diagnose "
        "--judgments</code>."
    )


def run_health(losses: Mapping[str, Sequence[tuple[int, float]]], loss: str, status: str) -> str:
    """Is it a bug? What the log of a training run says, as HTML."""
    values = losses.get("loss") or []
    words = []
    if values:
        step, first = values[0]
        begins = f"The loss begins at {readable(first, 3)}"
        if loss == "dpo" and step <= 1:
            near = abs(first - np.log(2)) < 0.02
            begins += " (ln 2, as it must)" if near else " and not at ln 2: policy and reference differ at the start"
        words = [begins, f"ends at {readable(values[-1][1], 3)}"]
        if not np.isfinite([value for _, value in values]).all():
            words.append("is not finite on the way")
    tail = f" The run is {escape(status)}." if status and status != "done" else ""
    return (escape(", ".join(words)) + "." if words else "No log of the loss.") + tail
