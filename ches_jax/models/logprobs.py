r"""Log-probabilities of given tokens, whose logits never exist as a whole, forward or backward.

For a state h and a target token y, with the model's ``z = cap(scale * W h)``:

.. math::
  \ell = z_y - Z, \qquad Z = \ln \sum_v e^{z_v}, \qquad \frac{\partial \ell}{\partial z_v} = 1[v = y] - e^{z_v - Z}

Both directions walk over chunks of positions. The forward keeps one number per position (Z) and the logits of as many
chunks as a fixed amount of memory holds, never of all; the backward computes the others again. Largest arrays: those,
[chunk, vocabulary] and the gradient of W.

>>> h, w, y = jnp.ones((1, 3, 2)), jnp.zeros((4, 2)), jnp.array([[0, 1, 3]])
>>> token_logps(h, w, y, Head(chunk=2)).round(3).tolist()  # ln 1/4
[[-1.3860000371932983, -1.3860000371932983, -1.3860000371932983]]
"""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.platform import platform
from ches_jax.models.precision import accumulate, einsum, matmul_precision

LOGITS_PER_CHUNK = {"cpu": 2**22}
"""Logits of one chunk: on a CPU what stays near the caches."""
LOGITS_ON_ACCELERATOR = 2**27
LOGITS_KEPT = {"cpu": 2**25}
"""Logits kept for the backward pass, by platform; none elsewhere, where it was not measured."""


class Head(NamedTuple):
    """What turns ``h W^T`` into logits, and how many at a time; static."""

    scale: float | None = None
    softcap: float | None = None
    chunk: int | None = None
    """Positions of each row computed at a time; default: by the size of the vocabulary and the platform."""
    rounded: bool = False
    """Round ``h W^T`` to the dtype of the states, as ``Decoder.logits`` does; else it stays in float32 at least."""


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


def _logits(h: Array, weight: Array, head: Head) -> Array:
    """Logits of a chunk."""
    acc = accumulate(h.dtype)
    contract = (((h.ndim - 1,), (1,)), ((), ()))
    out = h.dtype if head.rounded else acc
    z = lax.dot_general(h, weight, contract, precision=matmul_precision(h.dtype), preferred_element_type=out)
    z = z.astype(acc)
    if head.scale is not None:
        z = z * jnp.asarray(head.scale, acc)
    if head.softcap is None:
        return z
    cap = jnp.asarray(head.softcap, acc)
    return cap * jnp.tanh(z / cap)


def _logit_gradient(z: Array, total: Array, y: Array, g: Array, head: Head) -> Array:
    """Gradient by ``h W^T`` from the gradient g by the log-probabilities."""
    acc = z.dtype
    at_target = y[..., None] == jnp.arange(z.shape[-1], dtype=y.dtype)[None, None]
    dz = g[..., None] * (at_target.astype(acc) - jnp.exp(z - total[..., None]))
    if head.softcap is not None:
        dz = dz * (1 - jnp.square(z / jnp.asarray(head.softcap, acc)))
    return dz if head.scale is None else dz * jnp.asarray(head.scale, acc)


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
    chunk, rounded = _chunk(hidden, weight, head), weight.astype(hidden.dtype)
    logps = lax.map(lambda part: _of_chunk(part, rounded, head)[1], (_split(hidden, chunk), _split(target, chunk)))
    return _joined(logps, hidden.shape[1])


_token_logps = jax.custom_vjp(forward_token_logps, nondiff_argnums=(3,))


def _chunk(hidden: Array, weight: Array, head: Head) -> int:
    """Positions of each row in a chunk."""
    rows, count, _ = hidden.shape
    return head.chunk or chunk_size(rows, count, weight.shape[0])


