"""All checks of one data set, as text and as JSON."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ches_jax.data.duplicates import text_of
from ches_jax.data.sources import PairSource, open_prompts
from ches_jax.data.unpaired import LABELLED
from ches_jax.errors import DataError
from ches_jax.health import unpaired
from ches_jax.health.checks import CHECKS, Check, Row, leaks, unreadable
from ches_jax.runs.json_text import json_value

WHAT_TO_DO = {
    "unreadable": "repair these rows or leave them out",
    "length": "expect a model that prefers this length: a loss with length normalisation, ches select --control length",
    "refusals": "look at the examples: the label may mean that the response refuses",
    "identical sides": "leave these pairs out: they have no preferred side",
    "empty texts": "repair these rows or leave them out",
    "prompt_too_long": "leave these rows out, or score with a longer --max-length",
    "contradictions": "keep the label that you trust, or neither row",
    "duplicates": "ches select --dedup exact, or near",
    "scores": "find out which column made the label: one of the two is wrong",
    "languages": "look at the examples: the label may mean a language",
    "leaked prompts": "leave these prompts out of the training set",
    "labels": "find rows with the other label: with one alone nothing can be learned",
}
"""For each check, if it is a finding."""


@dataclass(frozen=True)
class Health:
    """The result of an examination of pairs without a model."""

    source: str
    rows: int
    checks: list[Check]
    show: int = 2

    @property
    def healthy(self) -> bool:
        """Whether no check went beyond its threshold."""
        return not any(c.finding for c in self.checks)

    @property
    def headline(self) -> str:
        """One line."""
        findings = [c.name for c in self.checks if c.finding]
        count = f"{len(findings)} finding{'s' * (len(findings) != 1)}"
        return f"{self.rows} rows, {count}" + (f": {', '.join(findings)}" if findings else "")

    @property
    def counts(self) -> dict[str, int]:
        """For the record of ``--json``."""
        return {"rows": self.rows, "findings": sum(c.finding for c in self.checks)}

    def text(self) -> str:
        """For a person."""
        lines = [self.source, ""]
        for check in self.checks:
            lines.append(f"{'FINDING' if check.finding else 'ok':<9}{check.name:<16}{check.text}")
            if examples := check.examples[: self.show]:
                lines += [f"{'':<25}such as {examples[0]}", *(f"{'':<33}{example}" for example in examples[1:])]
            if check.finding:
                lines.append(f"{'':<25}do: {WHAT_TO_DO[check.name]}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return {
            "pairs": self.source,
            "rows": self.rows,
            "healthy": self.healthy,
            "checks": {
                c.name: json_value(
                    {"finding": c.finding, "rows": c.rows, "text": c.text, "examples": list(c.examples[: self.show])}
                    | {"numbers": dict(c.numbers)}
                )
                for c in self.checks
            },
        }


def examine(source: PairSource, *, limit: int | None = None, against: str | None = None, show: int = 2) -> Health:
    """Every check of the rows, and of prompts that stand in ``against`` (a file of prompts or pairs) too.

    Args:
      source: preference pairs, or labelled single responses (``data.unpaired.LABELLED``).
      limit: only the first rows.
      against: a file whose prompts are compared.
      show: examples of each check.

    Raises:
      DataError: none of the rows can be examined.
    """
    records = list(itertools.islice(source.tolerant(), limit))
    usable = [record for record in records if record.candidates != () and not record.fault]
    if not usable:
        raise DataError(f"{source.name}: no {source.rows.name} to examine")
    checks = [unreadable([record for record in records if record.fault])]
    if source.rows is LABELLED:
        rows = [unpaired.Single.of(record) for record in usable]
        checks += [check(rows) for check in unpaired.CHECKS]
    else:
        rows = [Row.of(record) for record in usable]
        checks += [check(rows) for check in CHECKS]
    if against is not None:
        checks.append(leaks(rows, _prompts(against), against))
    return Health(source.describe(), len(rows), checks, show)


def _prompts(spec: str) -> Iterator[str]:
    return (text_of(r.content.get("prompt", r.content.get("prompt_ids"))) for r in open_prompts(spec))
