"""``ches train``: a model directory and pairs to a run directory with checkpoints, displacement log and new weights."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from ches_jax import embedded
from ches_jax.errors import ChesError, RunError
from ches_jax.hf.directory import fingerprint, read_config, resolve
from ches_jax.losses import Loss, LossInputs, mean_loss
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, abstract_decoder, abstract_parameters, named_parameters
from ches_jax.models.families import decoder_config
from ches_jax.models.load import load_model, with_parameters
from ches_jax.models.partition import placement
from ches_jax.models.save import save_pretrained
from ches_jax.parallel import make_mesh, row_shards
from ches_jax.runlog import RUN, as_dict, device_name, open_run, read_json, versions, write_json
from ches_jax.train.batches import Batch, Layout, chosen_only, fitted, make_batch, standard_row
from ches_jax.train.checkpoints import Checkpoints
from ches_jax.train.config import EMBEDDED, NOT_IDENTITY, TrainConfig, checked
from ches_jax.train.data import Plan, RunPairs, make_plan, read_run_pairs, reference_from_columns, write_dropped
from ches_jax.train.displacement import DisplacementLog
from ches_jax.train.evaluate import Evaluator, PairLogps
from ches_jax.train.metrics import FILE_NAME as METRICS
from ches_jax.train.metrics import JsonLines
from ches_jax.train.objective import get_objective, initial_loss_state, is_supervised, needs_reference
from ches_jax.train.optimizer import Schedule, make_optimizer, make_schedule, optimizer_hyper
from ches_jax.train.reference import from_file, reference_logps
from ches_jax.train.state import TrainState, initial_state, require_divides
from ches_jax.train.step import Step
from ches_jax.types import TokenPair

DROPPED = "dropped.jsonl"
MODEL = "model"
FITTED_UPDATES = 4096
"""Batch shapes are fitted to so many updates; a later one may still ask for a shape of its own."""
AGREEMENT = {"float64": 1e-9, "float32": 1e-4}
"""How far, relatively, the policy's first log-probabilities may lie from a reference that it is; 16 bits: 2e-2."""


class Stopped(Exception):
    """The run was told to stop, and has saved where it was."""


@dataclass(frozen=True)
class _Run:
    """Everything opened and checked before the first update."""

    config: TrainConfig
    out: Path
    directory: Path
    decoder: DecoderConfig
    mesh: Mesh
    pairs: RunPairs
    plan: Plan
    layout: Layout
    loss: Loss
    schedule: Schedule
    identity: dict[str, Any]

    @property
    def sets(self) -> dict[str, list[TokenPair]]:
        """The pairs that are watched, by the name of their set."""
        every = {"train": self.pairs.watched, "held_out": self.pairs.held_out}
        return {name: pairs for name, pairs in every.items() if pairs}


def train(config: TrainConfig, *, resume: bool = False, quiet: bool = False) -> Path:
    """Train, and return the run directory.

    Raises:
      ChesError: any input that is not fit; a loss that is not finite.
      Stopped: SIGTERM came; the state is saved and ``resume`` goes on.
    """
    config = checked(config)
    with jax.enable_x64(config.dtype == "float64"):
        run = _prepare(config)
        open_run(run.out, "train", run.identity, resume)
        done = run.out / RUN
        if done.exists() and read_json(done).get("status") == "done":
            return run.out
        return _train(run, quiet)


def _prepare(config: TrainConfig) -> _Run:
    """Open and check; nothing is computed or written."""
    assert config.out is not None
    directory = embedded.model_dir() if config.model == EMBEDDED else resolve(config.model)
    decoder = decoder_config(read_config(directory), str(directory))
    mesh = make_mesh(config.mesh)
    loss = get_objective(config.loss, config.loss_args, sft=config.sft, sft_per=config.sft_per)
    if needs_reference(loss) and config.reference == "none":
        raise ChesError(
            f"--reference none: loss {config.loss!r} compares with a reference; give initial or a directory"
        )
    pairs = read_run_pairs(config, directory, decoder)
    plan = make_plan(config, len(pairs.train))
    require_divides(abstract_parameters(decoder), mesh, plan.micro_batch)
    threshold = decoder.rope.length_threshold if decoder.rope else None
    row_tokens = config.row_tokens or standard_row([*pairs.train, *pairs.held_out], threshold)
    options = {k: v for k, v in as_dict(config).items() if k not in NOT_IDENTITY}
    identity = {"config": options, "model_fingerprint": fingerprint(directory), **pairs.fingerprints}
    return _Run(
        config=config,
        out=Path(config.out),
        directory=directory,
        decoder=decoder,
        mesh=mesh,
        pairs=pairs,
        plan=plan,
        layout=Layout(row_tokens, row_shards(mesh), config.eos, threshold),
        loss=loss,
        schedule=make_schedule(config.schedule, config.lr, plan.total, config.warmup),
        identity=identity,
    )


