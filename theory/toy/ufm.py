r"""The unconstrained-features model, and the one kernel identity that every theorem is a coordinate of.

Parameters are the unembedding W and one free vector per context (prompt and response prefix), Section 3 of Razin et al.
(https://arxiv.org/abs/2410.08847):

.. math::
  \ln \pi(y|x) = \sum_k \ln \mathrm{softmax}(W h_{x,y_{<k}})_{y_k}

For any loss of the log-probabilities, any number of samples and any overlap of prefixes, gradient flow gives every
response z, with :math:`d^+ = -\partial L / \partial \ln \pi(y^+)` and :math:`d^- = \partial L / \partial \ln \pi(y^-)`,

.. math::
  \frac{d}{dt} \ln \pi(z) = \sum_i K(z, y^+_i) d^+_i - K(z, y^-_i) d^-_i                              \qquad (*)

.. math::
  K(u,v) = \sum_{k,k'} \langle E_k, E'_{k'} \rangle \langle h_k, h'_{k'} \rangle
         + \sum_{k,k'\,\text{same context}} \langle G_k, G'_{k'} \rangle,
  \quad E_k = e_{y_k} - \pi_k, \quad G_k = W^\top E_k .
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class UFM(NamedTuple):
    """Parameters."""

    unembedding: Float[Array, "V D"]
    features: Float[Array, "C D"]


class Responses(NamedTuple):
    """Padded responses; ``contexts`` names the feature row that predicts each token."""

    tokens: Int[Array, "N T"]
    contexts: Int[Array, "N T"]
    mask: Bool[Array, "N T"]


class Pairs(NamedTuple):
    """Preference pairs: row i of both belongs to pair i."""

    chosen: Responses
    rejected: Responses


class Residuals(NamedTuple):
    """Pieces of the gradients of a log-probability, zero on padding."""

    error: Float[Array, "N T V"]
    """E: e_y - pi."""
    pull: Float[Array, "N T D"]
    """G = W^T E: the token's unembedding minus the mean one."""
    hidden: Float[Array, "N T D"]


class Kernel(NamedTuple):
    """Inner products of the gradients of log-probabilities, through W and through the features."""

    head: Float[Array, "*n"]
    body: Float[Array, "*n"]

    @property
    def total(self) -> Float[Array, "*n"]:
        """K."""
        return self.head + self.body


PairLoss = Callable[[Array, Array], Array]
"""From the log-probabilities of all chosen and all rejected responses to the training loss, a number."""


Objectives = Callable[["UFM"], Float[Array, " L"]]
"""From a model to several training losses at once."""


def stack(*responses: Responses) -> Responses:
    """Several batches of responses as one."""
    return Responses(*(jnp.concatenate(parts) for parts in zip(*responses, strict=True)))


def share_contexts(prompts: Int[Array, " N"], tokens: Int[Array, "N T"]) -> Int[Array, "N T"]:
    """A row for each (prompt, prefix), the same for equal ones; rows are among N * T.

    >>> share_contexts(jnp.array([0, 0]), jnp.array([[1, 2, 3], [1, 5, 3]])).tolist()
    [[0, 1, 2], [0, 1, 5]]
    """
    n, length = tokens.shape
    same_token = (tokens[:, None, :] == tokens[None, :, :]).astype(jnp.int32)
    before = jnp.concatenate([jnp.ones((n, n, 1), jnp.int32), jnp.cumprod(same_token, axis=2)[:, :, :-1]], axis=2)
    same = (before == 1) & (prompts[:, None] == prompts[None, :])[:, :, None]
    first = jnp.argmax(same, axis=1).astype(jnp.int32)
    return first * length + jnp.arange(length, dtype=jnp.int32)[None, :]


def pair_responses(
    prompts: Int[Array, " N"], chosen: Array, rejected: Array, chosen_mask: Array, rejected_mask: Array
) -> Pairs:
    """Pairs whose equal prefixes share their features, within a pair and across pairs of one prompt."""
    n = prompts.shape[0]
    contexts = share_contexts(jnp.concatenate([prompts, prompts]), jnp.concatenate([chosen, rejected]))
    return Pairs(
        Responses(chosen, contexts[:n], chosen_mask),
        Responses(rejected, contexts[n:], rejected_mask),
    )


def residual(logits: Float[Array, "*n V"], token: Int[Array, "*n"]) -> Float[Array, "*n V"]:
    """E = e_y - pi, with 1 - pi(y) as the sum of the other probabilities: by subtraction it loses its digits near 1."""
    is_token = jax.nn.one_hot(token, logits.shape[-1], dtype=bool)
    others = jnp.where(is_token, 0.0, jax.nn.softmax(logits, axis=-1))
    return jnp.where(is_token, others.sum(-1, keepdims=True), -others)


