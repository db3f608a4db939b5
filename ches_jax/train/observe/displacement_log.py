"""The displacement log of a run: how far every watched pair has moved, at every evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.displacement import TOLERANCE
from ches_jax.displacement.changes import FILE_NAME, PARTS, displacement_summary, regimes
from ches_jax.displacement.ranking import ranking_rates
from ches_jax.errors import RunError
from ches_jax.runs.files import read_parquet
from ches_jax.train.observe.evaluations import join, part, write_table
from ches_jax.train.observe.observer import Params
from ches_jax.train.observe.pair_logprobs import PairLogps, PairStatistics, WatchedPairs
from ches_jax.types import TokenPair

SCHEMA = pa.schema(
    [
        pa.field("step", pa.int32()),
        pa.field("set", pa.string()),
        pa.field("row_id", pa.string()),
        pa.field("index", pa.int64()),
        pa.field("logp_chosen", pa.float64()),
        pa.field("logp_rejected", pa.float64()),
        pa.field("dlogp_chosen", pa.float64()),
        pa.field("dlogp_rejected", pa.float64()),
        pa.field("margin", pa.float64()),
        pa.field("regime", pa.string()),
        pa.field("chosen_tokens", pa.int32()),
        pa.field("rejected_tokens", pa.int32()),
        pa.field("entropy_chosen", pa.float64()),
        pa.field("entropy_rejected", pa.float64()),
        pa.field("argmax_mass_chosen", pa.float64()),
        pa.field("argmax_mass_rejected", pa.float64()),
        pa.field("rank_rejected", pa.int32()),
        pa.field("label_posterior", pa.float64()),
    ]
)
"""One row per pair, set and evaluation; ``margin`` is the change of the margin, nats; entropies (nats) and arg-max
masses are means over the tokens of a response. ``rank_rejected``: of lists, the place of the rejected response among
those of its row, from 2. ``label_posterior``: LCPO's probability that the label is right."""

START = pa.schema([SCHEMA.field(name) for name in ("set", "row_id", "logp_chosen", "logp_rejected")])
"""What a run that is resumed reads of step 0."""


def present(pairs: Sequence[TokenPair], logps: PairLogps) -> PairLogps:
    """Log-probabilities with NaN for the side that a single response does not have."""
    has = ([bool(p.chosen.targets("include")) for p in pairs], [bool(p.rejected.targets("include")) for p in pairs])
    return PairLogps(*(np.where(side, values, np.nan) for side, values in zip(has, logps, strict=True)))


def sharpness(statistics: PairStatistics) -> dict[str, np.ndarray]:
    """Entropy and arg-max mass of each pair, by name and side."""
    both = {"entropy": statistics.entropy, "argmax_mass": statistics.argmax_mass}
    return {f"{name}_{side}": getattr(values, side) for name, values in both.items() for side in PairLogps._fields}


def block(
    step: int,
    name: str,
    pairs: Sequence[TokenPair],
    start: PairLogps,
    statistics: PairStatistics,
    eos: Any,
    tolerance: float,
    ranks: Mapping[str, int] | None = None,
    posterior: np.ndarray | None = None,
) -> pa.Table:
    """The rows of one set at one evaluation."""
    now = statistics.logps
    chosen, rejected = now.chosen - start.chosen, now.rejected - start.rejected
    columns: Mapping[str, Any] = {
        "step": [step] * len(pairs),
        "set": [name] * len(pairs),
        "row_id": [p.row_id for p in pairs],
        "index": [p.index for p in pairs],
        "logp_chosen": now.chosen,
        "logp_rejected": now.rejected,
        "dlogp_chosen": chosen,
        "dlogp_rejected": rejected,
        "margin": chosen - rejected,
        "regime": regimes(chosen, rejected, tolerance).tolist(),
        "chosen_tokens": [len(p.chosen.targets(eos)) for p in pairs],
        "rejected_tokens": [len(p.rejected.targets(eos)) for p in pairs],
        **sharpness(statistics),
        "rank_rejected": [(ranks or {}).get(p.row_id) for p in pairs],
        "label_posterior": [None] * len(pairs) if posterior is None else posterior,
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in SCHEMA], schema=SCHEMA)


def by_rank(
    pairs: Sequence[TokenPair], chosen: np.ndarray, rejected: np.ndarray, ranks: Mapping[str, int]
) -> dict[str, float]:
    """Mean change of the responses of each rank, nats; the best response of a row counts once.

    Empty where no pair has a rank.
    """
    places = np.array([ranks.get(p.row_id, 0) for p in pairs])
    if not places.any():
        return {}
    _, first = np.unique([p.index for p in pairs], return_index=True)
    out = {"dlogp_rank_1": float(np.mean(chosen[first]))}
    return out | {
        f"dlogp_rank_{k}": float(np.mean(rejected[places == k]))
        for k in range(2, int(places.max()) + 1)
        if (places == k).any()
    }


