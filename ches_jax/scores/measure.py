"""Token pairs to the numbers of the table: packed, passed through the model, added up in float64 on the host."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from ches_jax.data.audit import UNSCORABLE, shared_prefix
from ches_jax.data.packing import Placement, Rows, pack
from ches_jax.errors import ChesError
from ches_jax.parallel import row_shards
from ches_jax.scores import derive
from ches_jax.scores.passes import ScoringPass, fetch
from ches_jax.scores.statistics import SegmentStatistics
from ches_jax.scores.table import COLUMNS
from ches_jax.types import Eos, TokenPair

MODEL_COLUMNS = (
    "inner", "sqnorm_chosen", "sqnorm_rejected", "last_hidden_inner", "head_score", "logp_chosen", "logp_rejected",
)  # fmt: skip
"""What the model gives; everything else is derived or counted."""
TOKEN_COLUMNS = ("row_id", "index", "response", "position", "token", "ches", "head_score")


@dataclass(frozen=True)
class Batching:
    """How rows are cut for the device."""

    row_tokens: int
    rows_per_batch: int
    row_multiple: int
    length_threshold: int | None

    @classmethod
    def of(cls, batch_tokens: int, row_tokens: int, run: ScoringPass, length_threshold: int | None) -> "Batching":
        """Rows of ``row_tokens`` (or fewer, where a batch is smaller) dealt out over the mesh of ``run``."""
        length = min(row_tokens, -(-batch_tokens // 64) * 64)
        shards = row_shards(run.mesh)
        return cls(length, max(1, batch_tokens // length) * shards, shards, length_threshold)


class Measurer:
    """Measures chunks of pairs with one pass; counts what was computed and what of it was padding."""

    def __init__(self, run: ScoringPass, batching: Batching, eos: Eos, tell: Callable[[int], None] = lambda n: None):
        """``tell`` is called with the number of pairs after every batch."""
        self.run = run
        self.batching = batching
        self.eos: Eos = eos
        self._tell = tell
        self._positions = 0
        self._used = 0

    @property
    def waste(self) -> float:
        """Share of computed positions that were padding."""
        return 1 - self._used / self._positions if self._positions else 0.0

    def batches(self, pairs: Sequence[TokenPair]):
        """Packed batches of scorable pairs."""
        b = self.batching
        return pack(
            pairs,
            length=b.row_tokens,
            rows_per_batch=b.rows_per_batch,
            eos=self.eos,
            row_multiple=b.row_multiple,
            length_threshold=b.length_threshold,
        )

    def __call__(self, pairs: list[TokenPair]) -> tuple[dict[str, Any], dict[str, list] | None]:
        """The chunk's columns of the table, and of the token table where tokens are asked for.

        Raises:
          ChesError: a number that is not finite; names the row.
        """
        able = [i for i, p in enumerate(pairs) if UNSCORABLE.isdisjoint(p.flags)]
        numbers = {n: np.full(len(pairs), np.nan) for n in self._asked()}
        tokens: list[dict[str, list]] = []
        waiting: list[tuple[SegmentStatistics, Rows, list[Placement]]] = []

        def collect() -> None:
            statistics, rows, placements = waiting.pop(0)
            s = fetch(statistics)
            self._collect(s, rows, placements, able, numbers)
            if self.run.wanted.token_scores:
                tokens.append(self._tokens(s, rows, placements, [pairs[able[p.pair]] for p in placements]))
            self._tell(len(placements))

        for rows, placements in self.batches([pairs[i] for i in able]):
            self._positions += rows.tokens.size
            self._used += int((rows.lengths > 0).sum())
            waiting.append((self.run(rows), rows, placements))
            if len(waiting) > 1:  # one batch is under way on the device while another is read
                collect()
        while waiting:
            collect()
        _require_finite(pairs, able, numbers)
        by_token = (
            {n: [x for t in tokens for x in t[n]] for n in TOKEN_COLUMNS} if self.run.wanted.token_scores else None
        )
        return _table_columns(pairs, numbers, self.eos), by_token

    def _asked(self) -> list[str]:
        wanted = self.run.wanted
        left_out = set() if wanted.logps else {"logp_chosen", "logp_rejected"}
        left_out |= set() if wanted.head_score else {"head_score"}
        return [n for n in MODEL_COLUMNS if n not in left_out]

    def _collect(self, s, rows: Rows, placements: list[Placement], able: list[int], numbers: dict[str, np.ndarray]):
        """Put a batch's pair statistics where they belong."""
        row = np.array([p.row for p in placements], int)
        shared = np.array([p.shared for p in placements], int)
        at = np.array([able[p.pair] for p in placements], int)
        plus, minus = (s.sums[row, shared] + s.sums[row, shared + side] for side in (1, 2))
        numbers["inner"][at] = (plus * minus).sum(-1)
        numbers["sqnorm_chosen"][at] = (plus * plus).sum(-1)
        numbers["sqnorm_rejected"][at] = (minus * minus).sum(-1)
        numbers["last_hidden_inner"][at] = (s.last[row, shared + 1] * s.last[row, shared + 2]).sum(-1)
        if s.logps is not None:
            for name, side in (("logp_chosen", 1), ("logp_rejected", 2)):
                numbers[name][at] = s.logps[row, shared] + s.logps[row, shared + side]
        if s.token_head is not None:
            # the shares of the chosen response's tokens add up to the score; what the responses share has cancelled
            numbers["head_score"][at] = [
                s.token_head[p.row][np.isin(rows.segment[p.row], (p.shared, p.chosen))].sum() for p in placements
            ]

    def _tokens(self, s, rows: Rows, placements: list[Placement], pairs: list[TokenPair]) -> dict[str, list]:
        """One row per predicted token of each response; what both share is told with the chosen one."""
        out: dict[str, list] = {n: [] for n in TOKEN_COLUMNS}
        for place, pair in zip(placements, pairs, strict=True):
            segment = rows.segment[place.row]
            prompt = len(pair.prompt)
            for name, mine in (
                ("chosen", np.isin(segment, (place.shared, place.chosen))),
                ("rejected", segment == place.rejected),
            ):
                at = np.flatnonzero(mine)
                out["row_id"] += [pair.row_id] * len(at)
                out["index"] += [pair.index] * len(at)
                out["response"] += [name] * len(at)
                # the state at a position predicts the next one; the first response token is number 0
                out["position"] += (rows.positions[place.row][rows.source[place.row][at]] + 1 - prompt).tolist()
                out["token"] += rows.target[place.row][at].tolist()
                out["ches"] += s.token_ches[place.row][at].tolist()
                heads = [None] * len(at) if s.token_head is None else s.token_head[place.row][at].tolist()
                out["head_score"] += heads
        return out


def _require_finite(pairs: list[TokenPair], able: list[int], numbers: dict[str, np.ndarray]) -> None:
    for name, values in numbers.items():
        bad = [i for i in able if not np.isfinite(values[i])]
        if bad:
            p = pairs[bad[0]]
            raise ChesError(
                f"row {p.index} (row_id {p.row_id[:12]}): {name} is not finite; "
                "try --dtype float32, or look at the row with `ches doctor`"
            )


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
            "ches": derive.ches(inner, plus),
            "ln_ches": derive.ln_ches(inner, plus, n_chosen, n_rejected),
            "cosine": derive.cosine(inner, plus, minus),
        }
    columns: dict[str, Any] = {
        "row_id": [p.row_id for p in pairs],
        "index": [p.index for p in pairs],
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
