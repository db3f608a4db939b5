"""Keys and values of the positions a row has so far, so that each new token costs one position.

Rows are padded on the left: the newest position of all rows is in the same slot, and a row's own text fills the slots
from its first to that one without a gap.

    slot     0   1   2   3 | 4   5
    row 0   p0  p1  p2  p3 | y1  y2      first = 0
    row 1    .   .  p0  p1 | y1  y2      first = 2
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.attention.mask import KeyRanges
from ches_jax.models.config import DecoderConfig


class Cache(NamedTuple):
    """Keys (rotated) and values of every layer; slots not written yet are zero."""

    k: Float[Array, "L B K slots H"]
    v: Float[Array, "L B K slots H"]


def empty(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Cache:
    """A cache of zeros."""
    shape = (config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(
    cache: Cache, layer: Int[Array, ""], slot: Int[Array, ""], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
) -> Cache:
    """Put new keys and values of one layer into the slots from ``slot`` on."""
    none = jnp.int32(0)
    at = (layer, none, none, slot, none)
    return Cache(
        *(lax.dynamic_update_slice(a, new.swapaxes(1, 2)[None], at) for a, new in zip(cache, (k, v), strict=True))
    )


def of_layer(cache: Cache, layer: Int[Array, ""]) -> tuple[Float[Array, "B slots K H"], Float[Array, "B slots K H"]]:
    """Keys and values of one layer, in the axes that attention takes."""
    k, v = (lax.dynamic_index_in_dim(a, layer, 0, keepdims=False).swapaxes(1, 2) for a in cache)
    return k, v


def visibility(first: Int[Array, " B"], slots: Int[Array, " T"]) -> KeyRanges:
    """What queries in ``slots`` see of the cache: their row from its first slot up to themselves."""
    shape = (len(first), len(slots))
    start, end = jnp.broadcast_to(first[:, None], shape), jnp.broadcast_to(slots[None] + 1, shape)
    none = jnp.zeros(shape, jnp.int32)
    return KeyRanges(none, none, start, end)
