"""Phi-3, 3.5 and 4-mini: Llama with fused projections, partly rotating heads, LongRoPE and an optional window."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import RowSlice, Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import llama

MODEL_TYPE = "phi3"
ARCHITECTURE = "Phi3ForCausalLM"
NAMES = {
    **llama.NAMES,
    **{f"self_attn.{p}_proj": "self_attn.qkv_proj" for p in "qkv"},
    "mlp.gate_proj": "mlp.gate_up_proj",
    "mlp.up_proj": "mlp.gate_up_proj",
}
ROPE_NAMES = {"su": "longrope", "yarn": "longrope"}
"""What the first releases called LongRoPE."""


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Phi3Config``."""
    sizes = r.sizes()
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 4096)
    for bias in ("attention_bias", "mlp_bias", "lm_head_bias"):
        r.must_be(bias, False)
    r.must_be("full_attn_mod", 1)
    r.must_be("interpolate_factor", 1)
    rope = r.rope(head_dim, positions, fraction=1.0, original=4096, rename=ROPE_NAMES)
    if rope.kind not in {"default", "longrope"}:
        r.problems.append(f"config.json: rope type {rope.kind!r} is not one of this family (default, longrope)")
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-5),
        rope=rope,
        attention_scale=head_dim**-0.5,
        windows=(r.nullable_size("sliding_window", None),) * sizes["num_layers"],
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    q, kv, inner = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim, config.mlp_width
    views = {
        "self_attn.q_proj.weight": RowSlice(0, q + 2 * kv),
        "self_attn.k_proj.weight": RowSlice(q, q + 2 * kv),
        "self_attn.v_proj.weight": RowSlice(q + kv, q + 2 * kv),
        "mlp.gate_proj.weight": RowSlice(0, 2 * inner),
        "mlp.up_proj.weight": RowSlice(inner, 2 * inner),
    }
    return rules(params, NAMES, views=views)
