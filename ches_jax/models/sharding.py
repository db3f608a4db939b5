"""How a decoder lies on a mesh: one row per kind of parameter, and attention that stays on its device.

Weights are [out, in] with the layer axis in front. ``fsdp`` deals out one axis of every weight (gathered when used);
``tensor`` deals out heads and mlp channels, whose products need one sum across devices per block. An axis that does
not divide stays whole.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import ROWS
from ches_jax.models.attention.dense import Attend
from ches_jax.models.cache import Cache

OUT_OVER_TENSOR = ("tensor", "fsdp")
IN_OVER_TENSOR = ("fsdp", "tensor")
AXES_BY_MODULE = {
    "embed_tokens": OUT_OVER_TENSOR,
    "embed_positions": (None, "fsdp"),
    "lm_head": OUT_OVER_TENSOR,
    "q_proj": OUT_OVER_TENSOR,
    "k_proj": OUT_OVER_TENSOR,
    "v_proj": OUT_OVER_TENSOR,
    "o_proj": IN_OVER_TENSOR,
    "gate_proj": OUT_OVER_TENSOR,
    "up_proj": OUT_OVER_TENSOR,
    "down_proj": IN_OVER_TENSOR,
}


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where each axis of the parameter ``name`` lies.

    Vectors (norms, biases) follow the output axis of their module, norms lie over ``fsdp``. Adapters follow the axes of
    their matrix, whole along the rank.
    """
    module, leaf = name.split(".")[-2:]
    axes: tuple[str | None, ...] = AXES_BY_MODULE.get(module, ("fsdp",))
    if leaf == "bias":
        axes = axes[:1]
    elif leaf == "lora_a":
        axes = (None, *axes[1:])
    elif leaf == "lora_b":
        axes = (*axes[:1], None)
    stacked = name.startswith("layers.")
    axes = ((None,) if stacked else ()) + axes
    return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=True)))


def placement(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The ``sharding`` argument of ``load_model`` for a mesh."""
    return lambda name, shape: NamedSharding(mesh, partition_spec(name, shape, mesh))


def keep_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Hold activations dealt out by rows, so that weights travel to them and not the other way."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*ROWS, *(None,) * (x.ndim - 1))))


def keep_heads(kept: Cache, mesh: Mesh | None) -> Cache:
    """Hold a cache dealt out by rows and, where they divide, by key/value heads."""
    if mesh is None:
        return kept
    heads = "tensor" if kept.k.shape[2] % mesh.shape["tensor"] == 0 else None
    place = NamedSharding(mesh, PartitionSpec(None, *ROWS, heads))
    return Cache(*(jax.lax.with_sharding_constraint(a, place) for a in kept))


def gathered(table: jax.Array, mesh: Mesh | None) -> jax.Array:
    """An embedding table whole on every device while it is looked up in: lookups in parts of vectors travel badly."""
    if mesh is None:
        return table
    return jax.lax.with_sharding_constraint(table, NamedSharding(mesh, PartitionSpec()))


def attention_on(mesh: Mesh | None, attend: Attend) -> Attend:
    """``attend`` on each device's own rows and heads; nothing travels.

    Where the key/value heads do not divide over ``tensor`` they are repeated to the number of query heads; where those
    do not divide either, every device of the tensor axis computes all heads.
    """
    if mesh is None:
        return attend
    parts = mesh.shape["tensor"]

    def run(q, k, v, seen, **options):
        rows, length, kv, group, width = q.shape
        if kv % parts and (kv * group) % parts == 0:
            q = q.reshape(rows, length, kv * group, 1, width)
            k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
        heads = "tensor" if q.shape[2] % parts == 0 else None
        by_row = PartitionSpec(*ROWS)
        by_head = PartitionSpec(*ROWS, None, heads)
        local = jax.shard_map(
            partial(attend, **options),
            mesh=mesh,
            in_specs=(by_head, by_head, by_head, by_row),
            out_specs=by_head,
            check_vma=False,
        )
        return local(q, k, v, seen).reshape(rows, length, kv, group, width)

    return run
