"""LFM2: gated short convolutions, with attention in some of the layers."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader, Sizes
from ches_jax.models.checkpoint.tensor_map import Rule, Squeezed, rules
from ches_jax.models.config import DecoderConfig, LayerKind, ShortConvConfig

MODEL_TYPE = "lfm2"
ARCHITECTURE = "Lfm2ForCausalLM"
NAMES = {
    "embed_tokens": "embed_tokens",
    "norm": "embedding_norm",
    "lm_head": "lm_head",
    "attn_norm": "operator_norm",
    "mlp_norm": "ffn_norm",
    **{f"self_attn.{p}": f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj")},
    "self_attn.o_proj": "self_attn.out_proj",
    "self_attn.q_norm": "self_attn.q_layernorm",
    "self_attn.k_norm": "self_attn.k_layernorm",
    **{f"self_attn.{p}": f"conv.{p}" for p in ("in_proj", "conv", "out_proj")},
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
TYPES = {"conv": "short_conv", "full_attention": "attention"}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of an ``Lfm2Config``."""
    sizes = Sizes(
        vocab_size=r.size("vocab_size"),
        width=r.size("hidden_size"),
        mlp_width=_mlp_width(r),
        num_layers=r.layers("num_hidden_layers"),
        num_heads=r.size("num_attention_heads"),
    )
    eps = r.get("norm_eps", float, 1e-5)
    copies = {"block_dim": sizes["width"], "conv_dim": sizes["width"], "conv_dim_out": sizes["width"]}
    for key, value in {**copies, "num_heads": sizes["num_heads"], "block_norm_eps": eps}.items():
        r.must_be(key, value)
    r.must_be("block_use_swiglu", True)
    r.must_be("use_pos_enc", True)
    r.ignore("block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init", "conv_use_xavier_init", "theta")
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 128000)
    conv = ShortConvConfig(kernel=r.size("conv_L_cache", 3), bias=r.get("conv_bias", bool, False))
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 8),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=eps,
        rope=r.rope(head_dim, positions, theta=1e6),
        qk_norm="head",
        short_conv=conv,
        attention_scale=head_dim**-0.5,
        windows=(None,) * sizes["num_layers"],
        layer_kinds=_kinds(r, sizes["num_layers"]),
        tie_embeddings=r.get("tie_embedding", bool, r.get("tie_word_embeddings", bool, True)),
    )


def _mlp_width(r: ConfigReader) -> int:
    """Two thirds of what is written, and up to the next multiple, unless the config says not to adjust."""
    stored = r.size("block_ff_dim", None)  # the older name, which counts where both are written
    written = stored or r.size("intermediate_size")
    r.ignore("intermediate_size")
    multiple, factor = r.size("block_multiple_of", 256), r.get("block_ffn_dim_multiplier", float, 1.0)
    if not r.get("block_auto_adjust_ff_dim", bool, True):
        return written
    return multiple * -(-int(factor * int(2 * written / 3)) // multiple)


def _kinds(r: ConfigReader, layers: int) -> tuple[LayerKind, ...]:
    """Convolution or attention, by ``layer_types`` or by the numbers of the attention layers."""
    numbers = r.layer_numbers("full_attn_idxs", layers)
    default = ["full_attention" if numbers is None or i in numbers else "conv" for i in range(layers)]
    types = r.layer_types(TYPES, layers, default)
    return tuple(LayerKind(mixer=TYPES[kind]) for kind in types)


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES, views={"self_attn.conv.weight": Squeezed()})