def _kept_and_rest(parts: tuple[Array, ...], kept: int) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The first ``kept`` chunks, and the others."""
    return tuple(a[:kept] for a in parts), tuple(a[kept:] for a in parts)


def _of_chunk(part: tuple[Array, ...], weight: Array, head: Head) -> tuple[Array, Array, Array]:
    """Logits of a chunk, log-probabilities of its targets, logs of the sums."""
    h, y = part
    z = _logits(h, weight, head)
    total = jax.nn.logsumexp(z, axis=-1)
    return z, jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0] - total, total


def _forward(hidden, weight, target, head: Head):
    (rows, count, _), chunk = hidden.shape, _chunk(hidden, weight, head)
    rounded = weight.astype(hidden.dtype)
    parts = _split(hidden, chunk), _split(target, chunk)
    first, rest = _kept_and_rest(parts, chunks_kept(rows, chunk, count, weight.shape[0]))
    logits, *of_first = lax.map(lambda part: _of_chunk(part, rounded, head), first)
    of_rest = lax.map(lambda part: _of_chunk(part, rounded, head)[1:], rest)
    logps, totals = (jnp.concatenate(a) for a in zip(of_first, of_rest, strict=True))
    return _joined(logps, count), (hidden, weight, target, logits, totals)


def _backward(head: Head, saved, cotangent):
    hidden, weight, target, logits, totals = saved
    chunk = _chunk(hidden, weight, head)
    rounded = weight.astype(hidden.dtype)

    def one(dw, part, z=None):
        h, y, total, g = part
        dz = _logit_gradient(_logits(h, rounded, head) if z is None else z, total, y, g, head).astype(h.dtype)
        # [D, V] with the smaller factor first: transposing the larger one is what would take long
        return dw + einsum("bmd,bmv->dv", h, dz), einsum("bmv,vd->bmd", dz, rounded).astype(h.dtype)

    # padding beyond the last position has cotangent 0 and adds nothing
    parts = _split(hidden, chunk), _split(target, chunk), totals, _split(cotangent, chunk)
    first, rest = _kept_and_rest(parts, len(logits))
    dw = jnp.zeros(weight.shape[::-1], accumulate(hidden.dtype))
    dw, dh_first = lax.scan(lambda w, x: one(w, x[0], x[1]), dw, (first, logits))
    dw, dh_rest = lax.scan(one, dw, rest)
    dh = _joined(jnp.concatenate([dh_first, dh_rest]), hidden.shape[1])
    return dh, dw.T.astype(weight.dtype), None


_token_logps.defvjp(_forward, _backward)


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

    Logits exist a chunk at a time, forward and backward, as for ``token_logps``.

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
    rounded, ref_rounded = weight.astype(hidden.dtype), ref_weight.astype(ref_hidden.dtype)
    chunk = _chunk(hidden, weight, head)

    @jax.checkpoint
    def one(part):
        h, r = part
        z, ref = _logits(h, rounded, head), _logits(r, ref_rounded, ref_head)
        ref = ref - jax.nn.logsumexp(ref, axis=-1, keepdims=True)
        return jnp.sum(jnp.exp(ref) * (ref - (z - jax.nn.logsumexp(z, axis=-1, keepdims=True))), axis=-1)

    return _joined(lax.map(one, (_split(hidden, chunk), _split(ref_hidden, chunk))), hidden.shape[1])


def token_statistics(
    hidden: Float[Array, "B M D"], weight: Float[Array, "V D"], target: Int[Array, "B M"], head: Head
) -> Float[Array, "B M 3"]:
    r"""Log-probability of each target, entropy of its distribution (both in nats), and its largest probability.

    .. math:: H = Z - \sum_v p_v z_v, \qquad \max_v p_v = e^{\max_v z_v - Z}

    Arguments as for ``token_logps``; for evaluation, without a gradient of its own.
    """
    chunk, rounded = _chunk(hidden, weight, head), weight.astype(hidden.dtype)

    def one(part):
        z, logp, total = _of_chunk(part, rounded, head)
        centred = z - total[..., None]
        return jnp.stack([logp, -(jnp.exp(centred) * centred).sum(-1), jnp.exp(z.max(-1) - total)], axis=-1)

    return _joined(lax.map(one, (_split(hidden, chunk), _split(target, chunk))), hidden.shape[1])
