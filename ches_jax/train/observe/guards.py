"""What stops a run: a loss or gradient that is not finite, and a policy that is not the reference it started from."""

import math
from collections.abc import Sequence

import numpy as np

from ches_jax.errors import ChesError
from ches_jax.losses import Loss
from ches_jax.train.batch_loss import POLICY
from ches_jax.train.checkpoints import Checkpoints
from ches_jax.train.data.batches import Batch
from ches_jax.train.data.examples import Examples
from ches_jax.train.data.split import Plan

AGREEMENT = {"float64": 1e-9, "float32": 1e-4}
"""How far, relatively, the policy's first log-probabilities may lie from a reference that it is; 16 bits: 2e-2."""


def require_finite(update: int, metrics: dict[str, float], examples: Examples, plan: Plan, saved: Checkpoints) -> None:
    """Stop a run whose loss or gradient is NaN or infinite.

    Args:
      update: its number, from 0.
      metrics: of this update: ``loss`` and ``grad_norm``.
      examples: what is trained on.
      plan: which of them made the update.
      saved: the checkpoints, of which the last whole one is named.

    Raises:
      ChesError: with update, rows and last good checkpoint.
    """
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    saved.wait()
    what = "loss" if not math.isfinite(metrics["loss"]) else "grad_norm"
    rows = [examples.pairs[examples.pairs_of(i).start] for group in plan.update(update) for i in group]
    names = ", ".join(f"{p.index} ({p.row_id[:12]})" for p in rows[:8]) + (" ..." if len(rows) > 8 else "")
    good = saved.latest()
    where = (
        f"the last good checkpoint is {saved.folder / str(good)}" if good is not None else "no checkpoint was written"
    )
    raise ChesError(
        f"update {update + 1}: {what} is {metrics[what]} on rows {names}; {where}. A lower --lr, --clip 1 or "
        "--dtype float32 may help"
    )


def require_agreement(batches: Sequence[Batch], metrics: dict[str, float], loss: Loss, dtype: str) -> None:
    """Where the reference is the initial policy: before the first update the two give equal log-probabilities.

    Args:
      batches: the first update's, with the reference's log-probabilities.
      metrics: of that update, computed before it was made.
      loss: the objective; of plain DPO the first loss must be ln 2 too.
      dtype: of the computation, which decides the tolerance.

    Raises:
      ChesError: they differ by more than rounding.
    """
    tolerance = AGREEMENT.get(dtype, 2e-2)
    reference = float(np.concatenate([b.reference for b in batches]).mean())
    policy = metrics[POLICY]
    if not abs(policy - reference) <= tolerance * max(1.0, abs(reference)):
        raise ChesError(
            f"before the first update the policy gives the responses {policy:.6g} nats, the reference "
            f"{reference:.6g}; they are the same model, so the reference log-probabilities are not of these rows"
        )
    beta = loss.hyper.get("beta", 1.0)
    plain = loss.name in ("dpo", "sigmoid")  # not wrapped with weights or an SFT term
    if plain and not abs(metrics["loss"] - math.log(2)) <= beta * tolerance * max(1.0, abs(reference)):
        raise ChesError(f"before the first update the DPO loss is {metrics['loss']:.6g}, not ln 2: please report this")
