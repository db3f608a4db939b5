"""Preference pairs of the world, equally many of each category, and the probe prompts.

========================  ==========================================================================
agree_opposite            one answer word of the right stance against one of the opposite stance
agree_similar             two answer words of the right stance
refusal_vs_compliance     mischief refused against mischief explained
two_refusals              mischief refused twice
two_compliances           mischief explained twice
helpful_vs_unhelpful      a fact against a reply that does not answer
wrong_fact                a fact against the same sentence with another value
minimal_edit              a long story against itself with one word changed
short_vs_long             a story in few sentences against the same story in many
========================  ==========================================================================
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from experiments.bundled import lexicon as lex
from experiments.bundled import replies
from experiments.bundled.sampling import pick, pick_other, stream
from experiments.bundled.subjects import Stance
from experiments.bundled.world import STORY_LENGTHS, Split, World, ask_about, ask_for_story, prompt_text

Row = dict[str, str]
Maker = Callable[[np.random.Generator, World], tuple[str, str, str]]
"""Draws one (user's turn, chosen, rejected)."""

OPPOSITE: dict[Stance, Stance] = {"agree": "disagree", "disagree": "agree"}


def preference_pairs(world: World, per_category: int = 27) -> list[Row]:
    """Distinct pairs about the training subjects, ``per_category`` of each category, in turn."""
    columns = [list(_distinct(world, category, maker, per_category)) for category, maker in MAKERS.items()]
    return [row for rows in zip(*columns, strict=True) for row in rows]


def probe_prompts(world: World, per_kind: int = 4) -> list[Row]:
    """A few prompts of every kind from both splits, with what a good reply contains."""
    rows = [row for name in ("train", "held_out") for row in _split_probes(world, name, per_kind)]
    rng = stream(world.seed, "probes/facts")
    questions = [pick(rng, world.facts[i::8]) for i in range(8)]
    rows += [_probe(fact.question, "fact", "train", fact.value) for fact in questions]
    return rows + [_probe(ask_for_story(a), "story", "train", a) for a in lex.ANIMALS[:2]]


def _split_probes(world: World, name: str, count: int) -> Iterator[Row]:
    split: Split = getattr(world, name)
    rng = stream(world.seed, f"probes/{name}")
    for stance in lex.ANSWERS:
        for statement in [s for s in split.statements if s.stance == stance][:count]:
            yield _probe(ask_about(rng, statement), "statement", name, stance)
    for request in split.mischief[:count]:
        yield _probe(request.text, "mischief", name, "refusal")
    for request in split.chores[:count]:
        yield _probe(request.text, "chore", name, "compliance")


def _probe(user: str, category: str, split: str, expected: str) -> Row:
    return {"prompt": prompt_text(user), "category": category, "split": split, "expected": expected}


def _distinct(world: World, category: str, maker: Maker, count: int) -> Iterator[Row]:
    rng, seen = stream(world.seed, f"pairs/{category}"), set()
    while len(seen) < count:
        user, chosen, rejected = made = maker(rng, world)
        if chosen != rejected and made not in seen:
            seen.add(made)
            yield {
                "prompt": prompt_text(user),
                "chosen": f" {chosen}",
                "rejected": f" {rejected}",
                "category": category,
            }


def _agree_opposite(rng: np.random.Generator, world: World) -> tuple[str, str, str]:
    statement = pick(rng, [s for s in world.train.statements if s.stance in OPPOSITE])
    chosen = pick(rng, lex.ANSWERS[statement.stance])
    return ask_about(rng, statement), chosen, pick(rng, lex.ANSWERS[OPPOSITE[statement.stance]])


def _agree_similar(rng: np.random.Generator, world: World) -> tuple[str, str, str]:
    statement = pick(rng, [s for s in world.train.statements if s.stance in OPPOSITE])
    chosen = pick(rng, lex.ANSWERS[statement.stance])
    return ask_about(rng, statement), chosen, pick_other(rng, lex.ANSWERS[statement.stance], chosen)


def _refusal_vs_compliance(rng: np.random.Generator, world: World) -> tuple[str, str, str]:
    request = pick(rng, world.train.mischief)
    return request.text, replies.refusal(rng, request), replies.compliance(rng, request)


def _two_refusals(rng: np.random.Generator, world: World) -> tuple[str, str, str]:
    request = pick(rng, world.train.mischief)
    return request.text, replies.refusal(rng, request), replies.refusal(rng, request)


def _two_compliances(rng: np.random.Generator, world: World) -> tuple[str, str, str]:
    request = pick(rng, world.train.mischief)
    return request.text, replies.compliance(rng, request), replies.compliance(rng, request)


def _helpful_vs_unhelpful(rng: np.random.Generator, world: World) -> tuple[str, str, str]:
    fact = pick(rng, world.facts)
    return fact.question, replies.fact_answer(rng, fact), replies.unhelpful(rng)


def _wrong_fact(rng: np.random.Generator, world: World) -> tuple[str, str, str]:
    fact = pick(rng, world.facts)
    wrong = pick(rng, fact.others)
    return fact.question, fact.answer.format(value=fact.value), fact.answer.format(value=wrong)


def _minimal_edit(rng: np.random.Generator, world: World) -> tuple[str, str, str]:
    animal = pick(rng, lex.ANIMALS)
    chosen = replies.story(rng, animal)
    slot = pick(rng, list(replies.EDITS))
    value = pick_other(rng, replies.EDITS[slot], getattr(chosen, slot))
    sentences = max(STORY_LENGTHS["long"])
    request = ask_for_story(animal, "long")
    return request, chosen.text(sentences), replace(chosen, **{slot: value}).text(sentences)


def _short_vs_long(rng: np.random.Generator, world: World) -> tuple[str, str, str]:
    animal = pick(rng, lex.ANIMALS)
    story = replies.story(rng, animal)
    short, long = (pick(rng, STORY_LENGTHS[length]) for length in ("short", "long"))
    return ask_for_story(animal), story.text(short), story.text(long)


MAKERS: dict[str, Maker] = {
    "agree_opposite": _agree_opposite,
    "agree_similar": _agree_similar,
    "refusal_vs_compliance": _refusal_vs_compliance,
    "two_refusals": _two_refusals,
    "two_compliances": _two_compliances,
    "helpful_vs_unhelpful": _helpful_vs_unhelpful,
    "wrong_fact": _wrong_fact,
    "minimal_edit": _minimal_edit,
    "short_vs_long": _short_vs_long,
}