def token_log_probs(model: UFM, responses: Responses) -> Float[Array, "N T"]:
    """Log-probability of every response token, nats; 0 on padding."""
    logits = jnp.einsum("ntd,vd->ntv", model.features[responses.contexts], model.unembedding)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), responses.tokens[..., None], axis=-1)[..., 0]
    return jnp.where(responses.mask, picked, 0.0)


def log_probs(model: UFM, responses: Responses) -> Float[Array, " N"]:
    """Log-probability of every response, nats."""
    return token_log_probs(model, responses).sum(-1)


def pair_log_probs(model: UFM, pairs: Pairs) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-probabilities of the chosen and of the rejected responses."""
    return log_probs(model, pairs.chosen), log_probs(model, pairs.rejected)


def residuals(model: UFM, responses: Responses) -> Residuals:
    """E, G and h of every response token (Equations 9 and 10)."""
    hidden = jnp.where(responses.mask[..., None], model.features[responses.contexts], 0.0)
    logits = jnp.einsum("ntd,vd->ntv", hidden, model.unembedding)
    error = jnp.where(responses.mask[..., None], residual(logits, responses.tokens), 0.0)
    return Residuals(error, error @ model.unembedding, hidden)


def token_kernel(model: UFM, left: Responses, right: Responses) -> Kernel:
    """K(u, v) between the responses u of ``left`` and every single token v of ``right``, [N, M, T].

    What a loss needs that reads the log-probability of each token: (*) holds with tokens for responses.
    """
    a, b = residuals(model, left), residuals(model, right)
    alpha = jnp.einsum("akv,blv->akbl", a.error, b.error)
    similarity = jnp.einsum("akd,bld->akbl", a.hidden, b.hidden)
    same = left.contexts[:, :, None, None] == right.contexts[None, None, :, :]
    pulls = jnp.where(same, jnp.einsum("akd,bld->akbl", a.pull, b.pull), 0.0)
    return Kernel((alpha * similarity).sum(1), pulls.sum(1))


def kernel(model: UFM, left: Responses, right: Responses) -> Kernel:
    """K(u, v) between all responses u of ``left`` and v of ``right``, [N, M]; see the module's equation."""
    return Kernel(*(part.sum(-1) for part in token_kernel(model, left, right)))


def gram(model: UFM, *responses: Responses) -> Float[Array, "N N"]:
    """K between all the responses; of a pair's two sides [[K++, K+-], [K+-, K--]]."""
    rows = stack(*responses)
    return kernel(model, rows, rows).total


def incentives(loss: PairLoss, chosen: Float[Array, " N"], rejected: Float[Array, " N"]) -> tuple[Array, Array]:
    """How hard the loss pulls each chosen response up and each rejected one down: (-dL/dlnpi+, +dL/dlnpi-)."""
    up, down = jax.grad(loss, argnums=(0, 1))(chosen, rejected)
    return -up, down


def rates(model: UFM, pairs: Pairs, loss: PairLoss, probe: Responses) -> Float[Array, " N"]:
    """d/dt ln pi(z) of every probe response under gradient flow of ``loss``: identity (*), nats per unit of time."""
    up, down = incentives(loss, *pair_log_probs(model, pairs))
    return kernel(model, probe, pairs.chosen).total @ up - kernel(model, probe, pairs.rejected).total @ down


def rates_by_autodiff(model: UFM, objectives: Objectives, probe: Responses) -> Float[Array, "L N"]:
    """d/dt ln pi(z) of every probe under the flow of each objective, by a backward and a forward-mode pass.

    Nothing of the theory is in it: what the identity and the theorems are checked against.
    """
    velocities = jax.tree.map(jnp.negative, jax.jacrev(objectives)(model))
    return jax.vmap(lambda v: jax.jvp(lambda m: log_probs(m, probe), (model,), (v,))[1])(velocities)


def flow_rates(model: UFM, pairs: Pairs, losses: Sequence[PairLoss], probe: Responses) -> Float[Array, "L N"]:
    """``rates_by_autodiff`` of losses that read the pairs' log-probabilities."""

    def objectives(m: UFM) -> Array:
        now = pair_log_probs(m, pairs)
        return jnp.stack([loss(*now) for loss in losses])

    return rates_by_autodiff(model, objectives, probe)


def descent(model: UFM, pairs: Pairs, loss: PairLoss) -> UFM:
    """The velocity of gradient flow, -grad L."""
    gradient = jax.grad(lambda m: loss(*pair_log_probs(m, pairs)))(model)
    return jax.tree.map(jnp.negative, gradient)


def rescale(model: UFM, factor: float) -> UFM:
    """(s W, h / s): the same probabilities, another geometry, and so other dynamics."""
    return UFM(model.unembedding * factor, model.features / factor)


def shift_gauge(model: UFM, direction: Float[Array, " D"]) -> UFM:
    """W + 1 v^T: the same probabilities and the same rates, but other inner products of unembeddings."""
    return UFM(model.unembedding + direction[None, :], model.features)
