r"""Log-probabilities whose logits never exist as a whole, forward or backward.

For a state h and a target token y, with the model's ``z = cap(scale * W h)``:

.. math::
  \ell = z_y - Z, \qquad Z = \ln \sum_v e^{z_v}, \qquad \frac{\partial \ell}{\partial z_v} = 1[v = y] - e^{z_v - Z}

Both directions walk over stretches of positions: the forward keeps one number per position (the log of the sum),
the backward computes the stretch's logits again. Largest arrays: [stretch, vocabulary] and the gradient of W.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.precision import accumulate, matmul_precision, products

LOGITS_AT_ONCE = {"cpu": 2**22}
"""Logits of one stretch: on a CPU what stays near the caches."""
LOGITS_ON_ACCELERATOR = 2**27


class Head(NamedTuple):
    """What turns a raw product into a logit; static."""

    scale: float | None = None
    softcap: float | None = None
    stretch: int | None = None
    """Positions of each row computed at a time; default: by the size of the vocabulary and the platform."""


def stretch_of(rows: int, count: int, vocabulary: int) -> int:
    """Positions of each row per stretch: equal stretches, each within the platform's number of logits.

    >>> stretch_of(1, 1000, 2**27)
    1
    """
    budget = LOGITS_AT_ONCE.get(jax.default_backend(), LOGITS_ON_ACCELERATOR)
    most = max(1, budget // (rows * vocabulary))
    return -(-count // -(-count // most))


def _logits(h: Array, weight: Array, head: Head) -> tuple[Array, Array]:
    """Logits of a stretch, and the derivative of the soft cap there (1 without one)."""
    acc = accumulate(h.dtype)
    contract = (((h.ndim - 1,), (1,)), ((), ()))
    z = lax.dot_general(h, weight, contract, precision=matmul_precision(h.dtype), preferred_element_type=acc)
    if head.scale is not None:
        z = z * jnp.asarray(head.scale, acc)
    if head.softcap is None:
        return z, jnp.ones((), acc)
    cap = jnp.asarray(head.softcap, acc)
    t = jnp.tanh(z / cap)
    return cap * t, 1 - t * t


def _cut(a: Array, stretch: int) -> Array:
    """[B, M, ...] to [stretches, B, stretch, ...]: over positions, not over rows, which may lie on several devices."""
    rows, count = a.shape[:2]
    n = -(-count // stretch)
    a = jnp.pad(a, ((0, 0), (0, n * stretch - count)) + ((0, 0),) * (a.ndim - 2))
    return a.reshape(rows, n, stretch, *a.shape[2:]).swapaxes(0, 1)


def _joined(a: Array, count: int) -> Array:
    a = a.swapaxes(0, 1)
    return a.reshape(a.shape[0], -1, *a.shape[3:])[:, :count]


def token_logps(
    hidden: Float[Array, "B M D"], weight: Float[Array, "V D"], target: Int[Array, "B M"], head: Head
) -> Float[Array, "B M"]:
    """Log-probability in nats of each target; differentiable in ``hidden`` and ``weight``.

    Args:
      hidden: states that predict, in the compute dtype.
      weight: the unembedding, in any dtype; multiplied in the compute dtype.
      target: token each state predicts.
      head: the model's logit scale and soft cap.

    Returns:
      float32 (float64 for float64 states).
    """
    return cast(Array, _token_logps(hidden, weight, target, head))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _token_logps(hidden: Array, weight: Array, target: Array, head: Head) -> Array:
    return _forward(hidden, weight, target, head)[0]


def _each(one: Callable[[Array, Array, Array], Any], hidden, weight, target, head: Head) -> Any:
    """``one(logits, logp, log of the sum)`` of every stretch, its arrays joined to [B, M, ...]."""
    rows, count, _ = hidden.shape
    stretch = head.stretch or stretch_of(rows, count, weight.shape[0])
    rounded = weight.astype(hidden.dtype)

    def of_stretch(args):
        h, y = args
        z, _ = _logits(h, rounded, head)
        total = jax.nn.logsumexp(z, axis=-1)
        return one(z, jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0] - total, total)

    found = lax.map(of_stretch, (_cut(hidden, stretch), _cut(target, stretch)))
    return jax.tree.map(lambda a: _joined(a, count), found)


def _forward(hidden, weight, target, head: Head):
    logps, totals = _each(lambda z, logp, total: (logp, total), hidden, weight, target, head)
    return logps, (hidden, weight, target, totals)


def _backward(head: Head, kept, slope):
    hidden, weight, target, totals = kept
    rows, count, _ = hidden.shape
    stretch = head.stretch or stretch_of(rows, count, weight.shape[0])
    acc = accumulate(hidden.dtype)
    cast = weight.astype(hidden.dtype)

    def one(total_w, args):
        h, y, total, g = args
        z, inner = _logits(h, cast, head)
        at_target = y[..., None] == jnp.arange(z.shape[-1], dtype=y.dtype)[None, None]
        dz = g[..., None] * (at_target.astype(acc) - jnp.exp(z - total[..., None])) * inner
        if head.scale is not None:
            dz = dz * jnp.asarray(head.scale, acc)
        dz = dz.astype(h.dtype)
        dh = products("bmv,vd->bmd", dz, cast)
        # with the narrow factor first: turning the wide one over is what would take long
        dw = products("bmd,bmv->dv", h, dz)
        return total_w + dw, dh.astype(h.dtype)

    cut = partial(_cut, stretch=stretch)
    start = jnp.zeros(weight.shape[::-1], acc)
    # padding beyond the last position has slope 0 and adds nothing
    dw, dh = lax.scan(one, start, (cut(hidden), cut(target), cut(totals), cut(slope)))
    return _joined(dh, count), dw.T.astype(weight.dtype), None


_token_logps.defvjp(_forward, _backward)


def token_statistics(
    hidden: Float[Array, "B M D"], weight: Float[Array, "V D"], target: Int[Array, "B M"], head: Head
) -> Float[Array, "B M 3"]:
    r"""Log-probability of each target, entropy of its distribution (both in nats), and its largest probability.

    .. math:: H = Z - \sum_v p_v z_v, \qquad \max_v p_v = e^{\max_v z_v - Z}

    Arguments as for ``token_logps``; for evaluation, without a gradient of its own.
    """

    def one(z, logp, total):
        centred = z - total[..., None]
        return jnp.stack([logp, -(jnp.exp(centred) * centred).sum(-1), jnp.exp(z.max(-1) - total)], axis=-1)

    return cast(Array, _each(one, hidden, weight, target, head))
