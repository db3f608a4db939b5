"""The pairs of the story: those of ``experiments/forecast``, and the prompts that both models answer."""

from typing import Any

from experiments.forecast.data import pairs_file
from experiments.forecast.data import write_pairs as write_parts
from experiments.framework.item import Work

PROMPTS = "prompts"


def write_pairs(work: Work) -> dict[str, Any]:
    """Draw the pairs, write each part, and the first prompts of the test pairs."""
    counts = write_parts(work)
    lines = pairs_file(work, "test").read_text(encoding="utf-8").splitlines(keepends=True)
    pairs_file(work, PROMPTS).write_text("".join(lines[: work.config.texts]), encoding="utf-8")
    return counts
