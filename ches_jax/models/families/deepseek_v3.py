"""DeepSeek V3 and R1: latent attention, and experts chosen by sigmoid scores within the best groups.

The first layers are dense. What the checkpoints hold for predicting several tokens at once is left out.
"""

import math
from collections.abc import Iterable
from dataclasses import replace

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig, ExpertsConfig, LatentConfig, LayerKind, RopeConfig
from ches_jax.models.families import llama

MODEL_TYPE = "deepseek_v3"
ARCHITECTURE = "DeepseekV3ForCausalLM"
NAMES = {
    **llama.NAMES,
    "self_attn.q_a_proj": "self_attn.q_a_proj",
    "self_attn.q_a_norm": "self_attn.q_a_layernorm",
    "self_attn.q_b_proj": "self_attn.q_b_proj",
    "self_attn.kv_a_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_a_norm": "self_attn.kv_a_layernorm",
    "self_attn.kv_b_proj": "self_attn.kv_b_proj",
    "mlp.router": "mlp.gate",
    "mlp.router.correction": "mlp.gate.e_score_correction_bias",
    **{f"mlp.experts.{p}": f"mlp.experts.{{expert}}.{p}" for p in ("gate_proj", "up_proj", "down_proj")},
    **{f"mlp.shared.{p}": f"mlp.shared_experts.{p}" for p in ("gate_proj", "up_proj", "down_proj")},
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``DeepseekV3Config``."""
    sizes = r.sizes()
    layers, heads = sizes["num_layers"], sizes["num_heads"]
    latent = LatentConfig(
        query_rank=r.nullable_size("q_lora_rank", 1536),
        kv_rank=r.size("kv_lora_rank", 512),
        rotary_dim=r.size("qk_rope_head_dim", 64),
        plain_dim=r.size("qk_nope_head_dim", 128),
        value_dim=r.size("v_head_dim", 128),
        norm_eps=1e-6,
    )
    query_dim = latent.plain_dim + latent.rotary_dim
    r.must_be("qk_head_dim", query_dim)
    r.must_be("head_dim", latent.rotary_dim)
    r.must_be("num_key_value_heads", heads)
    r.must_be("topk_method", "noaux_tc")
    r.must_be("scoring_func", "sigmoid")
    r.must_be("moe_layer_freq", 1)
    r.ignore("ep_size", "seq_aux", "aux_loss_alpha", "output_router_logits")
    positions = r.size("max_position_embeddings", 4096)
    rope = replace(r.rope(latent.rotary_dim, positions), neighbours=r.nullable("rope_interleave", bool, True) or False)
    bias = r.get("attention_bias", bool, False)
    dense = r.get("first_k_dense_replace", int, 3)
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=heads,
        head_dim=max(query_dim, latent.value_dim),
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        latent=latent,
        attention_scale=query_dim**-0.5 * _score_factor(r, rope) ** 2,
        windows=(None,) * layers,
        prediction_layers=prediction_layers(r),
        layer_kinds=tuple(LayerKind(mixer="latent", mlp="dense" if i < dense else "routed") for i in range(layers)),
        activation=r.activation("hidden_act", "silu"),
        experts=routed_experts(r),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def prediction_layers(r: ConfigReader) -> int:
    """How many layers checkpoints hold beyond the model's, for predicting several tokens at once."""
    further = [r.get(key, int, None) for key in ("num_nextn_predict_layers", "num_mtp_layers")]
    return max((n for n in further if n is not None), default=1)


def routed_experts(
    r: ConfigReader, *, width: int = 2048, count: int = 256, groups: int = 8, kept: int = 4, scale: float = 2.5
) -> ExpertsConfig:
    """Experts, their groups, and how they are chosen; the family's defaults by keyword."""
    width = r.size("moe_intermediate_size", width)
    count = r.one_of(("n_routed_experts", "num_local_experts"), count)
    groups, kept = r.size("n_group", groups), r.size("topk_group", kept)
    if count % groups or count // groups < 2 or kept > groups:
        r.problems.append(
            f"config.json: {count} experts in 'n_group' = {groups} groups, of which 'topk_group' = {kept} are kept; "
            "expected equal groups of at least two experts, and no more kept than there are"
        )
    return ExpertsConfig(
        count=count,
        per_token=r.size("num_experts_per_tok", 8),
        width=width,
        score="sigmoid",
        renormalise=r.get("norm_topk_prob", bool, True),
        scale=r.get("routed_scaling_factor", float, scale),
        correction=True,
        groups=groups,
        groups_kept=kept,
        shared_width=width * r.size("n_shared_experts", 1),
    )


def _score_factor(r: ConfigReader, rope: RopeConfig) -> float:
    """YaRN's factor of queries and of keys, where the rotary settings name it (``mscale_all_dim``)."""
    settings = r.get("rope_scaling", dict, None) or r.get("rope_parameters", dict, None) or {}
    every = settings.get("mscale_all_dim") or 0.0
    if rope.kind == "default" or not every or rope.factor <= 1:
        return 1.0
    return 0.1 * every * math.log(rope.factor) + 1


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
