"""A hook for trainers of tunix (``PeftTrainer``, ``DPOTrainer``), which MaxText's post-training uses too.

    from ches_jax.integrations.tunix import displacement_hooks
    trainer.with_training_hooks(displacement_hooks(pairs, logits_of, out="runs/d", every=50))

Per-pair displacement of held-out pairs at the start, every so many updates and at the end: ``displacement.parquet`` for
``ches diagnose``; a run that resumes continues that file. A trainer has one object of hooks: ``then`` is called after
this one.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ches_jax.displacement import TOLERANCE
from ches_jax.integrations.arrays import HeldOutPairs
from ches_jax.integrations.pair_log import PairLog


def displacement_hooks(
    pairs: HeldOutPairs,
    logits_of: Callable[[Any, Any], Any],
    *,
    out: Path | str,
    every: int,
    tolerance: float = TOLERANCE,
    log: Callable[[dict[str, float], int], None] | None = None,
    then: Any = None,
) -> Any:
    """``TrainingHooks`` of tunix.

    Args:
      pairs: what is watched.
      logits_of: from the trainer's model and token ids [rows, length] to logits [rows, length, vocabulary].
      out: directory of ``displacement.parquet``.
      every: updates between measurements.
      tolerance: eps, nats.
      log: takes ``displacement/*`` and the step, for a tracker.
      then: other hooks of the trainer.
    """
    from tunix.sft.hooks import TrainingHooks  # pyright: ignore[reportMissingImports]

    table, measured = PairLog(out, tolerance=tolerance), set()

    def measure(trainer: Any) -> None:
        # the trainer's own count: the step that it gives to on_train_step_end is of an update before the last one
        step = int(trainer.train_steps)
        if step in measured:
            return
        measured.add(step)
        found = table.add(step, pairs.logps(lambda ids: logits_of(trainer.model, ids)), pairs.tokens)
        if log is not None:
            log(found, step)

    class DisplacementHooks(TrainingHooks):
        """Measures, then calls the other hooks."""

        def on_train_start(self, train_ctx: Any) -> None:
            measure(train_ctx)
            _call(then, "on_train_start", train_ctx)

        def on_train_end(self, train_ctx: Any) -> None:
            measure(train_ctx)
            _call(then, "on_train_end", train_ctx)

        def on_train_step_start(self, train_ctx: Any) -> None:
            if int(train_ctx.train_steps) % every == 0:
                measure(train_ctx)
            _call(then, "on_train_step_start", train_ctx)

        def on_train_step_end(self, train_ctx: Any, train_step: int, train_loss: float, *more: Any) -> None:
            _call(then, "on_train_step_end", train_ctx, train_step, train_loss, *more)

        def on_eval_step_start(self, train_ctx: Any) -> None:
            _call(then, "on_eval_step_start", train_ctx)

        def on_eval_step_end(self, train_ctx: Any, eval_loss: float) -> None:
            _call(then, "on_eval_step_end", train_ctx, eval_loss)

    return DisplacementHooks()


def _call(hooks: Any, name: str, *values: Any) -> None:
    if hooks is not None:
        getattr(hooks, name)(*values)
