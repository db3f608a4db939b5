"""Qwen 3.5 with routed experts beside a shared one, in every layer."""

from collections.abc import Iterable

from ches_jax.models.checkpoint.hf_config import ConfigReader
from ches_jax.models.checkpoint.tensor_map import Rule, rules
from ches_jax.models.config import DecoderConfig
from ches_jax.models.families import qwen2_moe, qwen3_5

MODEL_TYPE = "qwen3_5_moe_text"
ARCHITECTURE = "Qwen3_5MoeForCausalLM"
NAMES = {**qwen3_5.NAMES, **qwen2_moe.EXPERT_NAMES}


def read_config(r: ConfigReader) -> DecoderConfig:
    """The decoder of a ``Qwen3_5MoeTextConfig``."""
    experts = qwen2_moe.shared_and_routed(r, count=256, per_token=8, width=512, shared=512, renormalise=True)
    r.must_be("norm_topk_prob", True)
    r.ignore("intermediate_size")  # of dense layers, of which there are none
    sizes = r.sizes(num_heads=16, mlp_width=experts.width)
    routed = [True] * sizes["num_layers"]
    return qwen3_5.decoder(r, MODEL_TYPE, sizes, kv_heads=2, routed=routed, experts=experts)


def name_rules(params: Iterable[str], config: DecoderConfig) -> list[Rule]:
    """Where each parameter is stored."""
    return rules(params, NAMES, views=qwen3_5.views(config))
