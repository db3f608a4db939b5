"""The parts of a run that hold arrays or compiled programs: made of what ``setup`` has opened and checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from ches_jax.distributed.mesh import put_replicated
from ches_jax.losses import get_loss
from ches_jax.losses.wrappers import SFT_TERMS
from ches_jax.models.adapters.packed import load_packed
from ches_jax.train.beside import Reference
from ches_jax.train.best import parse_best
from ches_jax.train.checkpoints import Checkpoints
from ches_jax.train.data.batches import standard_row
from ches_jax.train.data.examples import Examples, ranks_of
from ches_jax.train.data.loader import Loader
from ches_jax.train.data.split import whole_pass, write_dropped
from ches_jax.train.objective import initial_loss_state, reads_reference_tokens
from ches_jax.train.observe.displacement_log import DisplacementLog, DisplacementObserver
from ches_jax.train.observe.eval_loss import EvalLoss, EvalPass
from ches_jax.train.observe.label_posteriors import LabelPosteriors, in_doubt
from ches_jax.train.observe.observer import EveryUpdate, Observer, Observers, Watch
from ches_jax.train.observe.pair_logprobs import Evaluator, WatchedPairs
from ches_jax.train.observe.probes import ProbeLog, ProbeObserver, Prober
from ches_jax.train.optimizer import make_optimizer
from ches_jax.train.policy import Policy, make_policy
from ches_jax.train.reference import Logps
from ches_jax.train.setup import OtherModel, Run, load_parameters, references
from ches_jax.train.state import TrainState, initial_state
from ches_jax.train.step import Step
from ches_jax.train.token_masks import initial_masks, learned_kinds, reads_reference_states

DROPPED = "dropped.jsonl"


@dataclass
class Parts:
    """What the loop is made of."""

    policy: Policy
    state: TrainState | None
    """Before the first update; None once it was taken."""
    loader: Loader
    update: Step
    evaluations: Observers
    """The run's own, whose numbers make the lines of evaluations and decide which checkpoint is best."""
    own: Observers
    """The caller's, whose numbers join the line of each update."""
    saved: Checkpoints
    posteriors: LabelPosteriors | None = None
    """Of a loss whose labels are in doubt (LCPO)."""

    def take_state(self) -> TrainState:
        """The state before the first update, given away: a run that resumes from another one can free its memory."""
        state, self.state = self.state, None
        assert state is not None
        return state


def assemble(run: Run, place: Path, observers: Sequence[Observer | Watch] = ()) -> Parts:
    """Load the weights, compute the reference, make the state, the step and the observers.

    Args:
      run: what was opened; its logs are written in ``run.out``.
      place: where checkpoints lie: ``run.out``, or in a store.
      observers: the caller's own.

    Raises:
      ChesError: a reference that does not fit, weights that cannot be read.
    """
    config = run.config
    if run.process.first:
        write_dropped(run.out / DROPPED, run.pairs.dropped)
    packed: dict[str, str] = {}
    if run.lora is None:
        loaded = load_parameters(run.model.directory, config.dtype, run.master, run.mesh)
    else:  # a quantised base stays as it is stored
        loaded, packed = load_packed(run.model.directory, run.mesh)
    policy, params = make_policy(
        loaded,
        run.model.decoder,
        run.lora,
        dtype=config.dtype,
        master=run.master,
        seed=config.seed,
        mesh=run.mesh,
        packed=packed,
    )
    evaluate = Evaluator(policy.abstract, run.mesh, run.layout, run.attention.attend)
    initial = policy.parameters(params)
    other = None if run.reference is None else OtherModel(run, run.reference)
    beside = _beside(run, policy, params, other) if reads_reference_states(run.loss) else None
    if beside is not None:
        params = {**params, **_masks(run, beside)}
    reference = references(
        config,
        run.loss,
        {"train": run.train, "held_out": run.held_out},
        run.identity,
        initial=evaluate.under(initial, per_token=reads_reference_tokens(run.loss)),
        other=other,
        folder=Path(config.reference_cache) if config.reference_cache else run.out,
        write=run.process.first,
    )
    total = run.plan.total
    posteriors = None
    if in_doubt(run.loss):
        posteriors = LabelPosteriors(run.loss, run.sets, run.train, run.held_out, reference, config.eos)
    evaluations = Observers(
        _evaluations(run, policy, evaluate, reference.get("held_out"), initial, posteriors, beside), total
    )
    own = [one if hasattr(one, "observe") else EveryUpdate(policy, cast(Watch, one)) for one in observers]
    optimizer = make_optimizer(config.optimizer, run.schedule, **config.optimizer_args)
    state = initial_state(params, optimizer, initial_loss_state(run.loss, run.master), run.mesh)
    step = Step(
        policy.abstract,
        optimizer,
        run.loss,
        state,
        run.mesh,
        frozen=policy.frozen,
        reference=beside,
        clip=config.clip,
        router_balance=config.router_balance,
        sft=None if run.sft is None else (config.sft, get_loss(SFT_TERMS[config.sft_per])),
        remat=config.remat,
    )
    loader = Loader(run.loss, run.train, run.plan, run.layout, reference.get("train"), run.master)
    if run.sft is not None:
        loader.sft = _sft_loader(run, run.sft)
    best = parse_best(config.keep_best) if config.keep_best else None
    return Parts(
        policy=policy,
        state=state,
        loader=loader,
        update=step,
        evaluations=evaluations,
        own=Observers(cast(Sequence[Observer], own), total),
        saved=Checkpoints(place, config.keep, best, config.save_every, run.process),
        posteriors=posteriors,
    )


