"""What stops a run: numbers that are none, and a policy that is not the reference it started from."""

import math
from collections.abc import Sequence

import numpy as np

from ches_jax.errors import ChesError
from ches_jax.train.checkpoints import Checkpoints
from ches_jax.train.data.batches import Batch
from ches_jax.train.objective import POLICY, needs_reference
from ches_jax.train.setup import Run

AGREEMENT = {"float64": 1e-9, "float32": 1e-4}
"""How far, relatively, the policy's first log-probabilities may lie from a reference that it is; 16 bits: 2e-2."""


def require_finite(run: Run, i: int, metrics: dict[str, float], saved: Checkpoints) -> None:
    """Stop a run whose loss or gradient is no number.

    Raises:
      ChesError: with update, rows and last good checkpoint.
    """
    if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
        return
    saved.wait()
    what = "loss" if not math.isfinite(metrics["loss"]) else "grad_norm"
    rows = [run.train.pairs[j * run.train.size] for group in run.plan.update(i) for j in group]
    named = ", ".join(f"{p.index} ({p.row_id[:12]})" for p in rows[:8]) + (" ..." if len(rows) > 8 else "")
    good = saved.latest()
    where = (
        f"the last good checkpoint is {saved.folder / str(good)}" if good is not None else "no checkpoint was written"
    )
    raise ChesError(
        f"update {i + 1}: {what} is {metrics[what]} on rows {named}; {where}. A lower --lr, --clip 1 or "
        "--dtype float32 may help"
    )


def require_agreement(run: Run, batches: Sequence[Batch], metrics: dict[str, float]) -> None:
    """Before the first update the policy is the reference: equal log-probabilities, and a DPO loss of ln 2.

    Raises:
      ChesError: they differ by more than rounding.
    """
    if not needs_reference(run.loss) or run.config.reference != "initial":
        return
    tolerance = AGREEMENT.get(run.config.dtype, 2e-2)
    reference = float(np.concatenate([b.reference for b in batches]).mean())
    policy = metrics[POLICY]
    if not abs(policy - reference) <= tolerance * max(1.0, abs(reference)):
        raise ChesError(
            f"before the first update the policy gives the responses {policy:.6g} nats, the reference "
            f"{reference:.6g}; they are the same model, so the reference log-probabilities are not of these rows"
        )
    beta = run.loss.hyper.get("beta", 1.0)
    plain = run.config.loss in ("dpo", "sigmoid") and not run.config.sft and run.config.weights is None
    if plain and not abs(metrics["loss"] - math.log(2)) <= beta * tolerance * max(1.0, abs(reference)):
        raise ChesError(f"before the first update the DPO loss is {metrics['loss']:.6g}, not ln 2: please report this")
