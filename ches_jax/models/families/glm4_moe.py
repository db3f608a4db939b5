"""GLM-4.5 and 4.6: half of a head rotates, and experts chosen as in DeepSeek V3 beside a shared one."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig, LayerKind
from ches_jax.models.families import deepseek_v3

MODEL_TYPE = "glm4_moe"
ARCHITECTURE = "Glm4MoeForCausalLM"
NAMES = {
    **deepseek_v3.NAMES,
    **{f"self_attn.{n}_norm": f"self_attn.{n}_norm" for n in "qk"},
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Glm4MoeConfig``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 131072)
    dense = r.get("first_k_dense_replace", int, 1)
    r.must_be("scoring_func", "sigmoid")
    r.must_be("topk_method", "noaux_tc")
    r.ignore("output_router_logits")
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 8),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-5),
        rope=r.rope(head_dim, positions, fraction=0.5),
        qkv_bias=r.get("attention_bias", bool, False),
        qk_norm="head" if r.get("use_qk_norm", bool, False) else "none",
        attention_scale=head_dim**-0.5,
        windows=(None,) * layers,
        prediction_layers=deepseek_v3.prediction_layers(r),
        layer_kinds=tuple(LayerKind(mlp="dense" if i < dense else "routed") for i in range(layers)),
        activation=r.activation("hidden_act", "silu"),
        experts=deepseek_v3.routed_experts(r, width=1408, count=128, groups=1, kept=1, scale=1.0),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
