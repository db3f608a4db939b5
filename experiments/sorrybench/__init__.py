"""Section 6 of the paper: does preference training on a model's own refusals make it refuse less?"""

from functools import partial

from experiments.framework.item import Stage
from experiments.sorrybench.config import SCALES, SorryScale
from experiments.sorrybench.measure import summarise as summary
from experiments.sorrybench.report import figures, rows, tables

TITLE = "Section 6, Figures 3, 4 and 8, Tables 16 to 18: refusals that are unlearned"

__all__ = ["SCALES", "TITLE", "figures", "rows", "stages", "summary", "tables"]


def stages(config: SorryScale) -> list[Stage]:
    """Requests, two responses to each, judgments, pairs, scores, learning rates, and a run per method and seed."""
    from experiments.sorrybench import data, runs

    found = [
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
                found.append(Stage(f"try/{pairs}/{lr:g}/{seed}", run))
        found.append(Stage(f"rate/{pairs}", partial(runs.choose_rate, pairs=pairs)))
    for seed in config.seeds:
        found.append(Stage(f"initial/{seed}", partial(runs.initial, seed=seed)))
    for name, method in config.methods.items():
        if method.pairs == "gold" and config.gold is None:
            continue
        for seed in config.seeds:
            found.append(Stage(f"train/{name}/{seed}", partial(runs.train_method, name=name, method=method, seed=seed)))
    return found
