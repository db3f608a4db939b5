r"""Log-probabilities whose logits never exist as a whole, forward or backward.

For a state h and a target token y, with the model's ``z = cap(scale * W h)``:

.. math::
  \ell = z_y - Z, \qquad Z = \ln \sum_v e^{z_v}, \qquad \frac{\partial \ell}{\partial z_v} = 1[v = y] - e^{z_v - Z}

Both directions walk over stretches of positions. The forward keeps one number per position (the log of the sum) and
the logits of as many stretches as a fixed amount of memory holds, never of all; the backward computes the others
again. Largest arrays: those, [stretch, vocabulary] and the gradient of W.
"""

from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.precision import accumulate, matmul_precision, products

LOGITS_AT_ONCE = {"cpu": 2**22}
"""Logits of one stretch: on a CPU what stays near the caches."""
LOGITS_ON_ACCELERATOR = 2**27
LOGITS_KEPT = {"cpu": 2**25}
"""Logits that wait for the backward pass, by platform; none elsewhere, where it was not measured."""


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


def stretches_kept(rows: int, stretch: int, count: int, vocabulary: int) -> int:
    """Stretches whose logits wait for the backward pass: within the platform's number of logits, and never all."""
    most = LOGITS_KEPT.get(jax.default_backend(), 0) // (rows * stretch * vocabulary)
    return min(most, -(-count // stretch) - 1)


def _logits(h: Array, weight: Array, head: Head) -> Array:
    """Logits of a stretch."""
    acc = accumulate(h.dtype)
    contract = (((h.ndim - 1,), (1,)), ((), ()))
    z = lax.dot_general(h, weight, contract, precision=matmul_precision(h.dtype), preferred_element_type=acc)
    if head.scale is not None:
        z = z * jnp.asarray(head.scale, acc)
    if head.softcap is None:
        return z
    cap = jnp.asarray(head.softcap, acc)
    return cap * jnp.tanh(z / cap)


def _slopes(z: Array, total: Array, y: Array, g: Array, head: Head) -> Array:
    """Slopes of the raw products from those of the log-probabilities, g."""
    acc = z.dtype
    at_target = y[..., None] == jnp.arange(z.shape[-1], dtype=y.dtype)[None, None]
    dz = g[..., None] * (at_target.astype(acc) - jnp.exp(z - total[..., None]))
    if head.softcap is not None:
        dz = dz * (1 - jnp.square(z / jnp.asarray(head.softcap, acc)))
    return dz if head.scale is None else dz * jnp.asarray(head.scale, acc)


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


def _apart(parts: tuple[Array, ...], keep: int) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The first ``keep`` stretches, and the rest."""
    return tuple(a[:keep] for a in parts), tuple(a[keep:] for a in parts)


def _sizes(hidden: Array, weight: Array, head: Head) -> tuple[int, int]:
    """Positions of a stretch, and how many stretches keep their logits."""
    rows, count, _ = hidden.shape
    stretch = head.stretch or stretch_of(rows, count, weight.shape[0])
    return stretch, stretches_kept(rows, stretch, count, weight.shape[0])


def _of_stretch(part: tuple[Array, ...], weight: Array, head: Head) -> tuple[Array, Array, Array]:
    """Logits of a stretch, log-probabilities of its targets, logs of the sums."""
    h, y = part
    z = _logits(h, weight, head)
    total = jax.nn.logsumexp(z, axis=-1)
    return z, jnp.take_along_axis(z, y[..., None], axis=-1)[..., 0] - total, total


def _forward(hidden, weight, target, head: Head):
    stretch, keep = _sizes(hidden, weight, head)
    rounded = weight.astype(hidden.dtype)
    parts = _cut(hidden, stretch), _cut(target, stretch)
    first, rest = _apart(parts, keep)
    logits, *kept = lax.map(lambda part: _of_stretch(part, rounded, head), first)
    others = lax.map(lambda part: _of_stretch(part, rounded, head)[1:], rest)
    logps, totals = (jnp.concatenate(a) for a in zip(kept, others, strict=True))
    return _joined(logps, hidden.shape[1]), (hidden, weight, target, logits, totals)


def _backward(head: Head, saved, slope):
    hidden, weight, target, logits, totals = saved
    stretch, keep = _sizes(hidden, weight, head)
    rounded = weight.astype(hidden.dtype)

    def one(total_w, part, z=None):
        h, y, total, g = part
        dz = _slopes(_logits(h, rounded, head) if z is None else z, total, y, g, head).astype(h.dtype)
        # with the narrow factor first: turning the wide one over is what would take long
        return total_w + products("bmd,bmv->dv", h, dz), products("bmv,vd->bmd", dz, rounded).astype(h.dtype)

    # padding beyond the last position has slope 0 and adds nothing
    parts = _cut(hidden, stretch), _cut(target, stretch), totals, _cut(slope, stretch)
    first, rest = _apart(parts, keep)
    dw = jnp.zeros(weight.shape[::-1], accumulate(hidden.dtype))
    dw, dh_first = lax.scan(lambda w, x: one(w, x[0], x[1]), dw, (first, logits))
    dw, dh_rest = lax.scan(one, dw, rest)
    dh = _joined(jnp.concatenate([dh_first, dh_rest]), hidden.shape[1])
    return dh, dw.T.astype(weight.dtype), None


_token_logps.defvjp(_forward, _backward)


def token_statistics(
    hidden: Float[Array, "B M D"], weight: Float[Array, "V D"], target: Int[Array, "B M"], head: Head
) -> Float[Array, "B M 3"]:
    r"""Log-probability of each target, entropy of its distribution (both in nats), and its largest probability.

    .. math:: H = Z - \sum_v p_v z_v, \qquad \max_v p_v = e^{\max_v z_v - Z}

    Arguments as for ``token_logps``; for evaluation, without a gradient of its own.
    """
    stretch, _ = _sizes(hidden, weight, head)
    rounded = weight.astype(hidden.dtype)

    def one(part):
        z, logp, total = _of_stretch(part, rounded, head)
        centred = z - total[..., None]
        return jnp.stack([logp, -(jnp.exp(centred) * centred).sum(-1), jnp.exp(z.max(-1) - total)], axis=-1)

    return _joined(lax.map(one, (_cut(hidden, stretch), _cut(target, stretch))), hidden.shape[1])
