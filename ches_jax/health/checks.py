r"""What can be wrong with preference pairs whatever the model: each check is a function of all rows.

A check says what it measured, in how many rows, and whether that is a *finding*: beyond its threshold, which stands
here and in ``docs/data_health.md``. Differences between the sides are findings only where their 95 % interval excludes
zero.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ches_jax.data.duplicates import NEAR, NearDuplicates, normalised, pair_texts, text_of
from ches_jax.data.messages import says_nothing
from ches_jax.data.sources import Record
from ches_jax.data.two_prompts import prompts_in
from ches_jax.judges.phrases import load_rules, refused
from ches_jax.languages import UNDETERMINED, language
from ches_jax.stats import bootstrap, wilson

EFFECT = 0.5
"""Cohen's d of a length difference from which it is a finding: a medium effect (Cohen 1988)."""
REFUSALS = 0.1
"""Difference of the shares of refusals from which it is a finding."""
SHARE = 0.01
"""Share of rows from which duplicates, scores against labels and languages that differ are a finding."""
LONGEST = 100_000
"""Characters of prompt and longer response from which a row is a finding: some 30,000 tokens of English."""
DRAWS = 1000
FEWEST = 6
"""Rows that all differ in the same direction are chance with a probability of 3 % (sign test)."""


@dataclass(frozen=True)
class Row:
    """A pair as texts."""

    name: str
    """For messages."""
    prompt: str
    chosen: str
    rejected: str
    extra: Mapping[str, Any]
    rejected_prompt: str | None = None
    """Of the rejected response, where it has its own."""

    @classmethod
    def of(cls, record: Record) -> "Row":
        """Of a row as read."""
        _, chosen, rejected = pair_texts(record.content)
        prompt, *other = map(text_of, prompts_in(record.content))
        return cls(record.where, prompt, chosen, rejected, record.extra, other[0] if other else None)

    @property
    def prompts(self) -> tuple[str, str]:
        """Of the chosen and of the rejected response."""
        return self.prompt, self.prompt if self.rejected_prompt is None else self.rejected_prompt

    @property
    def sides(self) -> tuple[str, str]:
        """Both responses, normalised."""
        return normalised(self.chosen), normalised(self.rejected)


