r"""How far each pair's log-probabilities have moved since step 0, and which of five ways it went.

.. math:: \Delta_\pm = \ln \pi_t(y_\pm|x) - \ln \pi_0(y_\pm|x), \qquad \Delta m = \Delta_+ - \Delta_-

in nats, summed over response tokens. Regimes, with a tolerance eps:

    flat                  neither moved by more than eps
    inverted              the margin fell
    wanted                chosen up, rejected down
    both_up               both up, margin up
    both_down_margin_up   both down, margin up: likelihood displacement

Of single responses (a pair with one side) the other side's numbers are NaN, and they have no regime.
"""

import numpy as np

REGIMES = ("wanted", "both_up", "both_down_margin_up", "inverted", "flat")
TOLERANCE = 0.05
"""Default eps in nats: above the rounding of float32 sums, below what changes a text."""
FILE_NAME = "displacement.parquet"
PARTS = "displacement"


def regimes(chosen: np.ndarray, rejected: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """The regime of each pair from its two changes in nats.

    >>> regimes(np.array([1.0, 2.0, -1.0, -2.0, 0.0]), np.array([-1.0, 1.0, -3.0, -1.0, 0.01])).tolist()
    ['wanted', 'both_up', 'both_down_margin_up', 'inverted', 'flat']
    """
    flat = (np.abs(chosen) <= tolerance) & (np.abs(rejected) <= tolerance)
    cases = [flat, chosen < rejected, (chosen >= 0) & (rejected <= 0), chosen > 0]
    names = ["flat", "inverted", "wanted", "both_up"]
    single = np.isnan(chosen) | np.isnan(rejected)
    return np.where(single, "", np.select(cases, names, "both_down_margin_up"))


def summarise(chosen: np.ndarray, rejected: np.ndarray, tolerance: float = TOLERANCE) -> dict[str, float]:
    """Means, medians and rates over pairs, under ``displacement/*``; changes in nats.

    ``chosen_share`` and ``rejected_share`` say how much of the mean margin change each response brought (they sum to
    1; a negative share worked against the margin). They are left out when the margin did not move.
    """
    both = ~np.isnan(chosen - rejected)
    out: dict[str, float] = {}
    for name, change in (("chosen", chosen[~np.isnan(chosen)]), ("rejected", rejected[~np.isnan(rejected)])):
        if len(change):
            out |= {f"dlogp_{name}": float(change.mean()), f"dlogp_{name}_median": float(np.median(change))}
    if both.any():
        chosen, rejected = chosen[both], rejected[both]
        margin, names = (chosen - rejected).mean(), regimes(chosen, rejected, tolerance)
        out["margin"] = float(margin)
        out["lld_rate"] = float((chosen < -tolerance).mean())
        out |= {f"{name}_rate": float((names == name).mean()) for name in REGIMES}
        if abs(margin) > tolerance:
            out["chosen_share"] = float(chosen.mean() / margin)
            out["rejected_share"] = float(-rejected.mean() / margin)
    return {f"displacement/{k}": v for k, v in out.items()}
