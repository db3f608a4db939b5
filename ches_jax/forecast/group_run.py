"""``ches groups``: a model and rollouts to a run directory with a row for every response.

The frozen updates of all groups are computed once and kept; then the groups pass in chunks, so that a killed run goes
on where it was.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from ches_jax.data.audit import UNSCORABLE, Audit, dropped_record, require_clean
from ches_jax.data.packing import Candidates
from ches_jax.data.rollouts import ROLLOUTS, Group, group_item, read_groups, require_known
from ches_jax.data.unpaired import with_own_flags
from ches_jax.distributed.mesh import local_shards, make_mesh, row_shards
from ches_jax.distributed.processes import Process, start_run
from ches_jax.errors import ChesError, DataError, RunError, require_config
from ches_jax.forecast.advantages import advantages, coefficients
from ches_jax.forecast.config import GroupsConfig
from ches_jax.forecast.frozen import FrozenStep, FrozenSteps, not_finite
from ches_jax.forecast.group_summary import summarise
from ches_jax.forecast.groups import GroupRates, HeadKernel, nthr, weighted
from ches_jax.forecast.metric import Metric, Tree
from ches_jax.forecast.model import open_model
from ches_jax.forecast.passes import Pull, Push, Rows
from ches_jax.forecast.stages import Clock, chunk, kept, whole, write_table
from ches_jax.forecast.together import begin, of_first
from ches_jax.inputs import ModelFiles, Opener
from ches_jax.models.decoder import abstract_parameters
from ches_jax.options import require_dtype, require_positive
from ches_jax.runs import chunks
from ches_jax.runs.directory import as_dict, device_name, new_name, write_summary
from ches_jax.runs.files import read_parquet
from ches_jax.runs.lock import RunLock
from ches_jax.runs.progress import say
from ches_jax.runs.store import output_place
from ches_jax.train.data.batches import Layout, standard_row
from ches_jax.train.data.split import Plan
from ches_jax.train.optimizer import make_schedule, optimizer_hyper
from ches_jax.train.policy import open_lora, require_lora_options
from ches_jax.train.state import require_divides

GROUPS = "groups.parquet"
"""The table of ``ches groups``."""
CHUNK = 16
"""Groups between two points from which --resume continues."""
SCHEMA = pa.schema(
    {
        "group": pa.int64(),
        "response": pa.int32(),
        "row_id": pa.string(),
        "index": pa.int64(),
        "reward": pa.float64(),
        "advantage": pa.float64(),
        "coefficient": pa.float64(),
        "tokens": pa.int32(),
        "logp": pa.float64(),
        "forecast": pa.float64(),
        "rate": pa.float64(),
        "rate_own": pa.float64(),
        "rate_winners": pa.float64(),
        "rate_losers": pa.float64(),
        "head_rate": pa.float64(),
        "nthr": pa.float64(),
        "falls": pa.bool_(),
    }
)
"""Columns of ``groups.parquet``, a row for each response. ``group``: number of the group, ``response``: of the response
in it, from 0; ``index``: its row of the data. ``forecast``: nats, in the run that is forecast, by all groups. ``rate``
and its parts, ``head_rate``: under gradient flow on its own group's loss. ``nthr``: of losers. ``falls``: the response
won and its rate is negative (lazy likelihood displacement)."""


@dataclass(frozen=True)
class Responses:
    """The groups of a run, as items with coefficients."""

    groups: list[Group]
    items: list[Candidates]
    advantages: list[np.ndarray]
    coefficients: list[np.ndarray]
    known: str
    """What the advantages come from: ``advantage`` or ``reward``."""
    dropped: list[dict[str, Any]]
    rows: int


def groups(config: GroupsConfig, *, resume: bool = False, quiet: bool = False, other_versions: bool = False) -> Path:
    """What a policy-gradient run would do to every response of groups; returns the run directory.

    Args:
      config: the groups of responses, and the run they would make.
      resume: continue the run that ``config.out`` holds.
      quiet: no progress.
      other_versions: continue although packages have other versions than at the start.

    Raises:
      ChesError: any input that is not fit, before anything is written; a gradient that is not finite.

    >>> import json; import pyarrow.parquet as pq; from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     rows = [{"prompt": "1+1? ", "response": str(n), "score": n == 2} for n in (1, 2, 3)]
    ...     _ = Path(f"{folder}/1.jsonl").write_text("".join(json.dumps(r) + chr(10) for r in rows))
    ...     out = groups(GroupsConfig(groups=f"{folder}/1.jsonl", out=f"{folder}/run", mesh="data=1"), quiet=True)
    ...     pq.read_table(out / "groups.parquet")["advantage"].to_numpy().round(2).tolist()
    [-0.58, 1.15, -0.58]
    """
    require_config("groups", config, GroupsConfig)
    require_dtype("dtype", config.dtype)
    require_positive(
        {
            n.replace("_", "-"): getattr(config, n)
            for n in ("lr", "batch_size", "steps", "limit", "clip", "batch_tokens", "lora_rank")
        }
    )
    require_lora_options(config)
    process = start_run(config.distributed, config.out)
    out = output_place(config.out or new_name(Path("runs"), "groups"))
    with jax.enable_x64(config.dtype == "float64"), RunLock(out) as lock:
        _groups(config, lock, process, resume, quiet or not process.first, other_versions)
        return of_first(out, process)


def _groups(
    config: GroupsConfig, lock: RunLock, process: Process, resume: bool, quiet: bool, other_versions: bool
) -> None:
    out, opener, clock = lock.out, Opener(), Clock(quiet)
    with process.sharing_errors():
        if process.first:
            lock.require_free()
        model, mesh = opener.model(config.model), make_mesh(config.mesh, everywhere=True)
        lora = open_lora(config, model, opener)
        found = read_responses(config, model, opener)
        plan = plan_of(config, len(found.items))
        metric = Metric(config.optimizer, config.optimizer_args, make_schedule("constant", config.lr, plan.total, 0))
        require_divides(abstract_parameters(model.decoder), mesh, row_shards(mesh))
    identity = {"config": as_dict(config), **opener.identity()}
    if begin(lock, "groups", identity, mesh, process, resume=resume, other_versions=other_versions):
        return
    if found.dropped and process.first:
        chunks.write_lines(out / chunks.DROPPED, found.dropped)
    say(f"loading the model ({model.directory})", quiet=quiet)
    policy, params = open_model(model, mesh, dtype=config.dtype, remat=config.remat, lora=lora, seed=config.seed)
    rows, together = (rows_of(config, model, mesh, found.items, one) for one in (False, True))
    alone = rows_of(
        config, model, mesh, [Candidates(i.prompt, (r,), 1) for i in found.items for r in i.responses], True
    )

    def compute() -> tuple[Tree, dict[str, Any]]:
        with clock.stage("frozen updates", min(plan.total, plan.steps_per_epoch)) as bar:
            moved = group_updates(found, plan, metric, Pull(policy, rows), params, config.clip, bar)
        return moved, {}

    direction, _ = kept(out, mesh, compute, process)
    push, rates, kernel = Push(policy, rows), GroupRates(policy, alone, together), HeadKernel(policy, rows)

    def table(members: Sequence[int]) -> pa.Table:
        items = [found.items[g] for g in members]
        forecast, kernels = push(params, direction, items), kernel(params, items)
        of_groups = [
            group_columns(found, g, config, forecast.logps[k], forecast.first[k], rates(params, items[k],
                          found.coefficients[g]), kernels[k])
            for k, g in enumerate(members)
        ]  # fmt: skip
        return pa.concat_tables([pa.table(one, schema=SCHEMA) for one in of_groups])

    parts = [range(i, min(i + CHUNK, len(found.items))) for i in range(0, len(found.items), CHUNK)]
    with clock.stage("groups", len(found.items)) as bar:
        for number, members in enumerate(parts):
            chunk(out, number, lambda: table(members), write_table, process)  # noqa: B023
            bar.update(len(members))
    files = whole(out, len(parts), opener.require_unchanged, process)
    with process.sharing_errors():
        if process.first:
            _finish(config, out, found, files, clock, mesh, plan, process)


def _finish(
    config: GroupsConfig, out: Path, found: Responses, files: Sequence[Path], clock: Clock, mesh: Mesh, plan: Plan,
    process: Process,
) -> None:  # fmt: skip
    """Joins the parts, and writes ``run.json``."""
    every = pa.concat_tables([read_parquet(file, RunError, "a part of this run", SCHEMA) for file in files])
    write_table(out / GROUPS, every.replace_schema_metadata({b"ches_jax": b"groups"}))
    write_summary(
        out,
        {
            "status": "done",
            "optimizer": {"name": config.optimizer, **optimizer_hyper(config.optimizer, config.optimizer_args)},
            "device": device_name(),
            "mesh": dict(mesh.shape),
            "processes": process.count,
            "counts": {
                "rows": found.rows, "groups": len(found.items), "responses": every.num_rows,
                "dropped": len(found.dropped), "updates": plan.total,
            },
            "summary": summarise(every, config, found.known, plan.total),
            "times": clock.seconds,
            "work": clock.work.facts(),
        },
    )  # fmt: skip
    chunks.clear(out)


def read_responses(config: GroupsConfig, model: ModelFiles, opener: Opener) -> Responses:
    """Groups, tokenised and audited, with the coefficients of their responses.

    Raises:
      ChesError: rows that cannot be read or are not fit; responses without rewards and advantages; no group whose
        rewards differ.
    """
    source = opener.rows(config.groups, config.split, config.columns, ROLLOUTS, "groups")
    opener.tokenizer(model, config.template)
    tokenizer = model.pair_tokenizer(
        max_length=config.max_length, eos=config.eos, template=config.template, template_args=config.template_args
    )
    records = [r for r in source if config.limit is None or r.index < config.limit]
    try:
        every = read_groups(records)
    except DataError as error:
        raise DataError(f"{source.name}, {error}") from None
    known = require_known(every, source.name)
    audit = Audit(tokenizer.tokenizer.bos_token_id, tokenizer.tokenizer.eos_token_id)  # type: ignore[arg-type]
    kept_groups, items, dropped = [], [], []
    for group in every:
        pairs = [with_own_flags(p) for p in tokenizer([r.record for r in group.rollouts])]
        audit.extend(pairs)
        bad = [p for p in pairs if (p.flags if config.on_bad_row == "drop" else not UNSCORABLE.isdisjoint(p.flags))]
        dropped += [dropped_record(p) for p in bad]
        if not bad:
            kept_groups.append(group)
            items.append(group_item(pairs))
    if config.on_bad_row == "error":
        require_clean(audit, source.name)
    if not items:
        raise DataError(f"{source.name}: no group is left ({len(every)} read, all with a response that is not fit)")
    won = [
        advantages(numbers, config.objective) if known == "reward" else numbers
        for group in kept_groups
        if (numbers := group.numbers(known)) is not None
    ]
    lengths = [np.array([len(r.targets(config.eos)) for r in item.responses]) for item in items]
    weights = [coefficients(a, n, config.objective) for a, n in zip(won, lengths, strict=True)]
    if not any(w.any() for w in weights):
        raise ChesError(
            f"{source.name}: {known}s are equal within each of its {len(items)} groups, so that no response wins and "
            "nothing would be learned; a group is the responses to one prompt (or of one uid)"
        )
    return Responses(kept_groups, items, won, weights, known, dropped, len(records))


def plan_of(config: GroupsConfig, count: int) -> Plan:
    """Which groups make which update; the order of pairs in ``ches train``."""
    total = config.steps if config.steps is not None else -(-count // config.batch_size)
    return Plan(count, config.batch_size, 1, total, config.seed)


def rows_of(config: GroupsConfig, model: ModelFiles, mesh: Mesh, items: Sequence[Candidates], one: bool) -> Rows:
    """How items become packed rows: in batches of ``--batch-tokens``, or of as few rows as there can be for ``one``."""
    threshold = model.decoder.rope.length_threshold if model.decoder.rope else None
    layout = Layout(
        standard_row(items, threshold), row_shards(mesh), config.eos, threshold, local_shards=local_shards(mesh)
    )
    return Rows(layout, mesh, layout.row_tokens if one else config.batch_tokens, items)


def group_updates(
    found: Responses, plan: Plan, metric: Metric, pull: Pull, params: Tree, clip: float | None, bar: Any
) -> Tree:
    """The sum of all updates of a run over groups, with every gradient taken at the start.

    Raises:
      ChesError: a gradient that is not finite.
    """
    first = min(plan.total, plan.steps_per_epoch)
    members = [np.concatenate(plan.update(t)) for t in range(first)]
    seen = sum(map(len, members))
    steps = FrozenSteps(FrozenStep(metric, clip), params, [len(m) / seen for m in members])
    for t, mine in enumerate(members):
        items = [found.items[i] for i in mine]
        gradient = pull(params, items, weighted([found.coefficients[i] for i in mine], len(mine)))
        try:
            steps.add(gradient)
        except FloatingPointError:
            raise not_finite(t, f"groups of {found.groups[mine[0]].where} ...") from None
        bar.update(1)
    return steps.moved_after(plan.total)


def group_columns(
    found: Responses, g: int, config: GroupsConfig, logps: np.ndarray, forecast: np.ndarray, rates: Any,
    kernel: np.ndarray,
) -> dict[str, Any]:  # fmt: skip
    """The columns of the table for one group.

    Raises:
      ChesError: a number that is not finite.
    """
    group, item, c = found.groups[g], found.items[g], found.coefficients[g]
    if not (np.isfinite(forecast).all() and np.isfinite(rates.total).all() and np.isfinite(kernel).all()):
        raise ChesError(f"group of {group.where}: its forecast is not finite; try --dtype float32")
    count = len(c)
    hidden_reward = nthr(kernel, c)
    return {
        "group": [g] * count,
        "response": range(count),
        "row_id": [r.record.row_id for r in group.rollouts],
        "index": [r.record.index for r in group.rollouts],
        "reward": [r.reward for r in group.rollouts],
        "advantage": found.advantages[g],
        "coefficient": c,
        "tokens": [len(r.targets(config.eos)) for r in item.responses],
        "logp": logps,
        "forecast": forecast,
        "rate": rates.total, "rate_own": rates.own, "rate_winners": rates.winners, "rate_losers": rates.losers,
        "head_rate": kernel @ c,
        "nthr": [None if np.isnan(v) else v for v in hidden_reward],
        "falls": (c > 0) & (rates.total < 0),
    }  # fmt: skip