def _beside(run: Run, policy: Policy, params: dict[str, Any], other: OtherModel | None) -> Reference:
    """The reference whose states a loss reads in every update; what is trained is copied, a frozen base is shared."""
    if other is not None:
        return Reference(other.abstract, other.params)
    return Reference(policy.abstract, policy.parameters({name: jnp.copy(value) for name, value in params.items()}))


def _sft_loader(run: Run, examples: Examples) -> Loader:
    """The rows of ``--sft-pairs``, as many in each update as it has pairs, in an order of their own."""
    size = min(run.config.batch_size, len(examples))
    plan = replace(run.plan, pairs=len(examples), batch_size=size, seed=run.config.seed)
    threshold = run.layout.length_threshold
    layout = run.layout._replace(
        row_tokens=standard_row(examples.items(), threshold),
        responses=0,
        response_tokens=0,
        row_counts=(),
        predictions=0,
    )
    loss = get_loss(SFT_TERMS[run.config.sft_per])
    return Loader(loss, examples, plan, layout, None, run.master)


def _masks(run: Run, beside: Reference) -> dict[str, Any]:
    """The masks that the loss learns, as they start, on the mesh."""
    decoder = beside.abstract.config
    masks = initial_masks(learned_kinds(run.loss), decoder.num_layers, decoder.width, [run.config.seed, 5])
    return put_replicated({name: value.astype(run.master) for name, value in masks.items()}, run.mesh)


def _evaluations(
    run: Run,
    policy: Policy,
    evaluate: Evaluator,
    reference: Logps | None,
    initial: dict[str, Any],
    posteriors: LabelPosteriors | None,
    beside: Reference | None,
) -> list[Observer]:
    """Displacement, loss on the held-out pairs, probes; all look every ``eval_every`` updates."""
    config, write = run.config, run.process.first
    watched = WatchedPairs(evaluate, run.sets)
    beta = run.loss.hyper.get("beta") if run.starts_at_the_reference else None
    ranks = ranks_of(run.train, run.held_out)
    log = DisplacementLog(run.out, config.eos, config.tolerance, write=write, ranks=ranks, beta=beta)
    observers: list[Observer] = [DisplacementObserver(config.eval_every, watched, log, posteriors)]
    if run.pairs.held_out and beside is not None and not run.loss.stateful:
        held_out = Loader(
            run.loss, run.held_out, whole_pass(len(run.held_out), run.plan), run.layout, reference, run.master
        )
        observers.append(EvalPass(config.eval_every, run.loss, held_out, policy.abstract, beside, run.mesh))
    elif run.pairs.held_out and not run.loss.stateful:
        dtype = np.dtype(run.master)
        observers.append(
            EvalLoss(config.eval_every, run.loss, run.held_out, reference, run.layout, evaluate, watched, dtype)
        )
    if run.probes is not None:
        prober = Prober(policy.abstract, run.mesh, run.probes, run.attention.attend)
        probe_log = ProbeLog(run.out, run.probes, prober(initial), write=write)
        observers.append(ProbeObserver(config.eval_every, prober, probe_log))
    return observers
