"""``ches train``: a model directory and pairs to a run directory with checkpoints, displacement log and new weights."""

import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from tqdm import tqdm

from ches_jax.bundled import BUNDLED
from ches_jax.distributed.processes import start_run
from ches_jax.errors import RunError, require_config
from ches_jax.models.decoder import parameter_count
from ches_jax.runs.directory import CONFIG, RUN, device_name, new_name, open_run, read_json, versions, write_json
from ches_jax.runs.lock import RunLock
from ches_jax.runs.model_card import trained_card, write_card
from ches_jax.runs.progress import say
from ches_jax.runs.store import output_place
from ches_jax.runs.work import Positions, Work
from ches_jax.runs.workspace import Workspace
from ches_jax.train.assemble import Parts, assemble
from ches_jax.train.batch_loss import update_metrics
from ches_jax.train.config import TrainConfig
from ches_jax.train.metrics import FILE_NAME as METRICS
from ches_jax.train.metrics import JsonLines, NullTracker
from ches_jax.train.objective import needs_reference
from ches_jax.train.observe.guards import require_agreement, require_finite
from ches_jax.train.observe.observer import Observer, Watch
from ches_jax.train.optimizer import optimizer_hyper
from ches_jax.train.policy import ADAPTER, MODEL, Policy, export_adapter, export_model
from ches_jax.train.setup import Run, prepare
from ches_jax.train.state import TrainState
from ches_jax.train.token_masks import TOKEN_MASKS, write_masks
from ches_jax.train.trackers import Trackers, open_trackers


class Stopped(Exception):
    """SIGTERM came; the run has saved its state."""


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    other_versions: bool = False,
    observers: Sequence[Observer | Watch] = (),
) -> Path:
    """Train, and return the run directory.

    Args:
      config: what to train on what.
      resume: continue the run that ``config.out`` holds.
      quiet: no progress.
      other_versions: continue although package versions differ from those at the start.
      observers: the caller's own, whose numbers join ``metrics.jsonl``: objects of the protocol
        ``observe.observer.Observer``, each with its own schedule, or functions of the number of updates done and the
        model there, called before the first update and after each.

    Raises:
      ChesError: any input that is not fit; a loss that is not finite.
      Stopped: SIGTERM came; the state is saved and ``resume`` continues.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     small = {"limit": 8, "batch_size": 4, "steps": 1, "mesh": "data=1", "export": False}
    ...     (train(TrainConfig(**small, out=f"{folder}/run"), quiet=True) / "displacement.parquet").exists()
    True
    """
    require_config("train", config, TrainConfig)
    process = start_run(config.distributed, config.out)
    config = replace(config, out=config.out or str(new_name(Path("runs"), "train")))
    place = output_place(str(config.out))
    with jax.enable_x64(config.dtype == "float64"), RunLock(place) as lock, Workspace(place, RUN) as work:
        with process.sharing_errors():
            if process.first:
                lock.require_free()
            run = prepare(config, process)
            # flat, so that a difference is reported by the name of its option
            prints = {k: v for k, v in run.identity.items() if k != "config"}
            identity = {**run.identity["config"], **prints}
            identity |= _written_before(run.out, identity["objective"])
            process.agree(identity)
            if process.first:
                lock.take()
                open_run(run.out, "train", identity, resume, other_versions=other_versions)
        with process.sharing_errors():
            if not (run.out / CONFIG).exists():
                raise RunError(
                    f"{run.out}: process 0 has made it, process {process.id} does not see it; --out must be on "
                    "a file system that all processes share, or in a store (gs://, s3://)"
                )
        done = run.out / RUN
        if done.exists() and read_json(done).get("status") == "done":
            return run.out
        with process.sharing_errors():
            work.pull()
        quiet = quiet or not process.first
        run = replace(run, out=work.here)
        say(f"loading the model ({run.model.directory})", quiet=quiet)
        parts = assemble(run, place, observers)
        say(f"the loss: {run.loss!r}", quiet=quiet)
        say("compiling, then training", quiet=quiet)
        return _train(run, parts, work, quiet)


