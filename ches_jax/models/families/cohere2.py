"""Command R7B and A (Cohere 2): attention and MLP side by side after one LayerNorm without bias.

Three layers in four have a window and rotate, each channel with its neighbour; the fourth sees everything and does not.
"""

from collections.abc import Iterable
from dataclasses import replace

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import llama

MODEL_TYPE = "cohere2"
ARCHITECTURE = "Cohere2ForCausalLM"
NAMES = {name: stored for name, stored in llama.NAMES.items() if name != "mlp_norm"}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Cohere2Config``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = max(sizes["width"] // sizes["num_heads"], 1)
    r.must_be("head_dim", head_dim)  # transformers does not read it
    positions = r.size("max_position_embeddings", 8192)
    bias = r.get("attention_bias", bool, False)
    _written_by_the_first_release(r)
    every = r.every("sliding_window_pattern", 4, layers)
    windows = r.windows(r.nullable_size("sliding_window", 4096), layers, [not last for last in every])
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes),
        head_dim=head_dim,
        max_positions=positions,
        norm="layer",
        norm_eps=r.get("layer_norm_eps", float, 1e-5),
        parallel_residual=True,
        shared_norm=True,
        rope=replace(r.rope(head_dim, positions), neighbours=True),
        rotated=tuple(window is not None for window in windows),
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=head_dim**-0.5,
        windows=windows,
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, True),
        logit_scale=r.get("logit_scale", float, 0.0625),
    )


def _written_by_the_first_release(r: ConfigReader) -> None:
    """Keys that say what the architecture is; transformers does not read them."""
    r.must_be("layer_switch", r.raw.get("sliding_window_pattern") or 4)
    r.must_be("order_of_interleaved_layers", "local_attn_first")
    r.must_be("position_embedding_type", "rope_gptj")
    r.must_be("rotary_pct", 1.0)
    for key in ("use_embedding_sharing", "use_gated_activation", "use_parallel_block"):
        r.must_be(key, True)
    r.must_be("use_qk_norm", False)
    r.ignore("use_parallel_embedding")


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
