"""``ches diagnose``: did likelihood displacement happen, and how sure is that?

Three questions are kept apart: did the chosen responses fall, did the mass go to unwanted ones, did quality fall. Pair
log-probabilities answer the first; only all three together are harm. The verdict follows named criteria:

    chosen, rejected, margin   mean change in nats, with a bootstrap interval over pairs
    up / down / level          the interval lies above eps / below -eps / neither
    inverted                   margin down
    both_down_margin_up        chosen down, margin not down: likelihood displacement
    both_up                    chosen up, rejected up
    wanted                     chosen up, rejected not; or rejected down, chosen above -eps
    flat                       all three intervals within [-eps, eps]
    undecided                  none of these
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.displacement.changes import FILE_NAME, PARTS, TOLERANCE, displacement_summary
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.errors import ChesError, RunError

RESAMPLES = 2000
LEVEL = 0.95
LOG_TAIL = 0.1
"""Of a TRL log, the last tenth of its steps is the end that is compared with the start."""


@dataclass(frozen=True)
class Changes:
    """Changes of log-probabilities in nats, one per pair (per logged step, for a TRL log)."""

    chosen: np.ndarray
    rejected: np.ndarray
    source: str
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Interval:
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float

    def direction(self, tolerance: float) -> str:
        """``up``, ``down`` or ``level``."""
        if self.low > tolerance:
            return "up"
        return "down" if self.high < -tolerance else "level"

    def within(self, tolerance: float) -> bool:
        """Whether the whole interval is within eps of zero."""
        return -tolerance <= self.low and self.high <= tolerance

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Diagnosis:
    """The verdict and what it rests on."""

    verdict: str
    pairs: int
    source: str
    chosen: Interval
    rejected: Interval
    margin: Interval
    summary: dict[str, float]
    tolerance: float
    caveats: tuple[str, ...]

    @property
    def questions(self) -> dict[str, str]:
        """The three questions and what is known."""
        fell = {"down": "yes", "up": "no"}.get(self.chosen.direction(self.tolerance))
        if fell is None:
            fell = "no" if self.chosen.low >= -self.tolerance else "unclear"
        return {
            "did the chosen responses fall?": fell,
            "did the mass go to unwanted responses?": "not measured (needs generated text or probe responses)",
            "did held-out quality fall?": "not measured (needs a judge)",
        }

    def text(self) -> str:
        """For a person: the verdict first, with its criterion."""
        s = {k.removeprefix("displacement/"): v for k, v in self.summary.items()}
        lines = [
            f"verdict: {self.verdict} (mean changes with {LEVEL:.0%} bootstrap intervals, eps {self.tolerance:g} nats)",
            f"  {self.source}: {self.pairs} pairs",
            f"  chosen    {self.chosen} nats, median {s['dlogp_chosen_median']:+.3f}",
            f"  rejected  {self.rejected} nats, median {s['dlogp_rejected_median']:+.3f}",
            f"  margin    {self.margin} nats",
            "  pairs: " + ", ".join(f"{k.removesuffix('_rate')} {v:.0%}" for k, v in s.items() if k.endswith("_rate")),
        ]
        if "chosen_share" in s:
            shares = f"{s['chosen_share']:+.0%} from chosen, {s['rejected_share']:+.0%} from rejected"
            lines.append(f"  margin change: {shares}")
        lines += [f"  {question} {answer}" for question, answer in self.questions.items()]
        lines += [f"  note: {caveat}" for caveat in self.caveats]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """For a script."""
        intervals = {n: vars(getattr(self, n)) for n in ("chosen", "rejected", "margin")}
        return {
            "verdict": self.verdict,
            "pairs": self.pairs,
            "source": self.source,
            "criterion": {"tolerance": self.tolerance, "level": LEVEL, "resamples": RESAMPLES},
            **intervals,
            **self.summary,
            "questions": self.questions,
            "caveats": list(self.caveats),
        }


def diagnose(config: DiagnoseConfig) -> Diagnosis:
    """The verdict on a run, two score tables, a table of log-probabilities or a TRL log.

    Raises:
      ChesError: no source or several; a source without the numbers that are needed.
    """
    given = [n for n in ("run_dir", "before", "logps", "trl_log") if getattr(config, n) is not None]
    if len(given) != 1 or (config.before is None) != (config.after is None):
        raise ChesError("give one of --run DIR, --before DIR --after DIR, --logps FILE, --trl-log FILE")
    if config.run_dir is not None:
        changes = of_run(Path(config.run_dir))
    elif config.before is not None:
        changes = of_scores(Path(config.before), Path(str(config.after)))
    elif config.logps is not None:
        changes = of_table(Path(config.logps))
    else:
        changes = of_trl_log(Path(str(config.trl_log)), config.beta)
    return judge(changes, config.tolerance)


def judge(changes: Changes, tolerance: float = TOLERANCE) -> Diagnosis:
    """The verdict on changes."""
    if not len(changes.chosen):
        raise ChesError(f"{changes.source}: no pairs")
    bad = ~(np.isfinite(changes.chosen) & np.isfinite(changes.rejected))
    if bad.any():
        raise ChesError(f"{changes.source}: {bad.sum()} pairs have log-probabilities that are no numbers")
    margin = changes.chosen - changes.rejected
    c, r, m = bootstrap(np.stack([changes.chosen, changes.rejected, margin]))
    caveats = changes.caveats
    if len(margin) < 30:
        caveats = (*caveats, f"{len(margin)} pairs are few: intervals are rough")
    return Diagnosis(
        verdict=_verdict(c, r, m, tolerance),
        pairs=len(margin),
        source=changes.source,
        chosen=c,
        rejected=r,
        margin=m,
        summary=displacement_summary(changes.chosen, changes.rejected, tolerance),
        tolerance=tolerance,
        caveats=caveats,
    )


def bootstrap(values: np.ndarray, seed: int = 0) -> list[Interval]:
    """Mean of each row of [quantities, pairs] with its percentile interval; pairs are drawn together."""
    rng = np.random.default_rng(seed)
    count = values.shape[1]
    means = np.stack([values[:, rng.integers(0, count, count)].mean(1) for _ in range(RESAMPLES)], 1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
    return [Interval(float(v.mean()), float(a), float(b)) for v, a, b in zip(values, low, high, strict=True)]


def _verdict(chosen: Interval, rejected: Interval, margin: Interval, tolerance: float) -> str:
    c, r, m = (i.direction(tolerance) for i in (chosen, rejected, margin))
    if m == "down":
        return "inverted"
    if c == "down":
        return "both_down_margin_up"
    if c == "up" and r == "up":
        return "both_up"
    if (c == "up" and r != "up") or (r == "down" and chosen.low >= -tolerance):
        return "wanted"
    return "flat" if all(i.within(tolerance) for i in (chosen, rejected, margin)) else "undecided"


def of_run(folder: Path) -> Changes:
    """The last evaluation of a training run, finished or not."""
    import pyarrow.parquet as pq

    path = folder / FILE_NAME
    if not path.exists():
        parts = sorted((folder / PARTS).glob("step-*.parquet"))
        if not parts:
            raise RunError(f"{folder}: no {FILE_NAME}; expected a directory of `ches train`")
        path = parts[-1]
    columns = pq.read_table(path).to_pydict()
    step, sets = np.array(columns["step"]), np.array(columns["set"])
    last = int(step.max())
    if last == 0:
        raise RunError(f"{folder}: holds step 0 only; there is no change to judge yet")
    held_out = "held_out" in sets
    take = (step == last) & (sets == ("held_out" if held_out else "train"))
    caveats = () if held_out else ("training pairs: a run with --holdout or --eval-pairs tells more",)
    name = "held-out" if held_out else "training"
    pairs = (np.array(columns["chosen_tokens"]) > 0) & (np.array(columns["rejected_tokens"]) > 0)
    if not (take & pairs).any():
        raise RunError(
            f"{folder}: trained on single responses, of which no two make a pair; displacement/* in metrics.jsonl has "
            "the changes of good and of bad ones"
        )
    if (take & ~pairs).any():
        caveats = (*caveats, f"{(take & ~pairs).sum()} single responses are not counted")
    take &= pairs
    return Changes(
        np.array(columns["dlogp_chosen"])[take],
        np.array(columns["dlogp_rejected"])[take],
        f"{folder}, {name} pairs, update {last} against 0",
        caveats,
    )


def of_scores(before: Path, after: Path) -> Changes:
    """Two score tables with log-probabilities, joined by ``row_id``."""
    first, second = (_columns(f, ("row_id", "logp_chosen", "logp_rejected")) for f in (before, after))
    at = {row_id: i for i, row_id in enumerate(second["row_id"])}
    both = [(i, at[row_id]) for i, row_id in enumerate(first["row_id"]) if row_id in at]
    if not both:
        raise RunError(f"{before} and {after} have no pair in common")
    i, j = (np.array(x) for x in zip(*both, strict=True))
    chosen, rejected = (
        np.array(second[n], float)[j] - np.array(first[n], float)[i] for n in ("logp_chosen", "logp_rejected")
    )
    left = len(first["row_id"]) + len(second["row_id"]) - 2 * len(both)
    caveats = (f"{left} rows are in one table only",) if left else ()
    return Changes(chosen, rejected, f"{before} to {after}", caveats)


def of_table(path: Path) -> Changes:
    """One table with log-probabilities before (TRL's reference columns) and after."""
    names = ("ref_chosen_logps", "ref_rejected_logps", "logp_chosen", "logp_rejected")
    c = {n: np.array(v, float) for n, v in _columns(path, names).items() if n in names}
    return Changes(
        c["logp_chosen"] - c["ref_chosen_logps"], c["logp_rejected"] - c["ref_rejected_logps"], str(path)
    )  # fmt: skip


def of_trl_log(path: Path, beta: float) -> Changes:
    """The end of a TRL log: rewards over beta are changes since the reference, as means of batches."""
    if beta <= 0:
        raise ChesError(f"--beta {beta}: expected a positive number")
    try:
        history = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ChesError(f"{path}: not a trainer_state.json (expected an object with log_history)") from None
    names = ("rewards/chosen", "rewards/rejected")
    entries: list[Mapping[str, Any]] = [e for e in history if all(n in e for n in names)]
    if not entries:
        raise ChesError(f"{path}: its log_history has no {names[0]}; expected the log of a DPOTrainer")
    entries = entries[-max(1, round(LOG_TAIL * len(entries))) :]
    chosen, rejected = (np.array([e[n] for e in entries], float) / beta for n in names)
    return Changes(
        chosen,
        rejected,
        f"{path}, last {len(entries)} logged steps",
        (f"means of training batches over beta {beta:g}: what single pairs did is hidden, rates count steps",),
    )


def _columns(path: Path, names: tuple[str, ...]) -> dict[str, list[Any]]:
    """Columns of a parquet file, or of ``scores.parquet`` in a directory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = path / "scores.parquet" if path.is_dir() else path
    try:
        table = pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"{file}: not a readable parquet file ({error})") from None
    missing = [n for n in names if n not in table.column_names]
    if missing:
        raise RunError(f"{file}: no column {', '.join(missing)}; score with --logps")
    return table.select(list(names)).to_pydict()


def failed(diagnosis: Diagnosis, rule: str | None) -> bool:
    """Whether a rule such as ``lld_rate>0.2`` holds.

    Raises:
      ChesError: a rule that cannot be read, or a name that the diagnosis does not have.
    """
    if rule is None:
        return False
    found = re.fullmatch(r"\s*(\w+)\s*([<>])\s*(-?[\d.]+)\s*", rule)
    values = {k.removeprefix("displacement/"): v for k, v in diagnosis.summary.items()}
    if found is None or found[1] not in values:
        raise ChesError(f"--fail-if {rule!r}: expected NAME>NUMBER or NAME<NUMBER with one of {', '.join(values)}")
    value, bound = values[found[1]], float(found[3])
    return value > bound if found[2] == ">" else value < bound
