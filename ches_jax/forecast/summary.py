"""What a forecast says, in numbers and in words."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from ches_jax.forecast.config import ForecastConfig
from ches_jax.forecast.setup import LINEAR

CALIBRATION = (
    "calibration, measured twice (experiments/forecast, after SFT, 16 updates): on held-out pairs the change of chosen "
    "responses was 0.48 times the first-order forecast less 3.3 nats, R2 0.83, Spearman 0.90 (0.26M parameters, 3e-5), "
    "and 0.87 times less 0.6, R2 0.93, Spearman 0.97 (3.1M, 1e-5); on training pairs R2 0.30 and 0.45. Ranks hold "
    "better than sizes"
)


def summarise(
    table: pa.Table,
    products: Mapping[str, Any],
    errors: Mapping[str, float],
    *,
    overlap: int,
    config: ForecastConfig,
    updates: int,
) -> dict[str, Any]:
    """The numbers of a finished forecast.

    Args:
      table: ``forecast.parquet``.
      products: the inner products and their sentence.
      errors: by set, how far first order is from the same updates taken at once.
      overlap: probes that are training pairs.
      config: what was asked.
      updates: of the run that is forecast.
    """
    names = np.array(table["set"].to_pylist(), dtype=object)
    sets = {which: _set(table, names == which) for which in ("train", "probe") if (names == which).any()}
    return {
        "optimizer": config.optimizer,
        "lr": config.lr,
        "updates": updates,
        "order": config.order,
        "sets": sets,
        **products,
        "reason": _reason(table, products, "probe" if "probe" in sets else "train"),
        "linear_error": dict(errors),
        "probes_that_are_training_pairs": overlap,
        "warnings": _warnings(sets, errors, overlap, config),
        "calibration": CALIBRATION,
    }


def _set(table: pa.Table, inside: np.ndarray) -> dict[str, Any]:
    def of(name: str) -> np.ndarray:
        return table[name].to_numpy()[inside]

    chosen, rejected = of("forecast_chosen"), of("forecast_rejected")
    found = {
        "pairs": int(inside.sum()),
        "forecast_chosen": float(chosen.mean()),
        "forecast_rejected": float(rejected.mean()),
        "forecast_margin": float((chosen - rejected).mean()),
        "chosen_falls": float((chosen < 0).mean()),
    }
    if "pilot_chosen" in table.schema.names:
        found |= {f"pilot_{side}": float(of(f"pilot_{side}").mean()) for side in ("chosen", "rejected")}
    return found


def _reason(table: pa.Table, products: Mapping[str, Any], which: str) -> str | None:
    """The sentence on the products, and how their sum and the forecast differ where two decimals show it.

    The products are of the mean gradient in the metric of the run. A forecast takes each minibatch's gradient, clips
    it, and decays weights.
    """
    reason, found = products.get("reason"), products.get("products")
    if not reason or not found:
        return reason
    inside = np.array(table["set"].to_pylist(), dtype=object) == which
    first = float(table["first_chosen"].to_numpy()[inside].mean())
    parts = found["probes_nats" if which == "probe" else "train_nats"]
    if f"{first:+.2f}" == f"{parts['from_chosen'] + parts['from_rejected']:+.2f}":
        return reason
    return f"{reason}. These parts are of the mean gradient; with each update's own, first order gives {first:+.2f}"


def _warnings(sets: Mapping[str, Any], errors: Mapping[str, float], overlap: int, config: ForecastConfig) -> list[str]:
    found = []
    if overlap:
        found.append(
            f"{overlap} of {sets['probe']['pairs']} probes are training pairs: their forecast is that of pairs that "
            "are trained on"
        )
    for which, error in errors.items():
        if error > LINEAR:
            found.append(
                f"{which}: this leaves the linear range: taken at once, the same updates change the responses by "
                f"something that first order misses by {error:.0%} of its size. Ranks may hold; sizes do not. A lower "
                "--lr, fewer --steps, --order 2 or --pilot tells more"
            )
    if "probe" not in sets:
        found.append("no --probes: only pairs that are trained on, whose mean first order can get wrong in sign")
    return found


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary for a person."""
    order = {1: "first order", 2: "second order"}[summary["order"]]
    lines = [f"{summary['updates']} updates of {summary['optimizer']} at {summary['lr']:g}, {order}, nats (mean):"]
    for which, one in summary["sets"].items():
        line = (
            f"  {which:5} {one['pairs']:6} pairs: chosen {one['forecast_chosen']:+.2f}, rejected "
            f"{one['forecast_rejected']:+.2f}, margin {one['forecast_margin']:+.2f}; chosen falls in "
            f"{one['chosen_falls']:.0%}"
        )
        if "pilot_chosen" in one:
            line += f"; pilot: chosen {one['pilot_chosen']:+.2f}, rejected {one['pilot_rejected']:+.2f}"
        lines.append(line)
    if summary.get("reason"):
        lines.append(summary["reason"])
    lines += [f"warning: {text}" for text in summary["warnings"]]
    return "\n".join([*lines, summary["calibration"]])


def headline(summary: Mapping[str, Any]) -> str:
    """One line of results: of the probes, or of the training pairs where there are none."""
    which = "probe" if "probe" in summary["sets"] else "train"
    one = summary["sets"][which]
    return (
        f"forecast for {one['pairs']} {which} pairs: chosen {one['forecast_chosen']:+.2f} nats, falls in "
        f"{one['chosen_falls']:.0%}"
    )
