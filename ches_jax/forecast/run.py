"""``ches forecast`` and ``ches influence``: a model and pairs to a run directory with the table of forecasts.

The direction (frozen updates, or M G_P) is computed once and kept; then the pairs pass in chunks, one part each, so
that a killed run continues where it was. Parts and direction go when all is joined.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.distributed.processes import Process, start_run
from ches_jax.errors import ChesError, RunError, require_config
from ches_jax.forecast import influence as influences
from ches_jax.forecast.config import ForecastConfig, InfluenceConfig, PassOptions, training
from ches_jax.forecast.frozen import Start
from ches_jax.forecast.metric import Metric, Tree
from ches_jax.forecast.pilot import pilot_changes, require_pilot, run_pilot
from ches_jax.forecast.setup import CHECKED, Passes, changes, linear_error, splits, taken
from ches_jax.forecast.stages import Clock, chunk, kept, whole, write_table
from ches_jax.forecast.summary import summarise
from ches_jax.forecast.together import begin, of_first
from ches_jax.options import require_positive
from ches_jax.runs import chunks
from ches_jax.runs.directory import as_dict, device_name, new_name, write_summary
from ches_jax.runs.files import parquet_source, read_parquet
from ches_jax.runs.lock import RunLock
from ches_jax.runs.progress import say
from ches_jax.runs.store import output_place
from ches_jax.scores.table import CANDIDATES, FORECAST, INFLUENCE, merge_parts, write_part
from ches_jax.train.objective import reads_joint, reads_lists
from ches_jax.train.optimizer import optimizer_hyper
from ches_jax.train.setup import Run, prepare
from ches_jax.train.token_masks import reads_reference_states
from ches_jax.types import TokenPair

PILOT = "pilot"


def forecast(
    config: ForecastConfig, *, resume: bool = False, quiet: bool = False, other_versions: bool = False
) -> Path:
    """Forecast the change of every pair's log-probabilities in training; returns the run directory.

    Args:
      config: which training run to forecast.
      resume: continue the run that ``config.out`` holds.
      quiet: no progress.
      other_versions: continue although packages have other versions than at the start.

    Raises:
      ChesError: any input that is not fit, before anything is written; a gradient that is not finite.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     small = {"limit": 8, "holdout": 4, "batch_size": 2, "steps": 2, "mesh": "data=1"}
    ...     out = forecast(ForecastConfig(**small, out=f"{folder}/run"), quiet=True)
    ...     pq.read_table(out / "forecast.parquet").num_rows
    8
    """
    require_config("forecast", config, ForecastConfig)
    if config.pilot and config.distributed != "off":
        raise ChesError(
            "--pilot with --distributed: a pilot is a training run of one process; leave it out here, and make it with "
            f"`ches train --distributed {config.distributed} --steps {config.pilot}`"
        )
    process = start_run(config.distributed, config.out)
    out = output_place(config.out or new_name(Path("runs"), "forecast"))
    require_pilot(training(config, str(out)), config.pilot)
    with jax.enable_x64(config.dtype == "float64"), RunLock(out) as lock:
        run, done = _open(config, lock, "forecast", resume, other_versions, process)
        if not done:
            _forecast(config, run, resume, quiet or not process.first)
        return of_first(out, process)


def influence(
    config: InfluenceConfig, *, resume: bool = False, quiet: bool = False, other_versions: bool = False
) -> Path:
    """What training on each pair does to the probes' chosen responses; returns the run directory.

    Args:
      config: which training run, and the probes.
      resume: continue the run that ``config.out`` holds.
      quiet: no progress.
      other_versions: continue although packages have other versions than at the start.

    Raises:
      ChesError: any input that is not fit, before anything is written; no probes; a loss that has no influences.
      Followed: with ``distributed``, in all processes but the first, when that one has written all.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     small = {"limit": 8, "holdout": 4, "batch_size": 2, "steps": 2, "mesh": "data=1"}
    ...     out = influence(InfluenceConfig(**small, out=f"{folder}/run"), quiet=True)
    ...     pq.read_table(out / "influence.parquet").num_rows
    4
    """
    require_config("influence", config, InfluenceConfig)
    process = start_run(config.distributed, config.out)
    out = output_place(config.out or new_name(Path("runs"), "influence"))
    if config.probes is None and not config.holdout:
        raise ChesError("ches influence: whose chosen responses should not fall? Give --probes FILE, or --holdout N")
    with jax.enable_x64(config.dtype == "float64"), RunLock(out) as lock:
        run, done = _open(config, lock, "influence", resume, other_versions, process)
        if not done:
            _influence(config, run, quiet or not process.first)
        return of_first(out, process)


def _open(
    config: PassOptions, lock: RunLock, verb: str, resume: bool, other_versions: bool, process: Process
) -> tuple[Run, bool]:
    """The run that is forecast, checked; and whether its directory, now ours, holds the finished forecast already."""
    with process.sharing_errors():
        if process.first:
            lock.require_free()
        require_positive({"chunk-rows": config.chunk_rows, "batch-tokens": config.batch_tokens})
        run = _checked(config, prepare(training(config, str(lock.out)), process))
    identity = {"config": as_dict(config), "objective": repr(run.loss), **run.opener.identity()}
    return run, begin(lock, verb, identity, run.mesh, process, resume=resume, other_versions=other_versions)


def _checked(config: PassOptions, run: Run) -> Run:
    """The run, where it can be forecast."""
    Metric(config.optimizer, config.optimizer_args, run.schedule)
    if config.accumulate > 1 and "kl_baseline" in run.loss.needs:
        raise ChesError(f"--accumulate with --loss {config.loss}: its reference point is one of the whole update")
    unknown = {
        "lists of responses": reads_lists(run.loss),
        "prompts taken together with their responses": reads_joint(run.loss),
        "a calibration that follows the run (rc)": "head_norm_chosen" in run.loss.needs,
        "divergences and masks of tokens": reads_reference_states(run.loss),
    }
    for what in (what for what, there in unknown.items() if there):
        raise ChesError(
            f"--loss {config.loss}: a forecast of {what} is not known; forecast its pairs with another loss"
        )
    return run


def _forecast(config: ForecastConfig, run: Run, resume: bool, quiet: bool) -> None:
    out, clock, process = run.out, Clock(quiet), run.process
    _write_dropped(run, config)
    say(f"loading the model ({run.model.directory})", quiet=quiet)
    passes = Passes.of(run, config.batch_tokens)
    sets = {"train": run.pairs.train, "probe": run.pairs.held_out}

    def compute() -> tuple[Tree, dict[str, Any]]:
        with clock.stage("frozen updates", run.plan.total) as bar:
            moved, start = passes.frozen_updates(by_side=splits(run), on_update=lambda t: bar.update(1))
        with clock.stage("inner products"):
            found = passes.products(start, run.pairs.held_out)
        return moved, {"products": None if found is None else found.to_json(), "reason": found and found.sentence()}

    direction, record = kept(out, run.mesh, compute, process)
    push = passes.push(direction, config.order)

    def columns(which: str, pairs: Sequence[TokenPair]) -> dict[str, Any]:
        found = push(pairs)
        logps, first, both = (changes(part) for part in (found.logps, found.first, taken(found)))
        _require_finite(pairs, *both)
        second = changes(found.second) if found.second is not None else (None, None)
        halves = [[None] * len(pairs) if s is None else s / 2 for s in second]
        return {
            **_identity_columns(pairs, config),
            "set": [which] * len(pairs),
            "forecast_chosen": both[0],
            "forecast_rejected": both[1],
            "first_chosen": first[0],
            "first_rejected": first[1],
            "second_chosen": halves[0],
            "second_rejected": halves[1],
            "logp_chosen": logps[0],
            "logp_rejected": logps[1],
        }

    work = [(which, part) for which, pairs in sets.items() for part in _chunks(pairs, config.chunk_rows)]
    with clock.stage("forecasting", sum(map(len, sets.values()))) as bar:
        for number, (which, pairs) in enumerate(work):
            chunk(out, number, lambda: pa.table(columns(which, pairs), schema=SCHEMA), write_table, process)  # noqa: B023
            bar.update(len(pairs))
    parts = whole(out, len(work), run.opener.require_unchanged, process)
    every = [SCHEMA.empty_table(), *(read_parquet(part, RunError, "a part of this run", SCHEMA) for part in parts)]
    table = pa.concat_tables(every)
    with clock.stage("linear range"):
        errors = _linear_errors(passes, direction, sets, table)
    if config.pilot:
        with clock.stage("pilot"):
            run_pilot(run.config, config.pilot, out / PILOT, resume=resume, quiet=quiet)
        table = _with_pilot(table, out / PILOT, sets)
    with process.sharing_errors():
        if process.first:
            write_table(out / FORECAST, table.replace_schema_metadata({b"ches_jax": b"forecast"}))
            summary = summarise(table, record, errors, overlap=_overlap(run), config=config, updates=run.plan.total)
            _finish(run, config, clock, {"summary": summary})


def _influence(config: InfluenceConfig, run: Run, quiet: bool) -> None:
    out, clock, process = run.out, Clock(quiet), run.process
    say(f"loading the model ({run.model.directory})", quiet=quiet)
    passes = Passes.of(run, config.batch_tokens)
    influences.require_splits(passes)
    _write_dropped(run, config)
    pairs, probes = run.pairs.train, run.pairs.held_out

    def compute() -> tuple[Tree, dict[str, Any]]:
        with clock.stage("gradients at the start", run.plan.steps_per_epoch) as bar:
            start: Start = passes.frozen_updates(whole_epoch=True, on_update=lambda t: bar.update(1))[1]
        with clock.stage("gradient of the probes"):
            return influences.influence_direction(passes, start, probes), {"slopes": start.slopes.tolist()}

    direction, record = kept(out, run.mesh, compute, process)
    push, slopes = passes.push(direction), np.array(record["slopes"])
    metadata = {"verb": "influence", "model": config.model, "pairs": config.pairs, **_prints(run)}
    parts = _chunks(pairs, config.chunk_rows)

    def columns(at: int, some: Sequence[TokenPair]) -> dict[str, Any]:
        found = influences.influence_of(push(some).first, slopes[at : at + len(some)], len(pairs))
        influences.finite(found, some)
        return {
            **_identity_columns(some, config),
            "influence": found.total,
            "from_chosen": found.from_chosen,
            "from_rejected": found.from_rejected,
            "flags": [list(p.flags) for p in some],
            "category": [p.category for p in some],
        }

    def write(path: Path, part: dict[str, Any]) -> int:
        write_part(path, part, metadata)
        return len(part["row_id"])

    with clock.stage("influences", len(pairs)) as bar:
        for number, some in enumerate(parts):
            chunk(out, number, partial(columns, at=number * config.chunk_rows, some=some), write, process)
            bar.update(len(some))
    files = whole(out, len(parts), run.opener.require_unchanged, process)
    with process.sharing_errors():
        if process.first:
            merge_parts(files, out / INFLUENCE)
            values = pq.read_table(parquet_source(out / INFLUENCE))["influence"].to_numpy()
            warnings = _overlap_warning(_overlap(run), len(probes))
            _finish(run, config, clock, {"concentration": influences.concentration(values), "warnings": warnings})


SCHEMA = pa.schema(
    {
        "row_id": pa.string(),
        "index": pa.int64(),
        "chosen_candidate": pa.int32(),
        "rejected_candidate": pa.int32(),
        "chosen_tokens": pa.int32(),
        "rejected_tokens": pa.int32(),
        "set": pa.string(),
        "forecast_chosen": pa.float64(),
        "forecast_rejected": pa.float64(),
        "first_chosen": pa.float64(),
        "first_rejected": pa.float64(),
        "second_chosen": pa.float64(),
        "second_rejected": pa.float64(),
        "logp_chosen": pa.float64(),
        "logp_rejected": pa.float64(),
    }
)
"""Columns of ``forecast.parquet``. ``forecast_*``: nats, the sum of ``first_*`` and (with --order 2) ``second_*``;
``logp_*``: nats at the start; with --pilot ``pilot_*`` besides: nats, measured."""


def _chunks(pairs: Sequence[TokenPair], size: int) -> list[Sequence[TokenPair]]:
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def _identity_columns(pairs: Sequence[TokenPair], config: PassOptions) -> dict[str, Any]:
    candidates = [[None if p.candidates is None else p.candidates[k] for p in pairs] for k in range(2)]
    return {
        "row_id": [p.row_id for p in pairs],
        "index": [p.index for p in pairs],
        **dict(zip(CANDIDATES, candidates, strict=True)),
        "chosen_tokens": [len(p.chosen.targets(config.eos)) for p in pairs],
        "rejected_tokens": [len(p.rejected.targets(config.eos)) for p in pairs],
    }


def _require_finite(pairs: Sequence[TokenPair], *sides: np.ndarray) -> None:
    for values in sides:
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ChesError(f"row {pairs[bad[0]].index}: its forecast is not finite; try --dtype float32")


def _linear_errors(
    passes: Passes, direction: Tree, sets: Mapping[str, Sequence[TokenPair]], table: pa.Table
) -> dict[str, float]:
    """By set, ``linear_error`` over a sample of its responses."""
    at_once, errors, start = passes.at_once(direction), {}, 0
    columns = {n: table[n].to_numpy() for n in ("first_chosen", "first_rejected", "logp_chosen", "logp_rejected")}
    for which, pairs in sets.items():
        some = np.random.default_rng(0).permutation(len(pairs))[:CHECKED]
        if some.size:
            after = np.concatenate(changes(at_once([pairs[i] for i in some])))
            if not table.num_rows:  # the first process has it
                continue
            first, before = (
                np.concatenate([columns[f"{kind}_{side}"][start + some] for side in ("chosen", "rejected")])
                for kind in ("first", "logp")
            )
            errors[which] = linear_error(first, after - before)
        start += len(pairs)
    return errors


def _with_pilot(table: pa.Table, pilot: Path, sets: Mapping[str, Sequence[TokenPair]]) -> pa.Table:
    found = [
        pilot_changes(pilot, pairs, "train" if which == "train" else "held_out")
        for which, pairs in sets.items()
        if pairs
    ]
    for k, side in enumerate(("chosen", "rejected")):
        table = table.append_column(f"pilot_{side}", pa.array(np.concatenate([one[k] for one in found])))
    return table


def _overlap(run: Run) -> int:
    """Probes that are training pairs."""
    train = {p.row_id for p in run.pairs.train}
    return sum(p.row_id in train for p in run.pairs.held_out)


def _overlap_warning(overlap: int, probes: int) -> list[str]:
    if not overlap:
        return []
    return [f"{overlap} of {probes} probes are training pairs: their numbers are those of pairs that are trained on"]


def _write_dropped(run: Run, config: PassOptions) -> None:
    """Rows left out; of ``--holdout`` the probes too, which a selection then leaves out as they were here."""
    probes = [
        {"row_id": p.row_id, "index": p.index, "candidates": p.candidates, "reasons": ["held out as a probe"]}
        for p in (run.pairs.held_out if config.holdout else ())
    ]
    dropped = [*run.pairs.dropped, *probes]
    if dropped and run.process.first:
        chunks.write_lines(run.out / chunks.DROPPED, dropped)


def _prints(run: Run) -> dict[str, Any]:
    return {k: v for k, v in run.identity.items() if k.endswith("fingerprint")}


def _finish(run: Run, config: PassOptions, clock: Clock, results: Mapping[str, Any]) -> None:
    out, pairs = run.out, run.pairs
    run.opener.require_unchanged()
    write_summary(
        out,
        {
            "status": "done",
            "loss": repr(run.loss),
            "optimizer": {"name": config.optimizer, **optimizer_hyper(config.optimizer, config.optimizer_args)},
            "device": device_name(),
            "mesh": dict(run.mesh.shape),
            "processes": run.process.count,
            "counts": {
                "rows": pairs.rows,
                "train": len(pairs.train),
                "probes": len(pairs.held_out),
                "dropped": len(pairs.dropped),
                "updates": run.plan.total,
            },
            "row_tokens": run.layout.row_tokens,
            **results,
            "times": clock.seconds,
            "work": clock.work.facts(),
        },
    )
    chunks.clear(out)
