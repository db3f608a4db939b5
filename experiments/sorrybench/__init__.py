"""Section 6 of the paper: does preference training on a model's own refusals make it refuse less?"""

from functools import partial

from experiments.framework.item import Stage
from experiments.sorrybench import data, runs
from experiments.sorrybench.config import SCALES, SorryScale
from experiments.sorrybench.report import figures, rows, tables
from experiments.sorrybench.summary import summarise

TITLE = "Section 6, Figures 3, 4 and 8, Tables 16 to 18: refusals that are unlearned"

NOTE = (
    "Refusals in `small` and `small-refusing` are recognised by the rule that ships, which needs a refusing verb "
    "(`tiny` has the phrases of its own world). The rule of version 0.2.0, by which `small` was judged before, took "
    "apologies too: of 1,305 texts that hh-tiny drew for these 435 requests it counted 13.5% as refusals and the "
    "present one 10.1%; 74 are of both, 102 of the former alone (such as \"I'm sorry, I don't know what you mean\"), "
    "58 of the present one alone."
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