class Cost(NamedTuple):
    """What this process did of a run."""

    work: Work
    counted: Positions
    """Of its updates."""
    updates: int

    def facts(self) -> dict[str, Any]:
        """For ``run.json``."""
        return {
            "seconds": round(self.work.elapsed(), 3),
            "updates_this_time": self.updates,
            "work": self.work.facts(**self.counted.facts()),
        }


WRITTEN = ("loss", "loss_args", "sft", "sft_per")
"""Options that write a loss; two ways of writing the same one are the same run."""


def _written_before(out: Path, objective: str) -> dict[str, Any]:
    """How the run in ``out`` writes its loss, where that is this very loss."""
    there = read_json(out / CONFIG) if (out / CONFIG).exists() else {}
    return {name: there[name] for name in WRITTEN if name in there} if there.get("objective") == objective else {}


def _train(run: Run, parts: Parts, work: Workspace, quiet: bool) -> Path:
    """Every update of the run, what is seen of it, what is kept of it.

    Counts the positions of this process's updates: a run that resumes counts from its checkpoint on, and the updates
    before it are in no count twice. Evaluations and the reference's pass over the pairs are in the seconds alone.
    """
    cost, counted, config, total = Work(), Positions(), run.config, run.plan.total
    policy, saved = parts.policy, parts.saved
    rate = jax.jit(run.schedule)  # one program, where its operations one by one are eleven
    state, first = saved.resume(parts.take_state(), run.plan.position)
    tracker, summary = _open_tracker(run, first), {}
    if parts.posteriors is not None:
        parts.posteriors.state = state.loss_state
    if first == 0:
        params = policy.parameters(state.params)
        with cost.on_device():
            summary = parts.evaluations.observe(0, params)
        tracker.log(0, summary)
        saved.require_metric(summary)
        if own := parts.own.observe(0, params):
            tracker.log(0, own)
    with (
        closing(tracker),
        _Stop() as stop,
        closing(parts.loader.ahead(first, total)) as updates,
        tqdm(total=total, initial=first, unit=" updates", disable=quiet, desc=f"training {config.loss}") as bar,
    ):
        for i, batches in enumerate(updates, first):
            with cost.on_device():
                state, metrics = parts.update(state, batches)
                require_finite(i, metrics, run.train, run.plan, saved)  # which waits for them
            parts.loader.count(i, batches, counted)
            if i == 0 and run.starts_at_the_reference:
                require_agreement(batches, metrics, run.loss, config.dtype)
            step, params = i + 1, policy.parameters(state.params)
            position = {"epoch": step / run.plan.steps_per_epoch, "learning_rate": float(rate(jnp.int32(i)))}
            tracker.log(step, {**position, **update_metrics(metrics), **parts.own.observe(step, params)})
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            bar.update()
            evaluated = parts.evaluations.due(step)
            if evaluated and parts.posteriors is not None:
                parts.posteriors.state = state.loss_state
            if evaluated:
                with cost.on_device():
                    summary = parts.evaluations.observe(step, params)
                tracker.log(step, summary)
            stopping, overdue, writing = run.process.any_of(stop.requested, saved.overdue(), saved.writing())
            if not writing:
                saved.settle()
            if step == total or stopping or overdue or saved.due(step, evaluated):
                with run.process.sharing_errors():
                    _push(run, work)
                saved.save(step, state, run.plan.position(step), summary if evaluated else None)
            if stopping and step < total:
                saved.wait()
                raise Stopped(
                    f"{work.place}: stopped by SIGTERM after update {step} of {total}; continue with --resume"
                )
    saved.wait()
    if first == total:  # killed between its last checkpoint and its summary
        summary = tracker.last()
    best = saved.best()
    saved.close()
    _finish(run, parts, state, summary, best, Cost(cost, counted, total - first))
    with run.process.sharing_errors():
        _push(run, work)
    return work.place


