"""Llama 2, 3 and 3.1+: RMSNorm before attention and MLP, rotary positions, grouped-query attention, SwiGLU."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig

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
    sizes = r.sizes()
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 2048)
    bias = r.get("attention_bias", bool, False)
    r.must_be("rope_interleaved", False)
    r.ignore("is_llama_config")
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=r.get("mlp_bias", bool, False),
        attention_scale=head_dim**-0.5,
        windows=(None,) * sizes["num_layers"],
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
