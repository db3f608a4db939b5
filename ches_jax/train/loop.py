"""``ches train``: a model directory and pairs to a run directory with checkpoints, displacement log and new weights."""

import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from ches_jax.bundled import BUNDLED
from ches_jax.distributed.processes import start_processes
from ches_jax.errors import ChesError, RunError
from ches_jax.models.decoder import Decoder, parameter_count
from ches_jax.runs.directory import CONFIG, RUN, device_name, new_name, open_run, read_json, versions, write_json
from ches_jax.train.checkpoints import Checkpoints, parse_best
from ches_jax.train.config import TrainConfig
from ches_jax.train.data.loader import batch_maker
from ches_jax.train.data.split import write_dropped
from ches_jax.train.metrics import FILE_NAME as METRICS
from ches_jax.train.metrics import JsonLines, Nobody
from ches_jax.train.objective import initial_loss_state, named, needs_reference
from ches_jax.train.observe.displacement_log import DisplacementLog
from ches_jax.train.observe.eval_loss import held_out_metrics
from ches_jax.train.observe.guards import require_agreement, require_finite
from ches_jax.train.observe.pair_logprobs import Evaluator
from ches_jax.train.observe.probes import ProbeLog, Prober
from ches_jax.train.optimizer import make_optimizer, optimizer_hyper
from ches_jax.train.policy import ADAPTER, MODEL, Policy, export_adapter, export_model, make_policy
from ches_jax.train.setup import Run, load_parameters, prepare, references
from ches_jax.train.state import TrainState, initial_state
from ches_jax.train.step import Step
from ches_jax.train.trackers import open_trackers

DROPPED = "dropped.jsonl"


class Stopped(Exception):
    """The run was told to stop, and has saved where it was."""


Observe = Callable[[int, Decoder], Mapping[str, float]]
"""From the number of updates done and the model there to numbers that join ``metrics.jsonl``."""


def train(config: TrainConfig, *, resume: bool = False, quiet: bool = False, observe: Observe | None = None) -> Path:
    """Train, and return the run directory.

    Args:
      config: what to train on what.
      resume: go on with the run that ``config.out`` holds.
      quiet: no progress.
      observe: called before the first update and after each, with the model of that moment, whose arrays the next
        update takes back.

    Raises:
      ChesError: any input that is not fit; a loss that is not finite.
      Stopped: SIGTERM came; the state is saved and ``resume`` goes on.
    """
    process = start_processes(config.distributed)
    if process.count > 1 and config.out is None:
        raise ChesError("--distributed: give the run directory with --out; all processes must see it")
    config = replace(config, out=config.out or str(new_name(Path("runs"), "train")))
    with jax.enable_x64(config.dtype == "float64"):
        with process.sharing_errors():
            run = prepare(config, process)
            # flat, so that a difference is told by the name of its option
            prints = {k: v for k, v in run.identity.items() if k != "config"}
            identity = {**run.identity["config"], **prints}
            process.agree(identity)
            if process.first:
                open_run(run.out, "train", identity, resume)
        with process.sharing_errors():
            if not (run.out / CONFIG).exists():
                raise RunError(
                    f"{run.out}: process 0 has made it, process {process.id} does not see it; --out must be on "
                    "a file system that all processes share"
                )
        done = run.out / RUN
        if done.exists() and read_json(done).get("status") == "done":
            return run.out
        return _train(run, quiet, observe)


