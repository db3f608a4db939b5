"""Section 5 of the paper: which pairs lower the likelihood of their preferred response."""

from functools import partial

from experiments.framework.item import Stage
from experiments.similarity.config import QUANTILES, SCALES, SimilarityScale
from experiments.similarity.measure import summarise as summary
from experiments.similarity.report import figures, rows, tables

TITLE = "Section 5, Figures 2, 5-7, Tables 14-15: which pairs cause displacement"

__all__ = ["SCALES", "TITLE", "figures", "rows", "stages", "summary", "tables"]


def stages(config: SimilarityScale) -> list[Stage]:
    """Pairs, scores, coefficients, and a run per objective, measure, quantile and seed."""
    from experiments.similarity import runs

    found = [
        Stage("pairs", runs.write_pairs),
        Stage("scores", runs.score_pairs),
        Stage("windows", runs.windows),
        Stage("coefficients", runs.coefficients),
    ]
    for name, objective in config.objectives.items():
        for measure in objective.measures:
            for quantile in QUANTILES:
                for seed in config.seeds:
                    run = partial(
                        runs.train_window, name=name, objective=objective, measure=measure, quantile=quantile, seed=seed
                    )
                    found.append(Stage(run_name(name, measure, quantile, seed), run))
    return found


def run_name(objective: str, measure: str, quantile: float, seed: int) -> str:
    """Name of the stage of one training run."""
    return f"train/{objective}/{measure}/{quantile:g}/{seed}"
