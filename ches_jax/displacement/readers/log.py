"""A training log as it is read, whatever file it comes from: entries of metrics over steps."""

import itertools
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.displacement.readers.log_order import LARGEST, SIDES, in_order
from ches_jax.displacement.readers.metric_names import HELD_OUT, REINFORCEMENT, REWARD_MODEL, metric
from ches_jax.errors import ChesError
from ches_jax.runs.files import open_regular

MOST_BYTES = 200_000_000
"""Of a file; a log is never larger, a data set may be."""

LARGEST_FLOAT = sys.float_info.max
"""What MLflow writes for infinity."""


class NotALogError(ChesError):
    """A file in none of the formats of logs; one of many in a directory."""


def read_whole(path: Path) -> bytes:
    """The bytes of a log.

    Raises:
      NotALogError: it is no regular file, or larger than any log.
      OSError: it cannot be read.
    """
    with open_regular(path, NotALogError, "a log") as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
            raise NotALogError(f"{path}: {size / 1e6:.0f} MB are too large for a log")
        return file.read()


@dataclass(frozen=True)
class Series:
    """One quantity over the steps at which it was logged."""

    steps: np.ndarray
    """[n], rising."""
    values: np.ndarray
    """[n]."""


@dataclass(frozen=True)
class Log:
    """The metrics of one run over its steps."""

    source: str
    """The file, and its kind."""
    series: Mapping[tuple[str, str], Series]
    """(``held_out`` or ``train``, quantity) -> what was logged."""
    names: tuple[str, ...] = ()
    """All metrics of the file as they are called there."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Hyper-parameters that the log itself tells."""
    notes: tuple[str, ...] = ()
    run: str = ""
    """Its name, where the file says it."""

    def get(self, name: str, quantity: str) -> Series | None:
        """A quantity of a set, where it was logged."""
        return self.series.get((name, quantity))

    @property
    def last_step(self) -> int:
        """The largest step of all."""
        return int(max((s.steps[-1] for s in self.series.values()), default=0))

    def matching(self, pattern: str) -> list[str]:
        """Metrics whose names match."""
        return [name for name in self.names if re.search(pattern, name, re.IGNORECASE)]

    @property
    def of_reinforcement(self) -> list[str]:
        """Metrics that only reinforcement learning logs."""
        return self.matching(REINFORCEMENT)

    @property
    def of_a_reward_model(self) -> list[str]:
        """Metrics that only the training of a reward model logs."""
        return self.matching(REWARD_MODEL)


def log_of(
    source: str,
    entries: Iterable[Mapping[str, Any]],
    *,
    held_out: str | None = None,
    settings: Mapping[str, Any] | None = None,
    notes: tuple[str, ...] = (),
    run: str = "",
) -> Log:
    """The log of entries ``{metric: number, step: number}`` in the order in which they were written.

    Where a run was resumed, steps go back: what was written later counts. Nested objects are read as ``outer/inner``.
    In a table NaN may stand for a cell that was not logged (``_without_empty_cells``).

    Args:
      source: for messages.
      entries: of the file.
      held_out: the name of the evaluation set, where there are several.
      settings: hyper-parameters that the file holds.
      notes: for the reader of the result.
      run: its name, where the file says it.

    Raises:
      ChesError: entries of two runs, or several evaluation sets and none is named.
    """
    values: dict[Key, dict[int, float]] = {}
    latest: dict[Key, int] = {}
    written: dict[Key, tuple[int, int]] = {}
    names: dict[str, None] = {}
    resumed: set[int] = set()
    twice: dict[Key, dict[int, tuple[float, float]]] = {}
    flat = [_without_empty_cells(_of_one_metric(_flat(raw))) for raw in entries]
    _require_one_run(source, flat)
    for at, (step, entry) in enumerate(in_order(flat)):
        names |= dict.fromkeys(n for n, v in entry.items() if isinstance(v, (int, float)) and not isinstance(v, bool))
        found = _quantities(source, step, entry)
        for key, (name, _) in found.items():
            if step < latest.get(key, step):
                if step <= min(values[key]):
                    raise ChesError(
                        f"{source}: after step {latest[key]} {name} begins again at step {step}: two runs in one file; "
                        "cut it so that one is left"
                    )
                resumed.add(step)
                for other in [k for k in values if k == key or written[k][1] > written[key][0]]:
                    values[other] = {s: v for s, v in values[other].items() if s < step}
                    latest[other] = min(latest[other], step)
        for key, (name, value) in found.items():
            there = values.setdefault(key, {})
            if key[0] == "held_out" and key[1] in SIDES and abs(there.get(step, value) - value) > 0:
                twice.setdefault(key, {})[step] = (there[step], value)
                if len(twice[key]) > 1:
                    raise ChesError(
                        f"{source}: {name} has two values at step {step}, as at an earlier one: several evaluation "
                        "sets by one name. The run's trainer_state.json tells them apart by their losses; or name them"
                    )
            if step not in there or not math.isnan(value):  # of two entries of a step, one may not log the metric
                there[step] = value
            latest[key] = step
            written[key] = (written.get(key, (at, at))[0], at)
    chosen_set = _evaluation_set(source, {s for name, q, s in values if name == "held_out" and q in SIDES}, held_out)
    again, more = _evaluated_again(source, {k: v for k, v in twice.items() if k[2] == chosen_set}, values)
    notes = (*notes, *more)
    series: dict[tuple[str, str], Series] = {}
    for (name, quantity, which), kept in values.items():
        steps = sorted(s for s in kept if s <= again)
        if steps and (name == "train" or which == chosen_set):
            series[name, quantity] = Series(np.array(steps), np.array([kept[s] for s in steps]))
    if resumed:
        notes = (*notes, f"resumed at step {min(resumed)}: of a step that was logged twice, the later entry counts")
    return Log(source, series, tuple(names), settings or {}, notes, run)


