"""StarCoder 2: LayerNorm with bias, biases everywhere, a plain MLP, and an optional window on every layer."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import llama

MODEL_TYPE = "starcoder2"
ARCHITECTURE = "Starcoder2ForCausalLM"
NAMES = {**llama.NAMES, "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Starcoder2Config``."""
    sizes = r.sizes()
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 4096)
    bias = r.get("use_bias", bool, True)
    # written by the first release
    r.must_be("norm_type", "layer_norm")
    r.must_be("mlp_type", "default")
    r.must_be("scale_attn_weights", True)
    r.ignore("activation_function", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32")
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 2),
        head_dim=head_dim,
        max_positions=positions,
        norm="layer",
        norm_eps=r.get("norm_epsilon", float, 1e-5),
        norm_bias=True,
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=head_dim**-0.5,
        windows=(r.nullable_size("sliding_window", None),) * sizes["num_layers"],
        gated_mlp=False,
        activation=r.activation("hidden_act", "gelu_pytorch_tanh"),
        mlp_bias=bias,
        tie_embeddings=r.get("tie_word_embeddings", bool, True),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
