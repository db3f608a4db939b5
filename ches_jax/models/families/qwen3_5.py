"""Qwen 3.5, the dense text model: the gated delta rule in three layers of four, gated attention in the fourth."""

from collections.abc import Iterable, Sequence

from ches_jax.models.checkpoint.hf_config import ConfigReader, Sizes
from ches_jax.models.checkpoint.tensor_map import Interleaved, Rule, Squeezed, View, rules
from ches_jax.models.config import DecoderConfig, DeltaRuleConfig, ExpertsConfig, LayerKind
from ches_jax.models.families import llama

MODEL_TYPE = "qwen3_5_text"
ARCHITECTURE = "Qwen3_5ForCausalLM"
NAMES = {
    **llama.NAMES,
    "self_attn.q_norm": "self_attn.q_norm",
    "self_attn.k_norm": "self_attn.k_norm",
    "self_attn.gate_proj": "self_attn.q_proj",
    **{
        f"self_attn.{p}": f"linear_attn.{p}" for p in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
    },
    "self_attn.conv": "linear_attn.conv1d",
    "self_attn.norm": "linear_attn.norm",
    "self_attn.dt_bias": "linear_attn.dt_bias",
    "self_attn.a_log": "linear_attn.A_log",
}
TYPES = {"linear_attention": "delta_rule", "full_attention": "attention"}
PICTURES = ("mrope_section", "mrope_interleaved")
"""Rotary settings that matter where positions are those of a picture: a text has one position a token."""


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Qwen3_5TextConfig``."""
    return decoder(r, MODEL_TYPE, r.sizes(num_heads=16), kv_heads=4)


def decoder(
    r: ConfigReader,
    family: str,
    sizes: Sizes,
    *,
    kv_heads: int,
    routed: Sequence[bool] = (),
    experts: ExpertsConfig | None = None,
) -> DecoderConfig:
    """What Qwen 3 Next and all Qwen 3.5 have in common.

    Args:
      r: the config.
      family: its type.
      sizes: of the model.
      kv_heads: how many there are by default.
      routed: per layer whether it has experts; none: no layer has.
      experts: what they are.
    """
    layers = sizes["num_layers"]
    head_dim = r.size("head_dim", 256)
    positions = r.size("max_position_embeddings", 32768)
    bias = r.get("attention_bias", bool, False)
    r.must_be("attn_output_gate", True)
    r.must_be("mamba_ssm_dtype", "float32")
    r.must_be("hidden_act", "silu")
    r.must_be("use_sliding_window", False)
    r.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    mlps = ["routed" if own else "dense" for own in routed or [False] * layers]
    mixers = [TYPES[kind] for kind in layer_types(r, layers)]
    return DecoderConfig(
        family=family,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, kv_heads),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        norm_plus_one=True,
        norm_rounds_last=True,
        rope=r.rope(head_dim, positions, fraction=0.25, own=PICTURES),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        output_gate=True,
        delta_rule=delta_rule(r),
        attention_scale=head_dim**-0.5,
        windows=(None,) * layers,
        layer_kinds=tuple(LayerKind(mixer=mixer, mlp=mlp) for mixer, mlp in zip(mixers, mlps, strict=True)),
        experts=experts,
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def delta_rule(r: ConfigReader) -> DeltaRuleConfig:
    """Heads and sizes of the gated delta rule."""
    keys, values = r.size("linear_num_key_heads", 16), r.size("linear_num_value_heads", 32)
    if values % keys:
        r.problems.append(
            f"config.json: 'linear_num_value_heads' = {values} is no multiple of 'linear_num_key_heads' = {keys}"
        )
    return DeltaRuleConfig(
        key_heads=keys,
        value_heads=values,
        key_dim=r.size("linear_key_head_dim", 128),
        value_dim=r.size("linear_value_head_dim", 128),
        kernel=r.size("linear_conv_kernel_dim", 4),
    )


def layer_types(r: ConfigReader, layers: int) -> list[str]:
    """The kind of each layer, by default every fourth (``full_attention_interval``) of them attention."""
    every = r.size("full_attention_interval", 4)
    return r.layer_types(
        TYPES, layers, ["linear_attention" if (i + 1) % every else "full_attention" for i in range(layers)]
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES, views=views(config))


def views(config: DecoderConfig) -> dict[str, View]:
    """Queries and gates of a head lie one after the other in one tensor; a convolution has an axis of length one."""
    two = (config.head_dim,) * 2
    attention = {
        f"self_attn.{module}.{leaf}": Interleaved(two, (part,))
        for part, module in enumerate(("q_proj", "gate_proj"))
        for leaf in ("weight", "bias")
    }
    return {"self_attn.conv.weight": Squeezed(), **attention}
