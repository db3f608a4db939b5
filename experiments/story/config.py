"""The scales of the story, and what is tried against the fall: an arm is DPO with one thing changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from experiments.forecast.config import OBJECTIVES, ForecastScale
from experiments.forecast.config import SCALES as RECIPES


class Arm(NamedTuple):
    """One way to train."""

    group: str
    """``start``, ``pairs`` (some are left out), ``remedies`` or ``objectives``."""
    label: str
    options: Mapping[str, Any] = {}
    """Options of ``ches train`` that differ from plain DPO."""
    control: bool = False
    """Whether it shows what as much of a change does by chance, or by length alone."""


ARMS: Mapping[str, Arm] = {
    "dpo": Arm("start", "DPO on all pairs"),
    "influence": Arm("pairs", "without the half of highest influence"),
    "ln_ches": Arm("pairs", "without the half of highest ln-CHES"),
    "head_score": Arm("pairs", "without the half of highest head score"),
    "rejected_tokens": Arm("pairs", "without the half of longest rejected", control=True),
    "random": Arm("pairs", "without a random half", control=True),
    "least_influence": Arm("pairs", "without the half of lowest influence", control=True),
    "soft_influence": Arm("pairs", "all pairs, weighted by influence"),
    "sft_term": Arm("remedies", *OBJECTIVES["rpo"]),
    "sft_sum": Arm("remedies", "SFT term per response", {"loss": "dpo_sft_sum", "loss_args": {"sft_coeff": 0.1}}),
    "dpop": Arm("remedies", *OBJECTIVES["dpop"]),
    "dpo_shift": Arm("remedies", *OBJECTIVES["dpo_shift"]),
    "lower_rate": Arm("remedies", "a third of the learning rate"),
    "higher_beta": Arm("remedies", "five times beta", {"loss_args": {"beta": 0.5}}),
    "ipo": Arm("objectives", *OBJECTIVES["ipo"]),
    "cal_dpo": Arm("objectives", *OBJECTIVES["cal_dpo"]),
    "apo_zero": Arm("objectives", "APO-zero", {"loss": "apo_zero"}),
    "cpo": Arm("objectives", "CPO", {"loss": "cpo"}),
    "simpo": Arm("objectives", *OBJECTIVES["simpo"]),
    "orpo": Arm("objectives", "ORPO", {"loss": "orpo"}),
}
"""``dpo`` is what all others are compared with. A coefficient is its paper's where that is on this scale."""
LOWER = 1 / 3
"""Factor of the learning rate in the arm ``lower_rate``."""


@dataclass(frozen=True, kw_only=True)
class StoryScale(ForecastScale):
    """One scale: the recipe of ``experiments/forecast`` (pairs, SFT, DPO), and the arms."""

    arms: tuple[str, ...] = tuple(ARMS)
    watched: int = 128
    """Training pairs that are followed in each arm."""
    texts: int = 128
    """Held-out prompts that both models answer."""
    text_tokens: int = 48
    """Most tokens of an answer."""
    orders: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the arms' runs: orders of the data."""


def _scale(recipe: ForecastScale, **changes: Any) -> StoryScale:
    unused = {"pilot": 0, "filters": (), "variants": ()}
    return StoryScale(**{**vars(recipe), **unused, **changes})


SCALES: dict[str, StoryScale] = {
    "tiny": _scale(
        RECIPES["tiny"],
        time="10 minutes",
        arms=("dpo", "influence", "random", "sft_term", "ipo"),
        watched=32,
        texts=16,
        text_tokens=16,
        orders=(0,),
    ),
    "small": _scale(
        RECIPES["small"],
        time="15 CPU minutes for 260K parameters",
        seeds=(0,),
        orders=(0,),
    ),
    "paper": _scale(RECIPES["paper"], orders=(0, 1, 2), text_tokens=256),
}
