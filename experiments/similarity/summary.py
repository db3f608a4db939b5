"""From the runs to the numbers of the figures: pure functions, and ``summarise`` which reads the stages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ches_jax.stats import bootstrap, bootstrap_spearman, partial_spearman, spearman, studentized_means
from experiments.framework.intervals import spread
from experiments.framework.item import Work
from experiments.similarity.config import MEASURES, QUANTILES, SimilarityScale
from experiments.similarity.data import columns
from experiments.similarity.runs import run_name

DRAWS = 1000
"""Resamples of the bootstrap over pairs."""
EXTREMES = 5
"""Pairs listed at each end of a score."""


def spearman_interval(a: np.ndarray, b: np.ndarray) -> dict[str, float] | None:
    """Spearman's correlation with its 95% percentile interval over resampled rows; None where it is undefined."""
    if not np.isfinite(spearman(a, b)):
        return None
    return {**bootstrap_spearman(a, b, draws=DRAWS), "n": len(a)}


def equal_lengths_interval(a: np.ndarray, b: np.ndarray, lengths: Sequence[np.ndarray]) -> dict[str, float] | None:
    """The same at equal lengths; None where the lengths explain a side."""
    rho = partial_spearman(a, b, lengths)
    if not np.isfinite(rho):
        return None

    def of(rows: np.ndarray) -> float:
        return partial_spearman(a[rows], b[rows], [v[rows] for v in lengths])

    low, high = bootstrap(of, len(a), draws=DRAWS // 3)
    return {"rho": rho, "low": float(low), "high": float(high), "n": len(a)}


def by_pair(pairs: Sequence[Mapping[str, Any]], column: str = "dlogp_chosen") -> tuple[np.ndarray, np.ndarray]:
    """Rows that some runs trained on, and the mean over those runs of a change of each.

    >>> runs = [{"row": [4, 2], "margin": [1.0, 3.0]}, {"row": [4], "margin": [2.0]}]
    >>> [v.tolist() for v in by_pair(runs, "margin")]
    [[2, 4], [3.0, 1.5]]
    """
    changes: dict[int, list[float]] = {}
    for run in pairs:
        for row, value in zip(run["row"], run[column], strict=True):
            changes.setdefault(row, []).append(value)
    rows = sorted(changes)
    return np.array(rows, np.int64), np.array([np.mean(changes[r]) for r in rows])


def summarise(work: Work) -> dict[str, Any]:
    """Figures 2 and 5 to 7 as numbers, rank correlations, windows, extremes, coefficients."""
    config: SimilarityScale = work.config
    scores = columns(work)
    windows = work.value("windows")
    return {
        "pairs": work.value("pairs"),
        "scores": {**work.value("scores"), **describe_scores(scores)},
        "coefficients": work.value("coefficients"),
        "windows": {
            measure: {q: describe_window(scores, measure, rows) for q, rows in windows["rows"][measure].items()}
            for measure in MEASURES
        },
        "objectives": {name: _objective(work, name, scores) for name in config.objectives},
        "extremes": {m: extremes(scores, m) for m in ("ches", "ln_ches", "head_score")},
    }


def describe_scores(scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How the scores go with each other and with length."""
    longer = scores["rejected_tokens"] - scores["chosen_tokens"]
    similar = [m for m in MEASURES if m != "random"]
    return {
        "spearman_with_length_difference": {m: _number(spearman(scores[m], longer)) for m in similar},
        "spearman_between": {
            f"{a} {b}": _number(spearman(scores[a], scores[b])) for i, a in enumerate(similar) for b in similar[i + 1 :]
        },
        "mean_chosen_tokens": float(np.nanmean(scores["chosen_tokens"])),
        "mean_rejected_tokens": float(np.nanmean(scores["rejected_tokens"])),
    }


def describe_window(scores: Mapping[str, np.ndarray], measure: str, rows: Sequence[int]) -> dict[str, Any]:
    """What the pairs of a window are like."""
    chosen, rejected = scores["chosen_tokens"][rows], scores["rejected_tokens"][rows]
    values = scores[measure][rows]
    description: dict[str, Any] = {
        "pairs": len(rows),
        "score": [float(values.min()), float(values.max())],
        "chosen_tokens": float(chosen.mean()),
        "rejected_tokens": float(rejected.mean()),
    }
    if "category" in scores:
        names, counts = np.unique(scores["category"][rows], return_counts=True)
        description["categories"] = {str(n): int(c) for n, c in zip(names, counts, strict=True)}
    return description


def _objective(work: Work, name: str, scores: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """One loss: every measure by quantile, and the pairs of the random windows by score."""
    config: SimilarityScale = work.config
    objective = config.objectives[name]
    runs = {
        m: {q: [work.value(run_name(name, m, q, s)) for s in config.seeds] for q in QUANTILES}
        for m in objective.measures
    }
    out: dict[str, Any] = {"loss": objective.loss, "lr": objective.lr, "measures": {}}
    for measure, windows in runs.items():
        out["measures"][measure] = {
            "windows": {f"{q:g}": window(windows[q]) for q in QUANTILES},
            "over_pairs": {f"{q:g}": over_pairs([r["pairs"] for r in windows[q]]) for q in QUANTILES},
            **ranks(windows),
        }
    if "random" in runs:
        rows, change = by_pair([r["pairs"] for windows in runs["random"].values() for r in windows])
        out["random_pairs"] = pair_correlations(scores, rows, change)
    return out


def window(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One point of a figure: the runs of one window."""
    names = ("dlogp_chosen", "dlogp_rejected", "margin", "per_token", "displaced", "loss_change")
    return {n: spread([r[n] for r in runs]) for n in names}


def over_pairs(pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean change of a window's pairs over its runs, with a bootstrap-t interval over pairs: other prompts, same runs.

    The pairs of a window are the same for every seed, which only orders them: an interval over seeds says nothing of
    which pairs happened to be in it.
    """
    _, change = by_pair(pairs)
    low, high = studentized_means(change[None])
    return {"mean": float(change.mean()), "low": float(low[0]), "high": float(high[0]), "n": len(change)}


def ranks(windows: Mapping[float, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Spearman's correlation of percentile and change over the windows: of the means, and of each seed's own."""
    quantiles = np.array(sorted(windows))

    def rho(column: str, seed: int | None) -> float:
        return spearman(
            quantiles,
            np.array(
                [
                    np.mean([r[column] for r in windows[q]]) if seed is None else windows[q][seed][column]
                    for q in quantiles
                ]
            ),
        )

    seeds = range(len(windows[quantiles[0]]))
    return {
        f"spearman_{column}": {"of_means": rho(column, None), "seeds": spread([rho(column, s) for s in seeds])}
        for column in ("dlogp_chosen", "per_token")
    }


def pair_correlations(scores: Mapping[str, np.ndarray], rows: np.ndarray, change: np.ndarray) -> dict[str, Any]:
    """Each score against the change of single pairs of the random windows, plain and at equal response lengths."""
    lengths = [scores[n][rows] for n in ("chosen_tokens", "rejected_tokens")]
    shown = [m for m in MEASURES if m != "random"]
    return {
        "pairs": len(rows),
        "displaced": float((change < 0).mean()),
        "spearman": {m: spearman_interval(scores[m][rows], change) for m in shown},
        "at_equal_lengths": {m: equal_lengths_interval(scores[m][rows], change, lengths) for m in shown},
        "length_difference": spearman_interval(lengths[1] - lengths[0], change),
    }


def extremes(scores: Mapping[str, np.ndarray], measure: str) -> dict[str, list[dict[str, Any]]]:
    """The pairs at both ends of a score, by row and length (their texts stay in the run's folder)."""
    from ches_jax.select.keep import scored_order

    order = scored_order(scores[measure])

    def describe(row: int) -> dict[str, Any]:
        description = {
            "row": int(row),
            "row_id": str(scores["row_id"][row])[:12],
            "score": float(scores[measure][row]),
            "chosen_tokens": int(scores["chosen_tokens"][row]),
            "rejected_tokens": int(scores["rejected_tokens"][row]),
        }
        return {**description, "category": str(scores["category"][row])} if "category" in scores else description

    return {"lowest": [describe(r) for r in order[:EXTREMES]], "highest": [describe(r) for r in order[::-1][:EXTREMES]]}


def _number(value: float) -> float | None:
    """A number JSON can hold."""
    return float(value) if np.isfinite(value) else None
