"""One decoder in Flax NNX for every supported family; a Hugging Face directory becomes a model here.

>>> from ches_jax.models import load_model
>>> model = load_model("bundled")
>>> model([[5, 6, 7]]).shape == (1, 3, model.config.vocab_size)
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ches_jax.models.adapters.peft import load_adapted, load_merged
    from ches_jax.models.checkpoint.load import load_model
    from ches_jax.models.checkpoint.save import save_pretrained
    from ches_jax.models.config import DecoderConfig
    from ches_jax.models.decoder import Decoder, parameter_count

__all__ = [
    "Decoder",
    "DecoderConfig",
    "load_adapted",
    "load_merged",
    "load_model",
    "parameter_count",
    "save_pretrained",
]
_HOMES = {
    "Decoder": "decoder",
    "DecoderConfig": "config",
    "load_adapted": "adapters.peft",
    "load_merged": "adapters.peft",
    "load_model": "checkpoint.load",
    "parameter_count": "decoder",
    "save_pretrained": "checkpoint.save",
}


def __getattr__(name: str) -> Any:
    """Imports a public name's module (and jax with it) when the name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
