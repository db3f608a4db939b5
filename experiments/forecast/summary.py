"""From the runs to the numbers: rank correlations, calibration, costs, filters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ches_jax.stats import bootstrap, partial_spearman, spearman
from experiments.forecast.config import ForecastScale
from experiments.forecast.runs import run_name
from experiments.framework.intervals import crossed, holm, spread
from experiments.framework.item import Work

DRAWS = 1000
PARTIAL_DRAWS = 300
OWN = {
    "head_score": -1,
    "ches": -1,
    "ln_ches": -1,
    "edit_distance": 1,
    "chosen_tokens": -1,
    "logp_chosen": 1,
}
"""Numbers of a pair alone, with the sign that the theory (or length) gives them: + means that the chosen rises."""
SETS = {"train": "train", "probe": "held_out"}


def summarise(work: Work) -> dict[str, Any]:
    """Everything the report says."""
    config: ForecastScale = work.config
    return {
        "pairs": work.value("pairs"),
        "sft": work.value("sft"),
        "costs": work.value("costs")["in_forwards"],
        "lrs": {f"{lr:g}": _of_recipe(work, f"{lr:g}", "tuned", lr) for lr in config.lrs},
        "untuned": {
            which: _means(work.value(run_name("untuned", config.lrs[-1], 0))[which]) for which in SETS.values()
        },
        "filters": _filters(work),
        "variants": {name: _of_recipe(work, name, name, config.lrs[-1]) for name in config.variants},
    }


def _of_recipe(work: Work, forecast_name: str, start: str, lr: float) -> dict[str, Any]:
    forecast = work.value(f"forecast/{forecast_name}")
    runs = [work.value(run_name(start, lr, seed)) for seed in work.config.seeds]
    return {
        "products": forecast["summary"].get("products"),
        "reason": forecast["summary"].get("reason"),
        "linear_error": forecast["summary"]["linear_error"],
        "sets": {which: _of_set(work, forecast["columns"], runs, name, which) for name, which in SETS.items()},
    }


def _of_set(work: Work, columns: Mapping[str, Sequence], runs: list[dict], name: str, which: str) -> dict[str, Any]:
    """Predictors of a set against the change in each run; intervals over its pairs in the first run."""
    scores = work.value("scores")["train" if name == "train" else "held"]
    at = {row_id: i for i, row_id in enumerate(scores["row_id"])}
    inside = [i for i, s in enumerate(columns["set"]) if s == name and columns["row_id"][i] in at]
    ids = [columns["row_id"][i] for i in inside]
    own = {n: sign * _numbers(scores, n, [at[r] for r in ids]) for n, sign in OWN.items()}
    predictors = {"first order": _numbers(columns, "first_chosen", inside)}
    if columns["forecast_chosen"] != columns["first_chosen"]:
        predictors["second order"] = _numbers(columns, "forecast_chosen", inside)
    predictors |= {"pilot": _numbers(columns, "pilot_chosen", inside), **own}
    lengths = [_numbers(scores, n, [at[r] for r in ids]) for n in ("chosen_tokens", "rejected_tokens")]
    actual = [aligned(run[which], ids) for run in runs]
    return {
        **_means(runs[0][which]),
        "orders_agree": [round(spearman(actual[0], other), 3) for other in actual[1:]],
        "predictors": {n: _predictor(x, actual, lengths, n not in own) for n, x in predictors.items()},
    }


def _numbers(columns: Mapping[str, Sequence], name: str, rows: Sequence[int]) -> np.ndarray:
    return np.array([columns[name][i] for i in rows], np.float64)


def aligned(changes: Mapping[str, Sequence], ids: Sequence[str], column: str = "dlogp_chosen") -> np.ndarray:
    """A column of a run in the order of the rows.

    >>> aligned({"row_id": ["b", "a"], "dlogp_chosen": [2.0, 1.0]}, ["a", "b"]).tolist()
    [1.0, 2.0]
    """
    numbers = dict(zip(changes["row_id"], changes[column], strict=True))
    return np.array([numbers[i] for i in ids], np.float64)


def _predictor(
    x: np.ndarray, actual: Sequence[np.ndarray], lengths: Sequence[np.ndarray], in_nats: bool
) -> dict[str, Any]:
    """Rank correlations with the change in every order of the data; intervals by resampling prompts, one pair each."""
    y, n = actual[0], len(x)
    low, high = bootstrap(lambda r: spearman(x[r], y[r]), n, draws=DRAWS)
    at_equal, equal = partial_spearman(x, y, lengths), np.full(2, np.nan)
    if np.isfinite(at_equal):  # a length is nothing at equal lengths
        equal = bootstrap(lambda r: partial_spearman(x[r], y[r], [v[r] for v in lengths]), n, draws=PARTIAL_DRAWS)
    numbers = {
        "rho": spearman(x, y),
        "low": float(low),
        "high": float(high),
        "rho_of_orders": [spearman(x, other) for other in actual],
        "equal_lengths": {
            "rho": _number(at_equal),
            "low": _number(equal[0]),
            "high": _number(equal[1]),
        },
    }
    if in_nats:
        numbers["calibration"] = calibration(x, y)
    return numbers


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def calibration(forecast: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Least squares of actual changes on forecast ones, nats.

    >>> calibration(np.array([0.0, 1.0, 2.0]), np.array([1.0, 1.5, 2.0]))["slope"]
    0.5
    """
    x = forecast - forecast.mean()
    slope = float(x @ (actual - actual.mean()) / (x @ x))
    intercept = float(actual.mean() - slope * forecast.mean())
    rest = actual - intercept - slope * forecast
    total = float(((actual - actual.mean()) ** 2).sum())
    return {
        "slope": slope,
        "intercept": intercept,
        "r2": 1 - float((rest**2).sum()) / total if total else float("nan"),
        "mean_forecast": float(forecast.mean()),
        "mean_actual": float(actual.mean()),
    }


