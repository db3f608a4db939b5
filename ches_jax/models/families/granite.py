"""Granite 3: Llama with four multipliers: of embeddings, of what a block adds, of attention scores, of logits."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.llama import NAMES

MODEL_TYPE = "granite"
ARCHITECTURE = "GraniteForCausalLM"


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``GraniteConfig``."""
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
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        residual_scale=r.get("residual_multiplier", float, 1.0),
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=r.get("attention_multiplier", float, 1.0),
        windows=(None,) * sizes["num_layers"],
        activation=r.activation("hidden_act", "silu"),
        mlp_bias=r.get("mlp_bias", bool, False),
        embedding_scale=r.get("embedding_multiplier", float, 1.0),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
        logit_scale=1 / r.positive("logits_scaling", 1.0),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
