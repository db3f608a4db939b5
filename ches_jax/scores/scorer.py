"""Token pairs to the numbers of the score table: packed, passed through the model, added up in float64 on the host."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from rapidfuzz.distance import Levenshtein

from ches_jax.data.audit import UNSCORABLE
from ches_jax.data.packing import (
    Item,
    PackedBatch,
    Placement,
    fitting_length,
    group_by_prompt,
    pack,
    tokens_apart,
)
from ches_jax.data.prefix import Group, Prefix, behind, by_prefix, most_copies, without
from ches_jax.distributed.division import team_of
from ches_jax.distributed.mesh import numbers_here, row_shards
from ches_jax.distributed.under_way import UnderWay
from ches_jax.errors import ChesError
from ches_jax.runs.work import Positions, Work
from ches_jax.scores import formulas
from ches_jax.scores.forward import ForwardPass, fetch
from ches_jax.scores.gradients import Gradients, Gram, band
from ches_jax.scores.gradients import cosine as gradient_cosine
from ches_jax.scores.hidden_sums import SegmentStatistics
from ches_jax.scores.table import CANDIDATES, COLUMNS
from ches_jax.scores.unembedding_gradients import PairContributions, pair_contributions
from ches_jax.types import Eos, TokenPair, shared_prefix

MODEL_COLUMNS = (
    "inner",
    "sqnorm_chosen",
    "sqnorm_rejected",
    "last_hidden_inner",
    "head_score",
    "logp_chosen",
    "logp_rejected",
)
"""What the model gives; everything else is derived or counted."""
GRADIENT_COLUMNS = ("grad_norm_chosen", "grad_norm_rejected", "grad_inner")
TOKEN_COLUMNS = (
    "row_id",
    "index",
    *CANDIDATES,
    "response",
    "position",
    "token",
    "logp",
    "ches",
    "head_score",
    "nthr",
)
PAIRS_AT_ONCE = 512
"""Pairs whose sums are gathered at a time: an item of many candidates has more pairs than memory should hold."""


class ItemPair(NamedTuple):
    """A pair of an item: its number in the chunk, and its two segments counted from the item's first."""

    pair: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class Batching:
    """How rows are cut for the device."""

    row_tokens: int
    rows_per_batch: int
    row_multiple: int
    length_threshold: int | None
    batch_tokens: int
    """Tokens per device and step, as the options say."""

    @classmethod
    def of(cls, batch_tokens: int, row_tokens: int, run: ForwardPass, length_threshold: int | None) -> "Batching":
        """Rows of ``row_tokens`` (or fewer, where a batch is smaller) sharded over the mesh of ``run``."""
        length = min(row_tokens, -(-batch_tokens // 64) * 64)
        shards = row_shards(run.mesh)
        return cls(length, max(1, batch_tokens // length) * shards, shards, length_threshold, batch_tokens)


class PairScorer:
    """Scores chunks of pairs by one forward pass per batch; counts computed positions and padding.

    Of processes that compute together each scores the pairs whose rows it has, and all learn all scores.
    """

    def __init__(
        self,
        run: ForwardPass,
        batching: Batching,
        eos: Eos,
        on_batch: Callable[[int], None] = lambda pairs: None,
        gradients: Gradients | None = None,
    ):
        """``on_batch`` is called with the number of pairs after every batch; ``gradients`` adds their columns."""
        self.run = run
        self.gradients = gradients
        self.team = team_of(run.mesh)
        self.batching = batching
        self.under_way = UnderWay(run.mesh)
        self.eos: Eos = eos
        self.on_batch = on_batch
        self.work = Work()
        self.counted = Positions()

    @property
    def waste(self) -> float:
        """Share of computed positions that were padding."""
        return self.counted.padding

    def facts(self) -> dict[str, Any]:
        """What scoring cost so far, for ``run.json``; all processes that compute together call it.

        The counted positions, and the bytes of the weights that each process holds.
        """
        return self.work.facts(**self.counted.facts(), weight_bytes=self.team.exchange(self.run.weight_bytes))

    def batches(
        self, items: Sequence[Item], prefix: Prefix | None = None
    ) -> Iterator[tuple[PackedBatch, list[Placement]]]:
        """Packed batches of items, of short rows where few items then take fewer positions."""
        if prefix is not None:
            items = without(items, prefix)
        b = self.batching
        length = fitting_length(items, b.row_tokens, b.row_multiple, b.length_threshold)
        packed = pack(
            items,
            length=length,
            rows_per_batch=b.rows_per_batch if length == b.row_tokens else b.row_multiple,
            eos=self.eos,
            row_multiple=b.row_multiple,
            length_threshold=b.length_threshold,
        )
        if prefix is None:
            return packed
        batches = list(packed)
        copies = most_copies(batches, prefix)
        return ((behind(rows, places, items, prefix, copies), places) for rows, places in batches)

    def __call__(self, pairs: list[TokenPair]) -> tuple[dict[str, Any], dict[str, list] | None]:
        """The chunk's columns of the table, and of the token table with ``--token-scores``.

        The responses of a record are computed once, whatever the number of its pairs.

        Raises:
          ChesError: a number that is not finite; names the row.
        """
        scorable = [i for i, p in enumerate(pairs) if UNSCORABLE.isdisjoint(p.flags)]
        items, refs = group_by_prompt([pairs[i] for i in scorable])
        self.counted.add(apart=tokens_apart(items))
        of_item: list[list[ItemPair]] = [[] for _ in items]
        for i, ref in zip(scorable, refs, strict=True):
            of_item[ref.item].append(ItemPair(i, 1 + ref.chosen, 1 + ref.rejected))
        numbers = {n: np.full(len(pairs), np.nan) for n in self._model_columns()}
        tokens: dict[int, dict[str, list]] = {}
        waiting: list[tuple[Callable[[], SegmentStatistics], PackedBatch, list[Placement]]] = []

        def collect() -> None:
            statistics, rows, placements = waiting.pop(0)
            with self.work.on_device():
                s = fetch(statistics())
            self.on_batch(sum(len(of_item[p.item]) for p in placements))
            rows, placements = self._here(rows, placements)
            located = [(p.row, p.shared, pair) for p in placements for pair in of_item[p.item]]
            for at in range(0, len(located), PAIRS_AT_ONCE):
                _add_sums(s, located[at : at + PAIRS_AT_ONCE], numbers)
            for p in placements:
                self._add_products(s, rows, p, of_item[p.item], pairs, numbers, tokens)

        for group in self._groups(items):
            before = None
            if group.prefix is not None:
                self.counted.add(computed=len(group.prefix.tokens), used=len(group.prefix.tokens))
                with self.work.on_device():
                    before = self.run.prefix(group.prefix.tokens)
            for rows, placements in self.batches(group.items, group.prefix):
                self.counted.add(computed=rows.tokens.size, used=int((rows.lengths > 0).sum()))
                placements = [replace(p, item=group.numbers[p.item]) for p in placements]
                with self.work.on_device():
                    waiting.append((self.under_way(self.run.prepared(rows, before)), rows, placements))
                if len(waiting) > self.under_way.count:  # they are computed while another is read
                    collect()
        while waiting:
            collect()
        numbers, tokens = self._of_team(numbers, tokens)
        if self.gradients is not None:
            with self.work.on_device():
                gram = self.gradients([pairs[i] for i in scorable])
            for name, values in zip(GRADIENT_COLUMNS, gram, strict=True):
                numbers[name][scorable] = values if name == "grad_inner" else np.sqrt(values)
        self._require_finite(pairs, scorable, numbers)
        columns = _table_columns(pairs, numbers, self.eos)
        if not self.run.outputs.token_scores:
            return columns, None
        names = [n for n in TOKEN_COLUMNS if n not in CANDIDATES or n in columns]
        return columns, {n: [x for i in sorted(tokens) for x in tokens[i][n]] for n in names}

    def _groups(self, items: Sequence[Item]) -> list[Group]:
        """The items in the groups that are packed together."""
        if not self.run.shares_prefix:
            return [Group(list(items), list(range(len(items))), None)]
        return by_prefix(items, self.batching.rows_per_batch * self.batching.row_tokens)

    def _here(self, rows: PackedBatch, placements: list[Placement]) -> tuple[PackedBatch, list[Placement]]:
        """The rows of a batch that ``fetch`` gives, and what lies in them."""
        here = numbers_here(self.run.mesh, len(rows.tokens))
        at = {int(row): i for i, row in enumerate(here)}
        return jax.tree.map(lambda a: a[here], rows), [replace(p, row=at[p.row]) for p in placements if p.row in at]

    def _of_team(
        self, numbers: dict[str, np.ndarray], tokens: dict[int, dict[str, list]]
    ) -> tuple[dict[str, np.ndarray], dict[int, dict[str, list]]]:
        """What all processes have found; a row that lies with several of them counts as the first one has it."""
        if self.team.count == 1:
            return numbers, tokens
        found = self.team.exchange([{n: v.tolist() for n, v in numbers.items()}, list(tokens.items())])
        joined = {n: np.array(v) for n, v in found[0][0].items()}
        for others, _ in found[1:]:
            joined = {n: np.where(np.isnan(v), others[n], v) for n, v in joined.items()}
        return joined, {i: rows for _, rows_of in reversed(found) for i, rows in rows_of}

    def _require_finite(self, pairs: list[TokenPair], scorable: list[int], numbers: dict[str, np.ndarray]) -> None:
        """Names the first row whose own number is not finite: in a packed row a NaN spreads to its neighbours."""
        bad = [i for i in scorable if not all(np.isfinite(values[i]) for values in numbers.values())]
        if bad and len(pairs) > 1:
            for i in bad:
                self([pairs[i]])  # raises where it is not finite alone
        if bad:
            p, name = pairs[bad[0]], next(n for n, values in numbers.items() if not np.isfinite(values[bad[0]]))
            raise ChesError(
                f"row {p.index} (row_id {p.row_id[:12]}): {name} is not finite; "
                "try --dtype float32, or look at the row with `ches doctor`"
            )

    def _model_columns(self) -> list[str]:
        outputs = self.run.outputs
        left_out = set() if outputs.logps else {"logp_chosen", "logp_rejected"}
        left_out |= set() if outputs.head_score else {"head_score"}
        gradients = () if self.gradients is None else GRADIENT_COLUMNS
        return [*(n for n in MODEL_COLUMNS if n not in left_out), *gradients]

    def _add_products(
        self,
        s: SegmentStatistics,
        rows: PackedBatch,
        place: Placement,
        item_pairs: list[ItemPair],
        pairs: list[TokenPair],
        numbers: dict[str, np.ndarray],
        tokens: dict[int, dict[str, list]],
    ) -> None:
        """The head scores and the token scores of an item's pairs, from the products of its predictions."""
        if s.head_products is None and s.ches_products is None:
            return
        own = slice(place.shared, place.shared + place.segments)
        at = np.flatnonzero((rows.segment[place.row] >= own.start) & (rows.segment[place.row] < own.stop))
        role = rows.segment[place.row][at] - place.shared
        ches, head = (None if p is None else p[place.row][at, own] for p in (s.ches_products, s.head_products))
        if head is not None:
            between = np.zeros((place.segments, place.segments))
            np.add.at(between, role, head)
            for i, chosen, rejected in item_pairs:
                # <A+, A- - A+>: what the responses share has cancelled in the difference
                difference = between[:, rejected] - between[:, chosen]
                numbers["head_score"][i] = difference[0] + difference[chosen]
        if ches is None:
            return
        # the state at a position predicts the next one; the first response token is number 0
        state = rows.positions[place.row][rows.source[place.row][at]] + 1
        for i, chosen, rejected in item_pairs:
            pair = pairs[i]
            by_ches = pair_contributions(ches, role, 0, chosen, rejected)
            by_head = None if head is None else pair_contributions(head, role, 0, chosen, rejected)
            target = rows.target[place.row][at]
            logps = None if s.token_logps is None else np.asarray(s.token_logps[place.row][at])
            tokens[i] = _token_rows(pair, role, chosen, rejected, state, target, logps, by_ches, by_head)


def _add_sums(s: SegmentStatistics, located: list[tuple[int, int, ItemPair]], numbers: dict[str, np.ndarray]) -> None:
    """Put the statistics of pairs that come from the sums of their responses where they belong."""
    row, shared, at, chosen, rejected = np.array([(r, first, *pair) for r, first, pair in located], int).T
    sides = (shared + chosen, shared + rejected)
    plus, minus = (s.sums[row, shared] + s.sums[row, side] for side in sides)
    numbers["inner"][at] = (plus * minus).sum(-1)
    numbers["sqnorm_chosen"][at] = (plus * plus).sum(-1)
    numbers["sqnorm_rejected"][at] = (minus * minus).sum(-1)
    numbers["last_hidden_inner"][at] = (s.last[row, sides[0]] * s.last[row, sides[1]]).sum(-1)
    if s.logps is not None:
        for name, side in zip(("logp_chosen", "logp_rejected"), sides, strict=True):
            numbers[name][at] = s.logps[row, shared] + s.logps[row, side]


def _token_rows(
    pair: TokenPair,
    role: np.ndarray,
    chosen: int,
    rejected: int,
    state: np.ndarray,
    target: np.ndarray,
    logps: np.ndarray | None,
    ches: PairContributions,
    head: PairContributions | None,
) -> dict[str, list]:
    """One row per predicted token of each response; what both begin with is listed with the chosen one."""
    out: dict[str, list] = {n: [] for n in TOKEN_COLUMNS}
    before = [len(prompt) for prompt in pair.prompts]
    position = state - np.where(role == rejected, before[1], before[0])
    new = position >= shared_prefix(pair)
    numbers = pair.candidates or (None, None)
    for name, mine, part in (
        ("chosen", (role == 0) | (role == chosen), "shares"),
        ("rejected", (role == rejected) & new, "with_chosen"),
    ):
        at = np.flatnonzero(mine)
        values = {
            "row_id": [pair.row_id] * len(at),
            "index": [pair.index] * len(at),
            **{n: [k] * len(at) for n, k in zip(CANDIDATES, numbers, strict=True)},
            "response": [name] * len(at),
            "position": position[at].tolist(),
            "token": target[at].tolist(),
            "logp": [None] * len(at) if logps is None else logps[at].tolist(),
            "ches": getattr(ches, part)[at].tolist(),
            "head_score": [None] * len(at) if head is None else getattr(head, part)[at].tolist(),
            "nthr": [None] * len(at) if head is None else head.with_chosen[at].tolist(),
        }
        for n in TOKEN_COLUMNS:
            out[n] += values[n]
    return out


def edit_distance(pair: TokenPair) -> float:
    """Levenshtein distance of the two contents in tokens, over the longer length: 0 equal, 1 nothing in common."""
    return Levenshtein.normalized_distance(pair.chosen.content, pair.rejected.content)


def _table_columns(pairs: list[TokenPair], numbers: dict[str, np.ndarray], eos: Eos) -> dict[str, Any]:
    """All columns of the table for a chunk; NaN in ``numbers`` (no score) becomes null."""
    inner, plus, minus = numbers["inner"], numbers["sqnorm_chosen"], numbers["sqnorm_rejected"]
    n_chosen, n_rejected = (
        np.array([len(getattr(p, side).targets(eos)) for p in pairs], np.int32) for side in ("chosen", "rejected")
    )
    with np.errstate(divide="ignore", invalid="ignore"):  # unscorable rows have no tokens; they become null
        scores = {
            **numbers,
            "ches": formulas.ches(inner, plus),
            "ln_ches": formulas.ln_ches(inner, plus, n_chosen, n_rejected),
            "cosine": formulas.cosine(inner, plus, minus),
        }
    if "grad_inner" in numbers:
        gram = Gram(numbers["grad_norm_chosen"] ** 2, numbers["grad_norm_rejected"] ** 2, numbers["grad_inner"])
        scores["grad_cosine"] = gradient_cosine(gram)
        scores["band_low"], scores["band_high"] = band(gram)
    candidates = {}
    if any(p.candidates for p in pairs):
        candidates = {n: [p.candidates and p.candidates[k] for p in pairs] for k, n in enumerate(CANDIDATES)}
    columns: dict[str, Any] = {
        "row_id": [p.row_id for p in pairs],
        "index": [p.index for p in pairs],
        **candidates,
        **{n: [None if np.isnan(x) else float(x) for x in v] for n, v in scores.items()},
        "edit_distance": [edit_distance(p) for p in pairs],
        "chosen_tokens": n_chosen,
        "rejected_tokens": n_rejected,
        "prompt_tokens": [len(p.prompt) for p in pairs],
        "shared_prefix_tokens": [shared_prefix(p) for p in pairs],
        "flags": [list(p.flags) for p in pairs],
        "category": [p.category for p in pairs],
    }
    return {name: columns[name] for name in COLUMNS if name in columns}
