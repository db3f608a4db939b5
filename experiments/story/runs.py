"""The stages after the pairs: each is a command of the product, and what it measured."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from experiments.forecast.data import pairs_file
from experiments.forecast.runs import changes_by_row, influence_table, recipe, selected, short_rejected, tuned_model
from experiments.framework.item import Work
from experiments.framework.training import run_training
from experiments.story.config import ARMS, LOWER, StoryScale
from experiments.story.data import PROMPTS

CAUSES = 8
"""Pairs of highest influence that the story shows."""
SHOWN = ("verdict", "chosen", "rejected", "margin", "harm", "questions", "advice", "pairs", "caveats", "on_policy")
"""What is kept of a diagnosis."""


def rate(work: Work) -> float:
    """The learning rate of DPO."""
    return work.config.lrs[-1]


def dpo_run(work: Work) -> Path:
    """The directory of the run that the story is about."""
    return work.folder("dpo")


def train_dpo(work: Work) -> dict[str, Any]:
    """DPO on all pairs, every pair watched: the mean course of both sets, and the changes at the end."""
    from ches_jax.train.config import TrainConfig

    config: StoryScale = work.config
    found = run_training(
        TrainConfig(
            model=str(tuned_model(work)),
            eval_pairs=str(pairs_file(work, "held")),
            watch=config.train,
            eval_every=max(1, config.steps // 8),
            out=str(dpo_run(work)),
            **recipe(work, rate(work)),
        ),
        quiet=work.quiet,
    )
    steps = np.unique(found.log["step"]).tolist()
    sets = {}
    for which in ("train", "held_out"):
        courses = {side: found.course(which, f"dlogp_{side}").mean(1).tolist() for side in ("chosen", "rejected")}
        sets[which] = {**courses, "end": changes_by_row(found.of(which))}
    return {"steps": steps, "sets": sets}


def find_causes(work: Work) -> dict[str, Any]:
    """``ches influence``: how concentrated the causes are, and the pairs that push most, with their texts."""
    import pyarrow.parquet as pq

    from ches_jax.runs.directory import RUN, read_json
    from ches_jax.scores.table import INFLUENCE

    folder = influence_table(work, rate(work))
    table = pq.read_table(folder / INFLUENCE)
    lines = pairs_file(work, "train").read_text(encoding="utf-8").splitlines()
    values = table["influence"].to_numpy()
    order = np.argsort(-values, kind="stable")[:CAUSES]
    names = ("row_id", "index", "influence", "from_chosen", "from_rejected")
    worst = [{name: table[name][int(i)].as_py() for name in names} for i in order]
    texts = [json.loads(lines[one["index"]]) for one in worst]
    return {
        "concentration": read_json(folder / RUN)["concentration"],
        "push_down": float((values > 0).mean()),
        "worst": [{**one, **text} for one, text in zip(worst, texts, strict=True)],
    }


def write_texts(work: Work) -> dict[str, str]:
    """Both models answer the prompts."""
    from ches_jax.generate.config import GenerateConfig
    from ches_jax.generate.run import generate

    for name, model in (("before", tuned_model(work)), ("after", dpo_run(work) / "model")):
        out = work.folder(f"texts-{name}")
        shutil.rmtree(out, ignore_errors=True)
        prompts = str(pairs_file(work, PROMPTS))
        generate(
            GenerateConfig(model=str(model), prompts=prompts, max_new_tokens=work.config.text_tokens, out=str(out)),
            quiet=work.quiet,
        )
    return {}


def diagnose_run(work: Work) -> dict[str, Any]:
    """``ches diagnose`` of the run, with the texts of both models and the influences."""
    from ches_jax.displacement.config import DiagnoseConfig
    from ches_jax.displacement.diagnose import diagnose

    found = diagnose(
        DiagnoseConfig(
            path=str(dpo_run(work)),
            responses_before=str(work.folder("texts-before")),
            responses_after=str(work.folder("texts-after")),
            scores=(str(influence_table(work, rate(work))),),
            out=str(work.folder("diagnosis")),
        )
    ).to_json()
    return {name: found[name] for name in SHOWN if name in found}


def train_arm(work: Work, name: str, seed: int) -> dict[str, Any]:
    """Training with one thing changed; changes of the test pairs, and of plain DPO after every update."""
    from ches_jax.train.config import TrainConfig

    options = {**recipe(work, rate(work), seed), **ARMS[name].options}
    if ARMS[name].group == "pairs":
        options |= _left_out(work, name, seed)
    if name == "lower_rate":
        options["lr"] *= LOWER
    plain = name == "dpo"
    found = run_training(
        TrainConfig(
            model=str(tuned_model(work)),
            eval_pairs=str(pairs_file(work, "test")),
            watch=work.config.watched,
            eval_every=1 if plain else None,
            export=False,
            out=str(work.folder(f"arm-{name}-{seed}")),
            **options,
        ),
        quiet=work.quiet,
    )
    course = {side: found.course("held_out", f"dlogp_{side}").tolist() for side in ("chosen", "rejected")}
    trained = float(found.of("train")["dlogp_chosen"].mean())
    return {**changes_by_row(found.of("held_out")), "train_chosen": trained, **({"course": course} if plain else {})}


def _left_out(work: Work, name: str, seed: int) -> dict[str, Any]:
    """The pairs of an arm that leaves some out, or weighs them."""
    if name == "rejected_tokens":
        return {"pairs": str(short_rejected(work))}
    if name == "soft_influence":
        return {"pairs": str(selected(work, rate(work), "influence", "soft:0.5", seed)), "weights": "weight"}
    by, keep = ("influence", "highest") if name == "least_influence" else (name, "lowest")
    return {"pairs": str(selected(work, rate(work), by, f"{keep}:{1 - work.config.dropped:g}", seed))}
