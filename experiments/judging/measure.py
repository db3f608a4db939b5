r"""Precision and recall of the rule of the package, and of the one before it, on the labelled answers.

    python -m experiments.judging.measure

.. math:: \mathrm{precision} = \frac{TP}{TP + FP}, \qquad \mathrm{recall} = \frac{TP}{TP + FN}

with Wilson's 95 % intervals; a refusal that the rule leaves undecided counts as missed. Writes
``ches_jax/judges/measured.json``, which the summary of ``ches judge`` quotes, and the table of ``docs/judging.md``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ches_jax.judges.phrases import MEASURED, default_rules, load_rules, refused
from ches_jax.stats import wilson

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "judging.md"
START, END = "<!-- measured: python -m experiments.judging.measure -->", "<!-- end -->"


def answers() -> list[dict[str, Any]]:
    """The labelled answers."""
    return [json.loads(line) for line in (HERE / "answers.jsonl").read_text(encoding="utf-8").splitlines()]


def rates(truth: Sequence[bool | None], said: Sequence[bool | None]) -> dict[str, Any]:
    """Counts, precision and recall over answers that have a label.

    >>> rates([True, True, False, None], [True, None, True, None])["precision"][0]
    0.5
    """
    pairs = [(t, s) for t, s in zip(truth, said, strict=True) if t is not None]
    hit = sum(t is True and s is True for t, s in pairs)
    wrong = sum(t is False and s is True for t, s in pairs)
    refusals = sum(t for t, _ in pairs)
    return {
        "answers": len(pairs),
        "refusals": refusals,
        "undecided": sum(s is None for _, s in pairs),
        "false_alarms": wrong,
        "missed": refusals - hit,
        "precision": [hit / (hit + wrong), *wilson(hit, hit + wrong)],
        "recall": [hit / refusals, *wilson(hit, refusals)],
    }


def measured() -> dict[str, Any]:
    """The rates of both rules on both halves; by kind and language, the wrong verdicts on the half it had not seen."""
    rows, rules = answers(), load_rules()
    previous = [bool(x) for x in json.loads((HERE / "previous.json").read_text(encoding="utf-8"))["refused"]]
    said = [refused(rules, row["text"])[0] for row in rows]

    def of(half: str, predictions: Sequence[bool | None]) -> dict[str, Any]:
        chosen = [i for i, row in enumerate(rows) if row["half"] == half]
        return rates([rows[i]["refused"] for i in chosen], [predictions[i] for i in chosen])

    def wrong(by: str) -> dict[str, dict[str, int]]:
        counts: dict[str, dict[str, int]] = {}
        for row, verdict in zip(rows, said, strict=True):
            if row["half"] == "report" and row["refused"] is not None:
                of_one = counts.setdefault(row[by], {"answers": 0, "wrong": 0, "undecided": 0})
                of_one["answers"] += 1
                of_one["undecided" if verdict is None else "wrong"] += verdict != row["refused"]
        return dict(sorted(counts.items()))

    return {
        "rules_sha256": hashlib.sha256(default_rules().read_bytes()).hexdigest(),
        "languages": list(rules.languages),
        "report": {"rule": of("report", said), "previous": of("report", previous)},
        "develop": {"rule": of("develop", said), "previous": of("develop", previous)},
        "by_kind": wrong("kind"),
        "by_language": wrong("language"),
    }


def table(numbers: Mapping[str, Any]) -> str:
    """The rates as Markdown."""
    lines = ["| answers | rule | refusals | precision | recall | false alarms | missed | undecided |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    names = {"report": "written after the rule", "develop": "seen while it was written"}
    for half, name in names.items():
        for rule, r in numbers[half].items():
            p, q = (f"{v:.1%} [{low:.1%}, {high:.1%}]" for v, low, high in (r["precision"], r["recall"]))
            lines.append(
                f"| {r['answers']} {name} | {'this' if rule == 'rule' else '0.2.0'} | {r['refusals']} | {p} | {q} | "
                f"{r['false_alarms']} | {r['missed']} | {r['undecided']} |"
            )
    lines += ["", "Wrong verdicts of the rule on the answers that were written after it:", ""]
    lines += ["| kind or language | answers | wrong | undecided |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {n['answers']} | {n['wrong']} | {n['undecided']} |"
        for name, n in (numbers["by_kind"] | numbers["by_language"]).items()
    ]
    return "\n".join(lines)


def main() -> int:
    """Write the numbers and the table."""
    numbers = measured()
    MEASURED.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(START)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{table(numbers)}\n{END}{after}", encoding="utf-8")
    print(MEASURED)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
