"""Qwen 3: RMSNorm over each head's queries and keys before they rotate; head size of its own."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import llama
from ches_jax.models.families.qwen2 import upper_windows

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
NAMES = {**llama.NAMES, "self_attn.q_norm": "self_attn.q_norm", "self_attn.k_norm": "self_attn.k_norm"}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Qwen3Config``."""
    sizes = r.sizes()
    head_dim = r.size("head_dim", 128)
    positions = r.size("max_position_embeddings", 32768)
    bias = r.get("attention_bias", bool, False)
    for norm in ("use_qk_norm", "qk_norm"):
        r.must_be(norm, True)  # what the architecture is; not read
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 32),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        attention_scale=head_dim**-0.5,
        windows=upper_windows(r, sizes["num_layers"]),
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
