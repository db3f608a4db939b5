"""GPT-NeoX and Pythia: LayerNorm, partly rotating heads, attention and MLP side by side or one after the other."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Interleaved, Rule, rules
from ches_jax.models.config import DecoderConfig

MODEL_TYPE = "gpt_neox"
ARCHITECTURE = "GPTNeoXForCausalLM"
NAMES = {
    "embed_tokens": "embed_in",
    "norm": "final_layer_norm",
    "lm_head": "embed_out",
    "attn_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    **{f"self_attn.{p}_proj": "attention.query_key_value" for p in "qkv"},
    "self_attn.o_proj": "attention.dense",
    "mlp.up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``GPTNeoXConfig``."""
    sizes = r.sizes()
    width, heads = sizes["width"], sizes["num_heads"]
    if width % heads:
        r.problems.append(f"config.json: 'hidden_size' = {width} is not a multiple of 'num_attention_heads' = {heads}")
    head_dim = max(width // heads, 1)
    positions = r.size("max_position_embeddings", 2048)
    bias = r.get("attention_bias", bool, True)
    fraction = r.get("rotary_pct", float, 0.25)
    rope = r.rope(head_dim, positions, theta_key="rotary_emb_base", fraction=fraction, fraction_key="rotary_pct")
    # transformers does not read the common names here; some versions wrote them as copies
    r.must_be("rope_theta", rope.theta)
    r.must_be("partial_rotary_factor", fraction)
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=heads,
        head_dim=head_dim,
        max_positions=positions,
        norm="layer",
        norm_eps=r.get("layer_norm_eps", float, 1e-5),
        norm_bias=True,
        parallel_residual=r.get("use_parallel_residual", bool, True),
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=head_dim**-0.5,
        windows=(None,) * sizes["num_layers"],
        gated_mlp=False,
        activation=r.activation("hidden_act", "gelu"),
        mlp_bias=True,
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    views = {
        f"self_attn.{p}_proj.{leaf}": Interleaved((config.head_dim,) * 3, (i,))
        for i, p in enumerate("qkv")
        for leaf in ("weight", "bias")
    }
    return rules(params, NAMES, prefix="gpt_neox.", views=views)