@dataclass(frozen=True)
class Check:
    """What one check found."""

    name: str
    finding: bool
    text: str
    """For a person: one line."""
    rows: int = 0
    """How many rows it is about."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    examples: Sequence[str] = ()
    """Names of the first of these rows."""


def cohens_d(a: np.ndarray, b: np.ndarray) -> float:
    r"""Cohen's d, ``(mean(a) - mean(b)) / s`` with the pooled standard deviation ``s``.

    Infinite where each side has one value and they differ; NaN where all values are one, or a side has fewer than two.

    .. math:: d = \frac{\bar a - \bar b}{\sqrt{(s_a^2 + s_b^2) / 2}}

    >>> cohens_d(np.array([2.0, 4.0]), np.array([1.0, 3.0])).__round__(4)
    0.7071
    """
    if min(len(a), len(b)) < 2:
        return float("nan")
    difference, spread = a.mean() - b.mean(), np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / 2)
    if spread > 0:
        return float(difference / spread)
    return float(np.copysign(np.inf, difference)) if difference else float("nan")


def size_effect(
    prompts: Sequence[str], sides: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
) -> tuple[bool, float, list[float]]:
    """Whether two sides differ in size, Cohen's d and its interval.

    Sides of one size each have an infinite effect and no interval; they differ from ``FEWEST`` rows on.

    Args:
      prompts: of each row.
      sides: the sizes of both sides in the rows that are drawn.
    """

    def effect(rows: np.ndarray) -> float:
        d = cohens_d(*sides(rows))
        return d if np.isfinite(d) else np.nan

    both = sides(np.arange(len(prompts)))
    d, (low, high) = cohens_d(*both), interval(prompts, effect).tolist()
    if np.isinf(d):
        return min(map(len, both)) >= FEWEST, d, [low, high]
    return bool(abs(d) >= EFFECT and (low > 0 or high < 0)), d, [low, high]


def length(rows: Sequence[Row]) -> Check:
    """Is the chosen response the longer one? In characters; intervals by bootstrap over prompts."""
    chosen, rejected = (np.array([len(getattr(r, side)) for r in rows], float) for side in ("chosen", "rejected"))
    finding, d, (low, high) = size_effect([r.prompt for r in rows], lambda i: (chosen[i], rejected[i]))
    longer = int((chosen > rejected).sum())
    share = wilson(longer, len(rows))
    return Check(
        "length",
        finding,
        f"chosen - rejected {chosen.mean() - rejected.mean():+.1f} characters, Cohen's d {d:+.2f} [{low:+.2f}, "
        f"{high:+.2f}]; chosen is longer in {longer / len(rows):.1%} [{share[0]:.1%}, {share[1]:.1%}]",
        longer,
        {
            "cohens_d": d,
            "interval": [low, high],
            "mean_chosen": float(chosen.mean()),
            "mean_rejected": float(rejected.mean()),
            "share_chosen_longer": longer / len(rows),
        },
    )


def refusals(rows: Sequence[Row]) -> Check:
    """How many responses of each side refuse, by the rules of ``ches judge``."""
    rules = load_rules()
    said = {side: [refused(rules, getattr(r, side))[0] for r in rows] for side in ("chosen", "rejected")}
    yes = {side: np.array([v is True for v in values], float) for side, values in said.items()}
    shares = {side: float(values.mean()) for side, values in yes.items()}
    undecided = sum(v is None for values in said.values() for v in values)
    difference = shares["chosen"] - shares["rejected"]
    low, high = interval([r.prompt for r in rows], lambda i: float(yes["chosen"][i].mean() - yes["rejected"][i].mean()))
    one_sided = [
        r.name for r, c, x in zip(rows, said["chosen"], said["rejected"], strict=True) if (c is True) != (x is True)
    ]
    return Check(
        "refusals",
        bool(abs(difference) >= REFUSALS and (low > 0 or high < 0)),
        f"{shares['chosen']:.1%} of chosen and {shares['rejected']:.1%} of rejected refuse, difference "
        f"{difference:+.1%} [{low:+.1%}, {high:+.1%}]" + (f"; {undecided} responses undecided" if undecided else ""),
        len(one_sided),
        {"chosen": shares["chosen"], "rejected": shares["rejected"], "interval": [low, high], "undecided": undecided},
        one_sided,
    )


def identical(rows: Sequence[Row]) -> Check:
    """Pairs whose sides say the same."""
    same = [r.name for r in rows if r.rejected_prompt is None and r.chosen.strip() == r.rejected.strip()]
    return Check("identical sides", bool(same), f"{len(same)} pairs with two equal responses", len(same), {}, same)


def empty(rows: Sequence[Row]) -> Check:
    """Pairs with a side, or a prompt, that is empty or white space alone."""
    return of_empty_texts({r.name: {s: getattr(r, s) for s in ("prompt", "chosen", "rejected")} for r in rows})


def of_empty_texts(texts: Mapping[str, Mapping[str, str]]) -> Check:
    """Rows with a text that says nothing: name of the row -> name of the text -> text."""
    bare = {name: [s for s, text in of_row.items() if says_nothing(text)] for name, of_row in texts.items()}
    offending = [f"{name} ({', '.join(sides)})" for name, sides in bare.items() if sides]
    return Check(
        "empty texts", bool(offending), f"{len(offending)} rows with an empty text", len(offending), {}, offending
    )


def too_long(rows: Sequence[Row]) -> Check:
    """Prompts, alone or with their longer response, beyond the context that most models have; prompts are never cut."""
    longest = {
        r.name: max(len(p) + len(t) for p, t in zip(r.prompts, (r.chosen, r.rejected), strict=True)) for r in rows
    }
    return of_long_rows(longest, LONGEST)


def of_long_rows(longest: Mapping[str, int], most: int) -> Check:
    """Rows of more characters than ``most``: name of the row -> characters."""
    offending = [f"{name} ({size:,} characters)" for name, size in longest.items() if size > most]
    words = f"{len(offending)} rows of more than {most:,} characters, the longest of {max(longest.values()):,}"
    return Check(
        "prompt_too_long", bool(offending), words, len(offending), {"longest": max(longest.values())}, offending
    )


def unreadable(records: Sequence[Record]) -> Check:
    """Rows that cannot be read: nulls, numbers for texts, damaged lines."""
    offending = [f"{r.where}: {r.fault}" for r in records]
    return Check("unreadable", bool(offending), f"{len(offending)} rows cannot be read", len(offending), {}, offending)


def contradictions(rows: Sequence[Row]) -> Check:
    """The same prompt and responses with the labels both ways round."""
    known: dict[tuple[str, str, str, str], str] = {}
    offending = []
    for r in rows:
        (asked, also), (chosen, rejected) = map(normalised, r.prompts), r.sides
        key, other_way = (asked, also, chosen, rejected), (also, asked, rejected, chosen)
        if key != other_way and (other := known.get(other_way)) is not None:
            offending.append(f"{r.name} against {other}")
        known.setdefault(key, r.name)
    return Check(
        "contradictions",
        bool(offending),
        f"{len(offending)} rows prefer what another row rejects",
        len(offending),
        {},
        offending,
    )


def duplicates(rows: Sequence[Row]) -> Check:
    """Rows that repeat an earlier one, exactly (but for case and punctuation) or nearly."""
    known: dict[tuple[str, ...], str] = {}
    near = NearDuplicates()
    exact, similar = [], []
    for r in rows:
        key = (*map(normalised, r.prompts), *r.sides)
        if key in known:
            exact.append(f"{r.name} repeats {known[key]}")
            continue
        known[key] = r.name
        if (other := near.first_like(r.name, "\n".join(dict.fromkeys(r.prompts)), r.chosen, r.rejected)) is not None:
            similar.append(f"{r.name} is nearly {other}")
    return of_repetitions(exact, similar, len(rows))


def of_repetitions(exact: Sequence[str], similar: Sequence[str], rows: int) -> Check:
    """Of so many rows, those that repeat an earlier one."""
    n = len(exact) + len(similar)
    return Check(
        "duplicates",
        n >= SHARE * rows and n > 0,
        f"{len(exact)} rows repeat an earlier one exactly, {len(similar)} nearly (Jaccard similarity of word "
        f"triples from {NEAR})",
        n,
        {"exact": len(exact), "near": len(similar)},
        [*exact, *similar],
    )


def scores(rows: Sequence[Row]) -> Check:
    """Columns with a number for each side (``score_chosen`` and ``score_rejected``) that disagree with the label."""
    columns = [(n, m) for n in dict.fromkeys(k for r in rows for k in r.extra) if (m := _other_side(n)) is not None]
    numbers: dict[str, Any] = {}
    offending: list[str] = []
    compared = 0
    for ours, theirs in columns:
        pairs = [(r.name, _number(r.extra.get(ours)), _number(r.extra.get(theirs))) for r in rows]
        both = [(name, a, b) for name, a, b in pairs if a is not None and b is not None]
        if not both:
            continue
        # of ranks the smaller one is the better
        sign = -1 if "rank" in ours.lower() else 1
        against = [f"{name} ({ours} {a:g}, {theirs} {b:g})" for name, a, b in both if sign * (a - b) < 0]
        equal = sum(a == b for _, a, b in both)
        numbers[ours] = {"other": theirs, "rows": len(both), "against": len(against), "equal": equal}
        compared += len(both)
        offending += against
    text = "no columns with a number for each side"
    if numbers:
        text = "; ".join(
            f"{ours} against {n['other']}: {n['against']} of {n['rows']} rows disagree with the label, "
            f"{n['equal']} are equal"
            for ours, n in numbers.items()
        )
    return Check(
        "scores", bool(offending) and len(offending) >= SHARE * compared, text, len(offending), numbers, offending
    )


def languages(rows: Sequence[Row]) -> Check:
    """The mix of languages, and pairs whose sides are in two."""
    of = [(r.name, *(language(t) for t in (r.prompt, r.chosen, r.rejected))) for r in rows]
    mix = Counter(chosen for _, _, chosen, _ in of)
    apart = [
        f"{name} (chosen {chosen}, rejected {rejected})"
        for name, _, chosen, rejected in of
        if UNDETERMINED not in (chosen, rejected) and chosen != rejected
    ]
    shown = ", ".join(f"{code} {n / len(rows):.1%}" for code, n in mix.most_common(8))
    return Check(
        "languages",
        bool(apart) and len(apart) >= SHARE * len(rows),
        f"chosen responses: {shown}; {len(apart)} pairs have sides in two languages",
        len(apart),
        {"chosen": dict(mix.most_common()), "two_languages": len(apart)},
        apart,
    )


class Prompted(Protocol):
    """A row with a prompt, or one for each response."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def prompts(self) -> tuple[str, ...]:
        """As texts."""
        ...


