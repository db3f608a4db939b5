"""The text model inside a multimodal directory: its config, and which of the stored tensors are its own.

A multimodal ``config.json`` has the text model's config under ``text_config``, and its file the text model's tensors
under ``language_model.`` (``language_model.model.layers...``, ``model.language_model.layers...``), the head inside or
outside of it. Towers, projectors and heads for several tokens at once are known by name; they are left out, and what is
neither is kept under its own name, so that whoever reads the file finds a tensor it has no place for.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ches_jax.errors import CheckpointError

TEXT = "text_config"
TIED = "tie_word_embeddings"
INSIDE = re.compile(r"^(?:model\.)?(?:language_model|text_model)\.")
OTHER = re.compile(
    r"^(?:model\.)?(?P<part>visual|vision_\w+|image_\w+|audio_\w+|multi_modal_\w+|multimodal_\w+|mm_\w+|embed_vision|"
    r"embed_audio|connector|mtp)(?:\.|$)"
)
"""Names of the modules that turn pictures and sound into embeddings, and of multi-token prediction (``mtp``)."""
TIED_WRAPPERS = frozenset({"mistral3"})
"""Multimodal types that tie head and embedding unless they say otherwise, around text types that do not."""
FROM_OUTSIDE = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype", "quantization_config")
"""Keys that count for the text model where they are written beside ``text_config`` alone."""
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
LEFT_OUT = {
    "gemma": (256000, 3072, 24576, 28, 16),
    "gemma2": (256000, 2304, 9216, 26, 8),
    "gemma3_text": (262208, 2304, 9216, 26, 8),
    "gemma4_text": (262144, 2304, 9216, 30, 8),
    "granite": (32000, 4096, 11008, 32, 32),
    "llama": (32000, 4096, 11008, 32, 32),
    "ministral3": (131072, 4096, 14336, 34, 32),
    "mistral": (32000, 4096, 14336, 32, 32),
    "mixtral": (32000, 4096, 14336, 32, 32),
    "olmo2": (50304, 4096, 11008, 32, 32),
    "phi3": (32064, 3072, 8192, 32, 32),
    "qwen2": (151936, 4096, 22016, 32, 32),
    "qwen3": (151936, 4096, 22016, 32, 32),
    "smollm3": (128256, 2048, 11008, 36, 16),
}
"""Text type -> the sizes that its config class has in transformers. A config inside another one is saved without the
values that are those of its class (LLaVA 1.5 has no ``hidden_size``), one by itself with all of them."""
T = TypeVar("T")


def text_config(raw: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The config of the text model: ``raw`` itself where it is one.

    >>> text_config({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})["model_type"]
    'gemma3_text'

    Raises:
      CheckpointError: a ``text_config`` that is none.
    """
    inner = raw.get(TEXT)
    if inner is None:
        return dict(raw)
    if not isinstance(inner, dict) or not isinstance(inner.get("model_type"), str):
        raise CheckpointError(
            f"{where}: config.json: {TEXT!r} = {inner!r:.80} describes no text model; give a directory whose "
            f"{TEXT!r} has a 'model_type' and the sizes"
        )
    out = {key: raw[key] for key in FROM_OUTSIDE if raw.get(key) is not None and inner.get(key) is None} | {
        key: value for key, value in inner.items() if value is not None or key not in FROM_OUTSIDE
    }
    sizes = LEFT_OUT.get(inner["model_type"])
    out = out if sizes is None else dict(zip(SIZES, sizes, strict=True)) | out
    # the head is outside of the text model, so what is written there decides, as in transformers
    tied = next((some[TIED] for some in (raw, inner) if some.get(TIED) is not None), None)
    if tied is None and raw.get("model_type") in TIED_WRAPPERS:
        tied = True
    return out if tied is None else out | {TIED: tied}


@dataclass(frozen=True)
class Parts:
    """Stored names sorted by what they belong to."""

    text: dict[str, str]
    """Stored name -> its name in a file of the text model alone."""
    other: dict[str, str]
    """Stored name -> the part it belongs to, such as ``vision_tower``."""

    def left_out(self) -> str:
        """What is left out, in one line; empty where nothing is."""
        counts = ", ".join(f"{part} ({n})" for part, n in sorted(Counter(self.other.values()).items()))
        return counts and f"{len(self.other)} tensors that are not of the text model are left out: {counts}"


def parts(names: Iterable[str]) -> Parts:
    """Which tensors are the text model's, and under which names.

    >>> two = parts(["model.language_model.norm.weight", "lm_head.weight", "model.visual.blocks.0.attn.qkv.bias"])
    >>> two.text
    {'model.language_model.norm.weight': 'norm.weight', 'lm_head.weight': 'lm_head.weight'}
    >>> two.left_out()
    '1 tensors that are not of the text model are left out: visual (1)'
    """
    text: dict[str, str] = {}
    other: dict[str, str] = {}
    for name in names:
        if match := OTHER.match(name):
            other[name] = match["part"]
        else:
            text[name] = INSIDE.sub("", name)
    return Parts(text, other)


def text_tensors(tensors: Mapping[str, T], where: str) -> tuple[dict[str, T], Parts]:
    """The tensors of the text model under its own names, and where the others went.

    Raises:
      CheckpointError: a file without a text model, one name stored twice.
    """
    sorted_out = parts(tensors)
    if tensors and not sorted_out.text:
        raise CheckpointError(
            f"{where}: no tensor of a text model (names under language_model. or model.language_model., or those of a "
            f"text checkpoint); found only {sorted_out.left_out().partition(': ')[2]}. Give the directory that holds "
            "the whole model"
        )
    out: dict[str, T] = {}
    for stored, name in sorted_out.text.items():
        if name in out:
            raise CheckpointError(
                f"{where}: tensor {name!r} of the text model is stored twice, once as {stored!r}; remove one of the two"
            )
        out[name] = tensors[stored]
    return out, sorted_out
