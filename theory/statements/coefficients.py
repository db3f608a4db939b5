r"""The coefficients alpha and beta of Theorems 6 and 7, and how far they can go.

.. math::
  \alpha_{k,k'} = \langle e_y - \pi, e_{y'} - \pi' \rangle = 1[y = y'] - \pi'(y) - \pi(y') + \langle \pi, \pi' \rangle

The paper states [-2, 2]. Sharper (derived; checked by sweep and by search):

- :math:`|\alpha| \le 2 (1-\pi(y)) (1-\pi'(y'))`, so coefficients vanish where the model is sure;
- the same token: :math:`\alpha = (1-p)(1-p') + \sum_{j \ne y} \pi_j \pi'_j \in [0, 2)`;
- different tokens: (-2, 1); at a first position with different tokens: [-1/2, 1).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from theory.statements.theorems import Response
from theory.toy.ufm import residual


class Coefficients(NamedTuple):
    """Coefficients between the tokens of two responses, with what bounds them."""

    alpha: Float[Array, "T U"]
    bound: Float[Array, "T U"]
    """2 (1 - pi(y)) (1 - pi'(y')): the largest absolute value."""
    same_token: Bool[Array, "T U"]
    real: Bool[Array, "T U"]
    """False on padding."""
    similarity: Float[Array, "T U"]
    """<h, h'>."""


class Positivity(NamedTuple):
    """Shares that Appendix G.2 counts: it reports more than 69% and more than 99% on language models."""

    alpha: Array
    similarity: Array
    product: Array


def pair_coefficient(pi: Float[Array, " V"], y: Array, other: Float[Array, " V"], z: Array) -> Array:
    """One coefficient from two distributions and two tokens, by the scalar formula."""
    return (y == z).astype(pi.dtype) - other[y] - pi[z] + pi @ other


def coefficients(w: Float[Array, "V D"], left: Response, right: Response) -> Coefficients:
    """All coefficients between two responses: alpha^- for (y+, y-), alpha^+ for (y+, y+), beta for (z, y)."""
    errors, sure = [], []
    for response in (left, right):
        error = residual(response.hidden @ w.T, response.tokens)
        errors.append(error)
        sure.append(jnp.take_along_axis(error, response.tokens[:, None], axis=1)[:, 0])
    return Coefficients(
        alpha=errors[0] @ errors[1].T,
        bound=2 * sure[0][:, None] * sure[1][None, :],
        same_token=left.tokens[:, None] == right.tokens[None, :],
        real=left.mask[:, None] & right.mask[None, :],
        similarity=left.hidden @ right.hidden.T,
    )


def positivity(c: Coefficients) -> Positivity:
    """Shares of positive coefficients, inner products and products of the two, among real positions."""
    count = c.real.sum()

    def share(values: Array) -> Array:
        return (c.real & (values > 0)).sum() / count

    return Positivity(share(c.alpha), share(c.similarity), share(c.alpha * c.similarity))


def head_score(w: Float[Array, "V D"], chosen: Response, rejected: Response) -> Array:
    """<A+, A-> - |A+|^2: what ``scores.head_score`` computes for whole batches without the double sum."""
    cross, own = coefficients(w, chosen, rejected), coefficients(w, chosen, chosen)
    sums = [jnp.where(c.real, c.alpha * c.similarity, 0.0).sum() for c in (cross, own)]
    return sums[0] - sums[1]
