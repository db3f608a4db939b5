"""Section 3 of the paper: one prompt, one pair, and where the probability goes."""

from functools import partial

from experiments.framework.item import Stage
from experiments.persona.config import SCALES, PersonaScale
from experiments.persona.numbers import summarise as summary
from experiments.persona.report import figures, rows, tables

TITLE = "Section 3, Tables 1 to 13: training on single prompts"

__all__ = ["SCALES", "TITLE", "figures", "rows", "stages", "summary", "tables"]


def stages(config: PersonaScale) -> list[Stage]:
    """Tuning, unembedding norms, prompt states, and a run per setting, contest and seed."""
    from experiments.persona import single

    found = [
        Stage("tuning", single.tune),
        Stage("directions", single.directions),
        Stage("prompts", single.prompt_states),
    ]
    for name, setting in config.settings.items():
        for contest in config.contests_of_model():
            for seed in config.seeds:
                run = partial(single.single, setting=setting, contest=contest, seed=seed)
                found.append(Stage(f"single/{name}/{contest.name}/{seed}", run))
    if config.phrases is not None:
        for kind, chosen, rejected in phrase_pairs(config):
            for seed in config.seeds:
                run = partial(single.longer, name=kind, chosen=chosen, rejected=rejected, seed=seed)
                found.append(Stage(f"longer/{kind}/{seed}", run))
    return found


def phrase_pairs(config: PersonaScale) -> list[tuple[str, str, str]]:
    """Kind, chosen and rejected of the runs on longer answers."""
    assert config.phrases is not None
    agree, disagree = config.phrases.agree, config.phrases.disagree
    return [
        ("opposite", agree[0], disagree[0]),
        ("similar-agree", agree[0], agree[1]),
        ("similar-disagree", disagree[0], disagree[1]),
    ]
