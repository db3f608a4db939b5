"""The stages after the pairs: each is a command of the product, and what it measured by ``row_id``."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from experiments.forecast.config import VARIANTS, ForecastScale
from experiments.forecast.data import pairs_file, write_pool
from experiments.framework.item import Work
from experiments.framework.training import run_training

SCORES = (
    "index",
    "ches",
    "ln_ches",
    "head_score",
    "edit_distance",
    "chosen_tokens",
    "rejected_tokens",
    "logp_chosen",
)
Columns = dict[str, list[Any]]


def run_name(start: str, lr: float, seed: int) -> str:
    """Name of the stage of a real run."""
    return f"train/{start}/{lr:g}/{seed}"


def tuned_model(work: Work) -> Path:
    """Where SFT leaves its weights."""
    return work.folder("sft") / "model"


def tune(work: Work) -> dict[str, Any]:
    """SFT on the chosen responses; nats a token of DPO's pairs and of held-out ones, before and after."""
    from ches_jax.train.config import TrainConfig

    config: ForecastScale = work.config
    trained = run_training(
        TrainConfig(
            model=str(config.model),
            pairs=str(pairs_file(work, "sft")),
            eval_pairs=str(pairs_file(work, "held")),
            loss="sft",
            optimizer="adamw",
            lr=config.sft_lr,
            schedule="cosine",
            warmup=8,
            epochs=config.sft_epochs,
            batch_size=config.batch_size,
            on_bad_row="drop",
            mesh=config.mesh,
            out=str(work.folder("sft")),
        ),
        quiet=work.quiet,
    )
    per_token = {}
    for which in ("train", "held_out"):
        for when, step in (("before", 0), ("after", None)):
            rows = trained.of(which, step)
            per_token[f"{which}_{when}"] = float((rows["logp_chosen"] / rows["chosen_tokens"]).mean())
    return {"updates": int(trained.log["step"].max()), "nats_per_token": per_token}


def score_pairs(work: Work) -> dict[str, Columns]:
    """Own-pair scores under the tuned model, of DPO's pairs and of held-out ones."""
    from ches_jax.scores.config import ScoreConfig
    from ches_jax.scores.run import score
    from ches_jax.scores.table import read_table

    tables = {}
    for part in ("train", "held"):
        out = work.folder(f"scores-{part}")
        shutil.rmtree(out, ignore_errors=True)
        options = {"pairs": str(pairs_file(work, part)), "on_bad_row": "drop", "mesh": work.config.mesh}
        score(
            ScoreConfig(model=str(tuned_model(work)), by="head_score", logps=True, out=str(out), **options),
            quiet=work.quiet,
        )
        table = read_table(out)[0]
        tables[part] = {n: table[n].to_pylist() for n in ("row_id", *SCORES)}
    return tables


def recipe(work: Work, lr: float, seed: int = 0, variant: str | None = None) -> dict[str, Any]:
    """The options of DPO, or of a variant of it, that forecast, influence and training share."""
    config: ForecastScale = work.config
    return {
        "pairs": str(pairs_file(work, "train")),
        "loss": "dpo",
        "optimizer": "rmsprop",
        "lr": lr,
        "seed": seed,
        "batch_size": config.batch_size,
        "steps": config.steps,
        "on_bad_row": "drop",
        "mesh": config.mesh,
        **(VARIANTS[variant].options if variant else {}),
    }


def forecast_pairs(work: Work, lr: float, order: int = 2, variant: str | None = None) -> dict[str, Any]:
    """``ches forecast --order N --pilot M`` of the tuned model: numbers by row, and what its summary says."""
    import pyarrow.parquet as pq

    from ches_jax.forecast.config import ForecastConfig
    from ches_jax.forecast.run import forecast
    from ches_jax.runs.directory import RUN, read_json
    from ches_jax.scores.table import FORECAST

    out = work.folder(f"forecast-{variant or f'{lr:g}'}")
    shutil.rmtree(out, ignore_errors=True)
    probes = str(pairs_file(work, "held"))
    options = {"order": order, "pilot": work.config.pilot, "probes": probes, "out": str(out)}
    options |= recipe(work, lr, variant=variant)
    forecast(ForecastConfig(model=str(tuned_model(work)), **options), quiet=work.quiet)
    table = pq.read_table(out / FORECAST)
    names = ("row_id", "set", "first_chosen", "forecast_chosen", "pilot_chosen")
    return {"columns": {n: table[n].to_pylist() for n in names}, "summary": read_json(out / RUN)["summary"]}


