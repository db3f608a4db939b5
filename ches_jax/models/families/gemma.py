"""Gemma: embeddings scaled by sqrt(width), RMSNorm by 1 + weight, a tanh-GELU gate, tied head."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families.llama import NAMES

MODEL_TYPE = "gemma"
ARCHITECTURE = "GemmaForCausalLM"


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``GemmaConfig``."""
    sizes = r.sizes()
    head_dim = r.size("head_dim", 256)
    positions = r.size("max_position_embeddings", 8192)
    bias = r.get("attention_bias", bool, False)
    # the first release wrote "gelu" and meant the tanh approximation; later ones wrote it again as hidden_activation
    written = r.activation("hidden_act", "gelu_pytorch_tanh")
    r.must_be("hidden_activation", *(("gelu_pytorch_tanh", "gelu_new") if written.startswith("gelu") else (written,)))
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 16),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        norm_plus_one=True,
        norm_rounds_last=True,
        rope=r.rope(head_dim, positions),
        qkv_bias=bias,
        out_bias=bias,
        attention_scale=head_dim**-0.5,
        windows=(None,) * sizes["num_layers"],
        activation="gelu_tanh" if written == "gelu" else written,
        embedding_scale=sizes["width"] ** 0.5,
        tie_embeddings=r.get("tie_word_embeddings", bool, True),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
