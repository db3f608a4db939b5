r"""What training on each pair does to the chosen responses of others: its influence on their displacement.

With the mean gradient :math:`G_P` of ln pi(chosen) over probes, the metric M of the run (``metric.Metric.of_run``) and
the descent of pair j,

.. math::
  I_j = -\frac{1}{N} \Big( a^+_j \langle M G_P, \nabla \ln \pi(y^+_j) \rangle
        + a^-_j \langle M G_P, \nabla \ln \pi(y^-_j) \rangle \Big), \qquad
  a^\pm_j = -\frac{\partial \ell_j}{\partial \ln \pi(y^\pm_j)}

are the nats by which training on j *lowers* their mean: exact at first order, and they add up to the forecast of
that mean. One backward pass over the probes, one over the training pairs for the metric, one forward-mode pass: no
gradient of a single pair is ever formed. (TracIn's quantity, https://arxiv.org/abs/2002.08484, with displacement as
its target.)
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ches_jax.errors import ChesError
from ches_jax.forecast.frozen import Start
from ches_jax.forecast.metric import Tree
from ches_jax.forecast.setup import Passes, changes, splits
from ches_jax.types import TokenPair

SHARES = (0.10, 0.25, 0.50)
"""Shares of the pairs whose part in the fall is reported."""


class Influence(NamedTuple):
    """[N] nats by which training on each pair lowers the mean ln pi(chosen) of the probes; float64."""

    from_chosen: np.ndarray
    """By raising its chosen response."""
    from_rejected: np.ndarray
    """By lowering its rejected response."""

    @property
    def total(self) -> np.ndarray:
        """Both."""
        return self.from_chosen + self.from_rejected


def require_splits(passes: Passes) -> None:
    """Refuse a loss whose gradient does not split into responses of pairs.

    Raises:
      ChesError: names the loss.
    """
    if not splits(passes.run):
        raise ChesError(
            f"--loss {passes.run.config.loss}: its gradient is not made of whole responses of pairs, so that it has no "
            "influence of a pair; use a loss of chosen and rejected responses, such as dpo"
        )


def influence_direction(passes: Passes, start: Start, probes: Sequence[TokenPair]) -> Tree:
    """M G_P."""
    gradient, metric = passes.mean_gradient(probes), passes.metric(start)
    return {k: g * metric[k].astype(g.dtype) for k, g in gradient.items()}


def influence_of(rates: Sequence[np.ndarray], slopes: np.ndarray, pairs: int) -> Influence:
    """Influence from what a push along M G_P gives.

    Args:
      rates: for each pair those of its two responses.
      slopes: [N, 2] derivatives of each pair's loss by the log-probabilities of its responses.
      pairs: of the whole data set.
    """
    chosen, rejected = changes(list(rates))
    return Influence(slopes[:, 0] * chosen / pairs, slopes[:, 1] * rejected / pairs)


def concentration(values: np.ndarray) -> dict[str, Any]:
    """How much of the fall the worst pairs hold: whether leaving some out can help at all.

    >>> concentration(np.array([6.0, 3.0, 1.0, -2.0]))["share_of_fall"]["25%"]
    0.6
    """
    down = np.sort(values)[::-1]
    fall = float(np.clip(down, 0, None).sum())
    counts = {f"{share:.0%}": max(1, round(share * len(down))) for share in SHARES}
    worst = {k: float(np.clip(down[:n], 0, None).sum()) for k, n in counts.items()}
    return {
        "pairs": len(down),
        "push_down": float((values > 0).mean()),
        "sum_of_falls": fall,
        "sum": float(down.sum()),
        "share_of_fall": {k: v / fall if fall else None for k, v in worst.items()},
        "sum_without": {k: float(down[n:].sum()) for k, n in counts.items()},
    }


def summary_text(record: Mapping[str, Any]) -> str:
    """What ``concentration`` found, in words."""
    summary = record["concentration"]
    shares = summary["share_of_fall"]
    lines = [
        f"training on {summary['pairs']} pairs moves the mean ln pi(chosen) of {record['counts']['probes']} probes by "
        f"{-summary['sum']:+.2f} nats at first order",
        f"{summary['push_down']:.0%} of the pairs push it down",
    ]
    if None not in shares.values():
        lines.append(
            "of the fall the worst "
            + ", ".join(f"{k} hold {v:.0%}" for k, v in shares.items())
            + "; a filter gets less than that, since the others' updates grow to the same length"
        )
    lines += record["warnings"]
    return "\n".join(lines)


def finite(values: Influence, pairs: Sequence[TokenPair]) -> None:
    """Refuse an influence that is not finite.

    Raises:
      ChesError: names the row.
    """
    bad = np.flatnonzero(~np.isfinite(values.total))
    if bad.size:
        raise ChesError(f"row {pairs[bad[0]].index}: its influence is not finite; try --dtype float32")
