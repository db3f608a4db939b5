"""OLMo 2: norms only after attention and MLP, and RMSNorm over all queries and over all keys together."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import llama

MODEL_TYPE = "olmo2"
ARCHITECTURE = "Olmo2ForCausalLM"
NAMES = {
    **llama.NAMES,
    "attn_out_norm": "post_attention_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
    "self_attn.q_norm": "self_attn.q_norm",
    "self_attn.k_norm": "self_attn.k_norm",
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of an ``Olmo2Config``."""
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
        norm_eps=r.get("rms_norm_eps", float, 1e-5),
        norm_rounds_last=True,
        norm_before=False,
        norm_after=True,
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="full",
        attention_scale=head_dim**-0.5,
        windows=(None,) * sizes["num_layers"],
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
