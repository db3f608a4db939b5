r"""The scores on arrays of anyone's model: hidden states, masks and the unembedding in, numbers out.

A mask marks the states that *predict* a token of the response: with a prompt of P tokens these are the positions
P - 1, P, ... (the drawing in ``ches_jax.types``). Leading axes are batches. ``pair_statistics``, ``ches`` and
``ln_ches`` take numpy or JAX arrays and can be traced; ``head_score`` computes in JAX.

>>> import numpy as np
>>> chosen, rejected = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [9.0, 9.0]])
>>> stats = pair_statistics(chosen, [True, True], rejected, [True, False])  # S+ = (1, 1), S- = (2, 0)
>>> float(ches(stats)), float(ln_ches(stats))
(0.0, 0.5)
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ches_jax.errors import DataError
from ches_jax.models.precision import accumulate
from ches_jax.scores import formulas
from ches_jax.scores.unembedding_gradients import CHUNK, Logits, head_products, identity, pair_contributions


class PairStatistics(NamedTuple):
    r"""Sufficient statistics of CHES: inner products of the sums :math:`S^\pm` of hidden states, and lengths.

    Each of the shape of the leading axes; numpy or jax arrays.
    """

    inner: Any
    r""":math:`\langle S^+, S^- \rangle`, squared hidden units."""
    sqnorm_chosen: Any
    r""":math:`\|S^+\|^2`."""
    sqnorm_rejected: Any
    r""":math:`\|S^-\|^2`."""
    n_chosen: Any
    """Tokens of the chosen response, true entries of its mask; of the dtype of the others."""
    n_rejected: Any


def pair_statistics(hidden_chosen: Any, mask_chosen: Any, hidden_rejected: Any, mask_rejected: Any) -> PairStatistics:
    r"""The statistics that ``ches`` and ``ln_ches`` are made of.

    .. math:: S^\pm = \sum_{t:\ \mathrm{mask}^\pm_t} h^\pm_t

    Args:
      hidden_chosen: [..., T, D] states after the final norm, of prompt + chosen; any float dtype.
      mask_chosen: [..., T] true where the state predicts a token of the response.
      hidden_rejected: [..., U, D], of prompt + rejected.
      mask_rejected: [..., U].

    Returns:
      Numbers of shape [...], accumulated in float32, or float64 for float64 states.

    Raises:
      DataError: shapes that do not fit together, or a mask that is none.

    References:
      Definition 2 of Razin et al., https://arxiv.org/abs/2410.08847.

    >>> import numpy as np
    >>> states, mask = np.ones((2, 3)), np.ones(2, bool)  # two tokens, width 3
    >>> stats = pair_statistics(states, mask, states[:1], mask[:1])
    >>> float(ches(stats))  # <S+, S-> - |S+|^2 = 2 * 3 - 4 * 3
    -6.0
    """
    arrays = (hidden_chosen, mask_chosen, hidden_rejected, mask_rejected)
    xp = jnp if any(isinstance(a, jax.Array) for a in arrays) else np
    sides = [_side(xp, "chosen", *arrays[:2]), _side(xp, "rejected", *arrays[2:])]
    (chosen, mask_plus), (rejected, mask_minus) = sides
    if chosen.shape[:-2] != rejected.shape[:-2] or chosen.shape[-1] != rejected.shape[-1]:
        raise DataError(
            f"hidden_chosen {list(chosen.shape)} and hidden_rejected {list(rejected.shape)}: expected the same leading "
            "axes and the same width; only the number of positions may differ"
        )
    plus, minus = (xp.where(mask[..., None], h, xp.zeros((), h.dtype)).sum(-2) for h, mask in sides)
    return PairStatistics(
        inner=(plus * minus).sum(-1),
        sqnorm_chosen=(plus * plus).sum(-1),
        sqnorm_rejected=(minus * minus).sum(-1),
        n_chosen=mask_plus.sum(-1).astype(chosen.dtype),
        n_rejected=mask_minus.sum(-1).astype(rejected.dtype),
    )


def _require_statistics(name: str, stats: Any) -> None:
    if not isinstance(stats, PairStatistics):
        raise DataError(f"{name}: a {type(stats).__name__}; expected the result of pair_statistics(...)")


def ches(stats: PairStatistics) -> Any:
    r"""Centered hidden embedding similarity, squared hidden units.

    .. math:: \langle S^+, S^- \rangle - \|S^+\|^2

    Higher: more similar, hence by the theory more at risk of likelihood displacement; 0 for identical responses.

    References:
      Definition 2 of Razin et al., https://arxiv.org/abs/2410.08847.

    >>> ches(PairStatistics(2.0, 2.0, 4.0, 2, 1))
    0.0
    """
    _require_statistics("ches", stats)
    return formulas.ches(stats.inner, stats.sqnorm_chosen)


def ln_ches(stats: PairStatistics) -> Any:
    r"""Length-normalised CHES, squared hidden units of a single token; NaN or infinite for an empty response.

    .. math:: \frac{\langle S^+, S^- \rangle}{|y^+| |y^-|} - \frac{\|S^+\|^2}{|y^+|^2}

    References:
      Definition 3 (Appendix A) of Razin et al., https://arxiv.org/abs/2410.08847.

    >>> ln_ches(PairStatistics(2.0, 2.0, 4.0, 2, 1))
    0.5
    """
    _require_statistics("ln_ches", stats)
    return formulas.ln_ches(stats.inner, stats.sqnorm_chosen, stats.n_chosen, stats.n_rejected)


def head_score(
    hidden_chosen: Any,
    targets_chosen: Any,
    mask_chosen: Any,
    hidden_rejected: Any,
    targets_rejected: Any,
    mask_rejected: Any,
    unembedding: Any,
    *,
    transform: Logits = identity,
    chunk: int = CHUNK,
) -> Float[Array, "*batch"]:
    r"""The exact score of the unembedding's gradient: CHES with a coefficient for each two tokens.

    .. math::
      \langle A^+, A^- \rangle - \|A^+\|_F^2, \qquad A^\pm = \nabla_W \ln \pi(y^\pm \mid x)
        = \sum_t (e_{y_t} - \pi_t)\, h_t^\top

    Higher: training the pair pushes the chosen response down through the unembedding. The vocabulary is walked in
    chunks: neither [T, V] nor [V, D] gradients are formed.

    Args:
      hidden_chosen: [..., T, D] states after the final norm, of prompt + chosen.
      targets_chosen: [..., T] the token that each state predicts, i.e. the tokens shifted by one.
      mask_chosen: [..., T] true where that token belongs to the response.
      hidden_rejected: [..., U, D], of prompt + rejected.
      targets_rejected: [..., U].
      mask_rejected: [..., U].
      unembedding: [V, D], W in ``logits = transform(h @ W.T)``.
      transform: elementwise, a logit scale or soft-cap; the identity for most models.
      chunk: vocabulary rows at a time.

    Returns:
      [...] scores, accumulated in float32, or float64 for float64 states (under ``jax.enable_x64``).

    Raises:
      DataError: shapes that do not fit together, a mask that is none, or tokens that the vocabulary does not have.

    References:
      Theorem 6 of Razin et al., https://arxiv.org/abs/2410.08847.

    >>> h, w = jnp.ones((1, 2)), jnp.zeros((2, 2))  # probabilities 1/2: residuals (1, -1)/2 and (-1, 1)/2
    >>> float(head_score(h, [0], [True], h, [1], [True], w))
    -2.0
    """
    w = _array(jnp, "unembedding", unembedding)
    sides = []
    for name, hidden, mask, targets in (
        ("chosen", hidden_chosen, mask_chosen, targets_chosen),
        ("rejected", hidden_rejected, mask_rejected, targets_rejected),
    ):
        hidden, mask = _side(jnp, name, hidden, mask)
        first = sides[0][0] if sides else hidden
        if hidden.shape[:-2] != first.shape[:-2] or w.ndim != 2 or hidden.shape[-1] != w.shape[-1]:
            raise DataError(
                f"hidden_{name} {list(hidden.shape)}, unembedding {list(w.shape)}: expected [..., T, D] with the "
                "leading axes of hidden_chosen, and [V, D]"
            )
        sides.append((hidden, mask, _tokens(name, targets, mask, len(w))))
    batch = sides[0][0].shape[:-2]
    flat = [[a.reshape(math.prod(batch), *a.shape[len(batch) :]) for a in side] for side in sides]
    hidden = jnp.concatenate([jnp.where(m[..., None], h, 0) for h, m, _ in flat], axis=1)
    target = jnp.concatenate([t for _, _, t in flat], axis=1)
    segment = jnp.concatenate([jnp.where(m, i, 3) for i, (_, m, _) in enumerate(flat, 1)], axis=1).astype(jnp.int32)
    # one item a row, as ``data.packing`` writes it: shared (empty here), chosen, rejected
    item = jnp.zeros((len(hidden), 3), jnp.int32)
    preferred = jnp.broadcast_to(jnp.array([1, 1, 0], jnp.int32), item.shape)
    products = head_products(hidden, target, segment, item, preferred, w, transform, chunk)
    scores = jax.vmap(lambda p, s: pair_contributions(p, s, 0, 1, 2).shares.sum())(products, segment)
    return scores.reshape(batch)


def _side(xp: Any, name: str, hidden: Any, mask: Any) -> tuple[Any, Any]:
    """States in the accumulation dtype, and the mask as booleans, checked against each other."""
    hidden, mask = _array(xp, f"hidden_{name}", hidden), _array(xp, f"mask_{name}", mask)
    if hidden.ndim < 2 or mask.shape != hidden.shape[:-1]:
        raise DataError(
            f"hidden_{name} {list(hidden.shape)}, mask_{name} {list(mask.shape)}: expected [..., T, D] and [..., T]"
        )
    if mask.dtype != bool:
        known = _known(mask)
        if known is not None and not np.isin(known, (0, 1)).all():
            raise DataError(
                f"mask_{name}: holds {_some_not(known, np.isin(known, (0, 1)))}; expected true or 1 where the state "
                "predicts a token of the response, and false or 0 elsewhere"
            )
        mask = mask.astype(bool)
    return hidden.astype(accumulate(hidden.dtype)), mask


def _tokens(name: str, targets: Any, mask: Any, vocabulary: int) -> Array:
    """Targets as int32, checked where the mask is true."""
    targets = _array(jnp, f"targets_{name}", targets)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise DataError(f"targets_{name}: {targets.dtype}; expected token ids, whole numbers")
    if targets.shape != mask.shape:
        raise DataError(f"targets_{name} {list(targets.shape)}: expected {list(mask.shape)}, a token for each state")
    known, inside = _known(targets), _known(mask)
    if known is not None and inside is not None:
        good = ~inside | ((known >= 0) & (known < vocabulary))
        if not good.all():
            raise DataError(
                f"targets_{name}: holds {_some_not(known, good)} where the mask is true; expected token ids from 0 to "
                f"{vocabulary - 1}, the rows of the unembedding"
            )
    return targets.astype(jnp.int32)


def _array(xp: Any, name: str, value: Any) -> Any:
    try:
        array = xp.asarray(value)
        if array.dtype == object:
            raise TypeError("its rows differ in length, or it holds something else than numbers")
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name}: no array of numbers ({str(error).partition(chr(10))[0]:.160})") from None
    return array


def _known(array: Any) -> np.ndarray | None:
    """The values, where they are here and known: not in a function that is traced, not of another process."""
    if isinstance(array, Tracer) or (isinstance(array, jax.Array) and not array.is_fully_addressable):
        return None
    return np.asarray(array)


def _some_not(values: np.ndarray, good: np.ndarray) -> str:
    """The first values that are not good, in words."""
    return ", ".join(f"{v:g}" for v in np.unique(values[~good])[:3])