def _train(run: Run, quiet: bool, observe: Observe | None) -> Path:
    config, plan, out = run.config, run.plan, run.out
    started = time.perf_counter()
    master = "float64" if config.dtype == "float64" else "float32"
    optimizer = make_optimizer(config.optimizer, run.schedule, **config.optimizer_args)
    loaded = load_parameters(run.directory, config.dtype, master if run.lora is None else None, run.mesh)
    policy, params = make_policy(
        loaded, run.decoder, run.lora, dtype=config.dtype, master=master, seed=config.seed, mesh=run.mesh
    )
    evaluate = Evaluator(policy.abstract, run.mesh, run.layout, run.attention.attend)
    first_process = run.process.first
    if first_process:
        write_dropped(out / DROPPED, run.pairs.dropped)
    reference = references(run, evaluate, policy.parameters(params))
    prober = probe_log = None
    if run.probes is not None:
        prober = Prober(policy.abstract, run.mesh, run.probes, run.attention.attend)
        probe_log = ProbeLog(out, run.probes, prober(policy.parameters(params)), write=first_process)
    state = initial_state(params, optimizer, initial_loss_state(run.loss, master), run.mesh)
    del params, loaded
    step = Step(
        policy.abstract, optimizer, run.loss, state, run.mesh,
        frozen=policy.frozen, clip=config.clip, remat=config.remat,
    )  # fmt: skip
    saved = Checkpoints(out, config.keep, parse_best(config.keep_best) if config.keep_best else None)
    log = DisplacementLog(out, config.eos, config.tolerance, write=first_process)
    at = saved.latest()
    if at is not None:
        state, position = saved.restore(at, state)
        if position != plan.position(at):
            raise RunError(f"{saved.folder / str(at)}: its data position is {position}, this run's {plan.position(at)}")
    first = at or 0
    tracker: Any = Nobody()
    if first_process:
        tracker = open_trackers(config.tracker, out, run.identity["config"], JsonLines(out / METRICS, at), at)

    def watch(state: TrainState, i: int) -> dict[str, float]:
        """Evaluate, write, log."""
        params = policy.parameters(state.params)
        now = {name: evaluate.statistics(params, pairs) for name, pairs in run.sets.items()}
        summary = log.record(i, run.sets, now)
        if "held_out" in now:
            summary |= held_out_metrics(run, evaluate, params, now["held_out"].logps, reference.get("held_out"))
        if prober is not None and probe_log is not None:
            summary |= probe_log.record(i, prober(params))
        tracker.log(i, summary)
        return summary

    def seen(state: TrainState, i: int) -> Mapping[str, float]:
        return {} if observe is None else observe(i, policy.model(state.params))

    summary = watch(state, 0) if at is None else {}
    if at is None:
        saved.require_metric(summary)
    if at is None and (found := seen(state, 0)):
        tracker.log(0, found)
    make = batch_maker(run, reference.get("train"), master)
    quiet = quiet or not first_process
    with closing(tracker), _Stop() as stop, ThreadPoolExecutor(1) as pool, tqdm(
        total=plan.total, initial=first, unit=" updates", disable=quiet, desc=f"training {config.loss}"
    ) as bar:  # fmt: skip
        ahead = pool.submit(make, first)
        for i in range(first, plan.total):
            batches = ahead.result()
            ahead = pool.submit(make, min(i + 1, plan.total - 1))
            state, metrics = step(state, batches)
            require_finite(run, i, metrics, saved)
            if i == 0:
                require_agreement(run, batches, metrics)
            metrics = named(metrics)
            lr = float(run.schedule(jnp.int32(i)))
            epoch = (i + 1) / plan.steps_per_epoch
            tracker.log(i + 1, {"epoch": epoch, "learning_rate": lr, **metrics, **seen(state, i + 1)})
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            bar.update()
            done = i + 1
            last = done == plan.total
            evaluated = last or bool(config.eval_every and done % config.eval_every == 0)
            if evaluated:
                summary = watch(state, done)
            due = (evaluated and config.keep_best) or (config.save_every and done % config.save_every == 0)
            stopping = run.process.any(stop.asked)
            if last or stopping or due:
                saved.save(done, state, plan.position(done), summary if evaluated else None)
            if stopping and not last:
                saved.wait()
                raise Stopped(f"{out}: stopped by SIGTERM after update {done} of {plan.total}; go on with --resume")
    saved.wait()
    if first == plan.total:  # killed between its last checkpoint and its summary
        summary = tracker.last()
    best = saved.best()
    saved.close()
    trained = sum(a.size for a in state.params.values())
    # of several processes the first one gets the weights of all
    policy = replace(policy, frozen=run.process.on_host(policy.frozen))
    params = run.process.on_host(state.params)
    if first_process:
        log.join()
        if probe_log is not None:
            probe_log.join()
        exported = _export(run, policy, params)
        seconds = time.perf_counter() - started
        _write_summary(run, summary, exported, best, trained, seconds, plan.total - first)
    run.process.exchange(None)
    return out


def _export(run: Run, policy: Policy, params: dict[str, Any]) -> dict[str, str]:
    """Adapters, and the whole model where asked, as directories of the run; their fingerprints."""
    prints = {}
    if policy.spec:
        name = run.config.model if run.config.model != BUNDLED else str(run.directory)
        prints["trained_adapter_fingerprint"] = export_adapter(policy, params, run.out / ADAPTER, run.directory, name)
    if run.config.export:
        prints["trained_fingerprint"] = export_model(policy, params, run.out / MODEL, run.directory)
    return prints


def _write_summary(
    run: Run, summary: dict[str, float], exported: dict[str, str], best: dict[str, Any] | None, trained: int,
    seconds: float, steps: int,
) -> None:  # fmt: skip
    config, pairs = run.config, run.pairs
    write_json(
        run.out / RUN,
        {
            "verb": "train",
            "status": "done",
            "config": run.identity["config"],
            "loss": repr(run.loss),
            "optimizer": {"name": config.optimizer, **optimizer_hyper(config.optimizer, config.optimizer_args)},
            "reference": config.reference if needs_reference(run.loss) else "none",
            **{k: v for k, v in run.identity.items() if k.endswith("fingerprint")},
            "trained_fingerprint": None,
            **exported,
            "parameters": {"trained": trained, "all": parameter_count(run.decoder) + (trained if run.lora else 0)},
            **({"lora": {name: one._asdict() for name, one in run.lora.spec.items()}} if run.lora else {}),
            "versions": versions(),
            "device": device_name(),
            "mesh": dict(run.mesh.shape),
            "processes": run.process.count,
            "attention": run.attention.name,
            "counts": {
                "rows": pairs.rows, "train": len(run.train), "held_out": len(pairs.held_out),
                "watched": len(pairs.watched), "dropped": len(pairs.dropped), "updates": run.plan.total,
            },
            "row_tokens": run.layout.row_tokens,
            "displacement": summary,
            **({"best": best} if best else {}),
            "seconds": round(seconds, 3),
            "updates_this_time": steps,
        },
    )  # fmt: skip


class _Stop:
    """Notes SIGTERM while a run is under way; elsewhere than in the main thread, does nothing."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_Stop":
        try:
            self._before = signal.signal(signal.SIGTERM, self._note)
        except ValueError:  # not the main thread
            self._before = None
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
