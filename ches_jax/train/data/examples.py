"""What updates are made of: for most objectives the pairs themselves, for others examples made of them.

An unpaired objective (KTO) takes single responses with a label. Beside its own response, each of its examples holds
that of another prompt, whose log-probability measures how far the policy is from the reference; the two are packed as
a pair's two responses are, so that the prompt is computed once for both.

    pairs      x: y+ y-      x': z+ z-
    examples   x: y+ | z+    x: y- | z-    x': z+ | y+    x': z- | y-    what follows | is only measured

An objective of samples (D2O) takes a rejected response with several samples. The data bring them as one pair for each
sample; the example is all of them, the rejected response once and last.

    pairs      x: s1 y-      x: s2 y-      x: s3 y-
    example    x: s1 s2 s3 y-

A joint objective (DOVE) counts a prompt with its response: its example is a pair whose prompt is the first token alone.

    pair       x1 x2 x3: y+    z1 z2: y-
    example    x1: x2 x3 y+    z1: z2 y-

A listwise objective takes rows of responses with scores, which come as the best response beside each other one; the
example is the list, the best first, each response once.

    pairs      x: y2 y1      x: y2 y3
    example    x: y2 y3 y1
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ches_jax.data.packing import Candidates, Item
from ches_jax.data.spans import differing_spans
from ches_jax.errors import ChesError
from ches_jax.losses import Loss
from ches_jax.losses.tokens import SPAN_MASKS
from ches_jax.train.objective import is_supervised, is_unpaired, reads_joint, reads_lists, reads_samples
from ches_jax.train.observe.pair_logprobs import PairLogps, TokenLogps
from ches_jax.types import Eos, Response, TokenPair

NOTHING = Response((), None)


@dataclass(frozen=True)
class Examples:
    """N examples: what is packed for each, and what else the objective reads of it."""

    pairs: list[TokenPair]
    """``size`` for each example, or as ``ends`` say."""
    extra: dict[str, np.ndarray]
    """[N] by field of ``LossInputs``: columns of the data, labels; numbers of tokens as [N] arrays of their own."""
    size: int = 1
    """Pairs of an example of samples."""
    ends: tuple[int, ...] | None = None
    """Of lists, which differ in length: where the pairs of each example end."""

    def __len__(self) -> int:
        return len(self.pairs) // self.size if self.ends is None else len(self.ends)

    def pairs_of(self, i: int) -> slice:
        """The pairs of example ``i``."""
        if self.ends is None:
            return slice(i * self.size, (i + 1) * self.size)
        return slice(self.ends[i - 1] if i else 0, self.ends[i])

    @property
    def most_responses(self) -> int:
        """Responses of the longest example."""
        most = self.size if self.ends is None else int(np.max(np.diff((0, *self.ends)), initial=1))
        return 1 + most

    def items(self) -> list[Item]:
        """What is packed."""
        return [self.item(i) for i in range(len(self))]

    def item(self, i: int) -> Item:
        """What is packed of example ``i``."""
        of_group = self.pairs[self.pairs_of(i)]
        if self.ends is not None:
            return Candidates(of_group[0].prompt, (of_group[0].chosen, *(p.rejected for p in of_group)), 1)
        if self.size == 1:
            return of_group[0]
        return Candidates(of_group[0].prompt, (*(p.chosen for p in of_group), of_group[0].rejected), self.size)

    def by_response(self, logps: PairLogps | TokenLogps, which: Sequence[int] | np.ndarray) -> list[list]:
        """Of each response (samples or chosen, then rejected) the values of these examples; from those of ``pairs``.

        Of lists the best response comes first, and a list that is shorter than the longest ends with zeros.
        """
        if self.ends is not None:
            groups = [self.pairs_of(i) for i in which]
            best = [logps.chosen[group.start] for group in groups]
            others = [
                [logps.rejected[g.start + k] if g.start + k < g.stop else 0.0 for g in groups]
                for k in range(self.most_responses - 1)
            ]
            return [best, *others]
        sides = [[logps.chosen[i * self.size + k] for i in which] for k in range(self.size)]
        return [*sides, [logps.rejected[i * self.size] for i in which]]


def one_sided(examples: Examples, side: int) -> Examples:
    """Of examples of single pairs only the chosen (0) or the rejected (1) responses, each in the chosen one's place."""

    def alone(p: TokenPair) -> TokenPair:
        response = (p.chosen, p.rejected)[side]
        return replace(p, prompt=p.prompts[side], chosen=response, rejected=NOTHING, rejected_prompt=None)

    return Examples([alone(p) for p in examples.pairs], {})


def make_examples(
    loss: Loss, pairs: Sequence[TokenPair], extra: Mapping[str, np.ndarray], *, seed: int, max_length: int, eos: Eos
) -> Examples:
    """The examples that a loss makes of pairs.

    Args:
      loss: the objective.
      pairs: the pairs of a run; of single responses the other side is empty.
      extra: [P] numbers of each pair, by field of ``LossInputs``.
      seed: draws the mismatched responses of an unpaired loss.
      max_length: most tokens of a prompt and a mismatched response.
      eos: whether a terminator counts.

    Raises:
      ChesError: pairs of which no such examples can be made.
    """
    if is_supervised(loss):
        return Examples([replace(p, rejected=NOTHING, rejected_prompt=None) for p in pairs], dict(extra))
    if is_unpaired(loss) and pairs:
        return _unpaired(pairs, extra, seed, max_length, eos)
    if reads_joint(loss):
        return Examples([_joint(p) for p in pairs], dict(extra))
    if reads_samples(loss) and pairs:
        size = len({p.candidates for p in pairs})
        return Examples(list(pairs), {k: v[::size] for k, v in extra.items()}, size)
    if reads_lists(loss) and pairs:
        return _lists(pairs, extra)
    spans = _spans(pairs, eos) if loss.needs >= SPAN_MASKS else {}
    return Examples(list(pairs), {**extra, **spans})


