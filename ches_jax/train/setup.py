"""Everything a run needs, opened and checked before the first number is computed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from ches_jax.bundled import BUNDLED
from ches_jax.data.packing import Item, responses_of
from ches_jax.distributed.mesh import local_shards, make_mesh, row_shards
from ches_jax.distributed.processes import Process
from ches_jax.errors import ChesError
from ches_jax.inputs import ModelFiles, Opener, convention
from ches_jax.losses import Loss, get_loss
from ches_jax.losses.wrappers import SFT_TERMS
from ches_jax.models.attention.choose import Choice, choose_attention
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.checkpoint.save import require_whole
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, abstract_decoder, abstract_parameters, named_parameters
from ches_jax.models.sharding import placement
from ches_jax.options import require_dtype, require_positive
from ches_jax.runs.directory import as_dict
from ches_jax.runs.store import here, output_place
from ches_jax.train.best import parse_best
from ches_jax.train.config import TrainConfig, UpdateOptions
from ches_jax.train.data.batches import Layout, standard_row
from ches_jax.train.data.examples import Examples, make_examples
from ches_jax.train.data.rows import REFERENCE_FIELDS, option_columns, read_pairs, require_columns
from ches_jax.train.data.split import Plan, RunPairs, make_plan, read_run_pairs
from ches_jax.train.objective import (
    get_objective,
    is_supervised,
    is_unpaired,
    needs_reference,
    reads_joint,
    reads_lists,
    reads_reference_tokens,
    reads_samples,
    reads_tokens,
)
from ches_jax.train.observe.pair_logprobs import Evaluator, PairLogps
from ches_jax.train.observe.probes import Probes, read_probes
from ches_jax.train.optimizer import Schedule, make_schedule, optimizer_hyper, require_schedule
from ches_jax.train.policy import Lora, open_lora, require_lora_options
from ches_jax.train.reference import Evaluate, Logps, from_file, reference_logps
from ches_jax.train.state import require_divides
from ches_jax.train.token_masks import reads_reference_states
from ches_jax.train.trackers import require_trackers
from ches_jax.types import TokenPair

NO_PROBES = "none"
POSITIVE = (
    "lr",
    "batch_size",
    "accumulate",
    "epochs",
    "steps",
    "limit",
    "clip",
    "eval_every",
    "save_every",
    "keep",
    "row_tokens",
    "lora_rank",
    "lora_alpha",
)
"""Options that must be more than zero."""


@dataclass(frozen=True)
class Run:
    """Everything opened and checked before the first update."""

    config: TrainConfig
    process: Process
    out: Path
    model: ModelFiles
    opener: Opener
    reference: ModelFiles | None
    """The model of ``--reference DIR``."""
    attention: Choice
    mesh: Mesh
    pairs: RunPairs
    train: Examples
    held_out: Examples
    plan: Plan
    layout: Layout
    loss: Loss
    sft: Examples | None
    """The rows of ``--sft-pairs``."""
    schedule: Schedule
    probes: Probes | None
    lora: Lora | None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the run: its options, the loss that they make, and everything it opened."""
        return {"config": as_dict(self.config), "objective": repr(self.loss), **self.opener.identity()}

    @property
    def master(self) -> str:
        """Dtype of trained parameters."""
        return master_dtype(self.config.dtype)

    @property
    def starts_at_the_reference(self) -> bool:
        """Whether the reference is the policy before the first update."""
        return needs_reference(self.loss) and self.config.reference == "initial"

    @property
    def sets(self) -> dict[str, list[TokenPair]]:
        """The pairs that are watched, by the name of their set."""
        every = {"train": self.pairs.watched, "held_out": self.pairs.held_out}
        return {name: pairs for name, pairs in every.items() if pairs}


def master_dtype(dtype: str) -> str:
    """Dtype in which parameters are trained that compute in ``dtype``.

    >>> master_dtype("bfloat16")
    'float32'
    """
    return "float64" if dtype == "float64" else "float32"


