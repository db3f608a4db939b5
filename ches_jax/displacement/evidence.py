"""Was a fall harmful? Named criteria, each met, not met or not measured, and the answer that follows from them.

    harmful     some criterion of harm is met
    benign      none is met, and both the margin and some texts of the models were measured
    undecided   otherwise: what is missing is named

That chosen responses fell is no criterion: on pairs that the first model would write itself, ln pi falls by the
Kullback-Leibler divergence whatever is learned (Rafailov et al., 2406.02900).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ches_jax.errors import ChesError
from ches_jax.runs.files import read_text

HARM = ("harmful", "benign")
LONGER = 1.5
"""Factor between the lengths of texts after and before, either way, from which on it is called a change."""
REPEATS = 0.1
"""Rise of the share of repeated 4-grams in a text that counts as a loss of quality."""


@dataclass(frozen=True)
class Criterion:
    """One criterion of harm."""

    name: str
    outcome: Literal["met", "not met", "not measured"]
    evidence: str
    """What was measured, or the option that measures it."""
    of_texts: bool = False
    """Whether it rests on texts that the models wrote."""


@dataclass(frozen=True)
class Harm:
    """The answer and its criteria."""

    criteria: tuple[Criterion, ...]

    @property
    def answer(self) -> str:
        """``harmful``, ``benign`` or ``undecided``."""
        if any(c.outcome == "met" for c in self.criteria):
            return "harmful"
        seen = [c for c in self.criteria if c.outcome == "not met"]
        return "benign" if {c.of_texts for c in seen} == {True, False} else "undecided"

    @property
    def where_the_mass_went(self) -> str:
        """The second question."""
        texts = [c for c in self.criteria if c.of_texts and c.outcome != "not measured"]
        return "; ".join(f"{c.name}: {c.evidence}" for c in texts) or (
            "not measured (--responses-before and --responses-after, --judgments, or --generate PROMPTS)"
        )

    @property
    def quality(self) -> str:
        """The third question."""
        measured = [c for c in self.criteria if not c.of_texts and c.outcome != "not measured"]
        return "; ".join(f"{c.evidence}" for c in measured) or "unclear (needs more held-out pairs or evaluations)"

    def lines(self) -> Iterator[str]:
        """For a person."""
        yield f"harm: {self.answer}"
        for c in self.criteria:
            yield f"  {c.outcome}: {c.name} ({c.evidence})"

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        return {"answer": self.answer, "criteria": [vars(c) for c in self.criteria]}


UNMEASURED = Harm(())
"""Nothing is known."""


def margin_criterion(direction: str, interval: str, held_out: bool) -> Criterion:
    """Did the margin fall? Held-out pairs say so; training pairs cannot say that quality held."""
    name = "the held-out margin fell" if held_out else "the margin of the training pairs fell"
    outcome = (
        "met" if direction == "down" else "not met" if direction in ("up", "level") and held_out else "not measured"
    )
    return Criterion(
        name, outcome, f"margin {interval}: {direction}" + ("" if held_out else "; held-out pairs say more")
    )


def text_criteria(before: Path | None, after: Path | None) -> list[Criterion]:
    """Are the texts of the second model much longer or shorter, or more repetitive?

    Args:
      before: responses of the first model: directory of `ches generate`, or JSON lines with text and row_id or prompt.
      after: of the second, to the same prompts.
    """
    names = ("the texts changed in length", "the texts repeat themselves")
    if before is None or after is None:
        missing = "--responses-before and --responses-after, or --generate PROMPTS"
        return [Criterion(name, "not measured", missing, True) for name in names]
    both = _paired(before, after, "responses.jsonl", "text")
    clusters = np.array([key[0] for key, *_ in both])
    ratios = np.array([np.log((len(b) + 1) / (len(a) + 1)) for _, a, b in both])
    repeats = np.array([_repeated(b) - _repeated(a) for _, a, b in both])
    ratio, repeat = _intervals(np.stack([ratios, repeats]), clusters)
    if not ratio.known:
        few = f"{len(set(clusters.tolist()))} prompts are too few"
        return [Criterion(name, "not measured", few, True) for name in names]
    bound = np.log(LONGER)
    longer = "met" if ratio.low > bound or ratio.high < -bound else "not met"
    size = f"{np.exp(ratio.mean):.2f} times as long [{np.exp(ratio.low):.2f}, {np.exp(ratio.high):.2f}]"
    return [
        Criterion(names[0], longer, f"{size}; criterion {LONGER:g} either way", True),
        Criterion(
            names[1],
            "met" if repeat.low > REPEATS else "not met",
            f"share of repeated 4-grams {repeat}; criterion +{REPEATS:g}",
            True,
        ),
    ]


def judged_criterion(judgments: Sequence[Path], want: str | None) -> Criterion:
    """Did the rate of the wanted judgment fall?

    Args:
      judgments: of the first and of the second model: directories of `ches judge`, or their judgments.jsonl.
      want: ``refusal`` or ``answer``: what a good response to these prompts is.

    Raises:
      ChesError: not two files, or none of their responses in common.
    """
    name = f"fewer responses {'refuse' if want == 'refusal' else 'answer'}" if want else "the judged rate fell"
    if not judgments:
        return Criterion(name, "not measured", "--judgments BEFORE AFTER of ches judge, with --want", True)
    if len(judgments) != 2:
        raise ChesError(f"--judgments takes two, of the first and of the second model; got {len(judgments)}")
    both = [item for item in _paired(judgments[0], judgments[1], "judgments.jsonl", "refusal") if None not in item[1:]]
    if not both:
        raise ChesError(f"{judgments[0]} and {judgments[1]}: no response is decided in both")
    clusters = np.array([key[0] for key, *_ in both])
    refused = np.array([[float(a), float(b)] for _, a, b in both]).T
    (change,) = _intervals((refused[1] - refused[0])[None], clusters)
    rates = f"refusals {refused[0].mean():.0%} before, {refused[1].mean():.0%} after, change {change}"
    if want is None:
        return Criterion(name, "not measured", f"{rates}; --want refusal or answer says which is good", True)
    if not change.known:
        return Criterion(name, "not measured", f"{rates}; too few prompts", True)
    fell = change.high < 0 if want == "refusal" else change.low > 0
    return Criterion(name, "met" if fell else "not met", rates, True)


def _intervals(values: np.ndarray, clusters: np.ndarray) -> list[Any]:
    from ches_jax.displacement.intervals import of_pairs

    return of_pairs(values, clusters)


def _repeated(text: str, size: int = 4) -> float:
    """Share of a text's word 4-grams that stand in it more than once.

    >>> _repeated("a b c d " * 3), _repeated("a b c d e f")
    (1.0, 0.0)
    """
    words = text.split()
    grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    if not grams:
        return 0.0
    counts: dict[tuple[str, ...], int] = {}
    for gram in grams:
        counts[gram] = counts.get(gram, 0) + 1
    return sum(n for n in counts.values() if n > 1) / len(grams)


def _paired(before: Path, after: Path, name: str, column: str) -> list[tuple[tuple[str, int], Any, Any]]:
    """Values of the rows that two files share, by ``row_id`` (or prompt) and sample."""
    first, second = (_read(path, name, column) for path in (before, after))
    common = [key for key in first if key in second]
    if not common:
        raise ChesError(f"{before} and {after}: no prompt in common; give both models the same prompts")
    return [(key, first[key], second[key]) for key in common]


def _read(path: Path, name: str, column: str) -> dict[tuple[str, int], Any]:
    file = path / name if path.is_dir() else path
    try:
        rows: list[Mapping[str, Any]] = [
            json.loads(x) for x in read_text(file, ChesError, "JSON lines").splitlines() if x.strip()
        ]
        return {(str(r.get("row_id") or r["prompt"]), int(r.get("sample") or 0)): r[column] for r in rows}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ChesError(f"{file}: expected JSON lines with {column} and row_id or prompt ({error!r})") from None
