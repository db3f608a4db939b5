"""Llama 4, the text model: chunked attention in layers that rotate, and one expert for a token beside a shared one.

Layers that do not rotate see everything, and their queries grow with their position.
"""

from collections.abc import Iterable
from dataclasses import replace

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import ExpertPart, Rule, View, rules
from ches_jax.models.config import DecoderConfig, ExpertsConfig, LayerKind, QueryGrowth
from ches_jax.models.families import llama

MODEL_TYPE = "llama4_text"
ARCHITECTURE = "Llama4ForCausalLM"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
NAMES = {
    **llama.NAMES,
    **{f"mlp.{p}": f"feed_forward.{p}" for p in PROJECTIONS},
    **{f"mlp.shared.{p}": f"feed_forward.shared_expert.{p}" for p in PROJECTIONS},
    "mlp.router": "feed_forward.router",
    "mlp.experts.gate_proj.weight": "feed_forward.experts.gate_up_proj",
    "mlp.experts.up_proj.weight": "feed_forward.experts.gate_up_proj",
    "mlp.experts.down_proj.weight": "feed_forward.experts.down_proj",
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Llama4TextConfig``."""
    width = r.size("intermediate_size")
    sizes = r.sizes()
    sizes["mlp_width"] = r.size("intermediate_size_mlp", 16384)
    layers = sizes["num_layers"]
    head_dim = r.nullable_size("head_dim", 128) or max(sizes["width"] // sizes["num_heads"], 1)
    positions = r.size("max_position_embeddings", 131072)
    bias = r.get("attention_bias", bool, False)
    rotated = r.flags("no_rope_layers", layers, [not last for last in r.every("no_rope_layer_interval", 4, layers)])
    chunk = r.nullable_size("attention_chunk_size", 8192)
    in_chunks = [rotates and chunk is not None for rotates in rotated]
    step = r.every("interleave_moe_layer_step", 1, layers)
    routed = r.layer_numbers("moe_layers", layers)
    routed = [i for i in range(layers) if step[i]] if routed is None else routed
    r.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    r.must_be("for_llm_compression", False)
    every, strength = r.size("floor_scale", 8192), r.get("attn_scale", float, 0.1)
    grows = bool(r.get("attn_temperature_tuning", (bool, int), True))
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 8),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-5),
        rope=replace(r.rope(head_dim, positions, theta=500000.0), neighbours=True),
        rotated=rotated,
        query_growth=QueryGrowth(strength=strength, every=every, shift=1, unrotated_only=True) if grows else None,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="rotated" if r.get("use_qk_norm", bool, True) else "none",
        attention_scale=head_dim**-0.5,
        windows=r.windows(chunk, layers, in_chunks, "chunked_attention"),
        chunked=True,
        layer_kinds=tuple(LayerKind(mlp="routed" if i in routed else "dense") for i in range(layers)),
        activation=r.activation("hidden_act", "silu"),
        experts=ExpertsConfig(
            count=r.one_of(("num_local_experts", "num_experts"), 16),
            per_token=r.size("num_experts_per_tok", 1),
            width=width,
            score="sigmoid",
            weighs_inputs=True,
            shared_width=width,
        ),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    assert config.experts is not None
    inner = config.experts.width
    views: dict[str, View] = {
        "mlp.experts.gate_proj.weight": ExpertPart(0, 1, 2 * inner, turned=True),
        "mlp.experts.up_proj.weight": ExpertPart(inner, 1, 2 * inner, turned=True),
        "mlp.experts.down_proj.weight": ExpertPart(turned=True),
    }
    return rules(params, NAMES, views=views)
