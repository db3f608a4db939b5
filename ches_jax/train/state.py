"""Everything an update changes, as one tree whose every leaf has a place on the mesh."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from ches_jax.distributed.mesh import ROW_AXES, put_replicated, row_shards
from ches_jax.errors import ChesError
from ches_jax.models.sharding import partition_spec
from ches_jax.train.token_masks import is_mask


class TrainState(NamedTuple):
    """State of training after ``step`` updates."""

    params: dict[str, Array]
    """Master weights by dotted name."""
    opt_state: Any
    loss_state: dict[str, Any]
    """State of a stateful loss; empty for most."""
    step: Int[Array, ""]


def state_shardings(abstract: TrainState, mesh: Mesh) -> TrainState:
    """Where every leaf lies: parameters by the partition table, what mirrors a parameter beside it, the rest whole."""
    whole = NamedSharding(mesh, PartitionSpec())
    # masks are small: whole everywhere
    shapes = {name: leaf.shape for name, leaf in abstract.params.items() if not is_mask(name)}

    def place(path: Any, leaf: Any) -> NamedSharding:
        names = [str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey)]
        name = names[-1] if names else ""
        if shapes.get(name) == leaf.shape:
            return NamedSharding(mesh, partition_spec(name, leaf.shape, mesh))
        return whole

    return jax.tree_util.tree_map_with_path(place, abstract)


def abstract_state(params: Any, optimizer: optax.GradientTransformation, loss_state: dict[str, Any]) -> TrainState:
    """Shapes and dtypes of the state."""
    return jax.eval_shape(lambda p: TrainState(p, optimizer.init(p), loss_state, jnp.zeros((), jnp.int32)), params)


def initial_state(
    params: dict[str, Array], optimizer: optax.GradientTransformation, loss_state: dict[str, Any], mesh: Mesh
) -> TrainState:
    """The state before the first update; takes over ``params``."""
    places = state_shardings(abstract_state(params, optimizer, loss_state), mesh)
    params = jax.device_put(params, places.params)
    rest = jax.jit(lambda p: optimizer.init(p), out_shardings=places.opt_state)(params)
    here = put_replicated((loss_state, np.zeros((), np.int32)), mesh)
    return TrainState(params, rest, *here)


def require_divides(params: dict[str, Any], mesh: Mesh, micro_batch: int) -> None:
    """Refuse a mesh that would leave devices without work of their own.

    Raises:
      ChesError: an axis that divides no parameter, or more row shards than pairs.
    """
    for axis in ("fsdp", "tensor", "expert"):
        size = mesh.shape[axis]
        if size > 1 and not any(
            axis in jax.tree.leaves(tuple(partition_spec(name, p.shape, mesh))) for name, p in params.items()
        ):
            if axis == "expert":
                raise ChesError(f"--mesh expert={size}: divides the experts of no layer of this model; use data={size}")
            shapes = sorted({p.shape for name, p in params.items() if name.endswith("proj.weight")})
            raise ChesError(f"--mesh {axis}={size}: divides no parameter of this model (such as {shapes[0]})")
    shards = row_shards(mesh)
    if shards > micro_batch:
        raise ChesError(
            f"--mesh: rows are sharded over {shards} devices ({' x '.join(ROW_AXES)}), but a micro-batch has "
            f"{micro_batch} pairs; "
            "use fewer devices, or a larger --batch-size (or fewer --accumulate)"
        )
