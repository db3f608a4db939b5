"""The log of watched pairs that every integration keeps: numbers for the trainer, and a table for ``ches diagnose``."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.displacement import TOLERANCE
from ches_jax.displacement.changes import FILE_NAME, SUMMARY, displacement_summary, regimes
from ches_jax.errors import ChesError
from ches_jax.runs.files import replacing


class PairLog:
    """Log-probabilities of held-out pairs at several steps of a run, as changes since the first.

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

        Raises:
          ChesError: a name of ``stop_if`` that no summary has.
        """
        unknown = sorted(set(stop_if or {}) - set(SUMMARY))
        if unknown:
            raise ChesError(f"stop_if {', '.join(unknown)}: expected some of {', '.join(SUMMARY)}")
        self.out, self.tolerance, self.stop_if = Path(out), tolerance, dict(stop_if or {})
        self._rows: list[pa.Table] = []
        self._start: np.ndarray | None = None

    def add(self, step: int, logps: np.ndarray, tokens: np.ndarray) -> dict[str, float]:
        """Writes one evaluation; returns ``displacement/*``.

        Args:
          step: updates so far; the first call is the start.
          logps: [pairs, 2], nats, chosen and rejected, the same pairs at every call.
          tokens: [pairs, 2], tokens of each response.

        Raises:
          ChesError: another number of pairs than at the start, or values that are not finite.
        """
        logps = np.asarray(logps, np.float64)
        if self._start is None:
            self._start = logps
        if logps.shape != self._start.shape or logps.shape[1:] != (2,):
            raise ChesError(f"log-probabilities {list(logps.shape)}: expected {list(self._start.shape)}, [pairs, 2]")
        if not np.isfinite(logps).all():
            raise ChesError(f"step {step}: {int((~np.isfinite(logps)).sum())} log-probabilities are NaN or infinite")
        chosen, rejected = (logps - self._start).T
        count = len(chosen)
        columns = {
            "step": pa.array([step] * count, pa.int32()),
            "set": ["held_out"] * count,
            "row_id": [f"eval-{i}" for i in range(count)],
            "index": list(range(count)),
            "logp_chosen": logps[:, 0],
            "logp_rejected": logps[:, 1],
            "dlogp_chosen": chosen,
            "dlogp_rejected": rejected,
            "margin": chosen - rejected,
            "regime": regimes(chosen, rejected, self.tolerance).tolist(),
            "chosen_tokens": np.asarray(tokens)[:, 0].astype(np.int32),
            "rejected_tokens": np.asarray(tokens)[:, 1].astype(np.int32),
        }
        self._rows.append(pa.table(columns))
        self.out.mkdir(parents=True, exist_ok=True)
        with replacing(self.out / FILE_NAME) as temporary:
            pq.write_table(pa.concat_tables(self._rows), temporary)
        return displacement_summary(chosen, rejected, self.tolerance)

    def stops(self, summary: Mapping[str, float]) -> bool:
        """Whether a number is beyond its bound."""
        return any(summary.get(f"displacement/{n}", float("nan")) > bound for n, bound in self.stop_if.items())
