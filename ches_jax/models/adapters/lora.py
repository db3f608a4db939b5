r"""Low-rank adapters beside the frozen matrices of the layers (Hu et al., LoRA, arXiv:2106.09685).

.. math:: y = x W^\top + s\,(x A^\top) B^\top, \qquad A \in R^{r \times in},\; B \in R^{out \times r}

with s = alpha / r (rsLoRA, arXiv:2312.03732: alpha / sqrt(r)). At the start A is drawn from U(-1/sqrt(in), 1/sqrt(in))
and B is zero, so the adapted model is the base model exactly. Adapters are stacked over layers as the matrices are, and
named beside them: ``layers.self_attn.q_proj.lora_a``.
"""

import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from ches_jax.errors import ChesError
from ches_jax.models.config import DecoderConfig
from ches_jax.models.decoder import Decoder, abstract_parameters, named_parameters
from ches_jax.models.families.registry import FAMILIES
from ches_jax.models.precision import accumulate
from ches_jax.models.stacks import below_stack

ALL_LINEAR = "all-linear"
EXPERT = "expert_"
ROUTER = "router"
TARGETS = {
    **{f"self_attn.{name}_proj": name for name in ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "kv_b")},
    "self_attn.gate_proj": "q",  # the gate of attention is stored with the queries
    "self_attn.in_proj": "in",
    "self_attn.out_proj": "out",
    **{f"self_attn.{name}": name for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b")},
    **{f"{module}.{name}_proj": name for module in ("mlp", "mlp.dense") for name in ("gate", "up", "down")},
    **{f"mlp.shared.{name}_proj": f"shared_{name}" for name in ("gate", "up", "down")},
    **{f"mlp.experts.{name}_proj": f"{EXPERT}{name}" for name in ("gate", "up", "down")},
    "mlp.router": ROUTER,
}
"""The matrices of a layer that can be adapted -> their short names; those of experts are one for each."""


class LowRank(NamedTuple):
    """Size and strength of the adapter of one kind of matrix."""

    rank: int
    scale: float


Spec = Mapping[str, LowRank]
"""Which matrices are adapted: ``layers.self_attn.q_proj`` -> its adapter."""


def make_spec(rank: int, alpha: float, targets: str, config: DecoderConfig, *, rslora: bool = False) -> Spec:
    """The same rank and scale for every target.

    Args:
      rank: r.
      alpha: the numerator of the scale.
      targets: names of ``TARGETS`` with commas between them (``q_proj`` is understood too), ``all-linear`` among them.
      config: the architecture, which has a gate or not.
      rslora: scale by 1 / sqrt(r) instead of 1 / r.

    Raises:
      ChesError: a rank or scale that is not positive, a target that the model does not have.
    """
    if rank < 1 or not (math.isfinite(alpha) and alpha > 0):
        raise ChesError(f"LoRA of rank {rank} and alpha {alpha}: expected positive numbers")
    known = adaptable(config)
    # experts and their routers only where they are named
    linear = [name for name in known if name != ROUTER and not name.startswith(EXPERT)]
    words = [word.strip() for word in targets.split(",")]
    names = [name for w in words for name in (linear if w == ALL_LINEAR else [w.removesuffix("_proj")])]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ChesError(
            f"--lora-targets {targets}: this model has no {', '.join(map(repr, unknown))}; expected {ALL_LINEAR} or "
            f"names of {', '.join(known)} with commas between them"
        )
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    return {module: LowRank(rank, scale) for name in dict.fromkeys(names) for module in known[name]}


def adaptable(config: DecoderConfig) -> dict[str, list[str]]:
    """The matrices of a decoder that can be adapted by their short names: one for each stack of layers that has it."""
    shorts = {f"{path}.weight": short for path, short in TARGETS.items()}
    found: dict[str, list[str]] = {short: [] for short in TARGETS.values()}
    for rule in FAMILIES[config.family].name_rules(abstract_parameters(config), config):
        short = shorts.get(below_stack(rule.param) or "")
        if short is not None:
            found[short].append(rule.param.removesuffix(".weight"))
    return {short: modules for short, modules in found.items() if modules}


def adapted(model: Decoder, spec: Spec, dtype: DTypeLike = "float32") -> Decoder:
    """``model`` (fresh, its parameters arrays or shapes) with shapes of adapters of ``dtype`` added in place."""
    for name, (rank, scale) in spec.items():
        module: Any = model
        for part in name.split("."):
            module = getattr(module, part)
        *lead, outputs, inputs = module.weight.get_value().shape
        module.lora_a = nnx.Param(jax.ShapeDtypeStruct((*lead, rank, inputs), jnp.dtype(dtype)))
        module.lora_b = nnx.Param(jax.ShapeDtypeStruct((*lead, outputs, rank), jnp.dtype(dtype)))
        module.lora_scale = scale
    return model


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return name.endswith((".lora_a", ".lora_b"))


def adapter_shapes(abstract: Decoder) -> dict[str, Any]:
    """Shape and dtype of every adapter parameter of an adapted decoder."""
    return {name: leaf for name, leaf in named_parameters(abstract).items() if is_adapter(name)}


def initial_adapters(shapes: Mapping[str, Any], seed: int | Iterable[int]) -> dict[str, np.ndarray]:
    """A uniform, B zero; the same numbers for every mesh."""
    rng = np.random.default_rng(seed if isinstance(seed, int) else list(seed))
    out = {}
    for name, leaf in sorted(shapes.items()):
        if name.endswith(".lora_b"):
            out[name] = np.zeros(leaf.shape, leaf.dtype)
        else:
            bound = 1 / math.sqrt(leaf.shape[-1])
            out[name] = rng.uniform(-bound, bound, leaf.shape).astype(leaf.dtype)
    return out


@partial(jax.jit, static_argnums=3)
def _merge(weight: Any, a: Any, b: Any, scale: float) -> Any:
    """``W + s B A`` of every layer, added up in float32 at least, in W's dtype."""
    acc = max((accumulate(x.dtype) for x in (weight, a, b)), key=lambda dtype: dtype.itemsize)
    change = jnp.einsum("...or,...ri->...oi", b.astype(acc), a.astype(acc), precision=lax.Precision.HIGHEST)
    return (weight.astype(acc) + scale * change).astype(weight.dtype)


def merged(params: Mapping[str, Any], spec: Spec) -> dict[str, Any]:
    """The parameters of a plain decoder with ``W + s B A`` in place of W, in W's dtype."""
    out = {name: value for name, value in params.items() if not is_adapter(name)}
    for name, (_, scale) in spec.items():
        out[f"{name}.weight"] = _merge(out[f"{name}.weight"], params[f"{name}.lora_a"], params[f"{name}.lora_b"], scale)
    return out
