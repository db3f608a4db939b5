r"""How far each pair's log-probabilities have moved since step 0, and which of six ways it went.

.. math:: \Delta_\pm = \ln \pi_t(y_\pm|x) - \ln \pi_0(y_\pm|x), \qquad \Delta m = \Delta_+ - \Delta_-

in nats, summed over response tokens. Regimes, with a tolerance eps for both changes and for the margin:

    flat                  neither moved by more than eps
    inverted              the margin fell
    together              both moved, the margin did not
    wanted                chosen up, rejected down
    both_up               both up, margin up
    both_down_margin_up   both down, margin up: likelihood displacement

Of single responses (a pair with one side) the other side's numbers are NaN, and they have no regime.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from ches_jax.displacement import TOLERANCE
from ches_jax.errors import DataError

REGIMES = ("wanted", "both_up", "both_down_margin_up", "inverted", "together", "flat")
FILE_NAME = "displacement.parquet"
"""Where a training run keeps the changes of each pair at each evaluation."""
PARTS = "displacement"
"""Folder with one file for each evaluation of a run that is not finished."""
SUMMARY = (
    "dlogp_chosen",
    "dlogp_chosen_median",
    "dlogp_rejected",
    "dlogp_rejected_median",
    "margin",
    "lld_rate",
    *(f"{regime}_rate" for regime in REGIMES),
    "chosen_share",
    "rejected_share",
)
"""Names of the numbers of :func:`displacement_summary`, without ``displacement/``."""
Direction = Literal["up", "down", "level", "undecided"]


@dataclass(frozen=True)
class Curve:
    """Mean changes of one set of pairs over the steps of a run."""

    steps: np.ndarray
    """[n]"""
    chosen: np.ndarray
    """[n]: nats, or what the scale of its changes says."""
    rejected: np.ndarray
    accuracy: float | None = None
    """Share of pairs whose chosen response has the larger reward, at the end."""
    loss: tuple[float, float] | None = None
    """First and last loss."""


@dataclass(frozen=True)
class Changes:
    """Changes of log-probabilities since the first model."""

    chosen: np.ndarray
    """Of each chosen response, [units], in nats where ``scale`` says so."""
    rejected: np.ndarray
    source: str
    """Where they come from, for the reader."""
    caveats: tuple[str, ...] = ()
    records: np.ndarray | None = None
    """The record of the data that each pair comes from, [pairs]: pairs of one record share responses, so they are
    resampled together. Default: each pair has its own."""
    unit: Literal["pairs", "steps", "evaluations"] = "pairs"
    """What is counted: pairs; logged steps, which are means of training batches; evaluations of the same held-out
    pairs."""
    scale: Literal["nats", "sign", "per token"] = "nats"
    """``sign``: in an unknown unit, so that only directions are known; ``per token``: means over tokens."""
    held_out: bool = False
    """Whether the pairs were watched and not trained on."""
    curve: Curve | None = None
    """The course over steps, where it is known."""
    rows: Mapping[str, Any] | None = None
    """Columns about the pairs, [pairs]: ``row_id``, ``index``, ``chosen_tokens``, ``rejected_tokens``, ``category``."""
    beside: "Changes | None" = None
    """The training pairs beside the held-out ones."""
    start: tuple[np.ndarray, np.ndarray] | None = None
    """Log-probabilities of chosen and rejected under the first model, [pairs] in nats, where they are known."""


def direction(low: float, high: float, tolerance: float = TOLERANCE) -> Direction:
    """Which way a change went that lies in [low, high]: ``up`` or ``down`` by more than eps, ``level`` within eps.

    ``undecided``: the interval reaches over a bound. A change that is known exactly has ``low == high``.

    >>> direction(-3, -2), direction(-0.01, 0.02), direction(-1, 1)
    ('down', 'level', 'undecided')
    """
    if low > tolerance:
        return "up"
    if high < -tolerance:
        return "down"
    return "level" if -tolerance <= low and high <= tolerance else "undecided"


def regimes(chosen: np.ndarray, rejected: np.ndarray, tolerance: float = TOLERANCE) -> np.ndarray:
    """The regime of each pair, [pairs] of names from ``REGIMES``, from its two changes in nats, [pairs].

    A record with one response (the other change is NaN) has the regime ``""``. Above the tolerance, signs decide.

    >>> regimes(np.array([1.0, 2.0, -1.0, -2.0, 0.0, -3.0]), np.array([-1.0, 1.0, -3.0, -1.0, 0.01, -2.999])).tolist()
    ['wanted', 'both_up', 'both_down_margin_up', 'inverted', 'flat', 'together']
    """
    margin = chosen - rejected
    flat = (np.abs(chosen) <= tolerance) & (np.abs(rejected) <= tolerance)
    cases = [flat, margin < -tolerance, margin <= tolerance, (chosen >= 0) & (rejected <= 0), chosen > 0]
    names = ["flat", "inverted", "together", "wanted", "both_up"]
    single = np.isnan(chosen) | np.isnan(rejected)
    return np.where(single, "", np.select(cases, names, "both_down_margin_up"))


def _changes(name: str, change: ArrayLike) -> np.ndarray:
    try:
        return np.ravel(np.asarray(change, np.float64))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"displacement_summary: {name} is no array of numbers ({str(error).partition(chr(10))[0]:.160})"
        ) from None


def displacement_summary(chosen: ArrayLike, rejected: ArrayLike, tolerance: float = TOLERANCE) -> dict[str, float]:
    r"""How far the log-probabilities of preference pairs moved, in numbers to log.

    .. math:: \Delta_\pm = \ln \pi_{\mathrm{after}}(y_\pm|x) - \ln \pi_{\mathrm{before}}(y_\pm|x)

    Args:
      chosen: change :math:`\Delta_+` of the log-probability of each chosen response, nats, shape [pairs]; NaN where a
        record has no chosen response.
      rejected: the same of the rejected responses.
      tolerance: eps, nats; smaller changes count as none.

    Returns:
      Under ``displacement/*``:

      - ``dlogp_chosen``, ``dlogp_chosen_median`` and the same of rejected: mean and median change, nats;
      - ``margin``: mean change of the margin, nats;
      - ``lld_rate``: share of pairs whose chosen response fell by more than eps (likelihood displacement);
      - ``wanted_rate``, ``both_up_rate``, ``both_down_margin_up_rate``, ``inverted_rate``, ``together_rate``,
        ``flat_rate``: shares of the regimes (:func:`regimes`);
      - ``chosen_share``, ``rejected_share``: how much of the mean margin change each response brought. They sum to 1,
        a negative share worked against the margin, and they are left out where the margin moved by at most eps.

      What no pair tells (means of a side that is all NaN) is left out.

    Raises:
      DataError: what is no array of numbers, or two of other shapes.

    References:
      Razin et al., Unintentional Unalignment (https://arxiv.org/abs/2410.08847), Definition 1; lld_rate: Deng et al.,
      lazy likelihood displacement (https://arxiv.org/abs/2505.18830).

    >>> before, after = np.array([[-10.0, -12.0], [-9.0, -9.0]]), np.array([[-12.0, -13.0], [-15.0, -12.0]])
    >>> summary = displacement_summary(*(after - before))
    >>> summary["displacement/dlogp_chosen"], summary["displacement/margin"], summary["displacement/lld_rate"]
    (-1.5, 3.0, 1.0)
    """
    chosen, rejected = (_changes(name, change) for name, change in (("chosen", chosen), ("rejected", rejected)))
    if chosen.shape != rejected.shape:
        raise DataError(
            f"displacement_summary: chosen {list(chosen.shape)} and rejected {list(rejected.shape)}; expected a change "
            "of each response, [pairs], of the same pairs"
        )
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
