"""The stages: pairs as text, their scores, the windows, coefficients, and one training run per window and seed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ches_jax import bundled
from ches_jax.errors import DataError
from experiments.framework.item import Work
from experiments.framework.training import run_training, write_rows
from experiments.similarity.config import MEASURES, QUANTILES, Objective, SimilarityScale
from experiments.similarity.measure import PairCoefficients, loss_change, mean_coefficients


def model_directory(config: SimilarityScale) -> Path:
    """The model that is scored and trained."""
    from ches_jax.hf.directory import resolve

    assert config.model is not None
    return bundled.model_dir() if config.model == "bundled" else resolve(config.model)


def pairs_file(work: Work) -> Path:
    """The pairs of the run, as text."""
    return work.folder("pairs.jsonl")


def scores_folder(work: Work) -> Path:
    """The run directory of the scores."""
    return work.folder("scores")


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
    found = len(rows)
    if config.sample is not None:
        drawn = np.random.default_rng(config.sample_seed).permutation(found)[: config.sample]
        rows = [rows[i] for i in drawn]
    write_rows(pairs_file(work), rows)
    return {"found": found, "pairs": len(rows)}


def as_text(content: Mapping[str, Any], dialogue: str) -> dict[str, str]:
    """A row as three texts; the prompt is put into ``dialogue`` where it does not end as that does already.

    >>> as_text({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "Human: {prompt} Assistant:")
    {'prompt': 'Human: Hi Assistant:', 'chosen': ' a', 'rejected': ' b'}
    """
    if "prompt" not in content:
        raise DataError("pairs of token ids cannot be put into a dialogue; expected prompt, chosen and rejected")
    prompt, chosen, rejected = (_text(content[name]) for name in ("prompt", "chosen", "rejected"))
    ending = dialogue.partition("{prompt}")[2].strip()
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


def score_pairs(work: Work) -> dict[str, Any]:
    """Every score and the log-probabilities of every pair."""
    from ches_jax.scores.config import ScoreConfig
    from ches_jax.scores.run import score
    from ches_jax.scores.table import read_table

    config: SimilarityScale = work.config
    out = score(
        ScoreConfig(
            model=str(model_directory(config)), pairs=str(pairs_file(work)), out=str(scores_folder(work)),
            by="head_score", logps=True, max_length=config.max_length, on_bad_row="keep", template="none",
            mesh=config.mesh,
        ),
        resume=True,
        quiet=work.quiet,
    )  # fmt: skip
    table, _ = read_table(out)
    flags = [flag for row in table["flags"].to_pylist() for flag in row or ()]
    return {"rows": len(table), "flags": {name: flags.count(name) for name in sorted(set(flags))}}


def columns(work: Work) -> dict[str, np.ndarray]:
    """All scores and lengths of every pair, by name, in the order of the table; NaN where a pair has none."""
    from ches_jax.scores.formulas import numbers, score_column
    from ches_jax.scores.table import read_table

    table, _ = read_table(scores_folder(work))
    found = {name: score_column(table, name) for name in (*MEASURES, "logp_margin")}
    found |= {name: numbers(table, name) for name in ("chosen_tokens", "rejected_tokens", "logp_chosen")}
    found["row_id"] = np.array(table["row_id"].to_pylist())
    if "category" in table.schema.names:
        found["category"] = np.array([c or "" for c in table["category"].to_pylist()])
    return found


def windows(work: Work) -> dict[str, Any]:
    """Rows of every window, by measure and quantile, with what they are like."""
    from ches_jax.select.keep import keep_indices, scored_order

    config: SimilarityScale = work.config
    found = columns(work)
    scored = len(scored_order(found["ches"]))
    if scored < 2 * config.window:
        raise DataError(f"{scored} pairs have a score; windows of {config.window} need at least {2 * config.window}")
    out: dict[str, Any] = {"scored": scored, "rows": {}}
    for measure in MEASURES:
        out["rows"][measure] = {
            f"{q:g}": keep_indices(found[measure], f"window:{q:g},{config.window}").tolist() for q in QUANTILES
        }
    return out


def train_window(
    work: Work, name: str, objective: Objective, measure: str, quantile: float, seed: int
) -> dict[str, Any]:
    """One epoch on the pairs of a window; what became of every pair."""
    import json

    from ches_jax.train.config import TrainConfig

    config: SimilarityScale = work.config
    rows = work.value("windows")["rows"][measure][f"{quantile:g}"]
    lines = pairs_file(work).read_text(encoding="utf-8").splitlines()
    out = work.folder(f"train/{name}-{measure}-{quantile:g}-{seed}")
    file = write_rows(out.with_name(f"{out.name}.jsonl"), [json.loads(lines[i]) for i in rows])
    done = run_training(
        TrainConfig(
            model=str(model_directory(config)), pairs=str(file), out=str(out), loss=objective.loss,
            loss_args=dict(objective.loss_args), lr=objective.lr, batch_size=config.batch_size,
            accumulate=config.accumulate, max_length=config.max_length, on_bad_row="keep", template="none",
            row_tokens=row_tokens(config), watch=config.window, seed=seed, mesh=config.mesh, export=False,
        ),
        quiet=True,
    )  # fmt: skip
    file.unlink()
    end = done.of("train")
    return {
        "losses": done.losses,
        "dlogp_chosen": float(end["dlogp_chosen"].mean()),
        "dlogp_rejected": float(end["dlogp_rejected"].mean()),
        "per_token": float(end["dlogp_chosen"].sum() / end["chosen_tokens"].sum()),
        "displaced": float((end["dlogp_chosen"] < 0).mean()),
        "margin": float(end["margin"].mean()),
        "loss_change": loss_change(objective, end["margin"]),
        "pairs": {
            "row": [rows[i] for i in end["index"].tolist()],
            "dlogp_chosen": [round(v, 5) for v in end["dlogp_chosen"].tolist()],
            "margin": [round(v, 5) for v in end["margin"].tolist()],
        },
    }


def row_tokens(config: SimilarityScale) -> int:
    """One row length for all runs of a scale, so that they share their compiled programs: the longest possible pair."""
    return -(-2 * config.max_length // 64) * 64


def coefficients(work: Work) -> dict[str, Any]:
    """Appendix G.2: shares of positive alphas and inner products, over the first pairs that have a score."""
    from ches_jax.models.checkpoint.load import load_model

    config: SimilarityScale = work.config
    model = load_model(model_directory(config), dtype="float32", param_dtype="float32")
    pairs = _token_pairs(work)
    usable = [p for p in pairs if p.chosen.targets("include") and p.rejected.targets("include")]
    usable = [p for p in usable if len(p.prompt) < config.max_length][: config.coefficients_of]
    return mean_coefficients([_coefficients(model, p, config.max_length) for p in usable])


def _token_pairs(work: Work) -> list[Any]:
    from ches_jax.data.sources import open_pairs
    from ches_jax.data.tokenize import PairTokenizer, load_tokenizer

    config: SimilarityScale = work.config
    tokenizer = PairTokenizer(
        load_tokenizer(model_directory(config)), max_length=config.max_length, template="none"
    )  # fmt: skip
    rows = [row for row in open_pairs(str(pairs_file(work))) if row.index < 4 * config.coefficients_of]
    return tokenizer(rows)


def _coefficients(model: Any, pair: Any, length: int) -> PairCoefficients:
    """Signs of one pair's coefficients, from the states and residuals of both responses."""
    sides = [_states(model, (*pair.prompt, *r.content), len(pair.prompt), r.targets("include"), length)
             for r in (pair.chosen, pair.rejected)]  # fmt: skip
    return PairCoefficients.of(*sides[0], *sides[1])


def _states(model: Any, sequence: Any, prompt: int, targets: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    """[|y|, D] states that predict a response, and [|y|, V] residuals e_y - pi, float32."""
    import jax.numpy as jnp

    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(sequence)] = sequence
    hidden = np.asarray(_hidden()(model, jnp.asarray(tokens)))[0, prompt - 1 : prompt - 1 + len(targets)]
    logits = np.asarray(model.logits(jnp.asarray(hidden)), np.float32)
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    residual = -probabilities / probabilities.sum(1, keepdims=True)
    residual[np.arange(len(targets)), list(targets)] += 1.0
    return hidden.astype(np.float32), residual


_compiled: list[Any] = []


def _hidden() -> Any:
    from flax import nnx

    if not _compiled:
        _compiled.append(nnx.jit(lambda model, tokens: model.hidden(tokens)))
    return _compiled[0]
