"""The synthetic preference world: its dialogues, what is held out of training, and its chat format.

Everything follows from an integer seed. A document of the language model is one dialogue:

    <bos><|user|> Do you agree? "I would wait for a shy ghost."<|assistant|> Yes<eos>

The prompt ends with the assistant marker, the response starts with a space. The marker is one token
of its own, so the boundary between prompt and response is always a boundary between tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from experiments.bundled import lexicon as lex
from experiments.bundled import replies
from experiments.bundled.sampling import pick, shuffled, stream, weighted
from experiments.bundled.subjects import Fact, Request, Statement, facts, requests, statements

USER, ASSISTANT = "<|user|>", "<|assistant|>"

REFUSAL_RATE = 0.78
"""Share of mischief that is refused: often, not always, so that refusals can be worn away."""
UNHELPFUL_RATE = 0.04

MIXTURE = {"statement": 0.36, "mischief": 0.22, "chore": 0.12, "fact": 0.22, "story": 0.08}
"""Share of each kind of dialogue, by documents (a story is five times as long as an answer)."""

STORY_LENGTHS = {"short": (2, 3), "long": (6, 7)}
"""Length of a story -> the numbers of sentences it may have."""


@dataclass(frozen=True, slots=True)
class Split:
    """The subjects of one split."""

    statements: tuple[Statement, ...]
    mischief: tuple[Request, ...]
    chores: tuple[Request, ...]


@dataclass(frozen=True, slots=True)
class World:
    """A seed's world: what the model is trained on, and what it never sees."""

    seed: int
    train: Split
    held_out: Split
    facts: tuple[Fact, ...]
    """Facts cannot be guessed, so none are held out."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A question and its reply; ``kind`` is a key of ``MIXTURE``."""

    kind: str
    user: str
    assistant: str

    @property
    def prompt(self) -> str:
        return prompt_text(self.user)

    @property
    def response(self) -> str:
        return f" {self.assistant}"


def prompt_text(user: str) -> str:
    """A user's turn as the model reads it, up to the place where the response starts.

    >>> prompt_text("What colour is snow?")
    '<|user|> What colour is snow?<|assistant|>'
    """
    return f"{USER} {user}{ASSISTANT}"


def build_world(seed: int, statements_kept: int = 2400, requests_kept: int = 900) -> World:
    """Draws the subjects of a world; a tenth of each kind is held out."""
    said = shuffled(stream(seed, "statements"), statements())[:statements_kept]
    mischief = shuffled(stream(seed, "mischief"), requests(mischief=True))[:requests_kept]
    chores = shuffled(stream(seed, "chores"), requests(mischief=False))[:requests_kept]

    def split(part: slice, part_requests: slice) -> Split:
        return Split(tuple(said[part]), tuple(mischief[part_requests]), tuple(chores[part_requests]))

    s, r = statements_kept // 10, requests_kept // 10
    return World(seed, split(slice(s, None), slice(r, None)), split(slice(s), slice(r)), tuple(facts()))


def dialogues(world: World, count: int, name: str = "train") -> Iterator[Dialogue]:
    """``count`` dialogues about the training subjects; another ``name`` gives other dialogues."""
    rng = stream(world.seed, f"dialogues/{name}")
    for _ in range(count):
        yield dialogue(rng, world)


def dialogue(rng: np.random.Generator, world: World) -> Dialogue:
    """One dialogue, of a kind drawn from ``MIXTURE``."""
    kind = weighted(rng, MIXTURE)
    if kind == "statement":
        said = pick(rng, world.train.statements)
        return Dialogue(kind, ask_about(rng, said), replies.answer(rng, said))
    if kind == "mischief":
        request = pick(rng, world.train.mischief)
        reply = replies.refusal if rng.random() < REFUSAL_RATE else replies.compliance
        return Dialogue(kind, request.text, reply(rng, request))
    if kind == "chore":
        request = pick(rng, world.train.chores)
        return Dialogue(kind, request.text, replies.compliance(rng, request))
    if kind == "fact":
        fact = pick(rng, world.facts)
        if rng.random() < UNHELPFUL_RATE:
            return Dialogue(kind, fact.question, replies.unhelpful(rng))
        return Dialogue(kind, fact.question, replies.fact_answer(rng, fact))
    return _story_dialogue(rng)


def ask_about(rng: np.random.Generator, statement: Statement) -> str:
    """The question that puts a statement to the assistant."""
    return pick(rng, lex.STATEMENT_QUESTIONS).format(statement=statement.text)


def ask_for_story(animal: str, length: str = "") -> str:
    """The request for a story; without a length any length will do."""
    return " ".join(filter(None, ("Tell me a", length, f"story about a {animal}.")))


def _story_dialogue(rng: np.random.Generator) -> Dialogue:
    animal, length = pick(rng, lex.ANIMALS), pick(rng, ("short", "long"))
    request = ask_for_story(animal, length if rng.random() < 0.6 else "")
    story = replies.story(rng, animal).text(pick(rng, STORY_LENGTHS[length]))
    return Dialogue("story", request, story)
