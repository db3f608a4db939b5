"""A callback for TRL's DPOTrainer (and its relatives): per-pair displacement on held-out pairs.

    from ches_jax.integrations.trl import displacement_callback
    trainer.add_callback(displacement_callback(trainer))

At the start and at every evaluation the log-probabilities of the held-out pairs are computed as the trainer computes
them, one pair at a time. ``displacement/*`` goes to the trainer's log, and ``displacement.parquet`` into its output
directory, which ``ches diagnose`` reads. Nothing here needs jax; transformers and TRL are the trainer's own.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ches_jax.displacement.changes import FILE_NAME, SUMMARY, TOLERANCE, displacement_summary, regimes
from ches_jax.errors import ChesError
from ches_jax.runs.files import replacing


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
    unknown = sorted(set(stop_if or {}) - set(SUMMARY))
    if unknown:
        raise ChesError(f"stop_if {', '.join(unknown)}: expected some of {', '.join(SUMMARY)}")
    rows: list[pa.Table] = []
    start: list[np.ndarray] = []

    class DisplacementCallback(TrainerCallback):
        """Measures at the start of training and at every evaluation."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._measure(args, state)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            summary = self._measure(args, state)
            named = {f"eval_{name}": value for name, value in summary.items()}
            if metrics is not None:
                metrics.update(named)  # so that metric_for_best_model may name one
            trainer.log(named)
            short = {name.removeprefix("displacement/"): value for name, value in summary.items()}
            if any(short.get(name, float("nan")) > bound for name, bound in (stop_if or {}).items()):
                control.should_training_stop = True

        def _measure(self, args: Any, state: Any) -> dict[str, float]:
            logps, tokens = pair_logps(trainer)
            if not start:
                start.append(logps)
            chosen, rejected = (logps - start[0]).T
            rows.append(_table(int(state.global_step), logps, chosen, rejected, tokens, tolerance))
            out = Path(args.output_dir)
            out.mkdir(parents=True, exist_ok=True)
            with replacing(out / FILE_NAME) as temporary:
                pq.write_table(pa.concat_tables(rows), temporary)
            return displacement_summary(chosen, rejected, tolerance)

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


def _table(
    step: int, logps: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, tokens: np.ndarray, tolerance: float
) -> pa.Table:
    count = len(chosen)
    return pa.table(
        {
            "step": pa.array([step] * count, pa.int32()),
            "set": ["held_out"] * count,
            "row_id": [f"eval-{i}" for i in range(count)],
            "index": list(range(count)),
            "logp_chosen": logps[:, 0],
            "logp_rejected": logps[:, 1],
            "dlogp_chosen": chosen,
            "dlogp_rejected": rejected,
            "margin": chosen - rejected,
            "regime": regimes(chosen, rejected, tolerance).tolist(),
            "chosen_tokens": tokens[:, 0].astype(np.int32),
            "rejected_tokens": tokens[:, 1].astype(np.int32),
        }
    )
