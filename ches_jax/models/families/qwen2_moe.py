"""Qwen 1.5 and 2 with routed experts beside a shared one, whose output a gate weighs."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig, ExpertsConfig, LayerKind
from ches_jax.models.families import llama

MODEL_TYPE = "qwen2_moe"
ARCHITECTURE = "Qwen2MoeForCausalLM"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERT_NAMES = {
    "mlp.router": "mlp.gate",
    "mlp.shared_gate": "mlp.shared_expert_gate",
    **{f"mlp.experts.{p}": f"mlp.experts.{{expert}}.{p}" for p in PROJECTIONS},
    **{f"mlp.shared.{p}": f"mlp.shared_expert.{p}" for p in PROJECTIONS},
}
NAMES = {**llama.NAMES, **EXPERT_NAMES}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Qwen2MoeConfig``."""
    sizes = r.sizes()
    layers = sizes["num_layers"]
    head_dim = r.head_dim(sizes)
    positions = r.size("max_position_embeddings", 32768)
    used = r.get("use_sliding_window", bool, False)
    r.ignore("sliding_window")  # written as 0 where it is not used
    window = r.nullable_size("sliding_window", 4096) if used else None
    first = r.get("max_window_layers", int, 28)
    slides = [window is not None and i % 2 == 0 and i < first for i in range(layers)]
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 16),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        rope=r.rope(head_dim, positions),
        qkv_bias=r.get("qkv_bias", bool, True),
        attention_scale=head_dim**-0.5,
        windows=r.windows(window, layers, slides),
        layer_kinds=tuple(LayerKind(mlp="routed" if own else "dense") for own in routed_layers(r, layers)),
        activation=r.activation("hidden_act", "silu"),
        experts=shared_and_routed(
            r, count=60, per_token=4, width=1408, shared=5632, renormalise=r.get("norm_topk_prob", bool, False)
        ),
        tie_embeddings=r.get("tie_word_embeddings", bool, False),
    )


def routed_layers(r: ConfigReader, layers: int) -> list[bool]:
    """Per layer whether it has experts: every ``decoder_sparse_step``, but for those of ``mlp_only_layers``."""
    sparse = r.every("decoder_sparse_step", 1, layers)
    dense = set(r.layer_numbers("mlp_only_layers", layers) or ())
    return [sparse[i] and i not in dense for i in range(layers)]


def shared_and_routed(
    r: ConfigReader, *, count: int, per_token: int, width: int, shared: int, renormalise: bool
) -> ExpertsConfig:
    """Softmax-routed experts beside a shared one with a gate; the family's defaults by keyword."""
    r.ignore("output_router_logits", "router_aux_loss_coef")
    return ExpertsConfig(
        count=r.one_of(("num_experts", "num_local_experts"), count),
        per_token=r.size("num_experts_per_tok", per_token),
        width=r.size("moe_intermediate_size", width),
        renormalise=renormalise,
        shared_width=r.size("shared_expert_intermediate_size", shared),
        shared_gate=True,
    )


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES)
