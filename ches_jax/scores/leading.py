"""Which score of a run orders its pairs: the one that predicted best, by our own measurements, what training does."""

from collections.abc import Collection
from typing import NamedTuple

MEASURED = {
    "head_score": (0.85, 0.84),
    "logp_margin": (0.65, 0.79),
    "ches": (0.41, 0.80),
    "projection": (0.24, 0.58),
    "cosine": (0.28, -0.09),
    "last_hidden_inner": (0.37, -0.08),
    "minus_edit_distance": (0.31, -0.16),
    "ln_ches": (0.26, -0.29),
    "swapped": (0.06, -0.63),
}
"""Spearman's correlation with the fall of the chosen response over five steps of training, each pair alone, on two sets
of 24 pairs (claim F3 of ``theory/README.md``), the highest mean first."""


LOW_IS_WORSE = frozenset({"forecast_chosen", "forecast_rejected"})
"""Numbers that are a change of ln pi; of all scores, and of an influence, the high ones are the bad ones."""


class Leading(NamedTuple):
    """A score, and why it is the one."""

    name: str
    why: str


def leading_score(names: Collection[str]) -> Leading | None:
    """The score of ``names`` that leads; a forecast of the training run itself goes before any score of a pair alone.

    >>> leading_score(["ln_ches", "ches", "head_score"]).name
    'head_score'
    >>> leading_score(["ches", "forecast_chosen"]).name
    'forecast_chosen'
    >>> leading_score([]) is None
    True
    """
    if "forecast_chosen" in names:
        return Leading(
            "forecast_chosen",
            "it is the change of the chosen response that the gradients of the whole data set forecast; scores of a "
            "pair alone do not see the other pairs",
        )
    if "influence" in names:
        return Leading("influence", "it is what each pair does to the chosen responses of the others")
    leader = next((name for name in MEASURED if name in names), None)
    if leader is None:
        return None
    first, second = MEASURED[leader]
    others = [
        f"{n} {a:+.2f} and {b:+.2f}" for n, (a, b) in MEASURED.items() if n in ("ches", "ln_ches") and n != leader
    ]
    return Leading(
        leader,
        f"of the scores here its ranks went best with the fall of chosen responses in this project's measurements "
        f"({first:+.2f} and {second:+.2f} on two sets of pairs, each pair trained alone; {', '.join(others)})",
    )
