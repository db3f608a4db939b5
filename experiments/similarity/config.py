"""The scales of the experiments on which pairs cause displacement."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from experiments.framework.item import Scale, Sft

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
MEASURES = ("ches", "ln_ches", "head_score", "minus_edit_distance", "last_hidden_inner", "random")
"""Names of ``ches_jax.scores.formulas.SCORES``. The paper has the first and the fourth and fifth."""


@dataclass(frozen=True)
class Objective:
    """A loss and the measures whose windows are trained on with it."""

    loss: str
    loss_args: Mapping[str, float]
    lr: float
    measures: tuple[str, ...] = MEASURES


@dataclass(frozen=True, kw_only=True)
class SimilarityScale(Scale):
    """One scale. ``pairs`` is a file or hub data set of preference pairs."""

    split: str | None = None
    sample: int | None = None
    """Pairs drawn from the data; None: all."""
    sample_seed: int = 548
    dialogue: str = "{prompt}"
    """How a prompt that is not written so already is put."""
    max_length: int
    """Tokens of prompt and response; what is longer is cut."""
    window: int
    """Pairs of a window around a quantile of the score."""
    batch_size: int
    accumulate: int = 1
    objectives: Mapping[str, Objective] = field(default_factory=dict)
    coefficients_of: int = 64
    """Pairs whose coefficients and inner products are counted."""
    per_category: int = 0
    """Pairs of each category of the bundled world."""

    def with_options(self, **changes: Any) -> Self:
        """Data of the user's are taken whole where the scale has its own: split and sample belong to those."""
        own = "pairs" in changes and self.pairs is not None
        return super().with_options(**({"split": None, "sample": None} if own else {}), **changes)


def objectives(lr: float, others: tuple[float, float], ipo: tuple[str, ...] = MEASURES) -> dict[str, Objective]:
    """DPO and IPO as in the paper at one learning rate; DPO on the windows of CHES at two others."""
    beta, tau = {"beta": 0.1}, {"tau": 0.01}
    return {
        "dpo": Objective("dpo", beta, lr),
        "ipo": Objective("ipo_sum", tau, lr, ipo),
        "dpo-lower": Objective("dpo", beta, others[0], ("ches",)),
        "dpo-higher": Objective("dpo", beta, others[1], ("ches",)),
    }


SCALES: dict[str, SimilarityScale] = {
    "tiny": SimilarityScale(
        model="bundled",
        pairs="bundled",
        seeds=(0, 1, 2),
        hardware="two CPU cores",
        time="10 minutes",
        max_length=160,
        window=80,
        batch_size=5,
        objectives=objectives(1e-5, (3e-6, 3e-5), ipo=("ches",)),
        per_category=90,
    ),
    "small": SimilarityScale(
        model=None,
        pairs=None,
        seeds=(0, 1, 2),
        hardware="two CPU cores (a model of a few million parameters), or one GPU",
        time="an hour",
        dialogue="\n\nHuman: {prompt}\n\nAssistant:",
        max_length=192,
        window=64,
        batch_size=4,
        objectives=objectives(1e-5, (3e-6, 3e-5), ipo=("ches",)),
        sft=Sft(lr=1e-3, epochs=6.0),
    ),
    "small-short": SimilarityScale(
        model=None,
        pairs=None,
        seeds=(0, 1, 2),
        hardware="two CPU cores (a model of less than a million parameters)",
        time="ten CPU minutes for 260K parameters",
        sample=320,
        dialogue="{prompt}\n",
        max_length=160,
        window=64,
        batch_size=4,
        objectives={"dpo": Objective("dpo", {"beta": 0.1}, 3e-5, ("ches", "head_score", "random"))},
        sft=Sft(lr=2e-3, epochs=10.0),
    ),
    "paper": SimilarityScale(
        model="allenai/OLMo-1B-hf",
        pairs="HuggingFaceH4/ultrafeedback_binarized",
        split="train_prefs",
        sample=5000,
        seeds=(0, 1, 2),
        hardware="one GPU of 80 GB for 1B parameters, two for 2B, four for 8B (--mesh fsdp=4)",
        time="not run; 5,000 pairs to score and 210 runs of 16 updates of 32 pairs",
        dialogue="<|prompter|>{prompt}<|assistant|>",
        max_length=512,
        window=512,
        batch_size=32,
        accumulate=8,
        objectives=objectives(1e-7, (5e-8, 5e-7)),
    ),
}
