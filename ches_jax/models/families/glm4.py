"""GLM-4 (0414): norms on both sides of each block, and half of each head rotates, each channel with its neighbour."""

from collections.abc import Iterable
from dataclasses import replace

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import RowSlice, Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import llama

MODEL_TYPE = "glm4"
ARCHITECTURE = "Glm4ForCausalLM"
NAMES = {
    **llama.NAMES,
    "attn_out_norm": "post_self_attn_layernorm",
    "mlp_out_norm": "post_mlp_layernorm",
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Glm4Config``."""
    sizes = r.sizes()
    head_dim = r.size("head_dim", 128)
    positions = r.size("max_position_embeddings", 131072)
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 2),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1.5625e-7),
        norm_after=True,
        rope=replace(r.rope(head_dim, positions, fraction=0.5), neighbours=True),
        qkv_bias=r.get("attention_bias", bool, True),
        attention_scale=head_dim**-0.5,
        windows=(None,) * sizes["num_layers"],
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    inner = config.mlp_width
    views = {"mlp.gate_proj.weight": RowSlice(0, 2 * inner), "mlp.up_proj.weight": RowSlice(inner, 2 * inner)}
    return rules(params, NAMES, views=views)
