"""Section 3 of the paper: one prompt, one pair, and where the probability goes."""

from functools import partial

from experiments.framework.item import Stage
from experiments.persona import runs
from experiments.persona.config import SCALES, PersonaScale
from experiments.persona.report import figures, rows, tables
from experiments.persona.summary import summarise

TITLE = "Section 3, Tables 1 to 13: training on single prompts"

__all__ = ["SCALES", "TITLE", "figures", "rows", "stages", "summarise", "tables"]


def stages(config: PersonaScale) -> list[Stage]:
    """Tuning, unembedding norms, prompt states, and a run per setting, contest and seed."""
    steps = [
        Stage("tuning", runs.tune),
        Stage("directions", runs.directions),
        Stage("prompts", runs.prompt_states),
    ]
    for name, setting in config.settings.items():
        for contest in config.contests_of_model():
            for seed in config.seeds:
                run = partial(runs.single, setting=setting, contest=contest, seed=seed)
                steps.append(Stage(f"single/{name}/{contest.name}/{seed}", run))
    if config.phrases is not None:
        for kind, chosen, rejected in config.phrases.pairs():
            for seed in config.seeds:
                run = partial(runs.longer, name=kind, chosen=chosen, rejected=rejected, seed=seed)
                steps.append(Stage(f"longer/{kind}/{seed}", run))
    return steps
