"""Gemma 4, the text model: heads of other sizes in full layers, keys and values lent, per-layer embeddings, experts.

The last layers borrow the keys and values of the last layer of their type that has its own. Full layers pair all
channels of a head and rotate a quarter of the pairs; with ``attention_k_eq_v`` their values are their keys.
"""

from collections.abc import Iterable
from typing import Any

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import ExpertPart, Rule, View, rules
from ches_jax.models.config import DecoderConfig, ExpertsConfig, LayerKind, RopeConfig
from ches_jax.models.families import gemma3

MODEL_TYPE = "gemma4_text"
ARCHITECTURE = "Gemma4ForCausalLM"
NAMES = {
    **gemma3.NAMES,
    "scalar": "layer_scalar",
    "per_layer.embed_tokens": "embed_tokens_per_layer",
    "per_layer.projection": "per_layer_model_projection",
    "per_layer.norm": "per_layer_projection_norm",
    "given.gate": "per_layer_input_gate",
    "given.projection": "per_layer_projection",
    "given.norm": "post_per_layer_input_norm",
    **{f"mlp.dense.{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")},
    "mlp.dense_out_norm": "post_feedforward_layernorm_1",
    "mlp.routed_norm": "pre_feedforward_layernorm_2",
    "mlp.routed_out_norm": "post_feedforward_layernorm_2",
    "mlp.router.weight": "router.proj.weight",
    "mlp.router.scale": "router.scale",
    "mlp.router.expert_scale": "router.per_expert_scale",
    "mlp.experts.gate_proj.weight": "experts.gate_up_proj",
    "mlp.experts.up_proj.weight": "experts.gate_up_proj",
    "mlp.experts.down_proj.weight": "experts.down_proj",
}
DEFAULT_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
PER_LAYER_KEYS = ("head_dim", "num_key_value_heads")


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Gemma4TextConfig``."""
    sizes = r.sizes(vocab_size=262144, num_heads=8)
    layers = sizes["num_layers"]
    head_dim = r.size("head_dim", 256)
    positions = r.size("max_position_embeddings", 131072)
    bias = r.get("attention_bias", bool, False)
    r.must_be("use_bidirectional_attention", "vision", False)  # of pictures, which are not here
    windows = _windows(r, layers)
    kinds, full_dim = _kinds(r, windows, sizes["mlp_width"], head_dim)
    full, local = _ropes(r, {"full_attention": full_dim, "sliding_attention": head_dim}, positions)
    width = r.get("hidden_size_per_layer_input", int, 256)
    per_layer_vocab = r.size("vocab_size_per_layer_input", 262144)
    if width and per_layer_vocab < sizes["vocab_size"]:
        r.problems.append(
            f"config.json: 'vocab_size_per_layer_input' = {per_layer_vocab}; expected a row for every token "
            f"({sizes['vocab_size']})"
        )
    return DecoderConfig(
        family=MODEL_TYPE,
        **sizes,
        num_kv_heads=r.kv_heads(sizes, 4),
        head_dim=head_dim,
        max_positions=positions,
        norm_eps=r.get("rms_norm_eps", float, 1e-6),
        norm_rounds_last=True,
        norm_after=True,
        rope=full,
        local_rope=local,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="head",
        value_norm=True,
        attention_scale=1.0,
        windows=windows,
        layer_kinds=kinds,
        activation=r.activation("hidden_activation", "gelu_pytorch_tanh"),
        experts=_experts(r) if r.get("enable_moe_block", bool, False) else None,
        per_layer_width=width or None,
        per_layer_vocab=per_layer_vocab,
        layer_scalar=True,
        embedding_scale=sizes["width"] ** 0.5,
        tie_embeddings=r.get("tie_word_embeddings", bool, True),
        logit_softcap=r.nullable("final_logit_softcapping", float, None),
    )


def _windows(r: ConfigReader, layers: int) -> tuple[int | None, ...]:
    """Five layers in six slide; the last one never does, whatever is written, as in transformers."""
    windows = r.windows(r.size("sliding_window", 512), layers, [(i + 1) % 6 != 0 for i in range(layers)])
    return (*windows[:-1], None)


def _experts(r: ConfigReader) -> ExpertsConfig:
    r.ignore("output_router_logits", "router_aux_loss_coef")
    return ExpertsConfig(
        count=r.size("num_experts"),
        per_token=r.size("top_k_experts"),
        width=r.size("moe_intermediate_size"),
        renormalise=True,
        scaled_router=True,
    )


def _kinds(
    r: ConfigReader, windows: tuple[int | None, ...], mlp_width: int, head_dim: int
) -> tuple[tuple[LayerKind, ...], int]:
    """The kind of each layer, and the channels of a head in full layers."""
    layers = len(windows)
    r.ignore("num_experts", "top_k_experts", "moe_intermediate_size")  # read where there are experts
    same = r.get("attention_k_eq_v", bool, False)
    shared = r.get("num_kv_shared_layers", int, 0)
    first_shared = layers - shared
    wide = 2 if r.get("use_double_wide_mlp", bool, False) else 1
    mlp = "dense_and_routed" if r.get("enable_moe_block", bool, False) else "dense"
    own_sizes = _full_sizes(r, windows, same)
    lenders = {}
    for i in range(min(first_shared, layers)):  # a negative number of them is refused below
        lenders[windows[i] is not None] = i
    borrowers = {windows[i] is not None for i in range(max(first_shared, 0), layers)}
    if shared < 0 or not borrowers <= lenders.keys():
        r.problems.append(
            f"config.json: 'num_kv_shared_layers' = {shared}: expected fewer than {layers}, and before them a layer of "
            "each type among them, whose keys and values they take"
        )

    def kind(i: int) -> LayerKind:
        local, borrows = windows[i] is not None, i >= first_shared
        lends = local in borrowers and lenders.get(local) == i
        return LayerKind(
            mlp=mlp,
            head_dim=None if local else own_sizes.get("head_dim"),
            num_kv_heads=None if local else own_sizes.get("num_key_value_heads"),
            mlp_width=wide * mlp_width if borrows and wide > 1 else None,
            local=local,
            kv="borrowed" if borrows else "lent" if lends else "own",
            values_are_keys=same and not local,
        )

    return tuple(kind(i) for i in range(layers)), own_sizes.get("head_dim") or head_dim


def _full_sizes(r: ConfigReader, windows: tuple[int | None, ...], same: bool) -> dict[str, int]:
    """Sizes of the full layers where they are not those of the sliding ones."""
    head_dim, kv_heads = r.size("global_head_dim", 512), r.size("num_global_key_value_heads", None)
    written: dict[Any, Any] | None = r.get("per_layer_config", dict, None)
    if written is None:
        return {"head_dim": head_dim} | ({"num_key_value_heads": kv_heads} if same and kv_heads else {})
    full = [i for i, window in enumerate(windows) if window is None]
    by_layer = {int(k): v for k, v in written.items() if str(k).isdigit()}
    sizes: dict[str, int] = by_layer.get(full[0], {}) if full else {}
    good = all(isinstance(v, int) and v > 0 for v in sizes.values()) and sizes.keys() <= set(PER_LAYER_KEYS)
    if not good or by_layer != (dict.fromkeys(full, sizes) if sizes else {}) or len(by_layer) != len(written):
        r.problems.append(
            f"config.json: 'per_layer_config' = {str(written)[:200]}; expected {', '.join(PER_LAYER_KEYS)} of the full "
            f"layers ({full}), the same for each"
        )
        return {}
    return sizes


def _ropes(r: ConfigReader, head_dims: dict[str, int], positions: int) -> tuple[RopeConfig, RopeConfig]:
    """Rope of the full and of the sliding layers."""
    written = r.get("rope_parameters", dict, None)
    if written is None:
        r.raw = {**r.raw, "rope_parameters": DEFAULT_ROPES}
    elif missing := [part for part in head_dims if not isinstance(written.get(part), dict)]:
        r.problems.append(f"config.json: 'rope_parameters' lacks the settings of {' and '.join(missing)}")
    full, local = r.ropes_by_layer_type(head_dims, positions, dict.fromkeys(head_dims, 10000.0))
    return full, local


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    views: dict[str, View] = {}
    if config.experts is not None:
        inner = config.experts.width
        views = {
            "mlp.experts.gate_proj.weight": ExpertPart(0, 1, 2 * inner),
            "mlp.experts.up_proj.weight": ExpertPart(inner, 1, 2 * inner),
        }
    return rules(params, NAMES, views=views)
