"""Keys and values of the positions a row has so far, so that each new token costs one position.

Rows are padded on the left: the newest position of all rows is in the same slot, and a row's own text fills the slots
from its first to that one without a gap.

    slot     0   1   2   3 | 4   5
    row 0   p0  p1  p2  p3 | y1  y2      first = 0
    row 1    .   .  p0  p1 | y1  y2      first = 2
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ches_jax.distributed.mesh import LogicalMesh
from ches_jax.models.attention.mask import KeyRanges

Cache: TypeAlias = tuple[Any, ...]
"""What each stack of layers keeps (``stacks.stacks``); its arrays begin with the axes layer of the stack, row."""


class KeysValues(NamedTuple):
    """Keys (rotated) and values of a layer, or of all layers of a stack; slots not written yet are zero."""

    k: Float[Array, "*L B K slots H"]
    v: Float[Array, "*L B K slots H"]


def empty_keys_values(rows: int, heads: int, slots: int, head_dim: int, dtype: jnp.dtype) -> KeysValues:
    """Those of one layer, all zero."""
    shape = (rows, heads, slots, head_dim)
    return KeysValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


@dataclass
class Memory:
    """What a layer keeps of a text for the tokens that come later; nothing where no text is made.

    Lives while a layer is traced: the layer reads and writes through it, the decoder takes ``kept`` afterwards.
    """

    kept: Any = None
    """Of all layers of the stack."""
    layer: Int[Array, ""] | None = None
    """Which of them this one is; None: ``kept`` is of this one alone."""
    slot: Int[Array, ""] | None = None
    """Where the tokens of this call go; None: they are the first ones, and nothing is read."""
    logical: LogicalMesh | None = None
    keys: Int[Array, "B S"] | None = None
    """What the tokens attend to, by number: of what is kept and, after it, of this call; nothing is written then."""
    lent: dict[str, tuple[Array, Array]] = field(default_factory=dict)
    """Keys and values that the layer lends to later ones, by the kind of layer that may borrow them."""

    def extended(
        self, k: Float[Array, "B T K H"], v: Float[Array, "B T K H"]
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """What the tokens attend to: the keys and values of this call, after those in the cache where it has some."""
        if self.kept is None:
            return k, v
        if self.keys is not None:
            before = self._of_layer()
            return _taken(before.k, k, self.keys), _taken(before.v, v, self.keys)
        none = jnp.int32(0)
        at = (none, none, none if self.slot is None else self.slot, none)
        pairs = zip(self.kept, (k, v), strict=True)
        self.kept = keep_heads(KeysValues(*(self._put(a, new.swapaxes(1, 2), at) for a, new in pairs)), self.logical)
        if self.slot is None:
            return k, v
        k, v = (a.swapaxes(1, 2) for a in self._of_layer())
        return k, v

    def state(self) -> Any:
        """Arrays of the layer as it kept them, rows first."""
        return self._of_layer()

    def keep(self, state: Any) -> None:
        """Put arrays of the whole layer, rows first, in place of those it kept."""
        self.kept = jax.tree.map(
            lambda a, new: self._put(a, new.astype(a.dtype), (jnp.int32(0),) * new.ndim), self.kept, state
        )

    def _put(self, a: Array, new: Array, at: tuple[Array, ...]) -> Array:
        """``a`` with ``new`` in this layer's part of it, from the indices ``at`` there on."""
        if self.layer is None:
            return lax.dynamic_update_slice(a, new, at)
        return lax.dynamic_update_slice(a, new[None], (self.layer, *at))

    def _of_layer(self) -> Any:
        if self.layer is None:
            return self.kept
        return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, self.layer, 0, keepdims=False), self.kept)


def _taken(
    before: Float[Array, "one K P H"], new: Float[Array, "B T K H"], keys: Int[Array, "B S"]
) -> Float[Array, "B S K H"]:
    """The keys (or values) with these numbers, of one text that comes before all rows and then of each row."""
    first = jnp.repeat(before.swapaxes(1, 2), len(new), axis=0)
    whole = jnp.concatenate([first, new], axis=1)
    return jax.vmap(lambda row, numbers: row[numbers])(whole, keys)


def unpacked(kept: Cache, source: Int[Array, "B P"], slots: int) -> Cache:
    """The cache of texts, from that of a stream of prompts: of keys and values, where their prompts' are.

    Args:
      kept: of R rows of T positions; all layers attend.
      source: position of each slot in the stream, row after row.
      slots: room of each text, P at least.
    """

    def of(a: Float[Array, "L R K T H"]) -> Float[Array, "L B K slots H"]:
        row, at = source // a.shape[3], source % a.shape[3]
        taken = a[:, row, :, at].transpose(2, 0, 3, 1, 4)
        return jnp.pad(taken, [(0, 0)] * 3 + [(0, slots - source.shape[1]), (0, 0)])

    return jax.tree.map(of, kept)


def keep_heads(pair: KeysValues, logical: LogicalMesh | None) -> KeysValues:
    """Hold the keys and values of a stack sharded by rows and, where they divide, by key/value heads."""
    if logical is None:
        return pair
    heads = "tensor" if pair.k.shape[2] % logical.size("tensor") == 0 else None
    place = logical.sharding(PartitionSpec(None, *logical.rows(pair.k.shape[1]), heads))
    return KeysValues(*(lax.with_sharding_constraint(a, place) for a in pair))


def visibility(first: Int[Array, " B"], slots: Int[Array, " T"]) -> KeyRanges:
    """What queries in ``slots`` see of the cache: their row from its first slot up to themselves."""
    shape = (len(first), len(slots))
    start, end = jnp.broadcast_to(first[:, None], shape), jnp.broadcast_to(slots[None] + 1, shape)
    none = jnp.zeros(shape, jnp.int32)
    return KeyRanges(none, none, start, end)
