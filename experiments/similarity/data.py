"""The stages up to the runs: pairs as text, their scores, and the windows of pairs that the runs train on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax.errors import DataError
from experiments.framework.item import Work
from experiments.framework.training import write_rows
from experiments.framework.tuning import start_model, tune
from experiments.similarity.config import MEASURES, QUANTILES, SimilarityScale


def pairs_file(work: Work) -> Path:
    """The pairs of the run, as text."""
    return work.folder("pairs.jsonl")


def write_pairs(work: Work) -> dict[str, Any]:
    """Draw the pairs and write them as prompt, chosen and rejected text."""
    config: SimilarityScale = work.config
    if config.pairs == "bundled":
        from experiments.bundled.pairs import preference_pairs
        from experiments.bundled.world import build_world

        rows: list[dict[str, str]] = list(preference_pairs(build_world(0), config.per_category))
    else:
        from ches_jax.data.sources import open_pairs

        assert config.pairs is not None
        rows = [as_text(row.content, config.dialogue) for row in open_pairs(config.pairs, config.split)]
    available = len(rows)
    if config.sample is not None:
        drawn = np.random.default_rng(config.sample_seed).permutation(available)[: config.sample]
        rows = [rows[i] for i in drawn]
    write_rows(pairs_file(work), rows)
    return {"found": available, "pairs": len(rows)}


def tune_on_pairs(work: Work) -> dict[str, Any]:
    """The first step of ``--after-sft``: on the chosen responses of all pairs."""
    return tune(work, pairs_file(work), max_length=work.config.max_length, on_bad_row="drop", template="none")


def as_text(content: Mapping[str, Any], dialogue: str) -> dict[str, str]:
    """A row as three texts; the prompt is put into ``dialogue`` where it does not end as that does already.

    >>> as_text({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Human: {prompt} Assistant:")
    {'prompt': 'Human: Hi Assistant:', 'chosen': ' a', 'rejected': ' b'}

    White space after the prompt is written where the prompt does not end with some.
    """
    if "prompt" not in content:
        raise DataError("pairs of token ids cannot be put into a dialogue; expected prompt, chosen and rejected")
    prompt, chosen, rejected = (_text(content[name]) for name in ("prompt", "chosen", "rejected"))
    ending = dialogue.partition("{prompt}")[2].strip()
    space = dialogue.partition("{prompt}")[2]
    if not ending and space and prompt and not prompt[-1].isspace():
        prompt += space
    if not ending:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if not prompt.rstrip().endswith(ending):
        prompt = dialogue.format(prompt=prompt)
    # after a word and a colon a response begins with a space
    lead = " " if ending.endswith(":") else ""
    chosen, rejected = (lead + text.lstrip(" ") if lead else text for text in (chosen, rejected))
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _text(value: Any) -> str:
    """Text, or the contents of messages."""
    if isinstance(value, str):
        return value
    return "\n".join(message["content"] for message in value)


def scores_folder(work: Work) -> Path:
    """The run directory of the scores."""
    return work.folder("scores")


def score_pairs(work: Work) -> dict[str, Any]:
    """Every score and the log-probabilities of every pair."""
    from ches_jax.scores.config import ScoreConfig
    from ches_jax.scores.run import score
    from ches_jax.scores.table import read_table

    config: SimilarityScale = work.config
    out = score(
        ScoreConfig(
            model=str(start_model(work)),
            pairs=str(pairs_file(work)),
            out=str(scores_folder(work)),
            by="head_score",
            logps=True,
            max_length=config.max_length,
            on_bad_row="keep",
            template="none",
            mesh=config.mesh,
        ),
        resume=True,
        quiet=work.quiet,
    )
    table, _ = read_table(out)
    flags = [flag for row in table["flags"].to_pylist() for flag in row or ()]
    return {"rows": len(table), "flags": {name: flags.count(name) for name in sorted(set(flags))}}


def columns(work: Work) -> dict[str, np.ndarray]:
    """All scores and lengths of every pair, by name, in the order of the table; NaN where a pair has none."""
    from ches_jax.scores.formulas import numbers, score_column
    from ches_jax.scores.table import read_table

    table, _ = read_table(scores_folder(work))
    values = {name: score_column(table, name) for name in (*MEASURES, "logp_margin")}
    values |= {name: numbers(table, name) for name in ("chosen_tokens", "rejected_tokens", "logp_chosen")}
    values["row_id"] = np.array(table["row_id"].to_pylist())
    if "category" in table.schema.names:
        values["category"] = np.array([c or "" for c in table["category"].to_pylist()])
    return values


def windows(work: Work) -> dict[str, Any]:
    """Rows of every window, by measure and quantile, with what they are like."""
    from ches_jax.select.keep import keep_indices, scored_order

    config: SimilarityScale = work.config
    scores = columns(work)
    scored = len(scored_order(scores["ches"]))
    if scored < 2 * config.window:
        raise DataError(f"{scored} pairs have a score; windows of {config.window} need at least {2 * config.window}")
    out: dict[str, Any] = {"scored": scored, "rows": {}}
    for measure in MEASURES:
        out["rows"][measure] = {
            f"{q:g}": keep_indices(scores[measure], f"window:{q:g},{config.window}").tolist() for q in QUANTILES
        }
    return out
