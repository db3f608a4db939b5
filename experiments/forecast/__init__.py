"""Before training: which chosen responses will fall, by how much, and because of which pairs. Beyond the paper."""

from functools import partial

from experiments.forecast import data, runs
from experiments.forecast.config import SCALES, ForecastScale
from experiments.forecast.report import figures, rows, tables
from experiments.forecast.summary import summarise
from experiments.framework.item import Stage

TITLE = "Beyond the paper: forecasts of displacement after SFT, and the pairs that cause it"

__all__ = ["SCALES", "TITLE", "figures", "rows", "stages", "summarise", "tables"]


def stages(config: ForecastScale) -> list[Stage]:
    """Pairs, SFT, scores, forecasts, costs, real runs from before and after SFT, filters, other losses."""
    steps = [
        Stage("pairs", data.write_pairs),
        Stage("sft", runs.tune),
        Stage("scores", runs.score_pairs),
        Stage("costs", runs.costs),
    ]
    for lr in config.lrs:
        steps += [Stage(f"forecast/{lr:g}", partial(runs.forecast_pairs, lr=lr))]
        steps += [
            Stage(runs.run_name("tuned", lr, seed), partial(runs.train_pairs, lr=lr, seed=seed, tuned=True))
            for seed in config.seeds
        ]
    lr = config.lrs[-1]
    steps += [Stage(runs.run_name("untuned", lr, 0), partial(runs.train_pairs, lr=lr, seed=0, tuned=False))]
    for seed in config.seeds if config.filters else ():
        steps += [Stage(f"pool/{seed}", partial(runs.open_pool, lr=lr, seed=seed))]
        steps += [
            Stage(f"filter/{name}/{seed}", partial(runs.train_selected, name=name, lr=lr, seed=seed))
            for name in config.filters
        ]
    for name in config.variants:
        steps += [Stage(f"forecast/{name}", partial(runs.forecast_pairs, lr=lr, order=1, variant=name))]
        steps += [
            Stage(runs.run_name(name, lr, seed), partial(runs.train_pairs, lr=lr, seed=seed, tuned=True, variant=name))
            for seed in config.seeds
        ]
    return steps