def _train(run: _Run, quiet: bool) -> Path:
    config, plan, out = run.config, run.plan, run.out
    started = time.perf_counter()
    master = "float64" if config.dtype == "float64" else "float32"
    abstract = abstract_decoder(run.decoder, dtype=jnp.dtype(config.dtype), param_dtype=jnp.dtype(master))
    optimizer = make_optimizer(config.optimizer, run.schedule, **config.optimizer_args)
    evaluate = Evaluator(abstract, run.mesh, run.layout)
    params = _load(run.directory, config.dtype, master, run.mesh)
    write_dropped(out / DROPPED, run.pairs.dropped)
    reference = _references(run, evaluate, params)
    state = initial_state(params, optimizer, initial_loss_state(run.loss, master), run.mesh)
    del params
    step = Step(abstract, optimizer, run.loss, state, run.mesh, clip=config.clip, remat=config.remat)
    saved = Checkpoints(out, config.keep)
    log = DisplacementLog(out, config.eos, config.tolerance)
    at = saved.latest()
    if at is not None:
        state, position = saved.restore(at, state)
        if position != plan.position(at):
            raise RunError(f"{saved.folder / str(at)}: its data position is {position}, this run's {plan.position(at)}")
    first = at or 0
    tracker = JsonLines(out / METRICS, at)

    def watch(state: TrainState, i: int) -> dict[str, float]:
        """Evaluate, write, log."""
        now = {name: evaluate(state.params, pairs) for name, pairs in run.sets.items()}
        summary = log.record(i, run.sets, now)
        if "held_out" in now:
            summary |= _held_out(run, now["held_out"], reference.get("held_out"))
        tracker.log(i, summary)
        return summary

    summary = watch(state, 0) if at is None else {}
    make = _batch_maker(run, reference.get("train"), master)
    with _Stop() as stop, ThreadPoolExecutor(1) as pool, tqdm(
        total=plan.total, initial=first, unit=" updates", disable=quiet, desc=f"training {config.loss}"
    ) as bar:  # fmt: skip
        ahead = pool.submit(make, first)
        for i in range(first, plan.total):
            batches = ahead.result()
            ahead = pool.submit(make, min(i + 1, plan.total - 1))
            state, metrics = step(state, batches)
            _require_finite(run, i, metrics, saved)
            if i == 0:
                _require_agreement(run, batches, metrics)
            lr = float(run.schedule(jnp.int32(i)))
            epoch = (i + 1) / plan.steps_per_epoch
            tracker.log(i + 1, {"epoch": epoch, "learning_rate": lr, **metrics})
            bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
            bar.update()
            done = i + 1
            last = done == plan.total
            if last or (config.eval_every and done % config.eval_every == 0):
                summary = watch(state, done)
            if last or stop.asked or (config.save_every and done % config.save_every == 0):
                saved.save(done, state, plan.position(done))
            if stop.asked and not last:
                saved.wait()
                raise Stopped(f"{out}: stopped by SIGTERM after update {done} of {plan.total}; go on with --resume")
    saved.wait()
    if first == plan.total:
        summary = watch(state, first)
    log.join()
    exported = _export(run, abstract, state) if config.export else None
    saved.close()
    _write_summary(run, summary, exported, time.perf_counter() - started, plan.total - first)
    return out