def leaks(rows: Sequence[Prompted], against: Iterable[str], name: str) -> Check:
    """Prompts that stand in other data too (a test set): equal, or nearly."""
    near = NearDuplicates()
    exact: dict[str, str] = {}
    for i, prompt in enumerate(against):
        key = normalised(prompt)
        if key and key not in exact:
            exact[key] = f"row {i}"
            near.first_like(f"row {i}", prompt)
    equal, similar = [], []
    for r in rows:
        own = dict.fromkeys(r.prompts)
        if other := next((exact[key] for key in map(normalised, own) if key in exact), None):
            equal.append(f"{r.name} is {other} of {name}")
        elif other := next((place for prompt in own if (place := near.like(prompt)) is not None), None):
            similar.append(f"{r.name} is nearly {other} of {name}")
    n = len(equal) + len(similar)
    return Check(
        "leaked prompts",
        n > 0,
        f"{len(equal)} prompts stand in {name} too, {len(similar)} nearly",
        n,
        {"exact": len(equal), "near": len(similar)},
        equal + similar,
    )


CHECKS: tuple[Callable[[Sequence[Row]], Check], ...] = (
    length,
    refusals,
    identical,
    empty,
    too_long,
    contradictions,
    duplicates,
    scores,
    languages,
)


def interval(prompts: Sequence[str], statistic: Callable[[np.ndarray], np.ndarray | float]) -> np.ndarray:
    """95 % by bootstrap over prompts, whose rows are not independent: both ends, [2, ...]; NaN of a single row.

    Args:
      prompts: of each row.
      statistic: of the numbers of the rows that are drawn.
    """
    if len(prompts) < 2:
        return np.full(2, np.nan)
    numbers: dict[str, int] = defaultdict(lambda: len(numbers))
    clusters = np.array([numbers[p] for p in prompts])
    with np.errstate(invalid="ignore"):
        return bootstrap(statistic, len(prompts), draws=DRAWS, clusters=clusters)


def _other_side(column: str) -> str | None:
    """``score_rejected`` for ``score_chosen``; None for a column of no side.

    >>> _other_side("Chosen_Score"), _other_side("score")
    ('Rejected_Score', None)
    """
    if re.search("chosen", column, re.IGNORECASE) is None:
        return None
    return re.sub(
        "chosen", lambda m: "Rejected" if m[0][0].isupper() else "rejected", column, count=1, flags=re.IGNORECASE
    )


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if np.isfinite(number) else None
