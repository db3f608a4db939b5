"""Mixtral: Mistral with routed experts in every layer."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig, ExpertsConfig, LayerKind
from ches_jax.models.families import llama

MODEL_TYPE = "mixtral"
ARCHITECTURE = "MixtralForCausalLM"
NAMES = {
    **llama.NAMES,
    "mlp.router": "block_sparse_moe.gate",
    "mlp.experts.gate_proj": "block_sparse_moe.experts.{expert}.w1",
    "mlp.experts.down_proj": "block_sparse_moe.experts.{expert}.w2",
    "mlp.experts.up_proj": "block_sparse_moe.experts.{expert}.w3",
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``MixtralConfig``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 131072)
    r.ignore("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # of training
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 8),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-5),
        rope=r.rope(head_dim, positions, theta=1e6),
        attention_scale=head_dim**-0.5,
        windows=(r.nullable_size("sliding_window", None),) * layers,
        layer_kinds=(LayerKind(mlp="routed"),) * layers,
        activation=r.activation("hidden_act", "silu"),
        experts=ExpertsConfig(
            count=r.one_of(("num_local_experts", "num_experts"), 8),
            per_token=r.size("num_experts_per_tok", 2),
            width=sizes["mlp_width"],
            renormalise=True,
        ),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