def require_options(config: TrainConfig) -> None:
    """Refuse options that no run could have.

    Raises:
      ChesError: the first bad option.
    """
    require_dtype("dtype", config.dtype)
    optimizer_hyper(config.optimizer, config.optimizer_args)
    require_schedule(config.schedule)
    require_positive({name.replace("_", "-"): getattr(config, name) for name in POSITIVE})
    for name in ("watch", "holdout", "warmup", "seed"):
        if getattr(config, name) < 0:
            raise ChesError(f"--{name} {getattr(config, name)}: expected 0 or more")
    require_lora_options(config)
    require_trackers(config.tracker)
    if config.keep_best is not None:
        best = parse_best(config.keep_best)
        if best.metric.startswith("eval_") and config.eval_pairs is None and not config.holdout:
            raise ChesError(f"--keep-best {config.keep_best}: no pairs are held out; give --eval-pairs or --holdout")
    if config.accumulate > config.batch_size:
        raise ChesError(f"--accumulate {config.accumulate}: more micro-batches than the {config.batch_size} pairs")
    if config.sft_pairs is not None and not config.sft:
        raise ChesError(
            f"--sft-pairs {config.sft_pairs}: give the coefficient of their likelihood too, such as --sft 0.1"
        )
    if config.sft_pairs is not None and config.accumulate > 1:
        raise ChesError(
            f"--sft-pairs with --accumulate {config.accumulate}: the pairs and the rows of the likelihood would be cut "
            "apart; leave --accumulate out, and save memory with --remat or a smaller --batch-size"
        )
    if config.eval_pairs is not None and config.holdout:
        raise ChesError("--holdout and --eval-pairs: give one of them")


def objective_of(config: UpdateOptions) -> Loss:
    """The loss that the options of a run make.

    Raises:
      ChesError: an expression that is none, or one that asks for more than the run supplies.
    """
    return get_objective(
        config.loss,
        config.loss_args,
        # of another set it is no part of the loss of a pair
        sft=0.0 if getattr(config, "sft_pairs", None) else config.sft,
        sft_per=config.sft_per,
        weighted=config.weights is not None,
        soft_labels=config.label_probabilities is not None,
    )


def require_cuttable(config: TrainConfig, loss: Loss) -> None:
    """Micro-batches give the update of the whole batch, or are refused.

    Raises:
      ChesError: a loss that compares the pairs of a batch, or keeps a mean over batches, with ``--accumulate``.
    """
    if config.accumulate > 1 and loss.needs_whole_batches:
        why = "compares the pairs of a batch with one another" if loss.couples_rows else "keeps a mean over batches"
        raise ChesError(
            f"--accumulate {config.accumulate}: loss {loss!r} {why}, so micro-batches would train another objective; "
            "leave --accumulate out, and save memory with --remat, a smaller --batch-size or more devices"
        )


def prepare(config: TrainConfig, process: Process | None = None) -> Run:
    """Open and check; nothing is computed or written.

    Raises:
      ChesError: options that no run could have (before anything is read), or input that is not fit.
    """
    process = process or Process()
    assert config.out is not None
    require_options(config)
    loss = objective_of(config)
    require_cuttable(config, loss)
    require_columns(config, loss)
    opener = Opener(option_columns(config))
    model = opener.model(config.model)
    decoder = model.decoder
    if config.export_whole:
        require_whole(model.directory)
    lora = open_lora(config, model, opener)
    mesh = make_mesh(config.mesh, everywhere=True)
    if needs_reference(loss) and config.reference == "none":
        raise ChesError(
            f"--reference none: loss {config.loss!r} compares with a reference; give initial or a directory"
        )
    if config.reference == "columns" and (
        is_unpaired(loss)
        or reads_samples(loss)
        or reads_lists(loss)
        or reads_joint(loss)
        or reads_reference_tokens(loss)
    ):
        raise ChesError(
            f"--reference columns: holds sums of the rows' own responses, and loss {config.loss!r} reads more of the "
            "reference; give initial, a directory or a cache file"
        )
    require_states(config, loss)
    reference = open_reference(config, loss, model, opener)
    pairs = read_run_pairs(config, loss, model, opener, process)
    train, held_out = (
        make_examples(
            loss, some, extra, seed=config.seed, max_length=config.max_length or decoder.max_positions, eos=config.eos
        )
        for some, extra in ((pairs.train, pairs.extra), (pairs.held_out, pairs.held_out_extra))
    )
    plan = make_plan(config, len(train))
    sft = _open_sft(config, model, opener, process) if config.sft_pairs else None
    require_balance(config, loss, decoder)
    require_divides(abstract_parameters(decoder), mesh, plan.micro_batch)
    threshold = decoder.rope.length_threshold if decoder.rope else None
    everything: list[Item] = [*pairs.train, *pairs.held_out, *train.items(), *held_out.items()]
    row_tokens = config.row_tokens or standard_row(everything, threshold)
    longest = max(len(r.targets(config.eos)) for item in everything for r in responses_of(item))
    prompts = config.probes or (BUNDLED if config.model == BUNDLED else NO_PROBES)
    probes = None
    if prompts != NO_PROBES:
        probes = read_probes(
            prompts,
            model,
            opener,
            template=config.template,
            template_args=config.template_args,
            max_length=config.max_length,
        )
    return Run(
        config=config,
        process=process,
        out=output_place(config.out),
        model=model,
        opener=opener,
        reference=reference,
        attention=choose_attention(config.attention, decoder, config.dtype),
        mesh=mesh,
        pairs=pairs,
        train=train,
        held_out=held_out,
        plan=plan,
        layout=Layout(
            row_tokens,
            row_shards(mesh),
            config.eos,
            threshold,
            responses=max(some.most_responses for some in (train, held_out)) if reads_lists(loss) else 0,
            response_tokens=longest if reads_tokens(loss) else 0,
            local_shards=local_shards(mesh) if process.count > 1 else None,
        ),
        loss=loss,
        sft=sft,
        schedule=make_schedule(config.schedule, config.lr, plan.total, config.warmup),
        probes=probes,
        lora=lora,
    )


