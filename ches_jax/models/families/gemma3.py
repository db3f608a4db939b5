"""Gemma 3, the text model: Gemma 2 with query/key norms, no caps inside attention, and a second rope for the windows.

Five layers in six slide and rotate with a small base; the sixth sees everything and rotates with a large one.
"""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig, RopeConfig
from ches_jax.models.families import gemma2

MODEL_TYPE = "gemma3_text"
ARCHITECTURE = "Gemma3ForCausalLM"
NAMES = {**gemma2.NAMES, "self_attn.q_norm": "self_attn.q_norm", "self_attn.k_norm": "self_attn.k_norm"}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Gemma3TextConfig``."""
    sizes = r.sizes(vocab_size=262208, num_heads=8)
    layers = sizes["num_layers"]
    head_dim = r.size("head_dim", 256)
    positions = r.size("max_position_embeddings", 131072)
    bias = r.get("attention_bias", bool, False)
    pattern = r.size("sliding_window_pattern", r.size("_sliding_window_pattern", 6))
    r.must_be("hidden_act", "gelu_pytorch_tanh", "gelu_new")  # a copy of hidden_activation, which counts
    r.must_be("attn_logit_softcapping")  # the released models dropped it, and transformers does not read it
    full, local = _ropes(r, head_dim, positions)
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
        rope=full,
        local_rope=local,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        attention_scale=r.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        windows=r.windows(
            r.nullable_size("sliding_window", 4096), layers, [(i + 1) % pattern != 0 for i in range(layers)]
        ),
        activation=r.activation("hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=sizes["width"] ** 0.5,
        tie_embeddings=r.get("tie_word_embeddings", bool, True),
        logit_softcap=r.nullable("final_logit_softcapping", float, None),
    )


def _ropes(r: ConfigReader, head_dim: int, positions: int) -> tuple[RopeConfig, RopeConfig]:
    """Rope of the full and of the sliding layers: one dictionary by layer type, or the older three keys."""
    unknown = sorted((r.get("rope_parameters", dict, None) or {}).keys() - {"full_attention", "sliding_attention"})
    if unknown:
        r.problems.append(
            f"config.json: 'rope_parameters' should have 'full_attention' and 'sliding_attention'; found {unknown}"
        )
    thetas = {
        "full_attention": r.get("rope_theta", float, 1e6),
        "sliding_attention": r.get("rope_local_base_freq", float, 1e4),
    }
    return r.ropes_by_layer_type(dict.fromkeys(thetas, head_dim), positions, thetas)


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
