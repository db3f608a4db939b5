"""The model of any checkpoint of a run, for those who come after it."""

from pathlib import Path
from typing import Any

from ches_jax.errors import RunError
from ches_jax.inputs import Opener
from ches_jax.models.adapters.lora import merged
from ches_jax.models.checkpoint.load import load_model, with_parameters
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.runs.directory import CONFIG, RUN, read_json
from ches_jax.runs.model_card import trained_card
from ches_jax.runs.shapes import read_json_lines, require_shape
from ches_jax.train.checkpoints import FOLDER, read_trained, saved_steps
from ches_jax.train.config import TrainConfig
from ches_jax.train.metrics import FILE_NAME as METRICS
from ches_jax.train.policy import open_lora

LORA_OPTIONS = {"adapter?": str, "lora_rank?": int, "lora_alpha?": float, "lora_targets?": str, "lora_rslora?": bool}
BEGUN = {"model": str, "model_fingerprint": str, **LORA_OPTIONS}
"""The shape of what is read of the ``config.json`` of a run of training."""
DONE = {"config": {"model": str, "pairs": str}, "loss": str, "counts": {"updates": int}, "best?": {"step": int}}
"""The shape of what is read of its ``run.json``."""


def step_of(out: Path, words: str) -> int:
    """The step that ``last``, ``best`` or a number means.

    Raises:
      RunError: there is no such checkpoint; lists those there are.
    """
    steps = saved_steps(out)
    if not steps and (out / CONFIG).exists():
        _require_training(out)
    there = f"checkpoints are there of steps {', '.join(map(str, steps))}" if steps else "there are no checkpoints"
    if words == "best":
        best = _summary(out).get("best") if (out / RUN).exists() else None
        if best is None:
            raise RunError(f"{out}: no best step is known (a finished run with --keep-best tells one); {there}")
        words = str(best["step"])
    step = steps[-1] if words == "last" and steps else int(words) if words.isdecimal() else None
    if step not in steps:
        raise RunError(f"{out / FOLDER}: no step {words!r}; {there}")
    return step


def model_at(out: Path, step: int) -> tuple[Decoder, Path]:
    """The model of a checkpoint, adapters merged, and the directory of the model the run started from.

    Raises:
      ChesError: not a training run; the model it started from is gone or another one now.
    """
    options = _require_training(out)
    require_shape(out / CONFIG, options, BEGUN, RunError)
    opener = Opener()
    model = opener.model(options["model"])
    if opener.identity()["model_fingerprint"] != options["model_fingerprint"]:
        raise RunError(f"{model.directory}: not the weights that the run {out} started from")
    params = read_trained(out, step)
    adapters = {name: options.get(name) for name in (option.rstrip("?") for option in LORA_OPTIONS)}
    lora = open_lora(TrainConfig(**adapters), model, opener)  # type: ignore[arg-type]
    if lora is not None:
        params = merged({**named_parameters(load_model(model.directory)), **params}, lora.spec)
    return with_parameters(abstract_decoder(model.decoder), params), model.directory


def _require_training(out: Path) -> dict[str, Any]:
    """What the ``config.json`` of a run of training holds.

    Raises:
      RunError: no run, or one of another verb.
    """
    options = read_json(out / CONFIG)
    if options.get("verb") != "train":
        raise RunError(f"{out}: a run of `ches {options.get('verb')}`; only those of `ches train` have checkpoints")
    return options


def card_at(out: Path, step: int) -> str | None:
    """The card of a checkpoint, with what the run measured at its step; None before the run is finished."""
    if not (out / RUN).exists():
        return None
    numbers: dict[str, float] = {}
    for values in read_json_lines(out / METRICS, {"step": int}, RunError):
        if values["step"] == step:
            measured = {k: v for k, v in values.items() if "displacement/" in k and isinstance(v, int | float)}
            numbers |= measured
    return trained_card(_summary(out), step, numbers)


def _summary(out: Path) -> dict[str, Any]:
    return require_shape(out / RUN, read_json(out / RUN), DONE, RunError)
