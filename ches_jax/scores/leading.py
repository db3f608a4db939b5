"""Which score of a run orders its pairs: the one that predicted best, by our own measurements, what training does."""

from collections.abc import Collection
from typing import NamedTuple

ALONE = {
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
TOGETHER = {
    "head_score": (0.91, -0.11, -0.56),
    "ches": (0.59, -0.07, -0.40),
    "ln_ches": (-0.55, 0.42, 0.30),
    "minus_edit_distance": (-0.07, 0.50, 0.32),
}
"""The same in runs on many pairs: without SFT (``experiments/similarity``, 320 pairs), and after SFT on training and on
held-out pairs (``experiments/forecast``, 256 and 396 pairs)."""
FILTERS = {"influence": 1.82, "random": -0.02, "rejected_tokens": 0.48, "ln_ches": -0.50}
"""Nats by which held-out chosen responses fell less after SFT, without the half of the pairs that is highest by a score
(``experiments/forecast``, 300 pairs)."""
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
            "it is the forecast change of the chosen response, from the gradients of the whole data set; scores of a "
            "pair alone do not see the other pairs",
        )
    if "influence" in names:
        return Leading("influence", "it is what each pair does to the chosen responses of the others")
    leader = next((name for name in ALONE if name in names), None)
    if leader is None:
        return None
    first, second = ALONE[leader]
    others = [f"{n} {a:+.2f} and {b:+.2f}" for n, (a, b) in ALONE.items() if n in ("ches", "ln_ches") and n != leader]
    return Leading(
        leader,
        f"of the scores here it predicted best which chosen responses fell when each pair was trained alone (rank "
        f"correlations {'; '.join([f'{first:+.2f} and {second:+.2f} on two sets of pairs', *others])}). In a run on "
        f"many pairs after SFT no score of a pair alone predicted it ({_together()}); ches forecast did",
    )


def _together() -> str:
    words = [f"{name} {train:+.2f} and {held:+.2f}" for name, (_, train, held) in TOGETHER.items()]
    return f"{', '.join(words)} on training and on held-out pairs"


def why_no_other_default() -> str:
    """Why `ches select` takes influences where no score is named, and nothing in their place.

    >>> why_no_other_default()[:39]
    'of the filters that were measured after'
    """
    gains = ", ".join(f"{name} {nats:+.1f}" for name, nats in FILTERS.items())
    alone = ", ".join(f"{name} {values[0]:+.2f}" for name, values in TOGETHER.items())
    return (
        f"of the filters that were measured after SFT, influence reduced the fall of chosen responses most (nats "
        f"against all pairs: {gains}); without SFT scores of a pair alone predicted its own fall ({alone}), after SFT "
        "they did not"
    )
