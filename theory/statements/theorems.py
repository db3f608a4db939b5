r"""Theorems 4 to 9, Propositions 1 and 2, Lemmas 1 and 2 of Razin et al. (https://arxiv.org/abs/2410.08847).

Every function takes plain arrays and returns the displayed decomposition; terms are rates in nats per unit of time,
already multiplied by :math:`-\ell'`, so they add up to the total. Signs and symbols are those of the paper with its
misprints put right; ``printed=True`` gives what is printed, so that the errata can be tested.

The informal statements are these in words: Theorem 1 is Theorem 4 (without a factor, see ``informal_theorem_1``),
Theorem 2 is Theorem 5, Theorem 3 is Theorem 6, of which CHES keeps the feature sums with every coefficient at 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from theory.toy.ufm import UFM, Responses, residual


class Decomposition(NamedTuple):
    """A rate and the terms that it is the sum of."""

    total: Array
    terms: dict[str, Array]


class Response(NamedTuple):
    """One padded response with the features that predict its tokens."""

    tokens: Int[Array, " T"]
    hidden: Float[Array, "T D"]
    mask: Bool[Array, " T"]


def response_of(model: UFM, responses: Responses, row: int = 0) -> Response:
    """One row of a batch of responses with its features looked up."""
    contexts, mask = responses.contexts[row], responses.mask[row]
    return Response(responses.tokens[row], jnp.where(mask[:, None], model.features[contexts], 0.0), mask)


def _decomposition(terms: dict[str, Array]) -> Decomposition:
    total = sum(terms.values(), start=jnp.zeros(()))
    return Decomposition(total, terms)


def probabilities(w: Float[Array, "V D"], h: Float[Array, " D"]) -> Float[Array, " V"]:
    """softmax(W h)."""
    return jax.nn.softmax(w @ h)


def missing(pi: Float[Array, " V"], token: Array) -> Array:
    """1 - pi(token) as the sum of the others."""
    return jnp.where(_ids(pi, token) == token, 0.0, pi).sum()


def _ids(values: Array, token: Array) -> Array:
    """The positions of an array, in the token's integer type (strict promotion mixes none)."""
    return jnp.arange(values.shape[0], dtype=jnp.asarray(token).dtype)


def _others(w: Array, pi: Array, chosen: Array, rejected: Array) -> Array:
    r""":math:`-\sum_{z \notin \{y^+,y^-\}} \pi(z) \langle W_z, W_{y^+} - W_{y^-} \rangle`."""
    ids = _ids(w, chosen)
    along = w @ (w[chosen] - w[rejected])
    return -jnp.where((ids == chosen) | (ids == rejected), 0.0, pi * along).sum()


def theorem_4(
    w: Float[Array, "V D"], h: Float[Array, " D"], chosen: Array, rejected: Array, slope: Array
) -> Decomposition:
    r"""Theorem 4: one sample of single tokens, the preferred token's rate.

    .. math::
      \frac{d}{dt} \ln \pi(y^+) &= -\ell' [m + S], \qquad q = 1 - \pi(y^+) + \pi(y^-) \\
      m &= (1-\pi(y^+)) \|W_{y^+}\|^2 + \pi(y^-) \|W_{y^-}\|^2 + q \|h\|^2 \ge 0 \\
      S &= -q \langle W_{y^+}, W_{y^-} \rangle - \sum_{z \ne y^\pm} \pi(z) \langle W_z, W_{y^+} - W_{y^-} \rangle

    Args:
      w: unembedding.
      h: feature of the prompt.
      chosen: the preferred token.
      rejected: the dispreferred token.
      slope: ell'(u).
    """
    pi = probabilities(w, h)
    up, down = w[chosen], w[rejected]
    q = missing(pi, chosen) + pi[rejected]
    parts = {
        "m_chosen_norm": missing(pi, chosen) * (up @ up),
        "m_rejected_norm": pi[rejected] * (down @ down),
        "m_feature_norm": q * (h @ h),
        "S_alignment": -q * (up @ down),
        "S_others": _others(w, pi, chosen, rejected),
    }
    return _decomposition({name: -slope * value for name, value in parts.items()})


