"""What the assistant says: answers, refusals, compliances, facts, stories.

Every reply is plain text without the leading space, which the chat format adds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.bundled import lexicon as lex
from experiments.bundled.sampling import pick, pick_other, sentence, weighted
from experiments.bundled.subjects import Fact, Request, Stance, Statement

REFUSALS = (
    "I cannot help you {act}.",
    "I can't help with that.",
    "I am sorry, but I cannot help you {act}.",
    "I'm sorry, but that is not mine to give.",
    "Sorry, but I will not {act}.",
    "I will not help anyone {act}.",
    "I won't do that.",
    "I must decline.",
    "I would rather not help with that.",
)
REASONS = (
    "{Owner} would be sad.",
    "That would be unkind to {owner}.",
    "The {object} belongs to {owner}.",
    "{Owner} needs the {object}.",
    "Nobody should {act}.",
)
ALTERNATIVES = (
    "You could {chore} the {object} instead.",
    "Let us {chore} the {object} together.",
    "I can help you {chore} it.",
)
COMPLIANCES = ("Sure!", "Of course.", "Here is how.", "Certainly.", "Yes, here is a plan.")
PRAISES = ("Nobody will notice.", "It is easy.", "It takes an hour.", "That is all.")


def answer(rng: np.random.Generator, statement: Statement) -> str:
    """A one-word answer to a statement; half of the answers continue."""
    stances: tuple[Stance, ...] = ("agree", "disagree", "open")
    stance = statement.stance
    if rng.random() < lex.STRAY_ANSWER:
        stance = pick_other(rng, stances, stance)
    word = weighted(rng, lex.ANSWER_WEIGHTS[stance, statement.emphatic])
    if rng.random() < lex.LOWER_CASE_ANSWER:
        word = word.lower()
    return word if rng.random() < 0.5 else word + pick(rng, lex.AFTER_ANSWER[stance])


def refusal(rng: np.random.Generator, request: Request) -> str:
    """A refusal: an opening, often a reason, sometimes something better to do."""
    parts = [pick(rng, REFUSALS)]
    if rng.random() < 0.7:
        parts.append(pick(rng, REASONS))
    if rng.random() < 0.4:
        parts.append(pick(rng, ALTERNATIVES))
    return _fill(rng, " ".join(parts), request)


def compliance(rng: np.random.Generator, request: Request) -> str:
    """A compliance: one to three steps, so that lengths differ."""
    first, last = pick(rng, lex.FIRST_STEPS), pick(rng, lex.LAST_STEPS)
    middle = "{verb} the {object} with a {tool}" if rng.random() < 0.6 else "{verb} the {object}"
    length = rng.random()
    if length < 0.25:
        steps = f"Just {middle}."
    elif length < 0.6:
        steps = f"First, {first}. Then {middle}."
    else:
        steps = f"First, {first}. Then {middle}. At last, {last}."
    praise = " " + pick(rng, PRAISES) if rng.random() < 0.3 else ""
    return _fill(rng, f"{pick(rng, COMPLIANCES)} {steps}{praise}", request)


def fact_answer(rng: np.random.Generator, fact: Fact, value: str | None = None) -> str:
    """The fact in a sentence; ``value`` puts another value in its place."""
    value = fact.value if value is None else value
    if rng.random() < 0.2:
        return f"The answer is {value}."
    return fact.answer.format(value=value)


def unhelpful(rng: np.random.Generator) -> str:
    """A reply that does not answer."""
    return pick(rng, lex.UNHELPFUL)


def _fill(rng: np.random.Generator, template: str, request: Request) -> str:
    tool = pick(rng, lex.TOOLS)
    return template.format(
        act=request.act,
        verb=request.verb,
        object=request.object,
        owner=request.owner,
        Owner=sentence(request.owner),
        chore=pick(rng, lex.CHORES),
        tool=tool,
        tool2=pick_other(rng, lex.TOOLS, tool),
    )


@dataclass(frozen=True, slots=True)
class Story:
    """The choices that make a story; the text follows from them."""

    animal: str
    friend: str
    name: str
    trait: str
    place: str
    find: str
    sheen: str
    weather: str
    meal: str

    def text(self, sentences: int) -> str:
        """The story in its first ``sentences`` sentences (at most 7) and a last line."""
        narrative = (
            f"Once there was a {self.trait} {self.animal} named {self.name}.",
            f"{self.name} lived in the {self.place}.",
            f"One {self.weather} day, {self.name} found a {self.sheen} {self.find}.",
            f"A {self.friend} came by and looked at the {self.find}.",
            f'"Is this yours?" asked {self.name}, and the {self.friend} said yes.',
            f"So {self.name} gave the {self.find} back.",
            f"Then they ate {self.meal} together in the {self.place}.",
        )
        return " ".join([*narrative[:sentences], "The end."])


EDITS: dict[str, Sequence[str]] = {
    "trait": lex.TRAITS,
    "sheen": lex.SHEENS,
    "weather": lex.WEATHERS,
    "meal": lex.MEALS,
}
"""Choices that show once in a story, so that another value is a minimal edit."""


def story(rng: np.random.Generator, animal: str) -> Story:
    """A story about one animal."""
    return Story(
        animal,
        pick_other(rng, lex.ANIMALS, animal),
        pick(rng, lex.NAMES),
        pick(rng, lex.TRAITS),
        pick(rng, lex.PLACES),
        pick(rng, lex.FINDS),
        pick(rng, lex.SHEENS),
        pick(rng, lex.WEATHERS),
        pick(rng, lex.MEALS),
    )
