"""What can be wrong with single responses and their labels (KTO's rows), whatever the model; see ``checks``."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ches_jax.data.duplicates import NearDuplicates, normalised, text_of
from ches_jax.data.sources import Record
from ches_jax.health.checks import (
    LONGEST,
    REFUSALS,
    Check,
    interval,
    of_empty_texts,
    of_long_rows,
    of_repetitions,
    size_effect,
)
from ches_jax.judges.phrases import load_rules, refused
from ches_jax.languages import language
from ches_jax.stats import wilson

WORDS = {True: "good", False: "bad"}


@dataclass(frozen=True)
class Single:
    """A response as text, with its label."""

    name: str
    """For messages."""
    prompt: str
    response: str
    good: bool

    @classmethod
    def of(cls, record: Record) -> "Single":
        """Of a row as ``data.unpaired.labelled`` reads it."""
        content = record.content
        return cls(record.where, text_of(content["prompt"]), text_of(content["response"]), content["good"])

    @property
    def prompts(self) -> tuple[str]:
        """The one there is."""
        return (self.prompt,)


def labels(rows: Sequence[Single]) -> Check:
    """How many responses are good. Without both labels there is nothing to prefer."""
    good = sum(r.good for r in rows)
    low, high = wilson(good, len(rows))
    return Check(
        "labels",
        good in (0, len(rows)),
        f"{good} good and {len(rows) - good} bad responses: {good / len(rows):.1%} good [{low:.1%}, {high:.1%}]",
        len(rows),
        {"good": good, "bad": len(rows) - good, "interval": [low, high]},
    )


def length(rows: Sequence[Single]) -> Check:
    """Are good responses longer? In characters; intervals by bootstrap over prompts."""
    size, good = np.array([len(r.response) for r in rows], float), _good(rows)
    finding, d, (low, high) = size_effect([r.prompt for r in rows], lambda i: (size[i][good[i]], size[i][~good[i]]))
    mean = {WORDS[side]: float(size[good == side].mean()) if (good == side).any() else None for side in (True, False)}
    said = ", ".join(f"{word} {value:.1f}" for word, value in mean.items() if value is not None)
    return Check(
        "length",
        finding,
        f"characters: {said}; good - bad, Cohen's d {d:+.2f} [{low:+.2f}, {high:+.2f}]",
        len(rows),
        {"cohens_d": d, "interval": [low, high], **{f"mean_{word}": value for word, value in mean.items()}},
    )


def refusals(rows: Sequence[Single]) -> Check:
    """How many responses of each label refuse, by the rules of ``ches judge``."""
    rules, good = load_rules(), _good(rows)
    said = [refused(rules, r.response)[0] for r in rows]
    yes = np.array([v is True for v in said], float)
    share = {WORDS[side]: _mean(yes[good == side]) for side in (True, False)}
    difference = share["good"] - share["bad"]
    low, high = interval([r.prompt for r in rows], lambda i: _mean(yes[i][good[i]]) - _mean(yes[i][~good[i]]))
    undecided = sum(v is None for v in said)
    of_good = [r.name for r, v in zip(rows, said, strict=True) if v is True and r.good]
    return Check(
        "refusals",
        bool(abs(difference) >= REFUSALS and (low > 0 or high < 0)),
        f"{share['good']:.1%} of good and {share['bad']:.1%} of bad responses refuse, difference {difference:+.1%} "
        f"[{low:+.1%}, {high:+.1%}]" + (f"; {undecided} undecided" if undecided else ""),
        int(yes.sum()),
        {**share, "interval": [low, high], "undecided": undecided},
        of_good,
    )


def empty(rows: Sequence[Single]) -> Check:
    """Rows whose prompt or response is empty or white space alone."""
    return of_empty_texts({r.name: {"prompt": r.prompt, "response": r.response} for r in rows})


def too_long(rows: Sequence[Single]) -> Check:
    """Rows beyond the context that most models have."""
    return of_long_rows({r.name: len(r.prompt) + len(r.response) for r in rows}, LONGEST)


def contradictions(rows: Sequence[Single]) -> Check:
    """The same prompt and response, good in one row and bad in another."""
    known: dict[tuple[str, str, bool], str] = {}
    offending = []
    for r in rows:
        texts = normalised(r.prompt), normalised(r.response)
        if (other := known.get((*texts, not r.good))) is not None:
            offending.append(f"{r.name} ({WORDS[r.good]}) against {other}")
        known.setdefault((*texts, r.good), r.name)
    n = len(offending)
    return Check("contradictions", n > 0, f"{n} responses are good in one row and bad in another", n, {}, offending)


def duplicates(rows: Sequence[Single]) -> Check:
    """Rows that repeat an earlier one with the same label, exactly (but for case and punctuation) or nearly."""
    known: dict[tuple[str, str, bool], str] = {}
    near = NearDuplicates()
    exact, similar = [], []
    for r in rows:
        key = (normalised(r.prompt), normalised(r.response), r.good)
        if key in known:
            exact.append(f"{r.name} repeats {known[key]}")
            continue
        known[key] = r.name
        if (other := near.first_like(r.name, r.prompt, r.response, WORDS[r.good])) is not None:
            similar.append(f"{r.name} is nearly {other}")
    return of_repetitions(exact, similar, len(rows))


def languages(rows: Sequence[Single]) -> Check:
    """The mix of languages of the responses, by label; for reading, never a finding."""
    mix = {WORDS[side]: Counter(language(r.response) for r in rows if r.good == side) for side in (True, False)}
    shown = "; ".join(
        f"{word} {', '.join(f'{code} {n / counts.total():.1%}' for code, n in counts.most_common(5))}"
        for word, counts in mix.items()
        if counts
    )
    return Check("languages", False, shown, 0, {word: dict(counts.most_common()) for word, counts in mix.items()})


CHECKS: tuple[Callable[[Sequence[Single]], Check], ...] = (
    labels,
    length,
    refusals,
    empty,
    too_long,
    contradictions,
    duplicates,
    languages,
)


def _good(rows: Sequence[Single]) -> np.ndarray:
    return np.array([r.good for r in rows], bool)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