def _load(directory: Path, dtype: str, master: str, mesh: Mesh) -> dict[str, jax.Array]:
    """Weights of a directory in the master dtype, on the mesh."""
    model = load_model(directory, dtype=dtype, param_dtype=master, sharding=placement(mesh))
    return named_parameters(model)


def _references(run: _Run, evaluate: Evaluator, params: dict[str, Any]) -> dict[str, PairLogps]:
    """Reference log-probabilities of training and held-out pairs; empty where the loss has no reference."""
    config, pairs = run.config, run.pairs
    if not needs_reference(run.loss):
        return {}
    if config.reference == "columns":
        parts = {"train": pairs.train, "held_out": pairs.held_out}
        return {name: reference_from_columns(some, pairs.columns) for name, some in parts.items()}
    everything = [*pairs.train, *pairs.held_out]
    identity = {
        "model_fingerprint": run.identity["model_fingerprint"],
        "tokenizer_fingerprint": run.identity["tokenizer_fingerprint"],
        "convention": {"eos": config.eos, "max_length": config.max_length, "template": config.template},
        "dtype": config.dtype,
    }
    folder = Path(config.reference_cache) if config.reference_cache else run.out
    if config.reference.endswith(".parquet"):
        found = from_file(Path(config.reference), everything, identity, lambda some: evaluate(params, some))
    elif config.reference == "initial":
        found = reference_logps(everything, lambda some: evaluate(params, some), identity, folder)
    else:
        directory = resolve(config.reference)
        identity["model_fingerprint"] = fingerprint(directory)
        found = reference_logps(everything, _other_model(run, directory), identity, folder)
    n = len(pairs.train)
    return {
        "train": PairLogps(found.chosen[:n], found.rejected[:n]),
        "held_out": PairLogps(found.chosen[n:], found.rejected[n:]),
    }


def _other_model(run: _Run, directory: Path) -> Callable[[Sequence[TokenPair]], PairLogps]:
    """Log-probabilities under a reference directory, whose weights are gone when they have been computed."""
    decoder = decoder_config(read_config(directory), str(directory))
    if decoder.vocab_size != run.decoder.vocab_size:
        raise ChesError(
            f"--reference {directory}: its vocabulary has {decoder.vocab_size} tokens, the model's "
            f"{run.decoder.vocab_size}; policy and reference share one tokenizer"
        )
    abstract = abstract_decoder(decoder, dtype=jnp.dtype(run.config.dtype))
    threshold = decoder.rope.length_threshold if decoder.rope else None
    evaluate = Evaluator(abstract, run.mesh, run.layout._replace(length_threshold=threshold))
    master = "float64" if run.config.dtype == "float64" else "float32"
    loaded: list[Any] = []

    def compute(pairs: Sequence[TokenPair]) -> PairLogps:
        if not loaded:
            loaded.append(_load(directory, run.config.dtype, master, run.mesh))
        return evaluate(loaded[0], pairs)

    return compute


def _batch_maker(run: _Run, reference: PairLogps | None, dtype: str) -> Callable[[int], list[Batch]]:
    """From the number of an update to its micro-batches."""
    pairs = [chosen_only(p) for p in run.pairs.train] if is_supervised(run.loss) else run.pairs.train
    updates = range(min(run.plan.total, FITTED_UPDATES))
    layout = fitted(run.layout, ([pairs[j] for j in group] for i in updates for group in run.plan.update(i)))

    def make(step: int) -> list[Batch]:
        groups = run.plan.update(step)
        weights = None
        if run.loss.name == "sft":
            tokens = sum(len(pairs[i].chosen.targets(run.config.eos)) for g in groups for i in g)
            weights = sum(map(len, groups)) / max(1, tokens)
        return [
            make_batch(
                [pairs[i] for i in group],
                layout,
                None if reference is None else reference.chosen[group],
                None if reference is None else reference.rejected[group],
                None if weights is None else np.full(len(group), weights),
                np.dtype(dtype),
            )
            for group in groups
        ]

    return make


