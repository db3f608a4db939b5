"""Section 6 of the paper: does preference training on a model's own refusals make it refuse less?"""

from functools import partial

from experiments.framework.item import Stage
from experiments.sorrybench import data, runs
from experiments.sorrybench.config import SCALES, SorryScale
from experiments.sorrybench.report import figures, rows, tables
from experiments.sorrybench.summary import summarise

TITLE = "Section 6, Figures 3, 4 and 8, Tables 16 to 18: refusals that are unlearned"

NOTE = (
    "Refusals in these results were recognised by the rule of version 0.2.0; by the rule that ships now, some answers "
    "would be judged otherwise (`docs/judging.md` has both rules beside labelled answers). The texts were not kept, so "
    "the results cannot be judged again without a new run."
)

__all__ = ["NOTE", "SCALES", "TITLE", "figures", "rows", "stages", "summarise", "tables"]


def stages(config: SorryScale) -> list[Stage]:
    """Requests, two responses to each, judgments, pairs, scores, learning rates, and a run per method and seed."""
    steps = [
        Stage("requests", data.write_requests),
        Stage("responses", data.sample_responses),
        Stage("judgments", data.judge_responses),
        Stage("pairs", data.write_pairs),
        Stage("scores", runs.score_pairs),
        Stage("subsets", runs.subsets),
    ]
    for pairs in ("generated", "gold"):
        if pairs == "gold" and config.gold is None:
            continue
        rates = runs.rates_of(config, pairs)
        for lr in rates if len(rates) > 1 else ():
            for seed in config.seeds[: config.rate_seeds]:
                run = partial(runs.try_rate, pairs=pairs, lr=lr, seed=seed)
                steps.append(Stage(f"try/{pairs}/{lr:g}/{seed}", run))
        steps.append(Stage(f"rate/{pairs}", partial(runs.choose_rate, pairs=pairs)))
    for seed in config.seeds:
        steps.append(Stage(f"initial/{seed}", partial(runs.initial, seed=seed)))
    for name, method in config.methods.items():
        if method.pairs == "gold" and config.gold is None:
            continue
        for seed in config.seeds:
            steps.append(Stage(f"train/{name}/{seed}", partial(runs.train_method, name=name, method=method, seed=seed)))
    return steps
