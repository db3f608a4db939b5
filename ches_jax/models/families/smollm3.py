"""SmolLM 3: Llama in which every fourth layer does not rotate."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.llama import NAMES

MODEL_TYPE = "smollm3"
ARCHITECTURE = "SmolLM3ForCausalLM"


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``SmolLM3Config``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 32768)
    bias = r.get("attention_bias", bool, False)
    rotated = r.flags("no_rope_layers", layers, [not last for last in r.every("no_rope_layer_interval", 4, layers)])
    written = r.nullable_size("sliding_window", None)
    window = written if r.get("use_sliding_window", bool, False) else None
    r.ignore("max_window_layers")
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 4),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope=r.rope(head_dim, positions, theta=2e6),
        rotated=rotated,
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=head_dim**-0.5,
        windows=r.windows(window, layers, [window is not None and not rotates for rotates in rotated]),
        activation=r.activation("hidden_act", "silu"),
        mlp_bias=r.get("mlp_bias", bool, False),
        tie_embeddings=r.get("tie_word_embeddings", bool, True),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
