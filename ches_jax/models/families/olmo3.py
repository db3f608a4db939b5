"""OLMo 3: OLMo 2 with a window on three layers in four; the fourth sees everything and rotates by YaRN."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.olmo2 import NAMES

MODEL_TYPE = "olmo3"
ARCHITECTURE = "Olmo3ForCausalLM"
THETA = 500000.0


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of an ``Olmo3Config``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 2048)
    bias = r.get("attention_bias", bool, False)
    theta = r.positive("rope_theta", THETA)
    if theta != THETA:
        r.problems.append(
            f"config.json: 'rope_theta' = {theta!r}: read as the base of all layers, or (as transformers does) of the "
            f"full ones, with {THETA!r} for the sliding ones; write 'rope_parameters' with the base of each layer type"
        )
    thetas = {"full_attention": theta, "sliding_attention": THETA}
    full, local = r.ropes_by_layer_type(dict.fromkeys(thetas, head_dim), positions, thetas)
    every_fourth = [(i + 1) % 4 == 0 for i in range(layers)]
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-5),
        norm_rounds_last=True,
        norm_before=False,
        norm_after=True,
        rope=full,
        local_rope=local,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="full",
        attention_scale=head_dim**-0.5,
        windows=r.windows(r.nullable_size("sliding_window", 4096), layers, [not full for full in every_fourth]),
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