def _held_out(run: _Run, now: PairLogps, reference: PairLogps | None) -> dict[str, float]:
    """Loss and rewards of the held-out pairs, under TRL's names with ``eval_`` in front."""
    pairs, loss = run.pairs.held_out, run.loss
    chosen_tokens = np.array([len(p.chosen.targets(run.config.eos)) for p in pairs], np.int32)
    rejected_tokens = np.array([len(p.rejected.targets(run.config.eos)) for p in pairs], np.int32)
    ref = PairLogps(np.zeros(len(pairs)), np.zeros(len(pairs))) if reference is None else reference
    every = {
        "logp_chosen": now.chosen, "logp_rejected": now.rejected, "ref_logp_chosen": ref.chosen,
        "ref_logp_rejected": ref.rejected, "chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens,
        "weights": np.full(len(pairs), len(pairs) / max(1, chosen_tokens.sum()) if loss.name == "sft" else 1.0),
    }  # fmt: skip
    asked = {
        k: jnp.asarray(v, jnp.int32 if v.dtype == np.int32 else jnp.float32)
        for k, v in every.items()
        if k in loss.needs
    }
    if loss.stateful:
        return {}
    value, logs = mean_loss(loss, LossInputs(**cast(Any, asked)))
    return {"eval_loss": float(value), **{f"eval_{k}": float(v) for k, v in logs.items()}}


def _require_finite(run: _Run, i: int, metrics: dict[str, float], saved: Checkpoints) -> None:
    """Stop a run whose loss or gradient is no number.

    Raises:
      ChesError: with update, rows and last good checkpoint.
    """
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    saved.wait()
    what = "loss" if not math.isfinite(metrics["loss"]) else "grad_norm"
    rows = [run.pairs.train[j] for group in run.plan.update(i) for j in group]
    named = ", ".join(f"{p.index} ({p.row_id[:12]})" for p in rows[:8]) + (" ..." if len(rows) > 8 else "")
    good = saved.latest()
    where = (
        f"the last good checkpoint is {saved.folder / str(good)}" if good is not None else "no checkpoint was written"
    )
    raise ChesError(
        f"update {i + 1}: {what} is {metrics[what]} on rows {named}; {where}. A lower --lr, --clip 1 or "
        "--dtype float32 may help"
    )


def _require_agreement(run: _Run, batches: list[Batch], metrics: dict[str, float]) -> None:
    """Before the first update the policy is the reference: equal log-probabilities, and a DPO loss of ln 2.

    Raises:
      ChesError: they differ by more than rounding.
    """
    if not needs_reference(run.loss) or run.config.reference != "initial":
        return
    tolerance = AGREEMENT.get(run.config.dtype, 2e-2)
    reference = float(np.concatenate([b.ref_logp_chosen for b in batches]).mean())
    policy = metrics["logps/chosen"]
    if not abs(policy - reference) <= tolerance * max(1.0, abs(reference)):
        raise ChesError(
            f"before the first update the policy gives the chosen responses {policy:.6g} nats, the reference "
            f"{reference:.6g}; they are the same model, so the reference log-probabilities are not of these rows"
        )
    beta = run.loss.hyper.get("beta", 1.0)
    plain = run.config.loss in ("dpo", "sigmoid") and not run.config.sft
    if plain and not abs(metrics["loss"] - math.log(2)) <= beta * tolerance * max(1.0, abs(reference)):
        raise ChesError(f"before the first update the DPO loss is {metrics['loss']:.6g}, not ln 2: please report this")


def _export(run: _Run, abstract: Decoder, state: TrainState) -> str:
    """The trained weights as a Hugging Face directory; returns its fingerprint."""
    target = run.out / MODEL
    if (target / "config.json").exists():
        return fingerprint(target)
    return save_pretrained(with_parameters(abstract, state.params), target, like=run.directory)


def _write_summary(run: _Run, summary: dict[str, float], exported: str | None, seconds: float, steps: int) -> None:
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
            "trained_fingerprint": exported,
            "versions": versions(),
            "device": device_name(),
            "mesh": dict(run.mesh.shape),
            "counts": {
                "rows": pairs.rows, "train": len(pairs.train), "held_out": len(pairs.held_out),
                "watched": len(pairs.watched), "dropped": len(pairs.dropped), "updates": run.plan.total,
            },
            "row_tokens": run.layout.row_tokens,
            "displacement": summary,
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
