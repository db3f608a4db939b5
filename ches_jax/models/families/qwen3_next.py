"""Qwen 3 Next: the layers of Qwen 3.5, their inputs fused head by head, and experts beside a shared one."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Interleaved, Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import qwen2_moe, qwen3_5

MODEL_TYPE = "qwen3_next"
ARCHITECTURE = "Qwen3NextForCausalLM"
NAMES = {
    **qwen3_5.NAMES,
    **qwen2_moe.EXPERT_NAMES,
    **{f"self_attn.in_proj_{part}": "linear_attn.in_proj_qkvz" for part in ("qkv", "z")},
    **{f"self_attn.in_proj_{part}": "linear_attn.in_proj_ba" for part in ("b", "a")},
}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Qwen3NextConfig``."""
    sizes = r.sizes(num_heads=16)
    experts = qwen2_moe.shared_and_routed(
        r, count=512, per_token=10, width=512, shared=512, renormalise=r.get("norm_topk_prob", bool, True)
    )
    routed = qwen2_moe.routed_layers(r, sizes["num_layers"])
    return qwen3_5.decoder(r, MODEL_TYPE, sizes, kv_heads=2, routed=routed, experts=experts)


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored: of each key head the queries, keys, values and gates that belong to it."""
    d = config.delta_rule
    assert d is not None
    share = d.value_heads // d.key_heads
    qkvz = (d.key_dim, d.key_dim, share * d.value_dim, share * d.value_dim)
    fused = {
        "in_proj_qkv": Interleaved(qkvz, (0, 1, 2)),
        "in_proj_z": Interleaved(qkvz, (3,)),
        "in_proj_b": Interleaved((share, share), (0,)),
        "in_proj_a": Interleaved((share, share), (1,)),
    }
    views = {f"self_attn.{module}.weight": view for module, view in fused.items()}
    return rules(params, NAMES, views={**qwen3_5.views(config), **views})