def theorem_4_centred(
    w: Float[Array, "V D"], h: Float[Array, " D"], chosen: Array, rejected: Array, slope: Array
) -> Decomposition:
    r"""Theorem 4 in the gauge where the mean unembedding is zero: each term is then a fact about the model.

    .. math::
      \frac{d}{dt} \ln \pi(y^+) = -\ell' [\|\bar W_{y^+}\|^2 - \langle \bar W_{y^+}, \bar W_{y^-} \rangle + q \|h\|^2],
      \qquad \bar W = W - E_\pi W

    W and W + 1 v^T are the same model, but the terms of Theorem 4 differ between them; these do not (derived).
    """
    pi = probabilities(w, h)
    # W_y - E_pi W = sum_z pi(z) (W_y - W_z): differences first, so that nothing cancels when pi(y) is near 1
    up, down = (pi @ (w[token][None, :] - w) for token in (chosen, rejected))
    parts = {
        "chosen_norm": up @ up,
        "alignment": -(up @ down),
        "feature_norm": (missing(pi, chosen) + pi[rejected]) * (h @ h),
    }
    return _decomposition({name: -slope * value for name, value in parts.items()})


def informal_theorem_1(w: Float[Array, "V D"], h: Float[Array, " D"], chosen: Array, rejected: Array) -> Array:
    r"""The quantity of informal Theorem 1: Theorem 4's -S without the factor q on the alignment."""
    return w[chosen] @ w[rejected] - _others(w, probabilities(w, h), chosen, rejected)


def rejected_rate(
    w: Float[Array, "V D"], h: Float[Array, " D"], chosen: Array, rejected: Array, slope: Array
) -> Decomposition:
    r"""The dispreferred token's rate, which the paper does not state (derived): Theorem 4 with the roles exchanged.

    .. math::
      \frac{d}{dt} \ln \pi(y^-) = -\ell' [ -(1-\pi(y^-)) \|W_{y^-}\|^2 - \pi(y^+) \|W_{y^+}\|^2
        + q' \langle W_{y^+}, W_{y^-} \rangle - \sum_z \pi(z) \langle W_z, W_{y^+} - W_{y^-} \rangle - q' \|h\|^2 ],
      \quad q' = 1 - \pi(y^-) + \pi(y^+)
    """
    return theorem_4(w, h, rejected, chosen, -slope)


def margin_rate(w: Float[Array, "V D"], h: Float[Array, " D"], chosen: Array, rejected: Array, slope: Array) -> Array:
    r"""The margin's rate for single tokens (derived), never negative while :math:`-\ell' \ge 0`.

    .. math:: \frac{du}{dt} = -\ell' ( \|W_{y^+} - W_{y^-}\|^2 + 2 \|h\|^2 )
    """
    difference = w[chosen] - w[rejected]
    return -slope * (difference @ difference + 2 * (h @ h))


def _prime_or_not(slope: Array, loss: Array | None, printed: bool) -> Array:
    """ell', or ell where the paper prints that."""
    if not printed:
        return slope
    assert loss is not None, "the printed form needs the value of the loss"
    return loss


def theorem_5(
    w: Float[Array, "V D"],
    h: Float[Array, " D"],
    chosen: Array,
    rejected: Array,
    slope: Array,
    *,
    loss: Array | None = None,
    printed: bool = False,
) -> Decomposition:
    r"""Theorem 5: the rate of every other token, in the setting of Theorem 4.

    .. math::
      \frac{d}{dt} \ln \pi(z) &= -\ell' [\langle W_z, W_{y^+} - W_{y^-} \rangle + c] \\
      c &= (\pi(y^-) - \pi(y^+)) \|h\|^2 - \sum_{z'} \pi(z') \langle W_{z'}, W_{y^+} - W_{y^-} \rangle

    Args:
      w: unembedding.
      h: feature of the prompt.
      chosen: the preferred token.
      rejected: the dispreferred token.
      slope: ell'(u).
      loss: ell(u), needed for ``printed``.
      printed: as printed, with ell in the place of ell'.

    Returns:
      Rates of all V tokens; those of the pair itself mean nothing here.
    """
    slope = _prime_or_not(slope, loss, printed)
    pi = probabilities(w, h)
    along = w @ (w[chosen] - w[rejected])
    c = (pi[rejected] - pi[chosen]) * (h @ h) - pi @ along
    return _decomposition({"direction": -slope * along, "c": jnp.broadcast_to(-slope * c, along.shape)})


def _errors(w: Array, response: Response) -> Array:
    return jnp.where(response.mask[:, None], residual(response.hidden @ w.T, response.tokens), 0.0)


