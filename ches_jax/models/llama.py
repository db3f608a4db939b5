"""Llama 2, 3 and 3.1+: RMSNorm before attention and MLP, rotary positions, grouped-query attention, SwiGLU."""

from collections.abc import Iterable
from typing import Any

from ches_jax.models.config import DecoderConfig
from ches_jax.models.mapping import Rule, rules
from ches_jax.models.reader import ConfigReader

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
NAMES = {
    "embed_tokens": "embed_tokens",
    "norm": "norm",
    "lm_head": "lm_head",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"self_attn.{p}": f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj")},
    **{f"mlp.{p}": f"mlp.{p}" for p in ("gate_proj", "up_proj", "down_proj")},
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``LlamaConfig``."""
    width = r.size("hidden_size")
    heads = r.size("num_attention_heads")
    head_dim = r.size("head_dim", max(width // heads, 1))
    layers = r.size("num_hidden_layers")
    positions = r.size("max_position_embeddings", 2048)
    bias = r.get("attention_bias", bool, False)
    return DecoderConfig(
        family=MODEL_TYPE,
        vocab_size=r.size("vocab_size"),
        width=width,
        mlp_width=r.size("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=r.size("num_key_value_heads", heads),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=r.get("mlp_bias", bool, False),
        attention_scale=head_dim**-0.5,
        windows=(None,) * layers,
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)


def write_config(config: DecoderConfig) -> dict[str, Any]:
    """``config.json`` of a new model with plain rotary positions (what ``read_config`` reads back)."""
    assert config.rope is not None and config.rope.kind == "default"
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "hidden_act": config.activation,
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tie_embeddings,
    }
