r"""Log-probabilities of given tokens, whose logits never exist as a whole, forward or backward.

For a state h and a target token y, with the model's ``z = cap(scale * W h)``:

.. math::
  \ell = z_y - Z, \qquad Z = \ln \sum_v e^{z_v}, \qquad \frac{\partial \ell}{\partial z_v} = 1[v = y] - e^{z_v - Z}

Both directions walk over chunks of positions. The forward keeps one number per position (Z) and the logits of as many
chunks as a fixed amount of memory holds, never of all; the backward computes the others again. Largest arrays: those,
[chunk, vocabulary] and the gradient of W.

On a mesh (``Head.logical``) W and its gradient are nowhere whole, and what is less travels: each device walks over a
part of the vocabulary (``vocabulary.Vocabulary``), for the states of all rows that share it, a chunk at a time; or it
keeps its states, and W comes by in pieces (``unembedding_pieces``).

>>> h, w, y = jnp.ones((1, 3, 2)), jnp.zeros((4, 2)), jnp.array([[0, 1, 3]])
>>> token_logps(h, w, y, Head(chunk=2)).round(3).tolist()  # ln 1/4
[[-1.3860000371932983, -1.3860000371932983, -1.3860000371932983]]
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.head import Head, logit_gradient, logits_of, product_gradient
from ches_jax.models.platform import platform
from ches_jax.models.precision import accumulate, einsum
from ches_jax.models.unembedding_pieces import PIECE, gradients_by_piece, logps_by_piece, unembedding_travels
from ches_jax.models.vocabulary import Vocabulary, place_of

LOGITS_PER_CHUNK = {"cpu": 2**22}
"""Logits of one chunk: on a CPU what stays near the caches."""
LOGITS_ON_ACCELERATOR = 2**27
LOGITS_KEPT = {"cpu": 2**25}
"""Logits kept for the backward pass, by platform; none elsewhere, where it was not measured."""


def chunk_size(rows: int, count: int, vocabulary: int) -> int:
    """Positions of each row per chunk: equal chunks, each within the platform's number of logits.

    Args:
      rows: rows of the batch, B.
      count: positions of each row, M.
      vocabulary: V.

    >>> chunk_size(1, 1000, 2**27)
    1
    """
    budget = LOGITS_PER_CHUNK.get(platform(), LOGITS_ON_ACCELERATOR)
    most = max(1, budget // (rows * vocabulary))
    return -(-count // -(-count // most))


def chunks_kept(rows: int, chunk: int, count: int, vocabulary: int) -> int:
    """Chunks whose logits are kept for the backward pass: within the platform's number of logits, and never all."""
    most = LOGITS_KEPT.get(platform(), 0) // (rows * chunk * vocabulary)
    return min(most, -(-count // chunk) - 1)


def _split(a: Array, chunk: int) -> Array:
    """[B, M, ...] to [chunks, B, chunk, ...]: over positions, not over rows, which may lie on several devices."""
    rows, count = a.shape[:2]
    n = -(-count // chunk)
    a = jnp.pad(a, ((0, 0), (0, n * chunk - count)) + ((0, 0),) * (a.ndim - 2))
    return a.reshape(rows, n, chunk, *a.shape[2:]).swapaxes(0, 1)


def _joined(a: Array, count: int) -> Array:
    """The inverse of ``_split``."""
    a = a.swapaxes(0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :count]


def token_logps(
    hidden: Float[Array, "B M D"], weight: Float[Array, "V D"], target: Int[Array, "B M"], head: Head
) -> Float[Array, "B M"]:
    r"""Log-probability in nats of each target, :math:`z_y - \ln \sum_v e^{z_v}`; differentiable in both arrays.

    Args:
      hidden: states that predict, in the compute dtype.
      weight: the unembedding, in any dtype; multiplied in the compute dtype.
      target: token each state predicts.
      head: the model's logit scale and soft cap, and the chunk.

    Returns:
      float32 (float64 for float64 states).
    """
    return cast(Array, _token_logps(hidden, weight, target, head))


def forward_token_logps(
    hidden: Float[Array, "B M D"], weight: Float[Array, "V D"], target: Int[Array, "B M"], head: Head
) -> Float[Array, "B M"]:
    """``token_logps`` in forward mode: ``jax.jvp`` passes it, to any order, with a chunk of logits at a time.

    A function with a backward pass of its own, as ``token_logps`` has, is closed to forward mode; here a backward pass
    would keep the logits of all chunks.
    """

    def on_device(parts: Vocabulary, hidden: Array, weight: Array, target: Array) -> Array:
        if unembedding_travels(parts, *hidden.shape[:2]):
            return logps_by_piece(parts, hidden, weight, target, head)[0]
        return _over_chunks(_logps_of_chunk, parts, hidden, weight, target, head)

    return _on_mesh(on_device, head, (hidden, weight, target), "rwr", "r")


_token_logps = jax.custom_vjp(forward_token_logps, nondiff_argnums=(3,))


def _over_chunks(
    of_chunk: Callable[..., Array], parts: Vocabulary, hidden: Array, weight: Array, target: Array, head: Head
) -> Float[Array, "B M *n"]:
    """What ``of_chunk`` gives of every position, on a device of the mesh or on the one there is."""
    rounded, chunk = parts.part(weight.astype(hidden.dtype)), _chunk(hidden, parts, head)
    chunks = _split(hidden, chunk), _split(target, chunk)
    return _joined(lax.map(lambda part: of_chunk(part, rounded, head, parts), chunks), hidden.shape[1])


def _on_mesh(
    run: Callable[..., Any], head: Head, arrays: tuple[Array, ...], lies: str, gives: str, width: int | None = None
) -> Any:
    """``run(parts, *arrays)`` on each device of the mesh, or on the one there is.

    Args:
      run: of what a device holds.
      head: says which mesh.
      arrays: states, then W, then others.
      lies: for each array r where it lies by rows, w where as W does.
      gives: the same of each result.
      width: of a W that lies as all arrays of kind w can; default: that of W.
    """
    words, own_width = arrays[1].shape
    if head.logical is None:
        return run(Vocabulary(words), *arrays)
    place = place_of(head.logical, arrays[0].shape[0], (words, width or own_width))
    specs = {"r": place.rows, "w": place.weight}
    results: Any = tuple(specs[kind] for kind in gives)
    local = jax.shard_map(
        partial(run, place.vocabulary),
        mesh=head.logical.current,
        in_specs=tuple(specs[kind] for kind in lies),
        out_specs=results if len(results) > 1 else results[0],
        check_vma=False,
    )
    return local(*arrays)


def _chunk(hidden: Array, parts: Vocabulary, head: Head, width: int | None = None) -> int:
    """Positions of each row in a chunk: what travels of them, or of states of another width, is at most a piece."""
    rows, count, own_width = hidden.shape
    width = width or own_width
    chunk = head.chunk or chunk_size(rows, count, parts.size)
    if not parts.gathered:
        return chunk
    chunks = -(-count // max(1, min(chunk, PIECE // (rows * parts.sharing * width))))
    return -(-count // chunks)


def _kept_and_rest(parts: tuple[Array, ...], kept: int) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The first ``kept`` chunks, and the others."""
    return tuple(a[:kept] for a in parts), tuple(a[kept:] for a in parts)


def _logits_of_chunk(h: Array, weight: Array, head: Head, parts: Vocabulary) -> Array:
    """Logits of these tokens of the vocabulary, of all rows that the devices which share it have."""
    z = logits_of(parts.all_rows(h), weight, head)
    if not parts.turned:
        return z
    real = parts.number(z.shape[-1]) < parts.size
    return jnp.where(real[None, None], z, jnp.asarray(-jnp.inf, z.dtype))


def _of_chunk(part: tuple[Array, ...], weight: Array, head: Head, parts: Vocabulary) -> tuple[Array, Array, Array]:
    """Logits of a chunk, log-probabilities of its targets, logs of the sums."""
    h, y = part
    z = _logits_of_chunk(h, weight, head, parts)
    total = _log_sum(z, parts)
    if not parts.over:
        return z, jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0] - total, total
    is_target = parts.all_rows(y)[..., None] == parts.number(z.shape[-1]).astype(y.dtype)[None, None]
    at_target = parts.total(jnp.where(is_target, z, jnp.zeros_like(z)).sum(-1))
    return z, parts.own_rows(at_target - total), parts.own_rows(total)


def _log_sum(z: Array, parts: Vocabulary) -> Array:
    """Logs of the sums over all tokens, from the logits of this part of the vocabulary."""
    if not parts.over:
        return jax.nn.logsumexp(z, axis=-1)
    most = parts.largest(z.max(-1))
    return most + jnp.log(parts.total(jnp.exp(z - most[..., None]).sum(-1)))


def _logps_of_chunk(part: tuple[Array, ...], weight: Array, head: Head, parts: Vocabulary) -> Array:
    return _of_chunk(part, weight, head, parts)[1]


def _kept(hidden: Array, head: Head, parts: Vocabulary) -> int:
    """Chunks whose logits are kept for the backward pass: none on a mesh, whose devices keep what they must."""
    rows, count, _ = hidden.shape
    return 0 if head.logical else chunks_kept(rows, _chunk(hidden, parts, head), count, parts.size)


def _forward(hidden, weight, target, head: Head):
    def on_device(parts: Vocabulary, hidden: Array, weight: Array, target: Array) -> tuple[Array, ...]:
        if unembedding_travels(parts, *hidden.shape[:2]):
            return logps_by_piece(parts, hidden, weight, target, head)
        count, chunk = hidden.shape[1], _chunk(hidden, parts, head)
        rounded = parts.part(weight.astype(hidden.dtype))
        chunks = _split(hidden, chunk), _split(target, chunk)
        first, rest = _kept_and_rest(chunks, _kept(hidden, head, parts))
        logits, *of_first = lax.map(lambda part: _of_chunk(part, rounded, head, parts), first)
        of_rest = lax.map(lambda part: _of_chunk(part, rounded, head, parts)[1:], rest)
        logps, totals = (_joined(jnp.concatenate(a), count) for a in zip(of_first, of_rest, strict=True))
        return (logps, totals) if head.logical else (logps, totals, logits)

    logps, totals, *logits = _on_mesh(on_device, head, (hidden, weight, target), "rwr", "rr")
    return logps, (hidden, weight, target, totals, *logits)


def _backward(head: Head, saved, cotangent):
    def on_device(parts: Vocabulary, hidden, weight, target, totals, cotangent, *logits: Array):
        if unembedding_travels(parts, *hidden.shape[:2]):
            return gradients_by_piece(parts, hidden, weight, target, totals, cotangent, head)
        count, chunk = hidden.shape[1], _chunk(hidden, parts, head)
        rounded = parts.part(weight.astype(hidden.dtype))

        def one(dw, part, z=None):
            h, y, total, g = part[0], *map(parts.all_rows, part[1:])
            z = _logits_of_chunk(h, rounded, head, parts) if z is None else z
            more, dh = _through_products(
                h, logit_gradient(z, total, y, g, head, parts.number(z.shape[-1])), rounded, parts
            )
            return dw + more, dh

        # padding beyond the last position has cotangent 0 and adds nothing
        chunks = _split(hidden, chunk), _split(target, chunk), _split(totals, chunk), _split(cotangent, chunk)
        first, rest = _kept_and_rest(chunks, _kept(hidden, head, parts))
        dw: Array = jnp.zeros(rounded.shape[::-1], accumulate(hidden.dtype))
        dh_first: list[Array] = []
        if logits:
            dw, of_first = lax.scan(lambda w, x: one(w, x[0], x[1]), dw, (first, logits[0]))
            dh_first = [of_first]
        dw, dh_rest = lax.scan(one, dw, rest)
        dh = _joined(jnp.concatenate([*dh_first, dh_rest]), count)
        return dh, parts.stored(dw.T, len(weight)).astype(weight.dtype)

    hidden, weight, target, totals, *logits = saved
    arrays = hidden, weight, target, totals, cotangent, *logits
    dh, dw = _on_mesh(on_device, head, arrays, "rwrrr", "rw")
    return dh, dw, None


_token_logps.defvjp(_forward, _backward)


def _through_products(h: Array, dz: Array, weight: Array, parts: Vocabulary) -> tuple[Array, Array]:
    """Gradients by this part of W, turned, and by a device's states, from that by ``h W^T`` of all rows."""
    dz = dz.astype(h.dtype)
    # [D, V] with the smaller factor first: transposing the larger one is what would take long
    dw = einsum("bmd,bmv->dv", parts.all_rows(h), dz)
    return dw, parts.sum_of_rows(einsum("bmv,vd->bmd", dz, weight)).astype(h.dtype)


def token_divergences(
    hidden: Float[Array, "B M D"],
    weight: Float[Array, "V D"],
    head: Head,
    ref_hidden: Float[Array, "B M E"],
    ref_weight: Float[Array, "V E"],
    ref_head: Head,
) -> Float[Array, "B M"]:
    r"""Divergence of the next-token distributions from the reference's, nats; differentiable in the first two arrays.

    .. math::
      K = KL(\pi_{ref} \| \pi) = \sum_v p^{ref}_v \left(\ln p^{ref}_v - \ln p_v\right), \qquad
      \frac{\partial K}{\partial z_v} = p_v - p^{ref}_v

    Logits exist a chunk at a time, forward and backward. On a mesh each device walks over its part of both
    unembeddings, and the states of both models travel, a chunk at a time.

    Args:
      hidden: states that predict, in the compute dtype.
      weight: the unembedding.
      head: the model's logit scale and soft cap, and the chunk.
      ref_hidden: states of the reference at the same predictions; it may be wider or narrower.
      ref_weight: its unembedding, of the same vocabulary.
      ref_head: its head.

    >>> h, w = jnp.ones((1, 1, 1)), jnp.array([[0.0], [jnp.log(3.0)]])
    >>> f"{float(token_divergences(0 * h, w, Head(), h, w, Head())[0, 0]):.4f}"  # of (1/2, 1/2) from (1/4, 3/4)
    '0.1308'
    """
    ref_hidden, ref_weight = lax.stop_gradient((ref_hidden, ref_weight))
    return cast(Array, _token_divergences(hidden, weight, ref_hidden, ref_weight, head, ref_head))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _token_divergences(hidden, weight, ref_hidden, ref_weight, head: Head, ref_head: Head):
    return _divergences_forward(hidden, weight, ref_hidden, ref_weight, head, ref_head)[0]


def _common_width(weight: Array, ref_weight: Array) -> int:
    """A width that divides over devices where those of both models do: both unembeddings then lie alike."""
    return math.gcd(weight.shape[1], ref_weight.shape[1])


def _divergences_forward(hidden, weight, ref_hidden, ref_weight, head: Head, ref_head: Head):
    def on_device(parts: Vocabulary, hidden, weight, ref_hidden, ref_weight) -> tuple[Array, ...]:
        own, ref_own = (parts.part(w.astype(h.dtype)) for w, h in ((weight, hidden), (ref_weight, ref_hidden)))
        chunk = _chunk(hidden, parts, head, max(hidden.shape[2], ref_hidden.shape[2]))

        def one(part: tuple[Array, Array]) -> tuple[Array, ...]:
            h, r = part
            z, ref = _logits_of_chunk(h, own, head, parts), _logits_of_chunk(r, ref_own, ref_head, parts)
            total, ref_total = _log_sum(z, parts), _log_sum(ref, parts)
            ratio = (ref - ref_total[..., None]) - (z - total[..., None])
            # of padding of the vocabulary both logits are minus infinity
            terms = jnp.where(ref > -jnp.inf, jnp.exp(ref - ref_total[..., None]) * ratio, jnp.zeros_like(ref))
            return tuple(map(parts.own_rows, (parts.total(terms.sum(-1)), total, ref_total)))

        found = lax.map(one, (_split(hidden, chunk), _split(ref_hidden, chunk)))
        return tuple(_joined(a, hidden.shape[1]) for a in found)

    arrays = hidden, weight, ref_hidden, ref_weight
    found, *totals = _on_mesh(on_device, head, arrays, "rwrw", "rrr", _common_width(weight, ref_weight))
    return found, (*arrays, *totals)


def _divergences_backward(head: Head, ref_head: Head, saved, cotangent):
    def on_device(parts: Vocabulary, hidden, weight, ref_hidden, ref_weight, *numbers: Array) -> tuple[Array, Array]:
        own, ref_own = (parts.part(w.astype(h.dtype)) for w, h in ((weight, hidden), (ref_weight, ref_hidden)))
        chunk = _chunk(hidden, parts, head, max(hidden.shape[2], ref_hidden.shape[2]))

        def one(dw: Array, part: tuple[Array, ...]) -> tuple[Array, Array]:
            h, r, *of_rows = part
            total, ref_total, g = (parts.all_rows(a)[..., None] for a in of_rows)
            z, ref = _logits_of_chunk(h, own, head, parts), _logits_of_chunk(r, ref_own, ref_head, parts)
            dz = product_gradient(g * (jnp.exp(z - total) - jnp.exp(ref - ref_total)), z, head)
            more, dh = _through_products(h, dz, own, parts)
            return dw + more, dh

        start = jnp.zeros(own.shape[::-1], accumulate(hidden.dtype))
        dw, dh = lax.scan(one, start, tuple(_split(a, chunk) for a in (hidden, ref_hidden, *numbers)))
        return _joined(dh, hidden.shape[1]), parts.stored(dw.T, len(weight)).astype(weight.dtype)

    hidden, weight, ref_hidden, ref_weight, *totals = saved
    arrays = hidden, weight, ref_hidden, ref_weight, *totals, cotangent
    dh, dw = _on_mesh(on_device, head, arrays, "rwrwrrr", "rw", _common_width(weight, ref_weight))
    return dh, dw, None, None


_token_divergences.defvjp(_divergences_forward, _divergences_backward)


def token_statistics(
    hidden: Float[Array, "B M D"], weight: Float[Array, "V D"], target: Int[Array, "B M"], head: Head
) -> Float[Array, "B M 3"]:
    r"""Log-probability of each target, entropy of its distribution (both in nats), and its largest probability.

    .. math:: H = Z - \sum_v p_v z_v, \qquad \max_v p_v = e^{\max_v z_v - Z}

    Arguments as for ``token_logps``; for evaluation, without a gradient of its own.
    """
    run = partial(_over_chunks, _statistics_of_chunk, head=head)
    return _on_mesh(run, head, (hidden, weight, target), "rwr", "r")


def _statistics_of_chunk(part: tuple[Array, ...], weight: Array, head: Head, parts: Vocabulary) -> Array:
    z, logp, own_total = _of_chunk(part, weight, head, parts)
    centred = z - parts.all_rows(own_total)[..., None]
    # of padding of the vocabulary p is 0 and z minus infinity
    products = jnp.where(centred > -jnp.inf, jnp.exp(centred) * centred, jnp.zeros_like(centred))
    entropy, most = -parts.total(products.sum(-1)), parts.largest(z.max(-1))
    return jnp.stack([logp, parts.own_rows(entropy), jnp.exp(parts.own_rows(most) - own_total)], axis=-1)
