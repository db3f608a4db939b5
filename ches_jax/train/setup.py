"""Everything a run needs, opened and checked before the first number is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from ches_jax.hf.directory import fingerprint, read_config, resolve
from ches_jax.losses import Loss
from ches_jax.models.attention.choose import Choice, choose_attention
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import abstract_decoder, abstract_parameters, named_parameters
from ches_jax.models.families.registry import decoder_config
from ches_jax.models.sharding import placement
from ches_jax.options import require_dtype
from ches_jax.runs.directory import as_dict
from ches_jax.train.checkpoints import parse_best
from ches_jax.train.config import NOT_IDENTITY, TrainConfig
from ches_jax.train.data.batches import Layout, standard_row
from ches_jax.train.data.examples import Examples, make_examples
from ches_jax.train.data.rows import REFERENCE_FIELDS, require_reward_columns
from ches_jax.train.data.split import Plan, RunPairs, make_plan, read_run_pairs
from ches_jax.train.objective import (
    get_objective,
    is_unpaired,
    needs_reference,
    reads_reference_tokens,
    reads_samples,
    reads_tokens,
)
from ches_jax.train.observe.pair_logprobs import Evaluator, PairLogps
from ches_jax.train.observe.probes import Probes, read_probes
from ches_jax.train.optimizer import Schedule, make_schedule, optimizer_hyper, require_schedule
from ches_jax.train.policy import Lora, open_lora, require_lora_options
from ches_jax.train.reference import Logps, from_file, reference_logps
from ches_jax.train.state import require_divides
from ches_jax.train.trackers import require_trackers
from ches_jax.types import TokenPair

NO_PROBES = "none"
POSITIVE = (
    "lr", "batch_size", "accumulate", "epochs", "steps", "limit", "clip", "eval_every", "save_every", "keep",
    "row_tokens", "lora_rank", "lora_alpha",
)  # fmt: skip
"""Options that must be more than zero."""


@dataclass(frozen=True)
class Run:
    """Everything opened and checked before the first update."""

    config: TrainConfig
    process: Process
    out: Path
    directory: Path
    decoder: DecoderConfig
    attention: Choice
    mesh: Mesh
    pairs: RunPairs
    train: Examples
    held_out: Examples
    plan: Plan
    layout: Layout
    loss: Loss
    schedule: Schedule
    probes: Probes | None
    lora: Lora | None
    identity: dict[str, Any]

    @property
    def sets(self) -> dict[str, list[TokenPair]]:
        """The pairs that are watched, by the name of their set."""
        every = {"train": self.pairs.watched, "held_out": self.pairs.held_out}
        return {name: pairs for name, pairs in every.items() if pairs}


def require_options(config: TrainConfig) -> None:
    """Refuse options that no run could have.

    Raises:
      ChesError: the first bad option.
    """
    require_dtype("dtype", config.dtype)
    optimizer_hyper(config.optimizer, config.optimizer_args)
    require_schedule(config.schedule)
    for name in POSITIVE:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ChesError(f"--{name.replace('_', '-')} {value}: expected a positive number")
    for name in ("watch", "holdout", "warmup"):
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
    if config.eval_pairs is not None and config.holdout:
        raise ChesError("--holdout and --eval-pairs: give one of them")


def prepare(config: TrainConfig, process: Process | None = None) -> Run:
    """Open and check; nothing is computed or written.

    Raises:
      ChesError: options that no run could have (before anything is read), or input that is not fit.
    """
    process = process or Process()
    assert config.out is not None
    require_options(config)
    loss = get_objective(
        config.loss, config.loss_args, sft=config.sft, sft_per=config.sft_per, weighted=config.weights is not None
    )
    require_reward_columns(config, loss)
    directory = resolve(config.model)
    decoder = decoder_config(read_config(directory), str(directory))
    lora = open_lora(config, directory, decoder)
    mesh = make_mesh(config.mesh, everywhere=True)
    if needs_reference(loss) and config.reference == "none":
        raise ChesError(
            f"--reference none: loss {config.loss!r} compares with a reference; give initial or a directory"
        )
    if config.reference == "columns" and (is_unpaired(loss) or reads_samples(loss) or reads_reference_tokens(loss)):
        raise ChesError(
            f"--reference columns: holds sums of the rows' own responses, and loss {config.loss!r} reads more of the "
            "reference; give initial, a directory or a cache file"
        )
    pairs = read_run_pairs(config, loss, directory, decoder, process)
    train, held_out = (
        make_examples(
            loss, some, given, seed=config.seed, max_length=config.max_length or decoder.max_positions, eos=config.eos
        )
        for some, given in ((pairs.train, pairs.given), (pairs.held_out, pairs.held_out_given))
    )
    plan = make_plan(config, len(train))
    require_divides(abstract_parameters(decoder), mesh, plan.micro_batch)
    threshold = decoder.rope.length_threshold if decoder.rope else None
    everything: list[Item] = [*pairs.train, *pairs.held_out, *train.items(), *held_out.items()]
    row_tokens = config.row_tokens or standard_row(everything, threshold)
    longest = max(len(r.targets(config.eos)) for item in everything for r in responses_of(item))
    asked = config.probes or (BUNDLED if config.model == BUNDLED else NO_PROBES)
    probes = None
    if asked != NO_PROBES:
        probes = read_probes(asked, directory, decoder, template=config.template, max_length=config.max_length)
    options = {k: v for k, v in as_dict(config).items() if k not in NOT_IDENTITY}
    identity = {"config": options, "model_fingerprint": fingerprint(directory), **pairs.fingerprints}
    if probes is not None:
        identity["probes_fingerprint"] = probes.fingerprint
    if lora is not None and lora.fingerprint is not None:
        identity["adapter_fingerprint"] = lora.fingerprint
    return Run(
        config=config,
        process=process,
        out=Path(config.out),
        directory=directory,
        decoder=decoder,
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
            response_tokens=longest if reads_tokens(loss) else 0,
            held=local_shards(mesh) if process.count > 1 else None,
        ),
        loss=loss,
        schedule=make_schedule(config.schedule, config.lr, plan.total, config.warmup),
        probes=probes,
        lora=lora,
        identity=identity,
    )


def load_parameters(directory: Path, dtype: str, master: str | None, mesh: Mesh) -> dict[str, jax.Array]:
    """Weights of a directory in the master dtype (None: as stored), on the mesh."""
    model = load_model(directory, dtype=dtype, param_dtype=master, sharding=placement(mesh))
    return named_parameters(model)


def references(run: Run, evaluate: Evaluator, params: dict[str, Any]) -> dict[str, Logps]:
    """Reference log-probabilities of training and held-out examples; empty where the loss has no reference."""
    config = run.config
    if not needs_reference(run.loss):
        return {}
    if config.reference == "columns":
        given = {"train": run.train.given, "held_out": run.held_out.given}
        return {name: PairLogps(*(some[f] for f in REFERENCE_FIELDS)) for name, some in given.items() if some}
    everything = [*run.train.pairs, *run.held_out.pairs]
    identity = {
        "model_fingerprint": run.identity["model_fingerprint"],
        "tokenizer_fingerprint": run.identity["tokenizer_fingerprint"],
        "convention": {"eos": config.eos, "max_length": config.max_length, "template": config.template},
        "dtype": config.dtype,
    }
    if "adapter_fingerprint" in run.identity:
        identity["adapter_fingerprint"] = run.identity["adapter_fingerprint"]
    per_token = reads_reference_tokens(run.loss)
    if per_token:
        identity["per"] = "token"

    def policy(pairs: Sequence[TokenPair]) -> Logps:
        return (evaluate.tokens if per_token else evaluate)(params, pairs)

    folder = Path(config.reference_cache) if config.reference_cache else run.out
    if config.reference.endswith(".parquet"):
        found = from_file(Path(config.reference), everything, identity, policy)
    elif config.reference == "initial":
        found = reference_logps(everything, policy, identity, folder, write=run.process.first)
    else:
        directory = resolve(config.reference)
        identity["model_fingerprint"] = fingerprint(directory)
        identity.pop("adapter_fingerprint", None)
        found = reference_logps(
            everything, _other_model(run, directory, per_token), identity, folder, write=run.process.first
        )
    n = len(run.train.pairs)
    parts = {"train": slice(n), "held_out": slice(n, None)}
    return {k: found._replace(chosen=found.chosen[s], rejected=found.rejected[s]) for k, s in parts.items()}


def _other_model(run: Run, directory: Path, per_token: bool) -> Callable[[Sequence[TokenPair]], Logps]:
    """Log-probabilities under a reference directory, whose weights are gone when they have been computed."""
    decoder = decoder_config(read_config(directory), str(directory))
    if decoder.vocab_size != run.decoder.vocab_size:
        raise ChesError(
            f"--reference {directory}: its vocabulary has {decoder.vocab_size} tokens, the model's "
            f"{run.decoder.vocab_size}; policy and reference share one tokenizer"
        )
    abstract = abstract_decoder(decoder, dtype=jnp.dtype(run.config.dtype))
    threshold = decoder.rope.length_threshold if decoder.rope else None
    attend = choose_attention(run.config.attention, decoder, run.config.dtype).attend
    evaluate = Evaluator(abstract, run.mesh, run.layout._replace(length_threshold=threshold), attend)
    master = "float64" if run.config.dtype == "float64" else "float32"
    loaded: list[Any] = []

    def compute(pairs: Sequence[TokenPair]) -> Logps:
        if not loaded:
            loaded.append(load_parameters(directory, run.config.dtype, master, run.mesh))
        return (evaluate.tokens if per_token else evaluate)(loaded[0], pairs)

    return compute
