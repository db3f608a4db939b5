"""Section 5 of the paper: which pairs lower the likelihood of their preferred response."""

from functools import partial

from experiments.framework.item import Stage
from experiments.similarity import data, runs
from experiments.similarity.config import QUANTILES, SCALES, SimilarityScale
from experiments.similarity.report import figures, rows, tables
from experiments.similarity.summary import summarise

TITLE = "Section 5, Figures 2, 5-7, Tables 14-15: which pairs cause displacement"

__all__ = ["SCALES", "TITLE", "figures", "rows", "stages", "summarise", "tables"]


def stages(config: SimilarityScale) -> list[Stage]:
    """Pairs, SFT with --after-sft, scores, coefficients, and a run per objective, measure, quantile and seed."""
    steps = [
        Stage("pairs", data.write_pairs),
        *([Stage("sft", data.tune_on_pairs)] if config.after_sft else []),
        Stage("scores", data.score_pairs),
        Stage("windows", data.windows),
        Stage("coefficients", runs.coefficients),
    ]
    for name, objective in config.objectives.items():
        for measure in objective.measures:
            for quantile in QUANTILES:
                for seed in config.seeds:
                    run = partial(
                        runs.train_window, name=name, objective=objective, measure=measure, quantile=quantile, seed=seed
                    )
                    steps.append(Stage(runs.run_name(name, measure, quantile, seed), run))
    return steps
