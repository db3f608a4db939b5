"""The scales of the experiments on unlearned refusals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from experiments.framework.item import Scale

SUBSETS = ("ln_ches", "head_score", "length", "random")
"""Ways to keep few pairs: the lowest by a score; ``length``: by |y-| - |y+|, what CHES mostly follows; by chance."""
TYPES = ("two_refusals", "two_compliances", "mixed", "undecided")
"""Types of pairs, by what the judge said of their responses; ``mixed``: one refusal, which is preferred."""

Objective = Literal["dpo", "ipo"]


@dataclass(frozen=True)
class Method:
    """What is trained on what."""

    objective: Objective
    pairs: str = "generated"
    """``generated`` or ``gold``; of the generated: one of ``SUBSETS``, or one of ``TYPES``."""
    sft: float = 0.0
    """Coefficient of -ln pi(y+), summed over tokens."""
    as_long: bool = False
    """As many updates as an epoch of all pairs has: few pairs otherwise differ from all in number of updates too."""


LLAMA_SFT = 0.1
"""The paper's coefficient of the likelihood term for Llama-3-8B-Instruct; Gemma-2B-IT has 1."""
LOSSES: Mapping[str, tuple[str, Mapping[str, float]]] = {
    "dpo": ("dpo", {"beta": 0.1}),
    "ipo": ("ipo_sum", {"tau": 0.01}),
}


@dataclass(frozen=True, kw_only=True)
class SorryScale(Scale):
    """One scale. ``pairs`` holds the requests: ``bundled``, or a file or hub data set with a column ``prompt``."""

    split: str | None = None
    where: Mapping[str, str] = field(default_factory=dict)
    """Only rows of the requests and of the gold responses that hold these values."""
    dialogue: str | None = None
    """How a request that is not written so already is put; None: as a user's turn, through the chat template."""
    requests: int | None
    """How many are drawn; None: all."""
    request_tokens: int | None = None
    """The longest request; None: what leaves room for a response in the model's context."""
    test_share: float = 0.15
    draw_seed: int = 0
    """Of the requests, the split, the sampled responses and the order of ties."""

    judge: str
    """``rules``, ``bundled`` (the rules of the bundled world), or a judge model."""
    judge_template: str | None = None
    gold: str | None
    """Judged responses to the same requests: ``bundled``, a file or hub data set (``data.Judged``), or None."""
    gold_splits: tuple[str | None, ...] = (None,)

    max_new_tokens: int
    stop: tuple[str, ...] = ()
    """Strings that end a response, beside the end-of-sequence tokens."""
    temperature: float = 0.7
    """Of the responses that are judged after training; preferences are sampled at 1."""
    batch_size: int = 32
    accumulate: int = 1
    keep: float = 0.05
    """Share of the pairs that the filters keep."""
    rates: tuple[float, ...]
    """Learning rates to choose from on the generated pairs: the largest whose loss after the epoch is below the one at
    the start, and whose responses end (``runs.largest_rate``)."""
    gold_rates: tuple[float, ...]
    rate_seeds: int = 1
    """How many seeds that choice looks at."""
    sample_rows: int = 64
    """Responses sampled together."""
    row_tokens: int | None = None
    """Length of packed rows in training: the same for all runs, so that they share compiled programs."""
    methods: Mapping[str, Method]

    def with_options(self, **changes: Any) -> Self:
        """Requests of the user's are taken whole and have no gold responses; Llama takes a coefficient of its own."""
        own: dict[str, Any] = {}
        if "pairs" in changes:
            own |= {"split": None, "where": {}, "gold": None, "gold_splits": (None,)}
        if "Llama" in str(changes.get("model", "")):
            own["methods"] = methods(LLAMA_SFT, 1000.0)
        return super().with_options(**(own | changes))


def methods(dpo_sft: float, ipo_sft: float) -> dict[str, Method]:
    """Every method of the paper, the filters beside its own, and runs on pairs of one type."""
    by_name = {
        "dpo": Method("dpo"),
        "dpo+sft": Method("dpo", sft=dpo_sft),
        "dpo-gold": Method("dpo", "gold"),
        **{f"dpo-{name}": Method("dpo", name) for name in SUBSETS},
        **{f"dpo-{name}-long": Method("dpo", name, as_long=True) for name in SUBSETS},
        "dpo-two_refusals": Method("dpo", "two_refusals"),
        "dpo-two_compliances": Method("dpo", "two_compliances"),
        "ipo": Method("ipo"),
        "ipo+sft": Method("ipo", sft=ipo_sft),
        "ipo-gold": Method("ipo", "gold"),
        **{f"ipo-{name}": Method("ipo", name) for name in ("ln_ches", "random")},
    }
    return by_name


SCALES: dict[str, SorryScale] = {
    "tiny": SorryScale(
        model="bundled",
        pairs="bundled",
        seeds=(0, 1, 2),
        hardware="two CPU cores",
        time="10 minutes",
        dialogue="<|user|> {prompt}<|assistant|>",
        requests=435,
        judge="bundled",
        gold="bundled",
        max_new_tokens=48,
        rates=(3e-5, 1e-4, 3e-4, 1e-3),
        gold_rates=(3e-5, 1e-4, 3e-4, 1e-3),
        row_tokens=128,
        methods=methods(0.1, 1000.0),
    ),
    "small": SorryScale(
        model=None,
        pairs=None,
        seeds=(0, 1, 2),
        hardware="two CPU cores (a model of a few million parameters), or one GPU",
        time="half an hour for 3M parameters on a CPU",
        dialogue="\n\nHuman: {prompt}\n\nAssistant:",
        requests=435,
        request_tokens=64,
        judge="rules",
        gold=None,
        max_new_tokens=96,
        stop=("\n\nHuman:",),
        rates=(1e-6, 3e-6, 1e-5, 3e-5, 1e-4),
        gold_rates=(1e-6, 3e-6, 1e-5, 3e-5, 1e-4),
        row_tokens=512,
        methods=methods(0.1, 1000.0),
    ),
    "paper": SorryScale(
        model="google/gemma-2b-it",
        pairs="sorry-bench/sorry-bench-202406",
        split="train",
        where={"prompt_style": "base"},
        seeds=(0, 1, 2),
        hardware="three GPUs of 80 GB for 2B parameters (--mesh fsdp=3), four for 8B",
        time="not run; 450 requests, 57 runs of at most 12 updates of 32 pairs, 25,000 responses of up to 512 tokens",
        requests=None,
        judge="sorry-bench/ft-mistral-7b-instruct-v0.2-sorry-bench-202406",
        gold="sorry-bench/sorry-bench-human-judgment-202406",
        gold_splits=("train", "test"),
        max_new_tokens=512,
        accumulate=8,
        rates=(5e-6,),
        gold_rates=(1e-6,),
        methods=methods(1.0, 1000.0),
    ),
}
