"""The table of supported families, by the ``model_type`` of ``config.json``."""

from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any, Protocol, cast, runtime_checkable

from ches_jax.errors import CheckpointError, many
from ches_jax.hf.quantised.schemes import scheme_of
from ches_jax.hf.text_part import text_config
from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import (
    cohere2,
    deepseek_v3,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    lfm2,
    llama,
    llama4,
    ministral3,
    mistral,
    mixtral,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    smollm3,
    starcoder2,
)
from ches_jax.models.families.unsupported import unsupported_reason
from ches_jax.notices import notice


@runtime_checkable
class Family(Protocol):
    """What a family file provides."""

    MODEL_TYPE: str
    ARCHITECTURE: str

    def read_config(self, r: ConfigReader) -> DecoderConfig:
        """``config.json`` to a ``DecoderConfig``."""
        ...

    def name_rules(self, params: Iterable[str], config: DecoderConfig) -> list[Rule]:
        """Where each parameter is stored."""
        ...


def _by_type(*modules: ModuleType) -> dict[str, Family]:
    return {m.MODEL_TYPE: cast(Family, m) for m in modules}


FAMILIES = _by_type(
    cohere2,
    deepseek_v3,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm4,
    glm4_moe,
    gpt2,
    gpt_neox,
    gpt_oss,
    granite,
    lfm2,
    llama,
    llama4,
    ministral3,
    mistral,
    mixtral,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    smollm3,
    starcoder2,
)


def family_of(raw: dict[str, Any], where: str) -> Family:
    """The family of a config (of its text model), or a CheckpointError that says what it is instead and what to do."""
    inner = text_config(raw, where)
    if reason := unsupported_reason(raw, inner, FAMILIES):
        raise CheckpointError(f"{where}: {reason}")
    return FAMILIES[inner["model_type"]]


def decoder_config(raw: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder a Hugging Face config describes; of a multimodal one, the text model.

    Raises:
      CheckpointError: an unknown family, a missing key, a key that is not handled, sizes that do not fit together. All
        in one message.
    """
    family = family_of(raw, where)
    text = text_config(raw, where)
    scheme_of(text, where)
    reader = ConfigReader(text)
    config = family.read_config(reader)
    problems = reader.finish()
    if not problems:
        problems = list(_misfits(config))
    if problems:
        raise CheckpointError(many(where, problems))
    if unread := reader.unread():
        notice(f"{where}: no code of a {family.MODEL_TYPE} model reads these keys of the config: {unread}")
    return config


def _misfits(config: DecoderConfig) -> Iterator[str]:
    """Values that are fine by themselves and not together, or that divide by zero."""
    if config.num_heads % config.num_kv_heads:
        yield f"config.json: {config.num_heads} heads are not a multiple of {config.num_kv_heads} kv heads"
    e = config.experts
    if e is not None and e.per_token > e.count:
        yield f"config.json: {e.per_token} experts for a token of {e.count}; expected no more than there are"
    bounds = {
        "soft cap of attention": config.attention_softcap,
        "soft cap of the logits": config.logit_softcap,
        "clip of queries, keys and values": config.qkv_clip,
    }
    for name, value in bounds.items():
        if value is not None and value <= 0:
            yield f"config.json: the {name} is {value!r}; expected a positive number, or null for none"
