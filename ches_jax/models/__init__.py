"""One decoder in Flax NNX for every supported family; a Hugging Face directory becomes a model here.

>>> from ches_jax.models import load_model
>>> model = load_model("bundled")
>>> model([[5, 6, 7]]).shape == (1, 3, model.config.vocab_size)
True
"""

from typing import TYPE_CHECKING

from ches_jax.face import lazy_names

if TYPE_CHECKING:
    from ches_jax.models.adapters.peft import load_adapted as load_adapted
    from ches_jax.models.adapters.peft import load_merged as load_merged
    from ches_jax.models.checkpoint.load import load_model as load_model
    from ches_jax.models.checkpoint.save import save_pretrained as save_pretrained
    from ches_jax.models.config import DecoderConfig as DecoderConfig
    from ches_jax.models.decoder import Decoder as Decoder
    from ches_jax.models.decoder import parameter_count as parameter_count

_HOMES = {
    "Decoder": ".decoder",
    "DecoderConfig": ".config",
    "load_adapted": ".adapters.peft",
    "load_merged": ".adapters.peft",
    "load_model": ".checkpoint.load",
    "parameter_count": ".decoder",
    "save_pretrained": ".checkpoint.save",
}
__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]
__getattr__, __dir__ = lazy_names(__name__, _HOMES)
