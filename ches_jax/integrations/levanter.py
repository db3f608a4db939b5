"""A hook for levanter's trainer (and marin's).

    from ches_jax.integrations.levanter import displacement_hook
    trainer.add_hook(displacement_hook(pairs, logits_of, out="runs/d"), every=50)

levanter calls a hook after an update: the first call is taken for the start of the run unless ``start`` has the model
before it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ches_jax.displacement import TOLERANCE
from ches_jax.integrations.arrays import HeldOutPairs
from ches_jax.integrations.pair_log import PairLog


def displacement_hook(
    pairs: HeldOutPairs,
    logits_of: Callable[[Any, Any], Any],
    *,
    out: Path | str,
    start: Any = None,
    tolerance: float = TOLERANCE,
    log: Callable[[dict[str, float], int], None] | None = None,
) -> Callable[[Any], dict[str, float]]:
    """A function of levanter's ``StepInfo`` that measures the pairs.

    Args:
      pairs: what is watched.
      logits_of: from the model and token ids [rows, length] to logits [rows, length, vocabulary], as plain arrays.
      out: directory of ``displacement.parquet``.
      start: the model before the first update.
      tolerance: eps, nats.
      log: takes ``displacement/*`` and the step: ``lambda found, step: levanter.tracker.log(found, step=step)``.
    """
    table = PairLog(out, tolerance=tolerance)

    def measure(model: Any, step: int) -> dict[str, float]:
        found = table.add(step, pairs.logps(lambda ids: logits_of(model, ids)), pairs.tokens)
        if log is not None:
            log(found, step)
        return found

    if start is not None:
        measure(start, 0)
    return lambda info: measure(info.model, int(info.next_step))
