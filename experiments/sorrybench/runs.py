"""The stages from the pairs on: scores, subsets, the learning rate, training, and refusals after it."""

import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ches_jax.errors import DataError
from experiments.framework.item import Work
from experiments.framework.training import Finished, run_training, write_rows
from experiments.sorrybench.config import LOSSES, SUBSETS, TYPES, Method, Objective, SorryScale
from experiments.sorrybench.data import (
    generated,
    judged,
    model_directory,
    only,
    pairs_file,
    read_lines,
    requests_file,
)


def score_pairs(work: Work) -> dict[str, Any]:
    """Every score of the generated pairs, by type of pair (Figure 4)."""
    from ches_jax.scores.config import ScoreConfig
    from ches_jax.scores.run import score

    config: SorryScale = work.config
    score(
        ScoreConfig(
            model=str(model_directory(config)),
            pairs=str(pairs_file(work, "generated")),
            by="head_score",
            out=str(work.folder("scores")),
            on_bad_row="keep",
            mesh=config.mesh,
        ),
        resume=True,
        quiet=True,
    )
    scores = columns(work)
    types = np.array([row["category"] for row in read_lines(pairs_file(work, "generated"))])
    names = ("ln_ches", "head_score", "ches", "length")
    return {
        t: {n: [round(float(v), 4) for v in scores[n][types == t]] for n in names} for t in TYPES if (types == t).any()
    }


def columns(work: Work) -> dict[str, np.ndarray]:
    """Scores of the generated pairs, higher: dropped first; NaN where a pair has none."""
    from ches_jax.scores.formulas import numbers, score_column
    from ches_jax.scores.table import read_table

    table, _ = read_table(work.folder("scores"))
    values = {name: score_column(table, name) for name in ("ches", "ln_ches", "head_score")}
    values["length"] = numbers(table, "rejected_tokens") - numbers(table, "chosen_tokens")
    return values


def subsets(work: Work) -> dict[str, Any]:
    """Which generated pairs each way of filtering keeps, and which are of each type. ``random``: one set per seed."""
    from ches_jax.select.keep import keep_indices

    config: SorryScale = work.config
    scores = columns(work)
    rule = f"lowest:{config.keep:.6f}"
    kept: dict[str, Any] = {name: keep_indices(scores[name], rule).tolist() for name in SUBSETS if name != "random"}
    scored = np.flatnonzero(np.isfinite(scores["ln_ches"]))
    count = len(kept["ln_ches"])
    kept["random"] = {
        str(seed): sorted(np.random.default_rng([seed, 4]).permutation(scored)[:count].tolist())
        for seed in config.seeds
    }
    types = [row["category"] for row in read_lines(pairs_file(work, "generated"))]
    return kept | {t: [i for i, name in enumerate(types) if name == t] for t in TYPES}


def chosen_rows(work: Work, pairs: str, seed: int) -> tuple[str, list[dict[str, Any]]]:
    """The file a method draws on (``generated`` or ``gold``) and its rows."""
    file = "gold" if pairs == "gold" else "generated"
    rows = read_lines(pairs_file(work, file))
    if pairs in ("gold", "generated"):
        return file, rows
    numbers = work.value("subsets")[pairs]
    return file, only(rows, numbers[str(seed)] if pairs == "random" else numbers)


def rates_of(config: SorryScale, pairs: str) -> tuple[float, ...]:
    """Learning rates to choose from; a single one is not tried."""
    return config.gold_rates if pairs == "gold" else config.rates


def try_rate(work: Work, pairs: str, lr: float, seed: int) -> dict[str, Any]:
    """DPO on these pairs at one learning rate."""
    return train_and_sample(work, f"try-{pairs}-{lr:g}-{seed}", Method("dpo", pairs), lr, seed)


