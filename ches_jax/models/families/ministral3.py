"""Ministral 3 and Mistral Small 4: Mistral with YaRN, and queries that grow with their position."""

from collections.abc import Iterable, Mapping
from typing import Any

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig, QueryGrowth
from ches_jax.models.families.llama import NAMES

MODEL_TYPE = "ministral3"
ARCHITECTURE = "Ministral3ForCausalLM"
DEFAULT_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
OWN_ROPE_KEYS = ("llama_4_scaling_beta", "max_position_embeddings")


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Ministral3Config``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = r.nullable_size("head_dim", 128) or max(sizes["width"] // sizes["num_heads"], 1)
    positions = r.size("max_position_embeddings", 262144)
    written = r.get("rope_scaling", dict, None) or r.get("rope_parameters", dict, None)
    if written is None:
        written = DEFAULT_ROPE
        r.raw = {**r.raw, "rope_parameters": written}
    window = r.nullable_size("sliding_window", None)
    r.ignore("layer_types")  # transformers does not read them: all layers have the window, or none
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 8),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-5),
        rope=r.rope(head_dim, positions, own=OWN_ROPE_KEYS),
        query_growth=_growth(r, written),
        attention_scale=head_dim**-0.5,
        windows=(window,) * layers,
        activation=r.activation("hidden_act", "silu"),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def _growth(r: ConfigReader, rope: Mapping[str, Any]) -> QueryGrowth | None:
    """How queries grow: by the two settings among the rotary ones."""
    strength, every = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
    if not isinstance(strength, (int, float)) or not isinstance(every, int) or strength < 0 or every < 1:
        r.problems.append(
            f"config.json: rope_parameters has 'llama_4_scaling_beta' = {strength!r} and "
            f"'original_max_position_embeddings' = {every!r}; expected a number from 0 on and a positive integer"
        )
        return None
    return QueryGrowth(strength=float(strength), every=every, single=True)


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