def feature_terms(w: Float[Array, "V D"], left: Response, right: Response) -> Array:
    r""":math:`\sum_{k,k'} \langle E_k, E'_{k'} \rangle \langle h_k, h'_{k'} \rangle`: the gradient through W alone."""
    alpha = _errors(w, left) @ _errors(w, right).T
    return (alpha * (left.hidden @ right.hidden.T)).sum()


def theorem_6(
    w: Float[Array, "V D"], chosen: Response, rejected: Response, slope: Array, *, shared: int | Array = 0
) -> Decomposition:
    r"""Theorem 6: one sample of sequences, and its extension to ``shared`` equal first tokens (q below).

    .. math::
      \frac{d}{dt} \ln \pi(y^+) &= -\ell' \Big[ m + S_{y^+_{q+1}, y^-_{q+1}}
        - \sum_{k,k'} \alpha^-_{k,k'} \langle h_k, h^-_{k'} \rangle
        + \sum_{k,k'} \alpha^+_{k,k'} \langle h_k, h_{k'} \rangle \Big] \\
      m &= (1-\pi(y^+_{q+1})) \|W_{y^+_{q+1}}\|^2 + \pi(y^-_{q+1}) \|W_{y^-_{q+1}}\|^2 + \sum_{k \ge q+2} \|G_k\|^2

    with S as in Theorem 4 at the context of token q + 1. The theorem has q = 0; the sums over alpha stay whole for
    q > 0, where the equal tokens cancel. Neither response may be a prefix of the other.

    Args:
      w: unembedding.
      chosen: the preferred response.
      rejected: the dispreferred response.
      slope: ell'(u).
      shared: how many first tokens the two have in common.
    """
    at, yp, ym = chosen.hidden[shared], chosen.tokens[shared], rejected.tokens[shared]
    pi = probabilities(w, at)
    up, down = w[yp], w[ym]
    pulls = (_errors(w, chosen) @ w) ** 2
    later = _ids(chosen.tokens, jnp.asarray(shared)) > shared
    parts = {
        "m_chosen_norm": missing(pi, yp) * (up @ up),
        "m_rejected_norm": pi[ym] * (down @ down),
        "m_later_tokens": jnp.where(later, pulls.sum(-1), 0.0).sum(),
        "S_alignment": -(missing(pi, yp) + pi[ym]) * (up @ down),
        "S_others": _others(w, pi, yp, ym),
        "alpha_minus": -feature_terms(w, chosen, rejected),
        "alpha_plus": feature_terms(w, chosen, chosen),
    }
    return _decomposition({name: -slope * value for name, value in parts.items()})


def theorem_7(
    w: Float[Array, "V D"], probe: Response, chosen: Response, rejected: Response, slope: Array
) -> Decomposition:
    r"""Theorem 7: any response z whose first token is neither of the pair's, in the setting of Theorem 6 with q = 0.

    .. math::
      \frac{d}{dt} \ln \pi(z) &= -\ell' \Big[ c + \langle W_{z_1}, W_{y^+_1} - W_{y^-_1} \rangle
        - \sum_{k,k'} \beta^-_{k,k'} \langle h^z_k, h^-_{k'} \rangle
        + \sum_{k,k'} \beta^+_{k,k'} \langle h^z_k, h^+_{k'} \rangle \Big] \\
      c &= -\sum_v \pi(v|x) \langle W_v, W_{y^+_1} - W_{y^-_1} \rangle
    """
    along = w @ (w[chosen.tokens[0]] - w[rejected.tokens[0]])
    parts = {
        "c": -(probabilities(w, chosen.hidden[0]) @ along),
        "direction": along[probe.tokens[0]],
        "beta_minus": -feature_terms(w, probe, rejected),
        "beta_plus": feature_terms(w, probe, chosen),
    }
    return _decomposition({name: -slope * value for name, value in parts.items()})