def _means(changes: Mapping[str, Sequence]) -> dict[str, Any]:
    """Mean changes of a set in nats with bootstrap intervals over pairs."""
    chosen, rejected = (np.array(changes[f"dlogp_{side}"]) for side in ("chosen", "rejected"))
    columns = np.stack([chosen, rejected, chosen - rejected])
    low, high = bootstrap(lambda rows: columns[:, rows].mean(1), columns.shape[1], draws=DRAWS)
    names = ("chosen", "rejected", "margin")
    ends = zip(names, columns.mean(1), low, high, strict=True)
    means = {n: {"mean": float(m), "low": float(a), "high": float(b)} for n, m, a, b in ends}
    return {**means, "chosen_fell": float((chosen < 0).mean()), "pairs": columns.shape[1]}


def _filters(work: Work) -> dict[str, Any]:
    """Each filter against all pairs, paired over draws of the pool (with an order of the data each) and test pairs."""
    config: ForecastScale = work.config
    runs = {name: [work.value(f"filter/{name}/{seed}") for seed in config.seeds] for name in config.filters}
    if not runs:
        return {}
    ids = runs["all"][0]["row_id"]
    chosen = {name: np.stack([aligned(run, ids) for run in some]) for name, some in runs.items()}
    rejected = {name: np.stack([aligned(run, ids, "dlogp_rejected") for run in some]) for name, some in runs.items()}
    found = {name: _filter(chosen, rejected, name) for name in runs}
    compared = [name for name in found if name != "all"]
    for name, p in zip(compared, holm([found[name]["both"]["p"] for name in compared]), strict=True):
        found[name]["p_holm"] = p
    return found


def _filter(chosen: Mapping[str, np.ndarray], rejected: Mapping[str, np.ndarray], name: str) -> dict[str, Any]:
    gain = chosen[name] - chosen["all"]
    low, high = bootstrap(lambda rows: gain[:, rows].mean(), gain.shape[1], draws=DRAWS)
    margin = chosen[name] - rejected[name]
    return {
        "chosen": spread(chosen[name].mean(1).tolist()),
        "margin": spread(margin.mean(1).tolist()),
        "accuracy": float((margin > 0).mean()),
        "gain": {"mean": float(gain.mean()), "low": float(low), "high": float(high)},
        "gain_over_draws": spread(gain.mean(1).tolist()),
        "both": crossed(gain),
        "margin_gain": crossed(margin - (chosen["all"] - rejected["all"])),
        "less_fall": float(-gain.mean() / chosen["all"].mean()) if chosen["all"].mean() < 0 else None,
    }
