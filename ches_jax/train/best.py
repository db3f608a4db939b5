"""What makes one checkpoint of a run the best."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from ches_jax.errors import ChesError


class Best(NamedTuple):
    """What makes a checkpoint the best."""

    metric: str
    """Name of a number of the evaluations."""
    mode: Literal["min", "max"]

    def value(self, metrics: Mapping[str, float]) -> float:
        """Higher is better; a number that is missing or NaN is worst."""
        value = metrics.get(self.metric, math.nan)
        return -math.inf if math.isnan(value) else value if self.mode == "max" else -value


def parse_best(text: str) -> Best:
    """``METRIC[:min|max]``; losses are best when small, accuracies and margins when large, others need min or max.

    >>> parse_best("eval_loss"), parse_best("displacement/lld_rate:min")
    (Best(metric='eval_loss', mode='min'), Best(metric='displacement/lld_rate', mode='min'))
    """
    metric, _, mode = text.partition(":")
    evaluated = metric.startswith(("displacement/", "eval_"))
    if not mode:
        mode = "min" if metric.endswith("loss") else "max" if metric.endswith(("accuracies", "margins")) else ""
    if mode not in ("min", "max") or not evaluated:
        raise ChesError(
            f"--keep-best {text!r}: expected a number of the evaluations and which way is better, such as "
            "eval_loss:min, eval_rewards/accuracies:max or displacement/margin:max"
        )
    return Best(metric, mode)