Key = tuple[str, str, str]
"""``held_out`` or ``train``, quantity, name of the evaluation set."""


def _quantities(source: str, step: int, entry: Mapping[str, Any]) -> dict[Key, tuple[str, float]]:
    """What an entry says of each quantity: the name in the log and the value.

    Raises:
      ChesError: two values of one reward.
    """
    out: dict[Key, tuple[str, float]] = {}
    own_set = _set_of_loss(entry)
    for name, value in entry.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if (meaning := metric(name)) is None or (meaning.quantity == "loss" and RUNTIME in entry):
            continue
        which = own_set if own_set and meaning.evaluation_set in HELD_OUT else meaning.evaluation_set
        key = ("held_out" if meaning.held_out else "train", meaning.quantity, which)
        called, there = out.get(key, (name, value))
        if meaning.quantity in SIDES and abs(there - value) > 0:
            raise ChesError(
                f"{source}: {called} is {there:g} and {name} is {value:g} at step {step}: which of them is the reward "
                "of the loss? Leave the other out"
            )
        out[key] = (called if meaning.quantity in SIDES else name, float(value))
    return out


SAME = 1e-3
"""Relative difference up to which two evaluations are of one model: sums in another order."""
CLOSE = 0.25
"""Difference, over the largest of the course, up to which a second evaluation of a step is of the same pairs."""


def _evaluated_again(
    source: str, twice: Mapping[Key, Mapping[int, tuple[float, float]]], values: Mapping[Key, Mapping[int, float]]
) -> tuple[float, tuple[str, ...]]:
    """The last step that counts where one was evaluated twice with other values, and notes.

    Trainers that load their best checkpoint at the end evaluate it under the number of the last step: then the run is
    what led to that checkpoint.

    Raises:
      ChesError: the second values are those of no checkpoint, and far from the first: of another set.
    """
    if not twice:
        return math.inf, ()
    step = max(s for found in twice.values() for s in found)
    second = {key: found[step][1] for key, found in twice.items() if step in found}
    earlier = [
        s
        for s in sorted(set.intersection(*({*values[key]} for key in second)))
        if s < step and all(math.isclose(values[key][s], v, rel_tol=SAME, abs_tol=1e-9) for key, v in second.items())
    ]
    if earlier:
        return earlier[-1], (
            f"at step {step} the evaluation of step {earlier[-1]} was repeated, as a trainer does that loads its best "
            f"checkpoint at the end: the run is taken as ending at step {earlier[-1]}",
        )
    for key, value in second.items():
        first, size = twice[key][step][0], max(map(abs, values[key].values()))
        if abs(value - first) > CLOSE * max(size, abs(first)):
            raise ChesError(
                f"{source}: two evaluations at step {step} say {first:g} and {value:g} of {key[1]}: of another set of "
                "pairs, or of another model? Leave one of them out"
            )
    return math.inf, (f"step {step} was evaluated twice, with other values: the later ones count",)


def _set_of_loss(entry: Mapping[str, Any]) -> str:
    """The evaluation set that an entry is of, where only its loss says it: TRL names no other metric after the set.

    >>> _set_of_loss({"eval_helpful_loss": 0.6, "eval_rewards/chosen": 0.1}), _set_of_loss({"loss": 0.6})
    ('helpful', '')
    """
    found = {m.evaluation_set for name in entry if (m := metric(name)) is not None and m.quantity == "loss"} - {""}
    return found.pop() if len(found) == 1 else ""


def joined(source: str, logs: Sequence[Log]) -> Log | None:
    """One log of several files: of other metrics, or of steps one after the other. None where they overlap."""
    if len({log.run for log in logs if log.run}) > 1:
        return None
    series: dict[tuple[str, str], Series] = {}
    for key in dict.fromkeys(key for log in logs for key in log.series):
        parts = sorted((log.series[key] for log in logs if key in log.series), key=lambda part: int(part.steps[0]))
        if any(after.steps[0] <= before.steps[-1] for before, after in itertools.pairwise(parts)):
            return None
        series[key] = Series(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("steps", "values")))
    names = dict.fromkeys(name for log in logs for name in log.names)
    notes = dict.fromkeys(note for log in logs for note in log.notes)
    settings = next((log.settings for log in logs if log.settings), {})
    return Log(source, series, tuple(names), settings, tuple(notes))


