r"""Attention that visits only the blocks of keys with something to see, forward and backward.

With ``z = cap(scale * q k^T)`` of a query, its weights ``p = exp(z - Z)`` with ``Z = ln sum exp z``, output ``o = p v``
and its slope ``g``:

.. math::
  \frac{\partial}{\partial v_s} = \sum_q p_{qs} g_q, \qquad
  \frac{\partial}{\partial z_{qs}} = p_{qs} \Big(g_q \cdot v_s - \sum_t p_{qt}\, g_q \cdot v_t\Big)

The sum over t equals ``g . o``; summed from the same rounded terms it makes the slopes of a query add up to nothing,
which an optimiser that divides by the size of a gradient notices.

The forward keeps ``Z``, the backward computes the scores again. Both walk over blocks of queries; what such a
block visits is gathered first, so that its products are few and large. Their number differs from block to block and
shapes cannot: it is rounded up to one of a few ``rungs``, each compiled once, and keys of the surplus are hidden.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ches_jax.models.attention.dense import HIDDEN_SCORE, KEPT, capped, to_multiple
from ches_jax.models.attention.mask import KeyRanges, block_spans, padded, visible, visited
from ches_jax.models.precision import accumulate, products

BLOCK, WIDE_BLOCK = {"cpu": 64}, 128
"""Queries and keys of a block by platform, and elsewhere: what was fastest."""


class Way(NamedTuple):
    """What is static."""

    block: int
    scale: float
    softcap: float | None


class Visits(NamedTuple):
    """Blocks of keys that each block of queries visits: the first ``visits`` of ``number``."""

    number: Int[Array, "N S"]
    visits: Int[Array, " N"]


def blocks(
    q: Float[Array, "B Q K G H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    seen: KeyRanges,
    *,
    scale: float,
    softcap: float | None,
    block: int | None = None,
) -> Float[Array, "B Q K G H"]:
    """Attention in blocks of ``block`` queries and keys; differentiable, no forward mode."""
    block = block or BLOCK.get(jax.default_backend(), WIDE_BLOCK)
    rows = (*(to_multiple(a, block) for a in (q, k, v)), padded(seen, block))
    return cast(Array, _attend(*rows, Way(block, scale, softcap)))[:, : q.shape[1]]


def rungs(most: int) -> list[int]:
    """Numbers of visits that are compiled; beyond 4 each at most a quarter more than the one before.

    >>> rungs(11)
    [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    """
    powers = range(most.bit_length())
    return sorted({min(most, size * 2**n) for n in powers for size in (1, 3, 5, 7)})


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: Array, k: Array, v: Array, seen: KeyRanges, way: Way) -> Array:
    return _forward(q, k, v, seen, way)[0]


def _forward(q, k, v, seen, way: Way):
    # lax.map, not vmap: each row visits its own blocks, and a row is work enough for a device
    out, total = lax.map(partial(_row_forward, way), (q, k, v, seen))
    out, total = checkpoint_name((out, total), KEPT)
    return out, (q, k, v, seen, total)


def _backward(way: Way, kept, slope):
    return (*lax.map(partial(_row_backward, way), (*kept, slope)), None)


_attend.defvjp(_forward, _backward)


def _row_forward(way: Way, row: tuple[Array, Array, Array, KeyRanges]) -> tuple[Array, Array]:
    """Outputs of a row, [Q, K, G, H], and the log of the sum of each block's scores, [N, K, G b]."""
    q, k, v, seen = row
    keys, values = (_blocks_of_keys(a, way.block) for a in (k, v))
    visits = _visits(seen, len(k), way.block)

    def block(args):
        qi, seen_i, number, count = args

        def at(rung: int):
            ki, vi = (_gathered(a, number, rung) for a in (keys, values))
            shown = _shown(seen_i, number, count, rung)
            z = _scores(qi, ki, shown, way)[0]
            top = z.max(-1, keepdims=True)
            p = jnp.exp(z - top)
            total = p.sum(-1, keepdims=True)
            out = products("kqs,ksh->kqh", p.astype(v.dtype), vi) / total
            return out.astype(q.dtype), (top + jnp.log(total))[..., 0]

        return _at_rung(count, number.shape[0], at)

    parts = (_blocks_of_queries(q, way.block), _in_blocks(seen, way.block), *visits)
    out, total = lax.map(block, parts)
    return _rows_of_queries(out, way.block), total


def _row_backward(way: Way, row: tuple[Array, Array, Array, KeyRanges, Array, Array]) -> tuple[Array, ...]:
    """Gradients by the queries, keys and values of a row."""
    q, k, v, seen, total, slope = row
    acc = accumulate(q.dtype)
    scale = jnp.asarray(way.scale, acc)  # of scores; multiplied where arrays are narrow
    keys, values = (_blocks_of_keys(a, way.block) for a in (k, v))
    visits = _visits(seen, len(k), way.block)

    def block(carry, args):
        qi, gi, total_i, seen_i, number, count = args

        def at(rung: int):
            ki, vi = (_gathered(a, number, rung) for a in (keys, values))
            shown = _shown(seen_i, number, count, rung)
            z, inner = _scores(qi, ki, shown, way)
            p = jnp.exp(z - total_i[..., None])
            dp = products("kqh,ksh->kqs", gi, vi)
            dz = p * (dp - jnp.sum(p * dp, -1, keepdims=True)) * inner
            dz, p = dz.astype(q.dtype), p.astype(v.dtype)
            # with the narrow factor first: turning the wide one over is what would take long
            parts = products("kqh,kqs->khs", qi, dz), products("kqh,kqs->khs", gi, p)
            dq = products("kqs,ksh->kqh", dz, ki) * scale
            return dq.astype(q.dtype), *(_as_blocks(a, way.block, most) for a in parts)

        most = number.shape[0]
        dq, *parts = _at_rung(count, most, at)

        def add(step, sums):
            return tuple(s.at[number[step]].add(part[step]) for s, part in zip(sums, parts, strict=True))

        return lax.fori_loop(0, count, add, carry), dq

    start = jnp.zeros((keys.shape[1], keys.shape[0], keys.shape[3], way.block), acc)
    queries = (_blocks_of_queries(a, way.block) for a in (q, slope))
    (dk, dv), dq = lax.scan(block, (start, start), (*queries, total, _in_blocks(seen, way.block), *visits))
    turned = (a.transpose(0, 3, 1, 2).reshape(k.shape) for a in (dk * scale, dv))
    return _rows_of_queries(dq, way.block), *(a.astype(k.dtype) for a in turned)


def _visits(seen: KeyRanges, keys: int, block: int) -> Visits:
    """What each block of a row's queries visits; numbers past ``visits`` are of some block that exists."""
    spans = jax.tree.map(lambda a: a[0], block_spans(jax.tree.map(lambda a: a[None], seen), block, block))
    most = keys // block
    steps = jnp.arange(most, dtype=jnp.int32)[None]
    number = visited(jax.tree.map(lambda a: a[:, None], spans), steps)
    return Visits(jnp.clip(number, 0, most - 1), spans.visits)


def _at_rung(count: Int[Array, ""], most: int, compute: Callable[[int], Any]) -> Any:
    """``compute`` at the first rung of at least ``count`` visits."""
    sizes = rungs(most)
    rung = jnp.sum(jnp.asarray(sizes, count.dtype) < count)
    return lax.switch(rung, [partial(compute, size) for size in sizes])


def _gathered(blocks: Float[Array, "K N b H"], number: Int[Array, " S"], rung: int) -> Float[Array, "K s H"]:
    """The first ``rung`` visited blocks, one after the other."""
    heads, _, _, width = blocks.shape
    return jnp.take(blocks, number[:rung], axis=1).reshape(heads, -1, width)


def _shown(seen: KeyRanges, number: Int[Array, " S"], count: Int[Array, ""], rung: int) -> Bool[Array, "b s"]:
    """Which of the gathered keys each query of a block sees."""
    block = seen.own_end.shape[0]
    steps = jnp.arange(rung, dtype=number.dtype)
    key = number[:rung, None] * block + jnp.arange(block, dtype=number.dtype)[None]
    key = jnp.where(steps[:, None] < count, key, -1)  # which nobody sees
    return visible(jax.tree.map(lambda a: a[None], seen), key.reshape(-1))[0]


def _scores(
    q: Float[Array, "K m H"], k: Float[Array, "K s H"], shown: Bool[Array, "b s"], way: Way
) -> tuple[Float[Array, "K m s"], Array]:
    """Scores with what is hidden far below, and the derivative of the soft cap there (1 without one)."""
    acc = accumulate(q.dtype)
    z = capped(products("kqh,ksh->kqs", q, k) * jnp.asarray(way.scale, acc), way.softcap)
    inner = jnp.ones((), acc) if way.softcap is None else 1 - jnp.square(z / jnp.asarray(way.softcap, acc))
    # added, as an array of its own: a choice would be made anew, from the ranges, for every head
    hidden = jnp.where(shown, jnp.asarray(0, acc), jnp.asarray(HIDDEN_SCORE, acc))
    by_head = z.reshape(z.shape[0], -1, *hidden.shape) + hidden[None, None]
    return by_head.reshape(z.shape), inner


def _in_blocks(a: Any, block: int) -> Any:
    """[Q, ...] to [N, block, ...], of every array."""
    return jax.tree.map(lambda x: x.reshape(-1, block, *x.shape[1:]), a)


def _blocks_of_queries(q: Float[Array, "Q K G H"], block: int) -> Float[Array, "N K m H"]:
    """Blocks with heads first; a block's m queries are those of its group, head by head."""
    n, _, kv, _, width = (cut := _in_blocks(q, block)).shape
    return cut.transpose(0, 2, 3, 1, 4).reshape(n, kv, -1, width)


def _rows_of_queries(q: Float[Array, "N K m H"], block: int) -> Float[Array, "Q K G H"]:
    """The way back."""
    n, kv, _, width = q.shape
    return q.reshape(n, kv, -1, block, width).transpose(0, 3, 1, 2, 4).reshape(n * block, kv, -1, width)


def _blocks_of_keys(k: Float[Array, "T K H"], block: int) -> Float[Array, "K N b H"]:
    return _in_blocks(k, block).transpose(2, 0, 1, 3)


def _as_blocks(part: Float[Array, "K H s"], block: int, most: int) -> Float[Array, "S K H b"]:
    """Of each visited block its part, and zeros up to ``most`` of them."""
    kv, width, _ = part.shape
    cut = part.reshape(kv, width, -1, block).transpose(2, 0, 1, 3)
    return jnp.pad(cut, [(0, most - len(cut)), *[(0, 0)] * 3])
