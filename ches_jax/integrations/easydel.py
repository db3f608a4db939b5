"""A hook for trainers of EasyDeL, whose ``on_step_end`` may change the metrics of a step.

from ches_jax.integrations.easydel import watch_displacement
watch_displacement(trainer, pairs, logits_of, out="runs/d", every=50)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ches_jax.displacement import TOLERANCE
from ches_jax.integrations.arrays import HeldOutPairs
from ches_jax.integrations.pair_log import PairLog


def watch_displacement(
    trainer: Any,
    pairs: HeldOutPairs,
    logits_of: Callable[[Any, Any], Any],
    *,
    out: Path | str,
    every: int,
    tolerance: float = TOLERANCE,
) -> PairLog:
    """Measures the pairs now, and then in the trainer's ``on_step_end`` every so many steps.

    Args:
      trainer: with its ``model_state``.
      pairs: what is watched.
      logits_of: from the trainer's state and token ids [rows, length] to logits [rows, length, vocabulary].
      out: directory of ``displacement.parquet``.
      every: steps between measurements.
      tolerance: eps, nats.
    """
    table, former = PairLog(out, tolerance=tolerance), trainer.on_step_end

    def measure(state: Any, step: int) -> dict[str, float]:
        return table.add(step, pairs.logps(lambda ids: logits_of(state, ids)), pairs.tokens)

    def on_step_end(state: Any, metrics: Any, step: int) -> tuple[Any, Any]:
        state, metrics = former(state, metrics, step)
        if int(step) and int(step) % every == 0:
            found = measure(state, int(step))
            if isinstance(metrics, dict):
                metrics = {**metrics, **found}
            elif getattr(metrics, "other_metrics", None) is not None:
                metrics.other_metrics.update(found)
        return state, metrics

    measure(trainer.model_state, int(getattr(trainer.model_state, "step", 0)))
    trainer.on_step_end = on_step_end
    return table
