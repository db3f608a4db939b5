"""OLMo: LayerNorm without weight or bias, queries, keys and values clipped where the config says so."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.llama import NAMES

MODEL_TYPE = "olmo"
ARCHITECTURE = "OlmoForCausalLM"
NORM_EPS = 1e-5  # not in the config


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of an ``OlmoConfig``."""
    sizes = r.sizes()
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 2048)
    bias = r.get("attention_bias", bool, False)
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes),
        head_dim=head_dim,
        max_positions=positions,
        norm="layer",
        norm_eps=NORM_EPS,
        norm_weight=False,
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        qkv_clip=r.nullable("clip_qkv", float, None),
        attention_scale=head_dim**-0.5,
        windows=(None,) * sizes["num_layers"],
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