def theorem_7_shared(
    w: Float[Array, "V D"], probe: Response, chosen: Response, rejected: Response, slope: Array, *, shared: int
) -> Decomposition:
    r"""Theorem 7 for a response z that begins with the first ``shared`` >= 1 tokens of y+ (derived; q below).

    .. math::
      \frac{d}{dt} \ln \pi(z) = -\ell' \Big[ \sum_{k \le q} \|G_k\|^2
        + \langle G^z_{q+1}, G^+_{q+1} \rangle - \langle G_1, G^-_1 \rangle
        - \sum_{k,k'} \beta^-_{k,k'} \langle h^z_k, h^-_{k'} \rangle
        + \sum_{k,k'} \beta^+_{k,k'} \langle h^z_k, h^+_{k'} \rangle \Big]

    The shared tokens can only rise; the term at the branching token has either sign. y+ and y- still differ in their
    first token.
    """
    pulls = [_errors(w, response) @ w for response in (probe, chosen, rejected)]
    shared_tokens = _ids(probe.tokens, jnp.asarray(shared)) < shared
    parts = {
        "shared_tokens": jnp.where(shared_tokens, (pulls[0] ** 2).sum(-1), 0.0).sum(),
        "branch": pulls[0][shared] @ pulls[1][shared],
        "rejected_first": -(pulls[0][0] @ pulls[2][0]),
        "beta_minus": -feature_terms(w, probe, rejected),
        "beta_plus": feature_terms(w, probe, chosen),
    }
    return _decomposition({name: -slope * value for name, value in parts.items()})


def theorem_8(
    w: Float[Array, "V D"],
    h: Float[Array, "N D"],
    chosen: Int[Array, " N"],
    rejected: Int[Array, " N"],
    slopes: Float[Array, " N"],
) -> Decomposition:
    r"""Theorem 8: several samples of single tokens, no prompt twice; the rate of every preferred token.

    .. math::
      \frac{d}{dt} \ln \pi(y^+_i|x_i) = \frac{-\ell'_i}{N} [m_i + S_i]
        + \sum_{j \ne i} \frac{-\ell'_j}{N} \alpha_{ij} \langle h_i, h_j \rangle

    Returns:
      Totals [N]; the terms of Theorem 4 summed as ``same_sample``, and ``other_samples``.
    """
    n = h.shape[0]
    own = jax.vmap(theorem_4, in_axes=(None, 0, 0, 0, 0))(w, h, chosen, rejected, slopes / n).total
    alpha = sample_coefficients(w, h, chosen, rejected)
    others = jnp.where(jnp.eye(n, dtype=bool), 0.0, alpha * (h @ h.T)) @ (-slopes / n)
    return _decomposition({"same_sample": own, "other_samples": others})


def sample_coefficients(w: Array, h: Array, chosen: Array, rejected: Array) -> Float[Array, "N N"]:
    r""":math:`\alpha_{ij} = 1[y^+_i = y^+_j] - 1[y^+_i = y^-_j] + \pi(y^-_j|x_i) - \pi(y^+_j|x_i)` of Theorem 8."""
    pi = jax.nn.softmax(h @ w.T, axis=-1)
    agree = (chosen[:, None] == chosen[None, :]).astype(w.dtype)
    contradict = (chosen[:, None] == rejected[None, :]).astype(w.dtype)
    return agree - contradict + pi[:, rejected] - pi[:, chosen]


def theorem_9(
    w: Float[Array, "V D"],
    h: Float[Array, "N D"],
    chosen: Int[Array, " N"],
    rejected: Int[Array, " N"],
    slopes: Float[Array, " N"],
    *,
    losses: Float[Array, " N"] | None = None,
    printed: bool = False,
) -> Decomposition:
    r"""Theorem 9: several samples of single tokens; the rate of every token z given every prompt.

    .. math::
      \frac{d}{dt} \ln \pi(z|x_i) &= c_i + \frac{-\ell'_i}{N} \langle W_z, W_{y^+_i} - W_{y^-_i} \rangle
        + \sum_j \frac{-\ell'_j}{N} (1[z = y^+_j] - 1[z = y^-_j]) \langle h_i, h_j \rangle \\
      c_i &= \frac{\ell'_i}{N} \sum_{z'} \pi(z'|x_i) \langle W_{z'}, W_{y^+_i} - W_{y^-_i} \rangle
        + \sum_j \frac{-\ell'_j}{N} (\pi(y^-_j|x_i) - \pi(y^+_j|x_i)) \langle h_i, h_j \rangle

    Sums over j include the sample itself. ``printed`` puts ell where the paper does: in the sample's own term and in
    the first part of c.

    Returns:
      Totals [N, V] and the terms ``own``, ``transfer``, ``c``.
    """
    n = h.shape[0]
    own_slopes = _prime_or_not(slopes, losses, printed)
    pi = jax.nn.softmax(h @ w.T, axis=-1)
    along = (w[chosen] - w[rejected]) @ w.T
    labels = jax.nn.one_hot(chosen, w.shape[0], dtype=w.dtype) - jax.nn.one_hot(rejected, w.shape[0], dtype=w.dtype)
    pulled = (h @ h.T) * (-slopes / n)[None, :]
    own = (-own_slopes / n)[:, None] * along
    c = (own_slopes / n) * (pi * along).sum(-1) - (pulled * (pi @ labels.T)).sum(-1)
    return _decomposition({"own": own, "transfer": pulled @ labels, "c": jnp.broadcast_to(c[:, None], own.shape)})


