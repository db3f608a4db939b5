"""A callback for TRL's DPOTrainer (and its relatives): per-pair displacement on held-out pairs.

    from ches_jax.integrations.trl import displacement_callback
    trainer.add_callback(displacement_callback(trainer))

At the start and at every evaluation the log-probabilities of the held-out pairs are computed as the trainer computes
them, one pair at a time. ``displacement/*`` goes to the trainer's log, and ``displacement.parquet`` into its output
directory, which ``ches diagnose`` reads. Nothing here needs jax; transformers and TRL are the trainer's own.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ches_jax.displacement import TOLERANCE
from ches_jax.errors import ChesError
from ches_jax.integrations.pair_log import PairLog


def displacement_callback(
    trainer: Any, *, tolerance: float = TOLERANCE, stop_if: Mapping[str, float] | None = None
) -> Any:
    """A ``TrainerCallback`` for a trainer of TRL that has an evaluation set.

    Args:
      trainer: a ``DPOTrainer``; its evaluation set is what is watched.
      tolerance: eps, nats.
      stop_if: stop training when a number of ``displacement_summary`` is beyond its bound: ``{"lld_rate": 0.6}``.

    Raises:
      ChesError: no evaluation set; a name of ``stop_if`` that no summary has.
    """
    from transformers import TrainerCallback

    if trainer.eval_dataset is None:
        raise ChesError("the displacement of held-out pairs needs an eval_dataset")
    log = PairLog(trainer.args.output_dir, tolerance=tolerance, stop_if=stop_if)

    class DisplacementCallback(TrainerCallback):
        """Measures at the start of training and at every evaluation."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._measure(state)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            summary = self._measure(state)
            named = {f"eval_{name}": value for name, value in summary.items()}
            if metrics is not None:
                metrics.update(named)  # so that metric_for_best_model may name one
            trainer.log(named)
            if log.stops(summary):
                control.should_training_stop = True

        def _measure(self, state: Any) -> dict[str, float]:
            return log.add(int(state.global_step), *pair_logps(trainer))

    return DisplacementCallback()


def pair_logps(trainer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the responses of each pair of the evaluation set, and how many tokens they have.

    The trainer's own collator makes the batches; both arrays are [pairs, 2], chosen and rejected.
    """
    import torch

    model, logps, tokens = trainer.model, [], []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for row in trainer.eval_dataset:
            batch = {k: v.to(model.device) for k, v in trainer.data_collator([row]).items() if hasattr(v, "to")}
            ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:].bool()
            logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].float()
            each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            logps.append((each * mask).sum(-1).double().cpu().numpy())
            tokens.append(mask.sum(-1).cpu().numpy())
    model.train(was_training)
    return np.stack(logps), np.stack(tokens)
