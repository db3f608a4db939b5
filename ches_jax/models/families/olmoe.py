"""OLMoE: routed experts in every layer, and RMSNorm over all queries and over all keys together."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig, ExpertsConfig, LayerKind
from ches_jax.models.families.qwen3_moe import NAMES

MODEL_TYPE = "olmoe"
ARCHITECTURE = "OlmoeForCausalLM"


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of an ``OlmoeConfig``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = max(sizes["width"] // sizes["num_heads"], 1)
    r.must_be("head_dim", head_dim)  # the norms are of this size
    positions = r.size("max_position_embeddings", 4096)
    bias = r.get("attention_bias", bool, False)
    r.ignore("output_router_logits", "router_aux_loss_coef")
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-5),
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="full",
        qkv_clip=r.get("clip_qkv", float, None),
        attention_scale=head_dim**-0.5,
        windows=(None,) * layers,
        layer_kinds=(LayerKind(mlp="routed"),) * layers,
        activation=r.activation("hidden_act", "silu"),
        experts=ExpertsConfig(
            count=r.one_of(("num_experts", "num_local_experts"), 64),
            per_token=r.size("num_experts_per_tok", 8),
            width=sizes["mlp_width"],
            renormalise=r.get("norm_topk_prob", bool, False),
        ),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