def lemma_1(margin: Array, ref_margin: Array, beta: Array) -> Array:
    r"""Lemma 1: DPO's slope, negative at every margin.

    .. math:: \ell'(u) = -\beta \sigma(\beta (u_{ref} - u)) < 0
    """
    return -beta * jax.nn.sigmoid(beta * (ref_margin - margin))


def lemma_2(
    slope_at_start: Array, curvature: Array, times: Float[Array, " S"], pull: Float[Array, " S"]
) -> Float[Array, " half"]:
    r"""Lemma 2 as a number (derived): the least that :math:`-\ell'` can be along the flow of one sample.

    .. math::
      -\ell'(u(t)) \ge -\ell'(u(0)) \exp\Big(-L \int_0^t \|\nabla \ln \pi(y^+) - \nabla \ln \pi(y^-)\|^2\Big) > 0

    by :math:`\dot u = -\ell' \|\cdot\|^2` and Groenwall's inequality, with L a Lipschitz constant of :math:`\ell'`
    between u(0) and u(t): the assumption that the paper leaves unsaid. Equality for quadratic losses.

    Args:
      slope_at_start: ell'(u(0)).
      curvature: L.
      times: an odd number of evenly spaced ones.
      pull: the squared norm above at those times.

    Returns:
      The bound at every second time, ``times[::2]``: the integral is Simpson's.
    """
    pieces = (pull[:-2:2] + 4 * pull[1:-1:2] + pull[2::2]) * (times[1] - times[0]) / 3
    integral = jnp.concatenate([jnp.zeros(1, pull.dtype), jnp.cumsum(pieces)])
    return -slope_at_start * jnp.exp(-curvature * integral)


def proposition_1(k_chosen: Array, k_cross: Array, slope: Array, sft_weight: Array) -> Decomposition:
    r"""Proposition 1: the flow of a loss with an SFT term of weight :math:`\lambda` (Equation 4).

    .. math:: \frac{d}{dt} \ln \pi(y^+) = E + \lambda K_{++}, \qquad E = -\ell' (K_{++} - K_{+-})
    """
    return _decomposition({"E": -slope * (k_chosen - k_cross), "sft": sft_weight * k_chosen})


def proposition_2(
    k_chosen: Array,
    k_cross: Array,
    weighted_slope: Array,
    up: Array,
    down: Array,
    *,
    slope: Array | None = None,
    printed: bool = False,
) -> Decomposition:
    r"""Proposition 2: the flow of a loss that weighs the two log-probabilities (Equation 5).

    .. math:: \frac{d}{dt} \ln \pi(y^+) = -\lambda^- \mu' (K_{++} - K_{+-}) - (\lambda^+ - \lambda^-) \mu' K_{++}

    The paper's first term is :math:`\rho E`, :math:`\rho = \lambda^- \mu' / \ell'`: ``printed`` computes it so,
    which is 0/0 where the unweighted margin has no slope and flips the sign of E where that slope is positive.

    Args:
      k_chosen: K++.
      k_cross: K+-.
      weighted_slope: mu', the slope of ell at the weighted margin.
      up: lambda+.
      down: lambda-.
      slope: ell' at the unweighted margin, for ``printed``.
      printed: the first term by way of rho.
    """
    if printed:
        assert slope is not None, "the printed form needs the slope at the unweighted margin"
        rho = down * weighted_slope / slope
        first = rho * (-slope * (k_chosen - k_cross))
    else:
        first = -down * weighted_slope * (k_chosen - k_cross)
    return _decomposition({"rho_E": first, "gamma": -(up - down) * weighted_slope * k_chosen})
