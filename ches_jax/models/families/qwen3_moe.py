"""Qwen 3 with routed experts, in all layers or in some."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig, ExpertsConfig, LayerKind
from ches_jax.models.families import llama
from ches_jax.models.families.qwen2_moe import routed_layers

MODEL_TYPE = "qwen3_moe"
ARCHITECTURE = "Qwen3MoeForCausalLM"
NAMES = {
    **llama.NAMES,
    "self_attn.q_norm": "self_attn.q_norm",
    "self_attn.k_norm": "self_attn.k_norm",
    "mlp.router": "mlp.gate",
    **{f"mlp.experts.{p}": f"mlp.experts.{{expert}}.{p}" for p in ("gate_proj", "up_proj", "down_proj")},
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Qwen3MoeConfig``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 32768)
    bias = r.get("attention_bias", bool, False)
    written = r.nullable_size("sliding_window", 4096)
    window = written if r.get("use_sliding_window", bool, False) else None
    r.ignore("output_router_logits", "router_aux_loss_coef", "max_window_layers")
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 4),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        attention_scale=head_dim**-0.5,
        windows=(window,) * layers,
        layer_kinds=tuple(LayerKind(mlp="routed" if own else "dense") for own in routed_layers(r, layers)),
        activation=r.activation("hidden_act", "silu"),
        experts=ExpertsConfig(
            count=r.one_of(("num_experts", "num_local_experts"), 128),
            per_token=r.size("num_experts_per_tok", 8),
            width=r.size("moe_intermediate_size", 768),
            renormalise=r.get("norm_topk_prob", bool, False),
        ),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
