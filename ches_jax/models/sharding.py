"""How a decoder lies on a mesh: one row per kind of parameter, and attention that stays on its device.

Weights are [out, in] with the layer axis in front. ``fsdp`` shards one axis of every weight (gathered when used);
``tensor`` shards heads and mlp channels, whose products need one sum across devices per block. An axis that does not
divide stays whole.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import LogicalMesh
from ches_jax.errors import ChesError
from ches_jax.models.attention.dense import Attend, AttentionInputs, AttentionParams
from ches_jax.models.stacks import below_stack

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
    "q_a_proj": (None, "fsdp"),
    "kv_a_proj": (None, "fsdp"),
    "q_b_proj": OUT_OVER_TENSOR,
    "kv_b_proj": OUT_OVER_TENSOR,
    "router": (None, "fsdp"),
    "shared_gate": (None, "fsdp"),
    **dict.fromkeys(("in_proj", "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "conv"), ("fsdp", None)),
    "out_proj": (None, "fsdp"),
}


def partition_spec(name: str, shape: tuple[int, ...], mesh: Mesh | LogicalMesh) -> PartitionSpec:
    """Where each axis of the parameter ``name`` lies, in the names of the mesh.

    Vectors (norms, biases) follow the output axis of their module, norms lie over ``fsdp``. Adapters follow the axes of
    their matrix, whole along the rank.
    """
    logical = _logical(mesh)
    *outer, module, leaf = name.split(".")
    if module == "packed":  # codes and factors lie as the matrix does
        module = outer.pop()
    axes: tuple[Any, ...] = AXES_BY_MODULE.get(module, ("fsdp", None))
    if of_experts := "experts" in outer:
        # whole experts lie on devices, not parts of each
        axes = tuple(None if axis == "tensor" else axis for axis in axes)
    if len(shape) - (below_stack(name) is not None) - of_experts == 1:
        axes = axes[:1]
    elif leaf == "lora_a":
        axes = (None, *axes[1:])
    elif leaf == "lora_b":
        axes = (*axes[:1], None)
    if of_experts:
        axes = (expert_axes(shape[1], logical) or None, *axes)
    axes = (() if below_stack(name) is None else (None,)) + axes
    divides = (a if a and n % logical.size(*_axes(a)) == 0 else None for a, n in zip(axes, shape, strict=True))
    return logical.spec(PartitionSpec(*divides))


def _axes(entry: str | tuple[str, ...]) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry


def expert_axes(count: int, logical: LogicalMesh) -> tuple[str, ...]:
    """Over which axes ``count`` experts are spread: as many devices as divide them."""
    options = (("expert", "tensor"), ("expert",), ("tensor",))
    return next((axes for axes in options if logical.size(*axes) > 1 and count % logical.size(*axes) == 0), ())


def placement(mesh: Mesh | LogicalMesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The sharding of each parameter by its name and shape: the ``sharding`` argument of ``load_model``."""
    logical = _logical(mesh)
    return lambda name, shape: NamedSharding(logical.mesh, partition_spec(name, shape, logical))


def _logical(mesh: Mesh | LogicalMesh) -> LogicalMesh:
    return mesh if isinstance(mesh, LogicalMesh) else LogicalMesh.of(mesh)


def mesh_here(mesh: Mesh | None, own: LogicalMesh | None) -> LogicalMesh | None:
    """The mesh a call runs on: the one it is given, else the model's own; None inside ``shard_map``, which is local.

    Raises:
      ChesError: the context mesh (``jax.set_mesh``) is another one.
    """
    logical = own if mesh is None else LogicalMesh.of(mesh)
    if logical is None:
        return None
    context = jax.sharding.get_abstract_mesh()
    if context.empty:
        return logical
    if AxisType.Manual in context.axis_types:
        return None
    if dict(context.shape) != dict(logical.mesh.shape):
        raise ChesError(
            f"the model lies on the mesh {dict(logical.mesh.shape)}, the context mesh of jax.set_mesh is "
            f"{dict(context.shape)}: load the model with mesh= that mesh, or call it outside the context"
        )
    return logical


def explicit(logical: LogicalMesh | None) -> bool:
    """Whether a computation on this mesh has to say how every product is sharded (``AxisType.Explicit``)."""
    return logical is not None and AxisType.Explicit in logical.current.axis_types


def with_auto_axes(
    model: nnx.Module, logical: LogicalMesh, compute: Callable[..., jax.Array], arrays: Any, out: PartitionSpec
) -> jax.Array:
    """``compute(model, *arrays)`` with the compiler choosing shardings inside, on a mesh with explicit axes.

    Args:
      model: its parameters lie on the mesh.
      logical: the mesh.
      compute: gives one array.
      arrays: other inputs, a tree; they are brought onto the mesh.
      out: how the result lies, over the axes of the mesh.
    """
    graph, state = nnx.split(model)
    whole = NamedSharding(logical.mesh, PartitionSpec())

    def onto(a: Any) -> jax.Array:
        a = jnp.asarray(a)
        return a if getattr(jax.typeof(a).sharding, "mesh", None) == logical.current else jax.sharding.reshard(a, whole)

    @jax.sharding.auto_axes(out_sharding=NamedSharding(logical.mesh, out))
    def run(state, arrays):
        return compute(nnx.merge(graph, state), *arrays)

    return run(state, jax.tree.map(onto, arrays))


def keep_rows(x: jax.Array, logical: LogicalMesh | None) -> jax.Array:
    """Hold activations sharded by rows, so that weights travel to them and not the other way."""
    if logical is None:
        return x
    spec = PartitionSpec(*logical.rows(x.shape[0]), *(None,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, logical.sharding(spec))


def attention_on(logical: LogicalMesh | None, attend: Attend) -> Attend:
    """``attend`` on each device's own rows and heads; nothing travels.

    Where the key/value heads do not divide over ``tensor`` they are repeated to the number of query heads; where those
    do not divide either, every device of the tensor axis computes all heads.
    """
    if logical is None:
        return attend
    parts = logical.size("tensor")

    def run(inputs: AttentionInputs, params: AttentionParams) -> jax.Array:
        q, k, v, ranges, sinks, by_block = inputs
        rows, length, kv, group, width = q.shape
        if kv % parts and (kv * group) % parts == 0:
            q = q.reshape(rows, length, kv * group, 1, width)
            k, v = (jnp.repeat(a, group, axis=2) for a in (k, v))
            sinks = None if sinks is None else sinks.reshape(kv * group, 1)
        heads = "tensor" if q.shape[2] % parts == 0 else None
        by_row = logical.spec(logical.rows(rows))
        by_head = logical.spec(PartitionSpec(*logical.rows(rows), None, heads))
        local = jax.shard_map(
            lambda *arrays: attend(AttentionInputs(*arrays), params),
            mesh=logical.current,
            in_specs=(by_head, by_head, by_head, by_row, logical.spec(PartitionSpec(heads)), by_row),
            out_specs=by_head,
            check_vma=False,
        )
        return local(q, k, v, ranges, sinks, by_block).reshape(rows, length, kv, group, width)

    return run
