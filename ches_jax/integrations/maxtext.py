"""For MaxText's own loop, which has no hooks: a function to call after each step.

Its post-training runs on tunix, whose hooks (``integrations.tunix``) serve there.

    from ches_jax.integrations.maxtext import displacement_step
    after_step = displacement_step(pairs, logits_of, out="runs/d", every=50)
    after_step(0, state.params)          # before the loop
    after_step(step + 1, state.params)   # behind train_step
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ches_jax.displacement import TOLERANCE
from ches_jax.integrations.arrays import HeldOutPairs
from ches_jax.integrations.pair_log import PairLog


def displacement_step(
    pairs: HeldOutPairs,
    logits_of: Callable[[Any, Any], Any],
    *,
    out: Path | str,
    every: int,
    tolerance: float = TOLERANCE,
) -> Callable[[int, Any], dict[str, float] | None]:
    """A function of the step and the parameters; it measures at step 0 and every so many steps.

    Args:
      pairs: what is watched.
      logits_of: from parameters and token ids [rows, length] to logits [rows, length, vocabulary].
      out: directory of ``displacement.parquet``.
      every: steps between measurements.
      tolerance: eps, nats.
    """
    table = PairLog(out, tolerance=tolerance)

    def after_step(step: int, params: Any) -> dict[str, float] | None:
        if step % every:
            return None
        return table.add(int(step), pairs.logps(lambda ids: logits_of(params, ids)), pairs.tokens)

    return after_step