def _push(run: Run, work: Workspace) -> None:
    if run.process.first:
        work.push()


def _open_tracker(run: Run, first: int) -> Trackers | NullTracker:
    """``metrics.jsonl`` cut behind the checkpoint of step ``first``, and the other trackers."""
    if not run.process.first:
        return NullTracker()
    resume_step = first or None
    lines = JsonLines(run.out / METRICS, resume_step)
    return open_trackers(run.config.tracker, run.out, run.identity["config"], lines, resume_step)


def _finish(
    run: Run,
    parts: Parts,
    state: TrainState,
    summary: dict[str, float],
    best: dict[str, Any] | None,
    cost: Cost,
) -> None:
    """Export the weights, close the logs, write ``run.json``."""
    trained = sum(a.size for a in state.params.values())
    # of several processes the first one gets the weights of all
    policy = replace(parts.policy, frozen=run.process.on_host(parts.policy.frozen))
    params = run.process.on_host(state.params)
    parts.evaluations.close()
    parts.own.close()
    if run.process.first:
        exported = _export(run, policy, params)
        _write_summary(run, summary, exported, best, trained, cost)
    run.process.exchange(None)


def _export(run: Run, policy: Policy, params: dict[str, Any]) -> dict[str, str]:
    """Adapters, and the whole model where asked, as directories of the run; their fingerprints."""
    prints = {}
    write_masks(run.out / TOKEN_MASKS, params)
    if policy.spec:
        name = run.config.model if run.config.model != BUNDLED else str(run.model.directory)
        prints["trained_adapter_fingerprint"] = export_adapter(
            policy, params, run.out / ADAPTER, run.model.directory, name
        )
    if run.config.export:
        prints["trained_fingerprint"] = export_model(
            policy, params, run.out / MODEL, run.model.directory, whole=run.config.export_whole
        )
    return prints


def _write_summary(
    run: Run,
    summary: dict[str, float],
    exported: dict[str, str],
    best: dict[str, Any] | None,
    trained: int,
    cost: Cost,
) -> None:
    config, pairs = run.config, run.pairs
    parameters = parameter_count(run.model.decoder) + (trained if run.lora else 0)
    facts = {
        "verb": "train",
        "status": "done",
        "config": run.identity["config"],
        "loss": repr(run.loss),
        "optimizer": {"name": config.optimizer, **optimizer_hyper(config.optimizer, config.optimizer_args)},
        "reference": config.reference if needs_reference(run.loss) else "none",
        **{k: v for k, v in run.identity.items() if k.endswith(("fingerprint", "quantisation"))},
        "trained_fingerprint": None,
        **exported,
        "parameters": {"trained": trained, "all": parameters},
        **({"lora": {name: one._asdict() for name, one in run.lora.spec.items()}} if run.lora else {}),
        "versions": versions(),
        "device": device_name(),
        "mesh": dict(run.mesh.shape),
        "processes": run.process.count,
        "attention": run.attention.name,
        "counts": {
            "rows": pairs.rows,
            "train": len(run.train),
            "held_out": len(pairs.held_out),
            "watched": len(pairs.watched),
            "dropped": len(pairs.dropped),
            "updates": run.plan.total,
        },
        "row_tokens": run.layout.row_tokens,
        "displacement": summary,
        **({"best": best} if best else {}),
        **cost.facts(),
    }
    for folder, library in ((run.out / MODEL, "transformers"), (run.out / ADAPTER, "peft")):
        if folder.is_dir():
            write_card(folder, trained_card(facts, run.plan.total, summary, library))
    write_json(run.out / RUN, facts)  # last: with it the run is finished


class _Stop:
    """Notes SIGTERM while a run is under way; elsewhere than in the main thread, does nothing."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "_Stop":
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread
            self._before = None
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
