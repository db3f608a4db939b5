"""The table of supported families, by the ``model_type`` of ``config.json``."""

from collections.abc import Iterable
from types import ModuleType
from typing import Any, Protocol, cast

from ches_jax.errors import CheckpointError, many
from ches_jax.models import llama
from ches_jax.models.config import DecoderConfig
from ches_jax.models.mapping import Rule
from ches_jax.models.reader import ConfigReader


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


FAMILIES = _by_type(llama)


def family_of(raw: dict[str, Any], where: str) -> Family:
    """The family of a config, or a CheckpointError that lists what is supported."""
    kind = raw.get("model_type")
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"{where}: a quantised checkpoint; give the unquantised weights (bf16, fp16 or fp32)"
        )
    if kind not in FAMILIES:
        raise CheckpointError(
            f"{where}: model_type {kind!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[kind]


def decoder_config(raw: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """The decoder a Hugging Face config describes.

    Raises:
      CheckpointError: an unknown family, a missing key, a key that is not handled, sizes that do not fit together. All
        in one message.
    """
    family = family_of(raw, where)
    reader = ConfigReader(raw)
    config = family.read_config(reader)
    problems = reader.finish()
    if not problems and config.num_heads % config.num_kv_heads:
        problems.append(
            f"config.json: {config.num_heads} heads are not a multiple of {config.num_kv_heads} kv heads"
        )
    if problems:
        raise CheckpointError(many(where, problems))
    return config