def _open_sft(config: TrainConfig, model: ModelFiles, opener: Opener, process: Process) -> Examples:
    """The rows of ``--sft-pairs``, read for cross-entropy alone: numbers that the pairs bring are not theirs."""
    plain = replace(
        config, weights=None, label_probabilities=None, token_weights=None, rewards=None, reference="initial"
    )
    tokenizer = model.pair_tokenizer(
        max_length=config.max_length, eos=config.eos, template=config.template, template_args=config.template_args
    )
    assert config.sft_pairs is not None
    loss = get_loss(SFT_TERMS[config.sft_per])
    read = read_pairs(plain, loss, tokenizer, config.sft_pairs, None, None, process, opener, "sft_pairs")
    return make_examples(loss, read.pairs, {}, seed=config.seed, max_length=0, eos=config.eos)


def require_states(config: TrainConfig, loss: Loss) -> None:
    """Refuse a reference that has no states, where the loss reads them.

    Raises:
      ChesError: a cache file, of log-probabilities.
    """
    if reads_reference_states(loss) and config.reference.endswith(".parquet"):
        raise ChesError(
            f"--reference {config.reference}: holds log-probabilities, and loss {config.loss!r} reads the states of "
            "the reference model too; give initial or a model directory"
        )


def require_balance(config: TrainConfig, loss: Loss, decoder: DecoderConfig) -> None:
    """Refuse a load-balancing loss where there is nothing to balance.

    Raises:
      ChesError: a negative weight, a loss that is not supervised, a model without softmax-routed experts.
    """
    if not 0 <= config.router_balance < math.inf:
        raise ChesError(f"--router-balance {config.router_balance}: expected a number from 0 on")
    if not config.router_balance:
        return
    if not is_supervised(loss):
        raise ChesError(f"--router-balance: is added to supervised losses (sft, sft_token, sft_sum), not {loss!r}")
    if reason := _nothing_to_balance(decoder):
        raise ChesError(f"--router-balance: a {decoder.family} model {reason}; leave the option out")


def _nothing_to_balance(decoder: DecoderConfig) -> str | None:
    """Why the load-balancing loss is not defined for a model; None where it is."""
    e = decoder.experts
    if e is None or all(kind.mlp == "dense" for kind in decoder.kinds):
        return "has no routed experts"
    if e.correction:
        return (
            "scores its experts by sigmoids and has no balance loss: its makers balance them by a stored correction of "
            "the scores, which is not trained here"
        )
    if e.score == "sigmoid":
        return "scores its experts by sigmoids and has no balance loss, which measures softmax scores"
    if any(kind.mlp == "dense_and_routed" for kind in decoder.kinds):
        return "has a dense MLP beside its experts in every layer, and its own code has no balance loss"
    return None


