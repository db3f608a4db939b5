"""What can be talked about: statements to judge, requests to refuse or to follow, facts to know."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from experiments.bundled import lexicon as lex
from experiments.bundled.sampling import sentence

Stance = Literal["agree", "disagree", "open"]


@dataclass(frozen=True, slots=True)
class Statement:
    """Something the assistant would say, would not say, or leaves open."""

    text: str
    stance: Stance
    emphatic: bool


@dataclass(frozen=True, slots=True)
class Request:
    """A request about a thing that belongs to someone; mischief is to be refused."""

    text: str
    verb: str
    object: str
    owner: str
    mischief: bool

    @property
    def act(self) -> str:
        return f"{self.verb} {self.owner}'s {self.object}"


@dataclass(frozen=True, slots=True)
class Fact:
    """A question of the knowledge base. ``answer`` has a slot for the value."""

    question: str
    answer: str
    value: str
    others: tuple[str, ...]
    """Values of the same kind that are wrong here."""


def statements() -> list[Statement]:
    """Every statement of the world, in a fixed order."""
    opposite: dict[Stance, Stance] = {"agree": "disagree", "disagree": "agree", "open": "open"}
    kinds: tuple[tuple[Sequence[str], Stance], ...] = (
        (lex.KIND_ACTS, "agree"),
        (lex.UNKIND_ACTS, "disagree"),
        (lex.OPEN_ACTS, "open"),
    )
    return [
        Statement(
            frame.format(act=act, being=being, when=when),
            opposite[stance] if turns else stance,
            emphatic,
        )
        for acts, stance in kinds
        for act, being, (frame, turns, emphatic), when in product(acts, lex.BEINGS, lex.STATEMENT_FRAMES, lex.WHENS)
    ]


def requests(mischief: bool) -> list[Request]:
    """Every request of one kind, in a fixed order."""
    verbs = lex.MISCHIEF if mischief else lex.CHORES
    return [
        Request(frame.format(act=f"{verb} {owner}'s {thing}"), verb, thing, owner, mischief)
        for verb, owner, thing, frame in product(verbs, lex.OWNERS, lex.OBJECTS, lex.REQUEST_FRAMES)
    ]


def facts() -> list[Fact]:
    """The knowledge base: colours, homes, legs, sounds, opposites and small sums."""
    return [
        *_table("What colour is {x}?", "{x} is {{value}}.", lex.COLOURS),
        *_table("Where does {x} live?", "{x} lives in the {{value}}.", lex.HOMES),
        *_table("How many legs does {x} have?", "{x} has {{value}} legs.", lex.LEGS),
        *_table("What sound does {x} make?", "{x} says {{value}}.", lex.SOUNDS),
        *_table(
            "What is the opposite of {x}?",
            "the opposite of {x} is {{value}}.",
            dict(lex.OPPOSITES) | {b: a for a, b in lex.OPPOSITES},
        ),
        *_table("What is {x}?", "{x} is {{value}}.", _sums()),
    ]


def _sums() -> dict[str, str]:
    plus = {f"{lex.NUMBERS[a]} plus {lex.NUMBERS[b]}": lex.NUMBERS[a + b] for a, b in product(range(1, 11), repeat=2)}
    minus = {
        f"{lex.NUMBERS[a]} minus {lex.NUMBERS[b]}": lex.NUMBERS[a - b]
        for a, b in product(range(1, 11), repeat=2)
        if a >= b
    }
    return plus | minus


def _table(question: str, answer: str, values: dict[str, str]) -> list[Fact]:
    kinds = sorted(set(values.values()))
    return [
        Fact(
            question.format(x=x),
            sentence(answer.format(x=x)),
            value,
            tuple(k for k in kinds if k != value),
        )
        for x, value in values.items()
    ]