def costs(work: Work) -> dict[str, Any]:
    """CPU seconds of each part, compiled, over one forward pass of the training pairs (both responses).

    That pass has dense attention, as the one has that the goals were set by; ``forward_in_blocks`` is the fastest here.
    """
    from ches_jax.forecast.config import ForecastConfig, training
    from ches_jax.forecast.influence import influence_direction
    from ches_jax.forecast.passes import Measure
    from ches_jax.forecast.setup import Passes
    from ches_jax.models.attention.dense import query_chunked
    from ches_jax.train.setup import prepare

    options = {"probes": str(pairs_file(work, "probes")), **recipe(work, work.config.lrs[0])}
    out = str(work.folder("costs"))
    passes = Passes.of(prepare(training(ForecastConfig(model=str(tuned_model(work)), **options), out)))
    train, probes = passes.run.pairs.train, passes.run.pairs.held_out
    dense, blocks = (
        Measure(model, passes.rows) for model in (replace(passes.model, attend=query_chunked), passes.model)
    )
    direction, start = passes.frozen_updates()
    first, second = passes.push(direction), passes.push(direction, 2)
    parts: dict[str, Callable[[], Any]] = {
        "forward": lambda: dense(passes.params, list(train)),
        "forward_in_blocks": lambda: blocks(passes.params, list(train)),
        "frozen_updates": passes.frozen_updates,
        "frozen_updates_by_side": partial(passes.frozen_updates, by_side=True),
        "push": lambda: first(train),
        "push_twice": lambda: second(train),
        "gradient_of_probes": lambda: influence_direction(passes, start, probes),
    }
    seconds = {name: _cpu(part) for name, part in parts.items()}
    unit = seconds["forward"]
    ratios = {name: value / unit for name, value in seconds.items()}
    forecast = ratios["frozen_updates_by_side"] + ratios["push"]
    influence = ratios["frozen_updates"] + ratios["gradient_of_probes"] + ratios["push"]
    return {"cpu_seconds_forward": unit, "in_forwards": {**ratios, "forecast": forecast, "influence": influence}}


def _cpu(part: Callable[[], Any], times: int = 3) -> float:
    """The least CPU seconds of a few calls, after one that compiles."""
    import jax

    jax.block_until_ready(part())
    spent = []
    for _ in range(times):
        begun = time.process_time()
        jax.block_until_ready(part())
        spent.append(time.process_time() - begun)
    return min(spent)


def train_pairs(work: Work, lr: float, seed: int, tuned: bool, variant: str | None = None) -> dict[str, Any]:
    """DPO, or a variant, from the tuned model or from the model as it is; the changes of every pair."""
    from ches_jax.train.config import TrainConfig

    model = str(tuned_model(work)) if tuned else str(work.config.model)
    trained = run_training(
        TrainConfig(
            model=model,
            eval_pairs=str(pairs_file(work, "held")),
            watch=work.config.train,
            export=False,
            out=str(work.folder(run_name(variant or ("tuned" if tuned else "untuned"), lr, seed))),
            **recipe(work, lr, seed, variant),
        ),
        quiet=work.quiet,
    )
    return {which: changes_by_row(trained.of(which)) for which in ("train", "held_out")}


def changes_by_row(rows: dict[str, np.ndarray]) -> Columns:
    return {n: rows[n].tolist() for n in ("row_id", "dlogp_chosen", "dlogp_rejected")}


def open_pool(work: Work, lr: float, seed: int) -> dict[str, Any]:
    """Draw the pool of a seed; its own-pair scores and its influences, which its filters read."""
    from ches_jax.forecast.config import InfluenceConfig
    from ches_jax.forecast.run import influence
    from ches_jax.runs.directory import RUN, read_json
    from ches_jax.scores.config import ScoreConfig
    from ches_jax.scores.run import score

    pool = write_pool(work, seed)
    scores, influences = _tables(work, seed)
    for out in (scores, influences):
        shutil.rmtree(out, ignore_errors=True)
    model = str(tuned_model(work))
    options: dict[str, Any] = recipe(work, lr, seed) | {"pairs": str(pool)}
    shared = {n: options[n] for n in ("pairs", "on_bad_row", "mesh")}
    score(ScoreConfig(model=model, by="head_score", out=str(scores), **shared), quiet=work.quiet)
    probes = str(pairs_file(work, "probes"))
    influence(InfluenceConfig(model=model, probes=probes, out=str(influences), **options), quiet=work.quiet)
    return {"concentration": read_json(influences / RUN)["concentration"]}


