"""``ches convert``: a model directory, a model with an adapter, or a checkpoint of a run, as a new model directory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ches_jax.errors import ChesError, require_config
from ches_jax.face import make_callable
from ches_jax.options import Options, Place, require_dtype, require_positive
from ches_jax.runs.store import place

make_callable(__name__)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Options):
    """What to write, and how.

    >>> ConvertConfig(model="bundled", out="copy").model
    'bundled'
    """

    model: str | None = None
    """Hugging Face model directory or hub name."""
    adapter: str | None = None
    """PEFT adapter (directory or hub name) to merge into the weights."""
    run_dir: Annotated[str | None, tyro.conf.arg(name="run")] = None
    """Run of `ches train` whose checkpoint to write instead, adapters merged."""
    step: str = "last"
    """Which checkpoint: last, best (of --keep-best), or its number of updates."""
    out: Place
    """The directory to write; must not exist, or be empty."""
    dtype: str | None = None
    """Store the weights in this dtype; default: each tensor's own."""
    whole: bool = False
    """Of a multimodal directory, write all of it with the new text model inside; default: the text model alone."""
    shard_gb: float = 2.0
    """Largest size of a weight file."""


def convert(config: ConvertConfig) -> Path:
    """Load, write, return the directory.

    Args:
      config: what to load and how to write it.

    Raises:
      ChesError: options that do not go together, anything that does not fit.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     out = convert(ConvertConfig(model="bundled", out=Path(folder) / "copy"))
    ...     (out / "model.safetensors").exists()
    True
    """
    require_config("convert", config, ConvertConfig)
    import jax

    from ches_jax.hf.directory import resolve
    from ches_jax.models.adapters.peft import load_merged
    from ches_jax.models.checkpoint.load import load_model
    from ches_jax.models.checkpoint.save import save_pretrained
    from ches_jax.runs.model_card import converted_card
    from ches_jax.train.restore import card_at, model_at, step_of

    require_dtype("dtype", config.dtype)
    require_positive({"shard-gb": config.shard_gb})
    if (config.model is None) == (config.run_dir is None):
        raise ChesError("give one of --model DIR (with --adapter DIR where there is one) and --run DIR")
    with jax.enable_x64(True):  # float64 weights stay float64
        if config.run_dir is not None:
            out = place(config.run_dir)
            step = step_of(out, config.step)
            model, directory = model_at(out, step)
            card = card_at(out, step)
        else:
            directory = resolve(str(config.model))
            # merged in the dtype that is written: what that can hold is not rounded away before
            model = (
                load_merged(directory, config.adapter, param_dtype=config.dtype)
                if config.adapter
                else load_model(directory)
            )
            card = converted_card(str(config.model), config.adapter, config.dtype)
        save_pretrained(
            model,
            config.out,
            like=directory,
            dtype=config.dtype,
            shard_bytes=int(config.shard_gb * 2**30),
            whole=config.whole,
            card=card,
        )
    return config.out