class DisplacementLog:
    """The log of a run: one part per evaluation, joined at the end. Knows the log-probabilities of step 0."""

    def __init__(
        self,
        out: Path,
        eos: Any,
        tolerance: float = TOLERANCE,
        *,
        write: bool = True,
        ranks: Mapping[str, int] | None = None,
        beta: float | None = None,
    ):
        """A log of nothing yet.

        Args:
          out: the run directory.
          eos: whether a terminator counts.
          tolerance: changes up to so many nats count as none.
          write: whether this process keeps the log; of several only the first does.
          ranks: of lists, the rank of each pair's rejected response, by ``row_id``.
          beta: of a loss of log-ratios to the model of step 0; None for others.
        """
        self.beta = beta
        self.ranks = ranks or {}
        self.write = write
        self.out = out
        self.eos = eos
        self.tolerance = tolerance
        self.start: dict[str, PairLogps] = {}

    def part(self, step: int) -> Path:
        """File of one evaluation."""
        return part(self.out / PARTS, step)

    def record(
        self,
        step: int,
        sets: Mapping[str, Sequence[TokenPair]],
        now: Mapping[str, PairStatistics],
        posteriors: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, float]:
        """Write one evaluation; returns the summaries (held-out pairs under ``eval_displacement/*``).

        Args:
          step: updates done.
          sets: the pairs by the name of their set.
          now: their statistics.
          posteriors: LCPO's probabilities that their labels are right.
        """
        now = {
            name: statistics._replace(logps=present(sets[name], statistics.logps)) for name, statistics in now.items()
        }
        if step == 0:
            self.start = {name: statistics.logps for name, statistics in now.items()}
        if not self.start and sets:
            self._read_start(sets)
        blocks, summary = [SCHEMA.empty_table()], {}
        for name, pairs in sets.items():
            posterior = (posteriors or {}).get(name)
            blocks.append(
                block(step, name, pairs, self.start[name], now[name], self.eos, self.tolerance, self.ranks, posterior)
            )
            chosen = now[name].logps.chosen - self.start[name].chosen
            rejected = now[name].logps.rejected - self.start[name].rejected
            prefix = "" if name == "train" else "eval_"
            summary |= {f"{prefix}{k}": v for k, v in displacement_summary(chosen, rejected, self.tolerance).items()}
            rates = ranking_rates(self.start[name], now[name].logps, self.beta)
            summary |= {f"{prefix}{k}": v for k, v in rates.items()}
            summary |= {f"{prefix}displacement/{k}": v for k, v in by_rank(pairs, chosen, rejected, self.ranks).items()}
            if posterior is not None:
                summary[f"{prefix}label/posterior_mean"] = float(np.mean(posterior))
            for key, values in sharpness(now[name]).items():
                if not np.isnan(values).all():
                    summary[f"{prefix}displacement/{key}"] = float(np.nanmean(values))
        if self.write:
            write_table(pa.concat_tables(blocks), self.part(step))
        return summary

    def _read_start(self, sets: Mapping[str, Sequence[TokenPair]]) -> None:
        """Step 0 of a run that is resumed."""
        if not self.part(0).exists():
            raise RunError(f"{self.part(0)}: missing, so no change since step 0 is known; start the run anew")
        table = read_parquet(self.part(0), RunError, "the log of step 0 of this run", START)
        for name, pairs in sets.items():
            of_set = table.filter(pa.array([s == name for s in table.column("set").to_pylist()]))
            if of_set.column("row_id").to_pylist() != [p.row_id for p in pairs]:
                raise RunError(f"{self.part(0)}: holds other {name} pairs than this run; start the run anew")
            values = (of_set.column(n).to_numpy() for n in ("logp_chosen", "logp_rejected"))
            self.start[name] = PairLogps(*values)

    def join(self) -> Path:
        """All evaluations in one file, in order of steps."""
        return join(self.out / PARTS, self.out / FILE_NAME)


@dataclass(frozen=True)
class DisplacementObserver:
    """Follows the log-probabilities of the watched pairs: the displacement log, and its summaries."""

    every: int | None
    watched: WatchedPairs
    log: DisplacementLog
    posteriors: Callable[[Mapping[str, PairLogps]], Mapping[str, np.ndarray]] | None = None
    """Of a run whose labels are in doubt: from the log-probabilities of each set to the probabilities of its labels."""

    def observe(self, step: int, params: Params) -> dict[str, float]:
        """``displacement/*`` of the training pairs, ``eval_displacement/*`` of the held-out ones."""
        now = self.watched.statistics(step, params)
        known = None if self.posteriors is None else self.posteriors({n: s.logps for n, s in now.items()})
        return self.log.record(step, self.watched.sets, now, known)

    def close(self) -> None:
        """Join the parts."""
        if self.log.write:
            self.log.join()
