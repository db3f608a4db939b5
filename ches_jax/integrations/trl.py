"""A callback for TRL's DPOTrainer, CPOTrainer and ORPOTrainer: per-pair displacement on held-out pairs.

    from ches_jax.integrations.trl import displacement_callback
    trainer.add_callback(displacement_callback(trainer))

At the start and at every evaluation the log-probabilities of the held-out pairs are computed as the trainer computes
them, one pair at a time. ``displacement/*`` goes to the trainer's log, and ``displacement.parquet`` into its output
directory, which ``ches diagnose`` reads; a run that resumes from a checkpoint continues that file. Nothing here needs
jax; transformers and TRL are the trainer's own.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ches_jax.displacement import TOLERANCE
from ches_jax.errors import ChesError
from ches_jax.integrations.pair_log import PairLog

NOT_OF_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps")
"""What is in a batch of DPOTrainer beside the model's inputs."""


def displacement_callback(
    trainer: Any,
    *,
    held_out: str | None = None,
    tolerance: float = TOLERANCE,
    stop_if: Mapping[str, float] | None = None,
) -> Any:
    """A ``TrainerCallback`` for a trainer of TRL that has an evaluation set.

    Args:
      trainer: a ``DPOTrainer``, ``CPOTrainer`` or ``ORPOTrainer``; its evaluation set is what is watched.
      held_out: which evaluation set is watched, where the trainer has several by name.
      tolerance: eps, nats.
      stop_if: stop training when a number of ``displacement_summary`` is above its bound, or below it where the bound
        is negative: ``{"lld_rate": 0.6}``, ``{"dlogp_chosen": -20.0}``.

    Raises:
      ChesError: no evaluation set, or several and no choice; batches that are not of pairs; a name of ``stop_if`` that
        no summary has, a bound that no number can pass.
    """
    from transformers import TrainerCallback

    name, rows = _watched(trainer.eval_dataset, held_out)
    prefix = "eval" if name is None else f"eval_{name}"
    for row in rows:  # batches of another kind are refused here, not when the training begins
        _responses(trainer.data_collator([row]), trainer)
        break
    log = PairLog(trainer.args.output_dir, tolerance=tolerance, stop_if=stop_if)

    class DisplacementCallback(TrainerCallback):
        """Measures at the start of training and at every evaluation."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._measure(state)

        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
            if name is not None and metrics is not None and f"{prefix}_loss" not in metrics:
                return  # the evaluation of another set
            summary = self._measure(state)
            named = {f"{prefix}_{key}": value for key, value in summary.items()}
            if metrics is not None:
                metrics.update(named)  # so that metric_for_best_model may name one
            trainer.log(named)
            if log.stops(summary):
                control.should_training_stop = True

        def _measure(self, state: Any) -> dict[str, float]:
            return log.add(int(state.global_step), *pair_logps(trainer, rows))

    return DisplacementCallback()


def _watched(sets: Any, held_out: str | None) -> tuple[str | None, Any]:
    """The name, if it has one, and the rows of the evaluation set that is watched."""
    if sets is None:
        raise ChesError("the displacement of held-out pairs needs an eval_dataset")
    if not isinstance(sets, dict):
        if held_out is not None:
            raise ChesError(f"held_out={held_out!r}: the eval_dataset is one set without a name; leave held_out away")
        return None, sets
    if held_out is None and len(sets) == 1:
        held_out = next(iter(sets))
    if held_out not in sets:
        given = "several sets" if held_out is None else f"no set {held_out!r}"
        raise ChesError(f"eval_dataset has {given}; choose one with held_out=...: {', '.join(map(repr, sets))}")
    return held_out, sets[held_out]


def pair_logps(trainer: Any, rows: Iterable[Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of the responses of each pair, and how many tokens they have.

    The trainer's own collator makes the batches; both arrays are [pairs, 2], chosen and rejected.

    Args:
      trainer: as for ``displacement_callback``.
      rows: prepared rows of the trainer; default: its evaluation set.
    """
    import torch

    model, logps, tokens = trainer.model, [], []
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for row in trainer.eval_dataset if rows is None else rows:
                parts = [_logps(model, *part) for part in _responses(trainer.data_collator([row]), trainer)]
                sums, counts = (torch.cat(side).cpu() for side in zip(*parts, strict=True))
                logps.append(sums.double().numpy())
                tokens.append(counts.numpy())
    finally:
        for module, mode in training.items():
            module.training = mode
    return np.stack(logps), np.stack(tokens)


def _responses(batch: Mapping[str, Any], trainer: Any) -> list[tuple[dict[str, Any], Any]]:
    """Inputs of the model and masks of the responses in a batch of one pair; the chosen response is the first row."""
    if "completion_mask" in batch and len(batch["completion_mask"]) == 2:  # DPOTrainer: both are one batch
        inputs = {k: v for k, v in batch.items() if k not in NOT_OF_THE_MODEL and hasattr(v, "to")}
        return [(inputs, batch["completion_mask"])]
    sides = ("chosen", "rejected")
    if all(f"{side}_{name}" in batch for side in sides for name in ("input_ids", "attention_mask", "labels")):
        return [  # CPOTrainer, ORPOTrainer
            ({n: batch[f"{side}_{n}"] for n in ("input_ids", "attention_mask")}, batch[f"{side}_labels"] != -100)
            for side in sides
        ]
    raise ChesError(
        f"displacement_callback: the batches of {type(trainer).__name__} ({', '.join(batch)}) are not those of pairs; "
        "expected input_ids and completion_mask of a chosen and a rejected response (DPOTrainer), or chosen_input_ids, "
        "chosen_labels, ... (CPOTrainer, ORPOTrainer). Both models and pairs do as well: ches diagnose --before MODEL "
        "--after MODEL --pairs FILE"
    )


def _logps(model: Any, inputs: Mapping[str, Any], mask: Any) -> tuple[Any, Any]:
    """Sums of log-probabilities of the tokens in the mask, and their number, of each row."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    ids, mask = inputs["input_ids"], mask.to(model.device)[:, 1:].bool()
    # virtual tokens of an adapter come before those of the row
    logits = model(**inputs, use_cache=False).logits[:, -ids.shape[1] :][:, :-1].float()
    each = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return each.masked_fill(~mask, 0.0).sum(-1), mask.sum(-1)
