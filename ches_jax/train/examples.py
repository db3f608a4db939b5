"""What updates are made of: for most objectives the pairs themselves, for others examples made of them.

An unpaired objective (KTO) takes single responses with a label. Beside its own response, each of its examples holds
that of another prompt, whose log-probability measures how far the policy is from the reference; the two are packed as
a pair's two responses are, so that the prompt is computed once for both.

    pairs      x: y+ y-      x': z+ z-
    examples   x: y+ | z+    x: y- | z-    x': z+ | y+    x': z- | y-    what follows | is only measured
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ches_jax.errors import ChesError
from ches_jax.losses import Loss
from ches_jax.train.objective import is_supervised, is_unpaired
from ches_jax.types import Eos, Response, TokenPair

NOTHING = Response((), None)


@dataclass(frozen=True)
class Examples:
    """N examples: what is packed for each, and what else the objective reads of it."""

    pairs: list[TokenPair]
    given: dict[str, np.ndarray]
    """[N] by field of ``LossInputs``."""

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, indices: Sequence[int] | np.ndarray) -> "Examples":
        """Those with these numbers, in this order."""
        return Examples([self.pairs[i] for i in indices], {k: v[indices] for k, v in self.given.items()})


def make_examples(
    loss: Loss, pairs: Sequence[TokenPair], given: Mapping[str, np.ndarray], *, seed: int, max_length: int, eos: Eos
) -> Examples:
    """The examples that a loss makes of pairs.

    Args:
      loss: the objective.
      pairs: the pairs of a run; of single responses the other side is empty.
      given: [P] numbers of each pair.
      seed: draws the mismatched responses of an unpaired loss.
      max_length: most tokens of a prompt and a mismatched response.
      eos: whether a terminator counts.
    """
    if is_supervised(loss):
        return Examples([replace(p, rejected=NOTHING) for p in pairs], dict(given))
    if not is_unpaired(loss) or not pairs:
        return Examples(list(pairs), dict(given))
    sides = [
        (i, good, response)
        for i, pair in enumerate(pairs)
        for good, response in ((True, pair.chosen), (False, pair.rejected))
        if response != NOTHING
    ]
    whose = [i for i, _, _ in sides]
    others = other_prompts([pairs[i].prompt for i in whose], seed)
    made = [
        _beside(pairs[i], response, sides[other][2], max_length, eos)
        for (i, _, response), other in zip(sides, others, strict=True)
    ]
    labels = np.array([good for _, good, _ in sides])
    return Examples(made, {**{k: v[whose] for k, v in given.items()}, "desirable": labels})


def other_prompts(prompts: Sequence[tuple[int, ...]], seed: int) -> list[int]:
    """For each row the number of a row with another prompt, each used once where that is possible.

    Rows of one prompt lie together in a random order of prompts; whoever is one largest group further has another one.

    Raises:
      ChesError: all rows have the same prompt.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    if len(groups) < 2:
        raise ChesError("an unpaired loss measures the policy on responses of other prompts; there is only one prompt")
    order = np.random.default_rng([seed, 4]).permutation(len(groups))
    members = [list(groups.values())[i] for i in order]
    largest = max(members, key=len)
    found = [0] * len(prompts)
    if 2 * len(largest) <= len(prompts):
        line = [i for group in members for i in group]
        for at, i in enumerate(line):
            found[i] = line[(at + len(largest)) % len(line)]
        return found
    rest = [i for group in members if group is not largest for i in group]
    for mine, theirs in ((largest, rest), (rest, largest)):
        for at, i in enumerate(mine):
            found[i] = theirs[at % len(theirs)]
    return found


def _beside(pair: TokenPair, own: Response, other: Response, max_length: int, eos: Eos) -> TokenPair:
    """One response of a pair with a stranger beside it, which is cut to the room there is."""
    room = max_length - len(pair.prompt)
    if len(other.targets(eos)) > room:
        other = Response(other.content[:room], None)
    content = repr((pair.row_id, own, other))
    return replace(pair, chosen=own, rejected=other, row_id=hashlib.sha256(content.encode()).hexdigest()[:32])
