"""Gemma 2: Gemma with norms on both sides of each block, soft caps, and a window on every other layer."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import llama

MODEL_TYPE = "gemma2"
ARCHITECTURE = "Gemma2ForCausalLM"
NAMES = {
    **llama.NAMES,
    "attn_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Gemma2Config``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = r.size("head_dim", 256)
    positions = r.size("max_position_embeddings", 8192)
    bias = r.get("attention_bias", bool, False)
    r.must_be("hidden_act", "gelu_pytorch_tanh", "gelu_new")  # a copy of hidden_activation, which counts
    window = r.nullable_size("sliding_window", 4096)
    r.must_be("sliding_window_size", window)  # a copy
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 4),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        norm_plus_one=True,
        norm_rounds_last=True,
        norm_after=True,
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=r.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=r.nullable("attn_logit_softcapping", float, 50.0),
        windows=r.windows(window, layers, [i % 2 == 0 for i in range(layers)]),
        activation=r.activation("hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=sizes["width"] ** 0.5,
        tie_embeddings=r.get("tie_word_embeddings", bool, True),
        logit_softcap=r.nullable("final_logit_softcapping", float, 30.0),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