def _joint(pair: TokenPair) -> TokenPair:
    """Prompt and response of each side as one response to the prompt's first token."""
    sides = [
        Response((*prompt[1:], *response.content), response.terminator)
        for prompt, response in zip(pair.prompts, (pair.chosen, pair.rejected), strict=True)
    ]
    starts = [prompt[:1] for prompt in pair.prompts]
    return replace(
        pair,
        prompt=starts[0],
        rejected_prompt=None if starts[1] == starts[0] else starts[1],
        chosen=sides[0],
        rejected=sides[1],
        row_id=hashlib.sha256(f"joint {pair.row_id}".encode()).hexdigest()[:32],
    )


def _lists(pairs: Sequence[TokenPair], extra: Mapping[str, np.ndarray]) -> Examples:
    """Lists of the pairs of each row, by falling score; their scores as [N, K] with zeros at the ends of short ones."""
    groups: dict[int, list[int]] = {}
    for position, pair in enumerate(pairs):
        groups.setdefault(pair.index, []).append(position)
    best, other = extra["rewards_chosen"], extra["rewards_rejected"]
    order = [sorted(group, key=lambda position: -other[position]) for group in groups.values()]
    scores = np.zeros((len(order), 1 + max(map(len, order))))
    for row, group in zip(scores, order, strict=True):
        row[: 1 + len(group)] = [best[group[0]], *other[group]]
    first = [group[0] for group in order]
    columns = {k: v[first] for k, v in extra.items() if not k.startswith("rewards_")}
    ends = np.cumsum([len(group) for group in order]).tolist()
    every = [pairs[position] for group in order for position in group]
    return Examples(every, {**columns, "scores": scores}, ends=tuple(ends))


def ranks_of(*some: Examples) -> dict[str, int]:
    """Of lists: the rank of each pair's rejected response in its row, from 2, by ``row_id``; empty for others."""
    return {
        pair.row_id: rank
        for examples in some
        if examples.ends is not None
        for i in range(len(examples))
        for rank, pair in enumerate(examples.pairs[examples.pairs_of(i)], 2)
    }


def _spans(pairs: Sequence[TokenPair], eos: Eos) -> dict[str, np.ndarray]:
    """Which tokens of each pair differ, by field of ``LossInputs``."""
    masks = [differing_spans(p.chosen.targets(eos), p.rejected.targets(eos)) for p in pairs]
    return {f"span_mask_{side}": ragged([m[i] for m in masks]) for i, side in enumerate(("chosen", "rejected"))}


def ragged(values: Sequence[np.ndarray]) -> np.ndarray:
    """[N] of arrays of any lengths."""
    out = np.empty(len(values), object)
    out[:] = list(values) if len(values) else []
    return out


def _unpaired(
    pairs: Sequence[TokenPair], extra: Mapping[str, np.ndarray], seed: int, max_length: int, eos: Eos
) -> Examples:
    sides = [
        (i, good, prompt, response)
        for i, pair in enumerate(pairs)
        for good, prompt, response in zip((True, False), pair.prompts, (pair.chosen, pair.rejected), strict=True)
        if response != NOTHING
    ]
    whose = [i for i, *_ in sides]
    others = other_prompts([prompt for _, _, prompt, _ in sides], seed)
    made = [
        _beside(replace(pairs[i], prompt=prompt, rejected_prompt=None), response, sides[other][3], max_length, eos)
        for (i, _, prompt, response), other in zip(sides, others, strict=True)
    ]
    labels = np.array([good for _, good, *_ in sides])
    columns = {k: v[whose] for k, v in extra.items()}
    if "weights_chosen" in columns:  # rows of one response have a weight each
        of_good, of_bad = columns.pop("weights_chosen"), columns.pop("weights_rejected")
        columns["weights"] = np.where(labels, of_good, of_bad)
    return Examples(made, {**columns, "desirable": labels})


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
    partners = [0] * len(prompts)
    if 2 * len(largest) <= len(prompts):
        line = [i for group in members for i in group]
        for at, i in enumerate(line):
            partners[i] = line[(at + len(largest)) % len(line)]
        return partners
    rest = [i for group in members if group is not largest for i in group]
    for of_group, theirs in ((largest, rest), (rest, largest)):
        for at, i in enumerate(of_group):
            partners[i] = theirs[at % len(theirs)]
    return partners


def _beside(pair: TokenPair, own: Response, other: Response, max_length: int, eos: Eos) -> TokenPair:
    """One response of a pair with a stranger beside it, which is cut to the room there is."""
    room = max_length - len(pair.prompt)
    if len(other.targets(eos)) > room:
        other = Response(other.content[:room], None)
    content = repr((pair.row_id, own, other))
    return replace(pair, chosen=own, rejected=other, row_id=hashlib.sha256(content.encode()).hexdigest()[:32])
