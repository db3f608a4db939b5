"""The log of watched pairs that every integration keeps: numbers for the trainer, and a table for ``ches diagnose``."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.displacement import TOLERANCE
from ches_jax.displacement.changes import FILE_NAME, SUMMARY, displacement_summary, regimes
from ches_jax.displacement.readers.training_run import read_log_table
from ches_jax.errors import ChesError
from ches_jax.notices import notice
from ches_jax.runs.files import replacing

COLUMNS = pa.schema(
    {
        "step": pa.int32(),
        "set": pa.string(),
        "row_id": pa.string(),
        "index": pa.int64(),
        "logp_chosen": pa.float64(),
        "logp_rejected": pa.float64(),
        "dlogp_chosen": pa.float64(),
        "dlogp_rejected": pa.float64(),
        "margin": pa.float64(),
        "regime": pa.string(),
        "chosen_tokens": pa.int32(),
        "rejected_tokens": pa.int32(),
    }
)
"""A row for each pair and step."""


SIGNED = ("dlogp_chosen", "dlogp_chosen_median", "dlogp_rejected", "dlogp_rejected_median", "margin")
SHARES_OF_MARGIN = ("chosen_share", "rejected_share")
"""Numbers of a summary that may lie below 0; the others are shares of the pairs, 0 to 1."""


class PairLog:
    """Log-probabilities of held-out pairs at several steps of a run, as changes since the first.

    A step that comes again replaces what was measured at it and after it. The log of a run that resumes continues the
    file in its directory.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     log = PairLog(folder, stop_if={"lld_rate": 0.5})
    ...     _ = log.add(0, np.zeros((8, 2)), np.ones((8, 2)))
    ...     found = log.add(5, np.full((8, 2), -3.0), np.ones((8, 2)))
    ...     found["displacement/dlogp_chosen"], log.stops(found)
    (-3.0, True)
    """

    def __init__(
        self, out: Path | str, *, tolerance: float = TOLERANCE, stop_if: Mapping[str, float] | None = None
    ) -> None:
        """A log in a directory; ``stop_if``: bounds on numbers of ``displacement_summary``.

        A number stops where it is above its bound, or below it where the bound is negative.

        Raises:
          ChesError: a name of ``stop_if`` that no summary has, a bound that no number can pass.
        """
        self.out, self.tolerance, self.stop_if = Path(out), tolerance, dict(stop_if or {})
        _check_bounds(self.stop_if)
        self._steps: dict[int, pa.Table] = {}

    def add(self, step: int, logps: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
        """Writes one evaluation; returns ``displacement/*``.

        Args:
          step: updates so far; the first step of a run is its start. If that is not 0, the file of an earlier part of
            the run is looked for in the directory.
          logps: [pairs, 2], nats, chosen and rejected, the same pairs at every call.
          tokens: [pairs, 2], tokens of each response.

        Raises:
          ChesError: other pairs than at the start, or values that are not finite.
        """
        step, logps, tokens = int(step), np.asarray(logps, np.float64), np.asarray(tokens).astype(np.int32)
        if logps.ndim != 2 or logps.shape[1] != 2 or tokens.shape != logps.shape:
            raise ChesError(f"log-probabilities {list(logps.shape)}, tokens {list(tokens.shape)}: expected [pairs, 2]")
        if not np.isfinite(logps).all():
            raise ChesError(f"step {step}: {int((~np.isfinite(logps)).sum())} log-probabilities are NaN or infinite")
        before = {s: t for s, t in (self._steps or self._earlier_part(step)).items() if s < step}
        start = self._start(before[min(before)], tokens) if before else logps
        if step and not before:
            notice(f"{self.out / FILE_NAME}: no measurement before update {step}; changes are counted from there")
        chosen, rejected = (logps - start).T
        self._steps = {**before, step: self._table(step, logps, chosen, rejected, tokens)}
        self.out.mkdir(parents=True, exist_ok=True)
        with replacing(self.out / FILE_NAME) as temporary:
            pq.write_table(pa.concat_tables(self._steps.values()), temporary)
        return displacement_summary(chosen, rejected, self.tolerance)

    def _table(
        self, step: int, logps: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, tokens: np.ndarray
    ) -> pa.Table:
        """The rows of one evaluation."""
        count = len(logps)
        columns = {
            "step": [step] * count,
            "set": ["held_out"] * count,
            "row_id": [f"eval-{i}" for i in range(count)],
            "index": list(range(count)),
            "logp_chosen": logps[:, 0],
            "logp_rejected": logps[:, 1],
            "dlogp_chosen": chosen,
            "dlogp_rejected": rejected,
            "margin": chosen - rejected,
            "regime": regimes(chosen, rejected, self.tolerance).tolist(),
            "chosen_tokens": tokens[:, 0],
            "rejected_tokens": tokens[:, 1],
        }
        return pa.table(columns, schema=COLUMNS)

    def _earlier_part(self, step: int) -> dict[int, pa.Table]:
        """The evaluations in the directory's file; none for a run that starts, which writes the file anew."""
        path = self.out / FILE_NAME
        if not step or not path.exists():
            return {}
        table = read_log_table(path)
        if not set(COLUMNS.names) <= set(table.column_names):
            raise ChesError(f"{path}: it is no log of a callback, and the run at update {step} would replace it")
        table = table.select(COLUMNS.names).cast(COLUMNS)
        steps = np.array(table["step"])
        return {int(s): table.filter(pa.array(steps == s)) for s in np.unique(steps)}

    def _start(self, first: pa.Table, tokens: np.ndarray) -> np.ndarray:
        """Log-probabilities at the first step, [pairs, 2], of pairs with these numbers of tokens."""
        there = np.stack([np.array(first[n]) for n in ("chosen_tokens", "rejected_tokens")], 1)
        if there.shape != tokens.shape or (there != tokens).any():
            what = "of other lengths" if there.shape == tokens.shape else f"{len(there)} pairs"
            raise ChesError(
                f"log-probabilities {list(tokens.shape)}: expected {list(there.shape)}, the pairs of step "
                f"{first['step'][0]} in {self.out / FILE_NAME}, which are {what}; a log has the same pairs at every "
                "step, so give these, or another directory"
            )
        return np.stack([np.array(first[n]) for n in ("logp_chosen", "logp_rejected")], 1)

    def stops(self, summary: Mapping[str, float]) -> bool:
        """Whether a number is beyond its bound."""
        return any(
            summary[name] < bound if bound < 0 else summary[name] > bound
            for name, bound in ((f"displacement/{n}", bound) for n, bound in self.stop_if.items())
            if name in summary
        )


def _check_bounds(stop_if: Mapping[str, float]) -> None:
    unknown = sorted(set(stop_if) - set(SUMMARY))
    if unknown:
        raise ChesError(f"stop_if {', '.join(unknown)}: expected some of {', '.join(SUMMARY)}")
    for name, bound in stop_if.items():
        if isinstance(bound, bool) or not isinstance(bound, int | float) or not math.isfinite(bound):
            raise ChesError(f"stop_if {name}={bound!r}: expected a number")
        if name not in SIGNED + SHARES_OF_MARGIN and not 0 <= bound <= 1:
            raise ChesError(f"stop_if {name}={bound!r}: it is a share of the pairs; expected a bound from 0 to 1")