def _tables(work: Work, seed: int) -> tuple[Path, Path]:
    return work.folder(f"scores-pool-{seed}"), work.folder(f"influence-pool-{seed}")


FILTER_RULES = {
    "influence": ("influence", "lowest"), "ln_ches": ("ln_ches", "lowest"), "ches": ("ches", "lowest"),
    "head_score": ("head_score", "lowest"), "rejected_tokens": ("column:rejected_tokens", "lowest"),
    "random": ("random", "lowest"), "least_influence": ("influence", "highest"),
}  # fmt: skip
"""Filters that leave pairs out: the score, and which end of it is kept."""


def train_selected(work: Work, name: str, lr: float, seed: int) -> dict[str, Any]:
    """DPO on what a filter keeps of a seed's pool, as many updates as on all; the changes of the test pairs."""
    from ches_jax.train.config import TrainConfig

    options: dict[str, Any] = recipe(work, lr, seed) | {"pairs": str(pairs_file(work, f"pool-{seed}"))}
    scores, influences = _tables(work, seed)
    if name in FILTER_RULES:
        by, end = FILTER_RULES[name]
        table, keep = influences if by == "influence" else scores, f"{end}:{1 - work.config.dropped:g}"
        options |= {"pairs": str(selected_from(work, table, by, keep, seed))}
    elif name == "soft_influence":
        kept = selected_from(work, influences, "influence", "soft:0.5", seed)
        options |= {"pairs": str(kept), "weights": "weight"}
    elif name == "with_sft":
        options |= {"sft": 1.0}
    out = str(work.folder(f"filter-{name}-{seed}"))
    trained = run_training(
        TrainConfig(
            model=str(tuned_model(work)),
            eval_pairs=str(pairs_file(work, "test")),
            watch=1,
            export=False,
            out=out,
            **options,
        ),
        quiet=work.quiet,
    )
    return changes_by_row(trained.of("held_out"))


def influence_table(work: Work, lr: float) -> Path:
    """The directory of ``ches influence`` of the probes, made once."""
    from ches_jax.forecast.config import InfluenceConfig
    from ches_jax.forecast.run import influence
    from ches_jax.runs.directory import RUN

    out = work.folder("influence")
    if not (out / RUN).exists():
        shutil.rmtree(out, ignore_errors=True)
        options = {"probes": str(pairs_file(work, "probes")), "out": str(out), **recipe(work, lr)}
        influence(InfluenceConfig(model=str(tuned_model(work)), **options), quiet=work.quiet)
    return out


def selected(work: Work, lr: float, by: str, keep: str, seed: int) -> Path:
    """``selected_from`` the table of all training pairs that has the score."""
    table = influence_table(work, lr) if by == "influence" else work.folder("scores-train")
    return selected_from(work, table, by, keep, seed)


def selected_from(work: Work, table: Path, by: str, keep: str, seed: int) -> Path:
    """The pairs that ``ches select`` keeps of a table of scores or influences."""
    from ches_jax.select.config import SelectConfig
    from ches_jax.select.run import select

    out = work.folder(f"selected-{by}-{keep}-{seed}".replace(":", "-"))
    shutil.rmtree(out, ignore_errors=True)
    select(SelectConfig(scores=table, by=by, keep=keep, seed=seed, out=out))
    return out / "pairs.jsonl"


def short_rejected(work: Work) -> Path:
    """The pairs with the shortest rejected responses: the control of length."""
    from experiments.framework.training import write_rows

    scores = work.value("scores")["train"]
    kept = round((1 - work.config.dropped) * len(scores["row_id"]))
    order = np.argsort(np.array(scores["rejected_tokens"]), kind="stable")[:kept]
    rows = [json.loads(line) for line in pairs_file(work, "train").read_text(encoding="utf-8").splitlines()]
    return write_rows(work.folder("short-rejected.jsonl"), [rows[i] for i in sorted(scores["index"][k] for k in order)])
