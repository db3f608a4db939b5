"""A run whose chosen responses fall by many nats: why, because of which pairs, and what helps. Beyond the paper."""

from functools import partial

from experiments.forecast.runs import score_pairs, tune
from experiments.framework.item import Stage
from experiments.story import data, runs
from experiments.story.config import SCALES, StoryScale
from experiments.story.report import figures, page, rows, tables
from experiments.story.summary import summarise

TITLE = "Beyond the paper: the story of a run whose chosen responses fall, and what helps"

__all__ = ["SCALES", "TITLE", "figures", "page", "rows", "stages", "summarise", "tables"]


def stages(config: StoryScale) -> list[Stage]:
    """Pairs, SFT, DPO, its diagnosis, its causes, and every arm."""
    steps = [
        Stage("pairs", data.write_pairs),
        Stage("sft", tune),
        Stage("dpo", runs.train_dpo),
        Stage("scores", score_pairs),
        Stage("causes", runs.find_causes),
        Stage("texts", runs.write_texts),
        Stage("diagnosis", runs.diagnose_run),
    ]
    return steps + [
        Stage(f"arm/{name}/{seed}", partial(runs.train_arm, name=name, seed=seed))
        for seed in config.orders
        for name in config.arms
    ]
