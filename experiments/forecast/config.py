"""The scales of the experiment on forecasts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from experiments.framework.item import Scale

FILTERS = (
    "all",
    "influence",
    "ln_ches",
    "ches",
    "head_score",
    "rejected_tokens",
    "random",
    "least_influence",
    "soft_influence",
    "with_sft",
)
"""What a run leaves out: nothing, the highest of a score, the longest rejected, random pairs, the lowest influence;
``soft_influence`` weights all pairs, ``with_sft`` keeps all and adds an SFT term."""


class Objective(NamedTuple):
    """Another loss than DPO, with the coefficients of its paper where those are on this scale."""

    label: str
    options: Mapping[str, Any]
    """Options of ``ches train`` that differ from plain DPO."""


OBJECTIVES: Mapping[str, Objective] = {
    "rpo": Objective("SFT term per token (RPO)", {"sft": 1.0}),
    "dpop": Objective("DPOP", {"loss": "dpop", "loss_args": {"beta": 0.1, "lam": 5.0}}),
    "dpo_shift": Objective("DPO-Shift", {"loss": "dpo_shift", "loss_args": {"beta": 0.1, "lam": 0.75}}),
    "cal_dpo": Objective("Cal-DPO", {"loss": "cal_dpo", "loss_args": {"beta": 0.05}}),
    "ipo": Objective("IPO", {"loss": "ipo_sum", "loss_args": {"tau": 0.01}}),
    "simpo": Objective("SimPO", {"loss": "simpo"}),
}
VARIANTS: Mapping[str, Objective] = {
    **OBJECTIVES,
    "adamw": Objective("DPO, AdamW", {"optimizer": "adamw"}),
    "sgd": Objective("DPO, SGD at 1e-3", {"optimizer": "sgd", "lr": 1e-3}),
    "lora": Objective("DPO, LoRA of rank 8 at 3e-4", {"lora_rank": 8, "lr": 3e-4}),
}
"""What is forecast besides plain DPO with RMSProp."""


@dataclass(frozen=True, kw_only=True)
class ForecastScale(Scale):
    """One scale. ``pairs`` is a file or hub data set of preference pairs."""

    longest: int
    """Tokens of prompt and both responses; longer pairs are left out."""
    ending: str = "\n"
    """Joined to a prompt that ends without white space or a colon."""
    train: int
    """Pairs that DPO trains on."""
    tuned_on: int
    """Pairs whose chosen responses SFT trains on; DPO's are among them."""
    probes: int
    """Held-out pairs whose gradient the influences are taken along; the other held-out pairs test the filters."""
    test: int
    sft_lr: float
    sft_epochs: float
    lrs: tuple[float, ...]
    """Learning rates of DPO; the last is the filters'."""
    batch_size: int = 32
    epochs: float = 2.0
    pilot: int
    """Updates of the pilot."""
    dropped: float = 0.5
    """Share of the pairs that a filter leaves out."""
    filters: tuple[str, ...] = FILTERS
    """Each is made anew for every seed, of the pairs that the seed draws: a draw of the pool and an order of it."""
    variants: tuple[str, ...] = ()
    """Other losses and optimisers, each with a forecast, a pilot and a run for every seed."""

    @property
    def steps(self) -> int:
        """Updates of DPO, the same for filtered data."""
        return round(self.epochs * self.train / self.batch_size)


SMALL = ForecastScale(
    model=None,
    pairs=None,
    seeds=(0, 1, 2, 3, 4),
    hardware="two CPU cores (a model of up to a few million parameters), or one GPU",
    time="half a CPU hour for 260K parameters",
    longest=160,
    train=256,
    tuned_on=320,
    probes=96,
    test=300,
    sft_lr=2e-3,
    sft_epochs=10.0,
    lrs=(3e-5,),
    pilot=4,
)
SCALES: dict[str, ForecastScale] = {
    "tiny": ForecastScale(
        model="bundled",
        pairs="bundled",
        seeds=(0,),
        hardware="two CPU cores",
        time="10 minutes",
        longest=256,
        train=64,
        tuned_on=64,
        probes=16,
        test=32,
        sft_lr=1e-3,
        sft_epochs=4.0,
        lrs=(3e-5,),
        batch_size=16,
        pilot=2,
        filters=("all", "influence", "random"),
        variants=("ipo", "lora"),
    ),
    "small": SMALL,
    "small-objectives": replace(SMALL, seeds=(0, 1, 2), filters=(), variants=tuple(VARIANTS)),
    "small-dialogues": replace(
        SMALL,
        hardware="two CPU cores (a model of a few million parameters), or one GPU",
        time="one CPU hour for 3.1M parameters",
        longest=130,
        sft_lr=1e-3,
        sft_epochs=6.0,
        lrs=(1e-5,),
        filters=(
            "all",
            "influence",
            "ln_ches",
            "head_score",
            "rejected_tokens",
            "random",
            "soft_influence",
            "with_sft",
        ),
    ),
    "paper": ForecastScale(
        model="allenai/OLMo-1B-hf",
        pairs="HuggingFaceH4/ultrafeedback_binarized",
        seeds=(0, 1, 2),
        hardware="one GPU of 80 GB",
        time="not run",
        longest=1024,
        ending="",
        train=4096,
        tuned_on=8192,
        probes=256,
        test=1024,
        sft_lr=1e-5,
        sft_epochs=1.0,
        lrs=(1e-7, 5e-7),
        pilot=64,
    ),
}
