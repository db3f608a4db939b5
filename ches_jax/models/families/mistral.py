"""Mistral: Llama with a sliding window on every layer and no biases."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.llama import NAMES

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``MistralConfig``."""
    sizes = r.sizes()
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 131072)
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 8),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope=r.rope(head_dim, positions),
        attention_scale=head_dim**-0.5,
        windows=(r.nullable_size("sliding_window", 4096),) * sizes["num_layers"],
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
