"""GPT-2: learned positions, LayerNorm, one matrix for queries, keys and values; matrices are stored [in, out]."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import RowSlice, Rule, TransposedSlice, View, rules
from ches_jax.models.config import DecoderConfig

MODEL_TYPE = "gpt2"
ARCHITECTURE = "GPT2LMHeadModel"
# reorder_and_upcast_attn asks for attention in float32, which is what this decoder always does
IGNORED = (
    "summary_type",
    "summary_use_proj",
    "summary_activation",
    "summary_proj_to_labels",
    "summary_first_dropout",
    "n_ctx",
    "reorder_and_upcast_attn",
)
NAMES = {
    "embed_tokens": "wte",
    "embed_positions": "wpe",
    "norm": "ln_f",
    "lm_head": "lm_head",
    "attn_norm": "ln_1",
    "mlp_norm": "ln_2",
    **{f"self_attn.{p}_proj": "attn.c_attn" for p in "qkv"},
    "self_attn.o_proj": "attn.c_proj",
    "mlp.up_proj": "mlp.c_fc",
    "mlp.down_proj": "mlp.c_proj",
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``GPT2Config``."""
    r.ignore(*IGNORED)
    r.must_be("scale_attn_by_inverse_layer_idx", False)
    width = r.size("n_embd")
    heads = r.size("n_head")
    layers = r.layers("n_layer")
    if width % heads:
        r.problems.append(f"config.json: 'n_embd' = {width} is not a multiple of 'n_head' = {heads}")
    return DecoderConfig(
        family=MODEL_TYPE,
        vocab_size=r.size("vocab_size"),
        width=width,
        mlp_width=r.size("n_inner", 4 * width),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(width // heads, 1),
        max_positions=r.size("n_positions", 1024),
        norm="layer",
        norm_eps=r.get("layer_norm_epsilon", float, 1e-5),
        norm_bias=True,
        rope=None,
        qkv_bias=True,
        out_bias=True,
        attention_scale=max(width // heads, 1) ** -0.5 if r.get("scale_attn_weights", bool, True) else 1.0,
        windows=(None,) * layers,
        gated_mlp=False,
        activation=r.activation("activation_function", "gelu_new"),
        mlp_bias=True,
        tie_embeddings=r.get("tie_word_embeddings", bool, True),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    width, inner = config.width, config.mlp_width
    views: dict[str, View] = {
        "self_attn.o_proj.weight": TransposedSlice(0, width),
        "mlp.up_proj.weight": TransposedSlice(0, inner),
        "mlp.down_proj.weight": TransposedSlice(0, width),
    }
    for i, part in enumerate("qkv"):
        views[f"self_attn.{part}_proj.weight"] = TransposedSlice(i * width, 3 * width)
        views[f"self_attn.{part}_proj.bias"] = RowSlice(i * width, 3 * width)
    return rules(params, NAMES, prefix="transformer.", layers="h", views=views)
