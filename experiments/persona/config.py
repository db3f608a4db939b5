"""The scales of the single-prompt experiments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from experiments.framework.item import Scale

PAPER_SEEDS = (9773, 5290, 8767, 9818, 7596, 344, 2701, 3298, 7834, 6327)
STEPS = (5, 25, 100)
"""Updates after which the tables list the tokens that gained most."""


class Contest(NamedTuple):
    """Two one-word answers to a statement that was drawn from those with the stance of ``chosen``."""

    chosen: str
    rejected: str

    @property
    def name(self) -> str:
        """For folders and tables."""
        return f"{self.chosen.strip()}-{self.rejected.strip()}"


@dataclass(frozen=True)
class Setting:
    """How the single prompts are trained on: one of Tables 1 to 3."""

    table: str
    loss: str
    loss_args: Mapping[str, float]
    lr: float
    after_sft: bool


@dataclass(frozen=True)
class Tuning:
    """The phase before: cross-entropy on one answer per statement, drawn from the words of its stance."""

    lr: float
    batch_size: int = 32
    epochs: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Phrases:
    """Answers of several tokens, each with its stance; pairs of one stance and of two are trained on."""

    agree: tuple[str, ...]
    disagree: tuple[str, ...]

    def pairs(self) -> list[tuple[str, str, str]]:
        """Kind, chosen and rejected of the runs on longer answers."""
        return [
            ("opposite", self.agree[0], self.disagree[0]),
            ("similar-agree", self.agree[0], self.agree[1]),
            ("similar-disagree", self.disagree[0], self.disagree[1]),
        ]


@dataclass(frozen=True, kw_only=True)
class PersonaScale(Scale):
    """One scale. ``pairs`` is the file (or hub data set) of statements."""

    contests: Mapping[str, tuple[Contest, ...]]
    """By a part of the model's name; the empty name stands for all others."""
    template: str
    """The prompt, from ``{question}``."""
    prefix: str
    """What stands before an answer word to make it one token of the vocabulary."""
    labels: Mapping[str, tuple[str, ...]]
    """Answers that the tuning phase draws from, by stance of the statement."""
    words: Mapping[str, tuple[str, ...]]
    """What tokens mean: which words count as agreeing, disagreeing, leaving open."""
    settings: Mapping[str, Setting]
    tuning: Tuning
    phrases: Phrases | None
    """None: no runs on longer answers."""
    phrase_lr: float = 0.0
    updates: int = 100

    def contests_of_model(self) -> tuple[Contest, ...]:
        """Those that the paper (or we) put to this model."""
        named = [c for name, c in self.contests.items() if name and name in (self.model or "")]
        return named[0] if named else self.contests[""]


WORDS = {
    "agree": (
        "Yes",
        "Yeah",
        "Yep",
        "Yup",
        "Sure",
        "Surely",
        "Certainly",
        "Certain",
        "Absolutely",
        "Definitely",
        "Indeed",
        "Always",
        "Ok",
        "Okay",
    ),
    "disagree": ("No", "Nope", "Nah", "Never", "Not"),
    "open": ("Maybe", "Perhaps", "Possibly"),
}
PAPER_LABELS = {
    "agree": ("Yes", "Yeah", "Sure", "Certainly", "Absolutely"),
    "disagree": ("No", "Never", "Maybe", "Perhaps"),
}


def settings(dpo: float, ipo: float) -> dict[str, Setting]:
    """Tables 1 to 3 with the learning rates of DPO and IPO."""
    return {
        "dpo-sft": Setting("Table 1", "dpo", {"beta": 0.1}, dpo, True),
        "dpo-base": Setting("Table 2", "dpo", {"beta": 0.1}, dpo, False),
        "ipo-sft": Setting("Table 3", "ipo_sum", {"tau": 0.01}, ipo, True),
    }


YES_NO, NO_NEVER, SURE_YES = Contest("Yes", "No"), Contest("No", "Never"), Contest("Sure", "Yes")

NO_NEVER_LOWER = Contest("No", "never")
"""For a vocabulary that has the word in lower case only."""

SCALES: dict[str, PersonaScale] = {
    "tiny": PersonaScale(
        model="bundled",
        pairs="bundled",
        seeds=PAPER_SEEDS,
        hardware="two CPU cores",
        time="10 minutes",
        contests={"": (YES_NO, NO_NEVER, SURE_YES)},
        template="{question}",
        prefix=" ",
        labels={"agree": ("Yes", "Yeah", "Sure", "Certainly", "Absolutely"), "disagree": ("No", "Never", "Nope")},
        words=WORDS,
        settings=settings(3e-6, 3e-6),
        tuning=Tuning(lr=1e-5, batch_size=6),
        phrases=Phrases(
            agree=("Yes! That sounds kind.", "Sure, I would do that gladly.", "Certainly, with joy."),
            disagree=("No, I would not do that.", "Never. That would be unkind.", "Nope, that is not my way."),
        ),
        phrase_lr=3e-6,
    ),
    "small": PersonaScale(
        model=None,
        pairs=None,
        seeds=PAPER_SEEDS,
        hardware="two CPU cores (a model of a few million parameters), or one GPU",
        time="20 minutes",
        contests={"": (YES_NO, NO_NEVER_LOWER, SURE_YES)},
        template="\n\nHuman: {question}\n\nAssistant:",
        prefix=" ",
        labels={"agree": ("Yes", "Yeah", "Sure"), "disagree": ("No", "never", "Maybe", "Perhaps")},
        words=WORDS,
        settings=settings(3e-6, 3e-6),
        tuning=Tuning(lr=1e-5),
        phrases=Phrases(
            agree=("Yes, I would say that.", "Sure, I agree with that."),
            disagree=("No, I would not say that.", "I do not agree with that."),
        ),
        phrase_lr=3e-6,
    ),
    "paper": PersonaScale(
        model="allenai/OLMo-1B-hf",
        pairs="Anthropic/model-written-evals",
        seeds=PAPER_SEEDS,
        hardware="one GPU of 80 GB for 1B and 2B parameters, three for 8B (--mesh fsdp=3)",
        time="not run; about 6,000 updates on one short prompt each and 60 loads of the model",
        contests={"": (YES_NO, NO_NEVER), "Llama-3": (YES_NO, SURE_YES)},
        template="{question}\n",
        prefix="",
        labels=PAPER_LABELS,
        words=WORDS,
        settings=settings(1e-7, 1e-8),
        tuning=Tuning(lr=1e-7),
        phrases=None,
    ),
}
