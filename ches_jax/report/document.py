"""A page as plain data: what every page has, whatever run it is of."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ches_jax.report.pair_table import PairTable

Tone = Literal["good", "bad", "unsure", "plain"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page with an anchor."""

    anchor: str
    heading: str
    body: str
    """HTML, escaped already."""
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    """What is on a page; texts are plain, bodies of sections and answers are HTML."""

    kind: str
    """Which command the run is of."""
    title: str
    """For the browser's tab."""
    headline: str
    """The answer in one sentence."""
    subtitle: str
    """Which model, which data, how much."""
    answers: Sequence[tuple[str, str]] = ()
    """Question, and answer as HTML."""
    tone: Tone = "plain"
    notes: Sequence[str] = ()
    sections: Sequence[Section] = ()
    pairs: PairTable | None = None
