"""The model of any checkpoint of a run, for those who come after it."""

from pathlib import Path

from ches_jax.errors import RunError
from ches_jax.inputs import Opener
from ches_jax.models.adapters.lora import merged
from ches_jax.models.checkpoint.load import load_model, with_parameters
from ches_jax.models.decoder import Decoder, abstract_decoder, named_parameters
from ches_jax.runs.directory import CONFIG, RUN, read_json
from ches_jax.runs.model_card import trained_card
from ches_jax.runs.shapes import read_json_lines
from ches_jax.train.checkpoints import FOLDER, read_trained, saved_steps
from ches_jax.train.config import TrainConfig
from ches_jax.train.metrics import FILE_NAME as METRICS
from ches_jax.train.policy import open_lora

LORA_OPTIONS = ("adapter", "lora_rank", "lora_alpha", "lora_targets", "lora_rslora")


def step_of(out: Path, words: str) -> int:
    """The step that ``last``, ``best`` or a number means.

    Raises:
      RunError: there is no such checkpoint; lists those there are.
    """
    steps = saved_steps(out)
    there = f"checkpoints are there of steps {', '.join(map(str, steps))}" if steps else "there are no checkpoints"
    if words == "best":
        best = read_json(out / RUN).get("best") if (out / RUN).exists() else None
        if best is None:
            raise RunError(f"{out}: no best step is known (a finished run with --keep-best tells one); {there}")
        return int(best["step"])
    step = steps[-1] if words == "last" and steps else int(words) if words.isdecimal() else None
    if step not in steps:
        raise RunError(f"{out / FOLDER}: no step {words!r}; {there}")
    return step


def model_at(out: Path, step: int) -> tuple[Decoder, Path]:
    """The model of a checkpoint, adapters merged, and the directory of the model the run started from.

    Raises:
      ChesError: not a training run; the model it started from is gone or another one now.
    """
    options = read_json(out / CONFIG)
    if options.get("verb") != "train":
        raise RunError(f"{out}: a run of `ches {options.get('verb')}`; only those of `ches train` have checkpoints")
    opener = Opener()
    model = opener.model(options["model"])
    if opener.identity()["model_fingerprint"] != options["model_fingerprint"]:
        raise RunError(f"{model.directory}: not the weights that the run {out} started from")
    params = read_trained(out, step)
    lora = open_lora(TrainConfig(**{name: options.get(name) for name in LORA_OPTIONS}), model, opener)  # type: ignore[arg-type]
    if lora is not None:
        params = merged({**named_parameters(load_model(model.directory)), **params}, lora.spec)
    return with_parameters(abstract_decoder(model.decoder), params), model.directory


def card_at(out: Path, step: int) -> str | None:
    """The card of a checkpoint, with what the run measured at its step; None before the run is finished."""
    if not (out / RUN).exists():
        return None
    numbers: dict[str, float] = {}
    for values in read_json_lines(out / METRICS, {"step": int}, RunError):
        if values["step"] == step:
            numbers |= {name: value for name, value in values.items() if "displacement/" in name}
    return trained_card(read_json(out / RUN), step, numbers)
