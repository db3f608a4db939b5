"""gpt-oss: attention sinks, windows on every other layer, and experts with biases and clamped gates.

On the hub the experts are in MXFP4 blocks; here they are the three tensors that those stand for.
"""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import ExpertPart, Rule, View, rules
from ches_jax.models.config import ClampedGate, DecoderConfig, ExpertsConfig, LayerKind
from ches_jax.models.families import llama

MODEL_TYPE = "gpt_oss"
ARCHITECTURE = "GptOssForCausalLM"
NAMES = {
    **llama.NAMES,
    "self_attn": "self_attn",
    "mlp.router": "mlp.router",
    **{f"mlp.experts.{p}_proj.weight": "mlp.experts.gate_up_proj" for p in ("gate", "up")},
    **{f"mlp.experts.{p}_proj.bias": "mlp.experts.gate_up_proj_bias" for p in ("gate", "up")},
    "mlp.experts.down_proj.weight": "mlp.experts.down_proj",
    "mlp.experts.down_proj.bias": "mlp.experts.down_proj_bias",
}
DEFAULT_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``GptOssConfig``."""
    sizes = r.sizes(num_heads=64)
    layers = sizes["num_layers"]
    head_dim = r.nullable_size("head_dim", 64) or max(sizes["width"] // sizes["num_heads"], 1)
    positions = r.size("max_position_embeddings", 131072)
    bias = r.get("attention_bias", bool, True)
    if not (r.get("rope_parameters", dict, None) or r.get("rope_scaling", dict, None)):
        r.raw = {**r.raw, "rope_parameters": DEFAULT_ROPE}
    r.ignore("output_router_logits", "router_aux_loss_coef", "hidden_act", "initial_context_length")
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 8),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-5),
        norm_rounds_last=True,
        rope=r.rope(head_dim, positions, theta=150000.0),
        qkv_bias=bias,
        out_bias=bias,
        sinks=True,
        attention_scale=head_dim**-0.5,
        windows=r.windows(r.nullable_size("sliding_window", 128), layers, [i % 2 == 0 for i in range(layers)]),
        layer_kinds=(LayerKind(mlp="routed"),) * layers,
        clamped_gate=ClampedGate(alpha=r.positive("swiglu_alpha", 1.702), limit=r.positive("swiglu_limit", 7.0)),
        experts=ExpertsConfig(
            count=r.one_of(("num_local_experts", "num_experts"), 128),
            per_token=r.one_of(("num_experts_per_tok", "experts_per_token"), 4),
            width=sizes["mlp_width"],
            renormalise=True,
            router_bias=True,
            bias=True,
        ),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    inner = config.mlp_width
    views: dict[str, View] = {"mlp.experts.down_proj.weight": ExpertPart(turned=True)}
    for start, part in enumerate(("gate", "up")):
        views[f"mlp.experts.{part}_proj.weight"] = ExpertPart(start, 2, 2 * inner, turned=True)
        views[f"mlp.experts.{part}_proj.bias"] = ExpertPart(start, 2, 2 * inner)
    return rules(params, NAMES, views=views)