def choose_rate(work: Work, pairs: str) -> dict[str, Any]:
    """The learning rate for these pairs, whatever the objective, as in the paper."""
    config: SorryScale = work.config
    rates = rates_of(config, pairs)
    if len(rates) == 1:
        return {"lr": rates[0]}
    runs = {
        f"{lr:g}": [work.value(f"try/{pairs}/{lr:g}/{s}") for s in config.seeds[: config.rate_seeds]] for lr in rates
    }
    losses, cut = ({lr: [r[k] for r in tries] for lr, tries in runs.items()} for k in ("loss_change", "cut"))
    responses = min(len(r["refusals"]) for tries in runs.values() for r in tries)
    return {"lr": largest_rate(losses, cut, responses), "runs": runs}


def trained(work: Work, name: str, method: Method, lr: float, seed: int, *, export: bool) -> Finished:
    """One epoch of a method."""
    from ches_jax.train.config import TrainConfig

    config: SorryScale = work.config
    file, rows = chosen_rows(work, method.pairs, seed)
    total = len(chosen_rows(work, file, seed)[1])
    out = work.folder(f"train/{name}")
    pairs = write_rows(out.with_name(f"{out.name}.jsonl"), rows)
    loss, arguments = LOSSES[method.objective]
    return run_training(
        TrainConfig(
            model=str(model_directory(config)),
            pairs=str(pairs),
            out=str(out),
            loss=loss,
            loss_args=dict(arguments),
            sft=method.sft,
            sft_per="sum",
            lr=lr,
            batch_size=config.batch_size,
            accumulate=config.accumulate,
            on_bad_row="keep",
            row_tokens=config.row_tokens,
            watch=len(rows),
            seed=seed,
            mesh=config.mesh,
            steps=-(-total // config.batch_size) if method.as_long else None,
            export=export,
        ),
        quiet=True,
    )


def train_method(work: Work, name: str, method: Method, seed: int) -> dict[str, Any]:
    """Train, and see how often the model refuses now."""
    file, rows = chosen_rows(work, method.pairs, seed)
    if not rows:
        return {"pairs": 0}
    lr = work.value(f"rate/{file}")["lr"]
    return {"pairs": len(rows), "lr": lr, **train_and_sample(work, f"{name}-{seed}", method, lr, seed)}


def train_and_sample(work: Work, label: str, method: Method, lr: float, seed: int) -> dict[str, Any]:
    """One run: how the pairs it trained on moved, and what the model answers now."""
    _, rows = chosen_rows(work, method.pairs, seed)
    done = trained(work, label, method, lr, seed, export=True)
    folder = work.folder(f"train/{label}")
    answers = evaluated(work, str(folder / "model"), label, seed)
    shutil.rmtree(folder)
    end = done.of("train")
    changes = {n: round(float(end[n].mean()), 5) for n in ("dlogp_chosen", "dlogp_rejected", "margin")}
    return {
        "updates": len(done.losses),
        "loss_change": mean_loss(method.objective, end["margin"]) - mean_loss(method.objective, 0 * end["margin"]),
        **changes,
        "by_type": _by_type(rows, end),
        **answers,
    }


def _by_type(rows: list[dict[str, Any]], end: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Mean change of ln pi(y+) and ln pi(y-) by type of pair, and how many there are."""
    types = np.array([rows[i].get("category", "gold") for i in end["index"].tolist()])
    return {
        str(t): [
            int((types == t).sum()),
            *(round(float(end[n][types == t].mean()), 5) for n in ("dlogp_chosen", "dlogp_rejected")),
        ]
        for t in np.unique(types)
    }


def initial(work: Work, seed: int) -> dict[str, Any]:
    """How often the model refuses before training."""
    return evaluated(work, str(model_directory(work.config)), f"initial-{seed}", seed)


def evaluated(work: Work, model: str, label: str, seed: int) -> dict[str, Any]:
    """Refusal rates over the requests of both splits, one response each."""
    config: SorryScale = work.config
    name = f"after/{label}"
    # the model's directory goes when it has answered; a run that was killed in between samples anew
    shutil.rmtree(work.folder(name), ignore_errors=True)
    shutil.rmtree(work.folder(f"{name}-judged"), ignore_errors=True)
    responses = generated(work, model, name, samples=1, temperature=config.temperature, seed=1000 + seed)
    refusals = judged(work, name)
    test = [row["test"] for row in read_lines(requests_file(work))]
    return {
        "train": refusal_rate([r for r, t in zip(refusals, test, strict=True) if not t]),
        "test": refusal_rate([r for r, t in zip(refusals, test, strict=True) if t]),
        "tokens": sum(len(r["token_ids"]) for r in responses) / len(responses),
        "cut": sum(r["finish_reason"] == "length" for r in responses) / len(responses),
        "refusals": bits(refusals),
        **({"kinds": kinds([r["text"] for r in responses])} if config.judge == "bundled" else {}),
    }


def kinds(texts: list[str]) -> dict[str, float]:
    """Shares of refusals, compliances and broken replies by the grammar of the bundled world."""
    from experiments.bundled.grammar import kind

    names = [kind(t) for t in texts]
    return {k: names.count(k) / len(names) for k in ("refusal", "compliance", "broken")}


def mean_loss(objective: Objective, margins: np.ndarray) -> float:
    r"""Mean loss from the changes of the margins since the start, which is the reference.

    .. math:: \mathrm{DPO}:\ \ln(1 + e^{-\beta m}), \qquad \mathrm{IPO}:\ (m - 1/(2\tau))^2

    >>> round(mean_loss("dpo", np.zeros(3)), 4), mean_loss("ipo", np.zeros(3))
    (0.6931, 2500.0)
    """
    _, arguments = LOSSES[objective]
    if objective == "dpo":
        return float(np.logaddexp(0.0, -arguments["beta"] * margins).mean())
    return float(((margins - 0.5 / arguments["tau"]) ** 2).mean())


ENDLESS = 0.02
"""Share of responses that may newly run into the limit of tokens, as most texts of a broken model do."""


def largest_rate(losses: Mapping[str, Sequence[float]], cut: Mapping[str, Sequence[float]], responses: int) -> float:
    r"""The largest learning rate that lowers the loss over the epoch and leaves a model whose responses end.

    With the share p of responses that the smallest rate's model cuts, n responses, and ``ENDLESS`` e, a rate's share
    is at most :math:`p + e + 2\sqrt{2 p (1 - p) / n}`: the root is the standard error of such a difference by chance.

    Args:
      losses: change of the loss for every seed, by rate.
      cut: share of responses that ran into the limit of tokens.
      responses: how many were looked at each time.

    Raises:
      DataError: there is none.

    >>> losses = {"1e-06": [-0.01, -0.02], "1e-05": [-0.1, -0.2], "0.0001": [-0.2, 0.1]}
    >>> largest_rate(losses, {"1e-06": [0.5, 0.5], "1e-05": [0.5, 0.51], "0.0001": [0.5, 0.5]}, 400)
    1e-05
    """
    p = max(cut[min(cut, key=float)])
    most = p + ENDLESS + 2 * math.sqrt(2 * p * (1 - p) / responses)
    good = [float(lr) for lr, changes in losses.items() if max(changes) < 0 and max(cut[lr]) <= most]
    if not good:
        raise DataError(f"no learning rate of {', '.join(losses)} lowers the loss; add smaller ones to the scale")
    return max(good)


def refusal_rate(refusals: Sequence[bool | None]) -> float | None:
    """Share of refusals among the responses that were decided.

    >>> refusal_rate([True, False, None, True, True])
    0.75
    """
    decided = [r for r in refusals if r is not None]
    return sum(decided) / len(decided) if decided else None


def bits(refusals: Sequence[bool | None]) -> str:
    """One letter per response: 1 refused, 0 did not, ? undecided.

    >>> bits([True, False, None])
    '10?'
    """
    return "".join({True: "1", False: "0", None: "?"}[r] for r in refusals)
