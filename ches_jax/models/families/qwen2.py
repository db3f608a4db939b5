"""Qwen 2 and 2.5: Llama with biases on queries, keys and values, and an optional window on the upper layers."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.llama import NAMES

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Qwen2Config``."""
    sizes = r.sizes()
    head_dim = r.head_dim(sizes)
    r.must_be("use_mrope", False)
    for bias in ("attention_bias", "qkv_bias"):
        r.must_be(bias, True, False)  # not read: queries, keys and values have one always
    positions = r.size("max_position_embeddings", 32768)
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 32),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope=r.rope(head_dim, positions),
        qkv_bias=True,
        attention_scale=head_dim**-0.5,
        windows=upper_windows(r, sizes["num_layers"]),
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def upper_windows(r: ConfigReader, layers: int) -> tuple[int | None, ...]:
    """Layers from ``max_window_layers`` on slide, where ``use_sliding_window`` says so (Qwen 3 has the same rule)."""
    used = r.get("use_sliding_window", bool, False)
    written = r.nullable_size("sliding_window", 4096)
    r.ignore("dual_chunk_attention_config")  # of another program, for texts longer than one of its chunks
    window = written if used else None
    first = r.get("max_window_layers", int, 28)
    return r.windows(window, layers, [window is not None and i >= first for i in range(layers)])


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