def _evaluation_set(source: str, present: set[str], wanted: str | None) -> str:
    if wanted is not None:
        if wanted.lower() not in present:
            there = f"its evaluation sets are {', '.join(sorted(present))}" if present else "it has no evaluation"
            raise ChesError(f"{source}: --held-out {wanted}: {there}")
        return wanted.lower()
    if len(present) > 1:
        raise ChesError(
            f"{source}: has several evaluation sets ({', '.join(sorted(present))}); "
            "say which counts with --held-out NAME"
        )
    return next(iter(present), "")


METRIC_COLUMNS = ("metric", "key", "tag", "metricname", "metric_name", "variable")
VALUE_COLUMNS = ("value", "metricvalue", "metric_value")
"""Columns of a table that has a row for each metric: MLflow, Comet, TensorBoard's data frames."""
RUNTIME = "train_runtime"
"""In the last entry of transformers, whose ``train_loss`` is a mean over the whole run."""
RUN_NAMES = ("run", "run_name", "run_id", "run id", "run_uuid", "experiment_key", "Name", "Run")
"""Columns of exports that name the run of an entry."""


def _require_one_run(source: str, entries: Iterable[Mapping[str, Any]]) -> None:
    for column in RUN_NAMES:
        runs = dict.fromkeys(str(entry[column]) for entry in entries if entry.get(column) not in (None, ""))
        if len(runs) > 1:
            raise ChesError(f"{source}: holds {len(runs)} runs ({', '.join(runs)}); export one of them")


def _without_empty_cells(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry without the NaN of a set of pairs that it does not log: the other set has numbers in it.

    A table has a column for every metric, and a row where training metrics were logged has NaN under those of the
    evaluation. A run that diverges has NaN and no numbers beside it.

    >>> nan = float("nan")
    >>> _without_empty_cells({"step": 1, "rewards/chosen": 0.5, "eval_rewards/chosen": nan})
    {'step': 1, 'rewards/chosen': 0.5}
    >>> len(_without_empty_cells({"step": 1, "rewards/chosen": nan, "loss": nan}))
    3
    """
    sets: dict[str, list[str]] = {}
    for name, value in entry.items():
        if isinstance(value, (int, float)) and (meaning := metric(name)) is not None:
            sets.setdefault(f"{meaning.held_out} {meaning.evaluation_set}", []).append(name)
    empty = [names for names in sets.values() if all(math.isnan(entry[name]) for name in names)]
    if not empty or len(empty) == len(sets):
        return entry
    left_out = {name for names in empty for name in names}
    return {name: value for name, value in entry.items() if name not in left_out}


def _of_one_metric(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry of a table with a row for each metric, ``step,metric,value``, as one of a table with a column for each.

    >>> _of_one_metric({"step": 3, "key": "eval/loss", "value": 0.7})
    {'step': 3, 'eval/loss': 0.7}
    """
    lower = {name.lower(): name for name in entry}
    name = next((lower[n] for n in METRIC_COLUMNS if n in lower), None)
    value = next((lower[n] for n in VALUE_COLUMNS if n in lower), None)
    if name is None or value is None or not isinstance(entry[name], str):
        return entry
    return {**{k: v for k, v in entry.items() if k not in (name, value)}, entry[name]: entry[value]}


def tag_of_download(path: Path) -> str:
    """The metric of one chart that TensorBoard saved, which only the name of its file tells.

    >>> tag_of_download(Path("run-.-tag-eval_rewards_chosen.csv"))
    'eval_rewards_chosen'

    Raises:
      ChesError: it does not tell one.
    """
    _, found, tag = path.stem.rpartition("-tag-")
    if not found:
        raise ChesError(
            f"{path}: one chart of TensorBoard, and nothing says of which metric; name the file after it, "
            f"run-tag-eval_rewards_chosen{path.suffix}"
        )
    return tag


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            out |= _flat(inner, f"{prefix}{name}/")
        else:
            out[f"{prefix}{name}"] = _number(inner)
    return out


def _number(value: Any) -> Any:
    """Numbers that a writer put into quotes, as ms-swift and CSV do; ``"62.5%"`` is 0.625."""
    if isinstance(value, str):
        try:
            return float(value[:-1]) / 100 if value.endswith("%") else float(value)
        except ValueError:
            return value
    if (isinstance(value, int) and abs(value) > LARGEST) or (isinstance(value, float) and abs(value) >= LARGEST_FLOAT):
        return math.inf if value > 0 else -math.inf
    return value