def open_reference(config: TrainConfig, loss: Loss, model: ModelFiles, opener: Opener) -> ModelFiles | None:
    """The model of ``--reference DIR``; None where the reference is another.

    Raises:
      ChesError: it cannot be read, or has another vocabulary.
    """
    if not needs_reference(loss) or config.reference in ("initial", "none", "columns"):
        return None
    if config.reference.endswith(".parquet"):
        opener.file(Path(here(config.reference)), "reference")
        return None
    reference = opener.model(config.reference, "reference")
    if reference.decoder.vocab_size != model.decoder.vocab_size:
        raise ChesError(
            f"--reference {reference.directory}: its vocabulary has {reference.decoder.vocab_size} tokens, the model's "
            f"{model.decoder.vocab_size}; policy and reference share one tokenizer"
        )
    return reference


def load_parameters(directory: Path, dtype: str, master: str | None, mesh: Mesh) -> dict[str, jax.Array]:
    """Weights of a directory in the master dtype (None: as stored), on the mesh."""
    model = load_model(directory, dtype=dtype, param_dtype=master, sharding=placement(mesh))
    return named_parameters(model)


def references(
    config: TrainConfig,
    loss: Loss,
    examples: Mapping[str, Examples],
    identity: Mapping[str, Any],
    *,
    initial: Evaluate,
    other: Evaluate | None,
    folder: Path,
    write: bool = True,
) -> dict[str, Logps]:
    """Reference log-probabilities of training and held-out examples; empty where the loss has no reference.

    Args:
      config: ``reference`` names the source.
      loss: decides whether sums or single tokens are needed.
      examples: by the name of their set.
      identity: of the run: fingerprints of model, tokenizer and adapter are read.
      initial: log-probabilities under the policy before the first update.
      other: the same under the model of ``--reference DIR``.
      folder: where the cache lies.
      write: whether this process writes it.

    Raises:
      ChesError: a cache of another model, a directory of another vocabulary, values that are not finite.
    """
    if not needs_reference(loss):
        return {}
    if config.reference == "columns":
        extra = {name: some.extra for name, some in examples.items() if some.extra}
        return {name: PairLogps(*(columns[f] for f in REFERENCE_FIELDS)) for name, columns in extra.items()}
    pairs = [pair for some in examples.values() for pair in some.pairs]
    identity = reference_identity(config, loss, identity)
    of_reference = identity.pop("reference_fingerprint", None)
    if config.reference.endswith(".parquet"):
        logps = from_file(Path(here(config.reference)), pairs, identity, initial)
    elif config.reference == "initial":
        logps = reference_logps(pairs, initial, identity, folder, write=write)
    else:
        assert other is not None
        identity["model_fingerprint"] = of_reference
        identity.pop("adapter_fingerprint", None)
        logps = reference_logps(pairs, other, identity, folder, write=write)
    parts, start = {}, 0
    for name, some in examples.items():
        part = slice(start, start := start + len(some.pairs))
        parts[name] = logps._replace(chosen=logps.chosen[part], rejected=logps.rejected[part])
    return parts


def reference_identity(config: TrainConfig, loss: Loss, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the reference's log-probabilities, and so names their cache."""
    prints = ("model_fingerprint", "tokenizer_fingerprint", "adapter_fingerprint", "reference_fingerprint")
    decides = {name: identity[name] for name in prints if name in identity}
    decides["convention"] = convention(config.eos, config.max_length, config.template, config.template_args)
    decides["dtype"] = config.dtype
    if reads_reference_tokens(loss):
        decides["per"] = "token"
    return decides


@dataclass
class OtherModel:
    """Log-probabilities under a reference directory, whose weights are loaded when they are first needed."""

    run: Run
    model: ModelFiles

    @property
    def abstract(self) -> Decoder:
        """The decoder without arrays."""
        return abstract_decoder(self.model.decoder, dtype=jnp.dtype(self.run.config.dtype))

    @cached_property
    def params(self) -> dict[str, jax.Array]:
        """Its weights on the mesh."""
        return load_parameters(self.model.directory, self.run.config.dtype, self.run.master, self.run.mesh)

    @cached_property
    def _evaluate(self) -> Evaluate:
        run, decoder, dtype = self.run, self.model.decoder, self.run.config.dtype
        threshold = decoder.rope.length_threshold if decoder.rope else None
        layout = run.layout._replace(length_threshold=threshold)
        attend = choose_attention(run.config.attention, decoder, dtype).attend
        evaluator = Evaluator(self.abstract, run.mesh, layout, attend)
        return evaluator.under(self.params, per_token=reads_reference_tokens(run.loss))

    def __call__(self, pairs: Sequence[TokenPair]) -> Logps:
        """Log-probabilities of ``pairs``."""
        return self._evaluate(pairs)
