r"""Objectives that weigh the tokens of a response: a rule gives each token a weight, then any loss of sums follows.

A rule is a pure function of the batch's token fields. Summed log-probabilities become :math:`\sum_t w_t \ln \pi_t`, and
lengths the number of tokens, or what a rule says they are.

    token_logps   [-1.0, -2.0, -3.0,  0.0]      padding may hold anything finite
    token_mask    [   1,    1,    1,    0]      sum -6, length 3
    weights       [   1,    0,    1,    0]      sum -4, length 3, or 2 if the rule counts kept tokens

>>> logps, mask = jnp.array([[-1.0, -2.0, -3.0, 0.0]]), jnp.array([[1, 1, 1, 0]])
>>> batch = LossInputs(
...     token_logps_chosen=logps, token_logps_rejected=logps, token_mask_chosen=mask, token_mask_rejected=mask
... )
>>> one = jnp.array([[1.0, 0.0, 1.0, 0.0]])
>>> sums = weighted_sums(batch, TokenWeights(one, one, counts=True))
>>> float(sums.logp_chosen[0]), int(sums.chosen_tokens[0])
(-4.0, 2)
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from ches_jax.errors import ChesError
from ches_jax.losses.inputs import LENGTHS, LOGPS, REFERENCE, Aux, LossInputs
from ches_jax.losses.registry import Loss, as_number
from ches_jax.losses.wrappers import wrapped, wrapper

TOKEN_LOGPS = frozenset({"token_logps_chosen", "token_logps_rejected"})
TOKEN_MASKS = frozenset({"token_mask_chosen", "token_mask_rejected"})
TOKEN_REFERENCE = frozenset({"ref_token_logps_chosen", "ref_token_logps_rejected"})
REF_SUMS = REFERENCE - LOGPS


class TokenWeights(NamedTuple):
    """Weights of the tokens of both responses; each joins the mask."""

    chosen: Float[Array, "*B T"]
    rejected: Float[Array, "*B U"]
    counts: bool = False
    """Whether a length is the sum of weights, or still the number of tokens."""


Rule: TypeAlias = Callable[[LossInputs], TokenWeights]


def masks(batch: LossInputs) -> tuple[Array, Array]:
    """Token masks in the dtype of the log-probabilities."""
    chosen, rejected = jnp.asarray(batch.token_logps_chosen), jnp.asarray(batch.token_logps_rejected)
    return (
        jnp.asarray(batch.token_mask_chosen).astype(chosen.dtype),
        jnp.asarray(batch.token_mask_rejected).astype(rejected.dtype),
    )


def weighted_sums(batch: LossInputs, weights: TokenWeights) -> LossInputs:
    """The batch with sums and lengths made from its tokens; reference sums too, where it has reference tokens."""
    sums = {}
    for side, given, mask in zip(("chosen", "rejected"), weights[:2], masks(batch), strict=True):
        weight = given * mask
        for prefix in ("", "ref_"):
            values = getattr(batch, f"{prefix}token_logps_{side}")
            if values is not None:
                # where, not a product: padding may hold minus infinity
                kept = jnp.where(weight != 0, jnp.asarray(values), 0.0)
                sums[f"{prefix}logp_{side}"] = jnp.sum(kept * weight, axis=-1)
        sums[f"{side}_tokens"] = jnp.sum(weight if weights.counts else mask, axis=-1)
    return batch._replace(**sums)


def every_token(batch: LossInputs) -> TokenWeights:
    """Weight 1 everywhere: the plain sums."""
    chosen, rejected = masks(batch)
    return TokenWeights(jnp.ones_like(chosen), jnp.ones_like(rejected))


def given_weights(batch: LossInputs) -> TokenWeights:
    """The batch's own ``token_weights_chosen`` and ``token_weights_rejected``."""
    chosen, rejected = masks(batch)
    return TokenWeights(
        jnp.asarray(batch.token_weights_chosen).astype(chosen.dtype),
        jnp.asarray(batch.token_weights_rejected).astype(rejected.dtype),
    )


def unsure_tokens(batch: LossInputs) -> TokenWeights:
    r"""ConfPO's rule: keep the tokens whose probability is below the response's mean, :math:`\pi_t < \bar\pi`.

    References:
      Yoon et al., ConfPO (https://arxiv.org/abs/2506.08712).
    """
    chosen, rejected = masks(batch)
    return TokenWeights(
        _below_mean(jnp.asarray(batch.token_logps_chosen), chosen),
        _below_mean(jnp.asarray(batch.token_logps_rejected), rejected),
        counts=True,
    )


def _below_mean(values: Array, mask: Array) -> Array:
    probability = jnp.where(mask != 0, jnp.exp(stop_gradient(jnp.where(mask != 0, values, 0.0))), 0.0)
    mean = jnp.sum(probability, axis=-1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)
    return jnp.where((probability < mean) & (mask != 0), jnp.ones_like(mask), jnp.zeros_like(mask))


def beyond_shared_length(alpha: float) -> Rule:
    r"""LD-DPO's rule: tokens beyond the length of the pair's shorter response weigh ``alpha``, 0 to 1.

    References:
      Liu et al., Length Desensitization in DPO (https://arxiv.org/abs/2409.06411).
    """
    kept = as_number(alpha)
    if kept is None or not 0.0 <= kept <= 1.0:
        raise ChesError(f"beyond_shared_length: alpha={alpha!r} is outside [0, 1]")

    def rule(batch: LossInputs) -> TokenWeights:
        chosen, rejected = masks(batch)
        shared = jnp.minimum(jnp.sum(chosen, axis=-1, keepdims=True), jnp.sum(rejected, axis=-1, keepdims=True))

        def weigh(mask: Array) -> Array:
            return jnp.where(jnp.cumsum(mask, axis=-1) <= shared, 1.0, kept).astype(mask.dtype)

        return TokenWeights(weigh(chosen), weigh(rejected))

    return rule


def differing_spans(batch: LossInputs) -> TokenWeights:
    """RRPO's rule: keep the tokens that differ between the two responses, as ``span_mask_*`` of the batch say.

    References:
      Sarkar et al., RRPO (https://arxiv.org/abs/2504.12083): rewards of sub-sequences, of the spans that were changed.
    """
    chosen, rejected = masks(batch)
    return TokenWeights(
        jnp.asarray(batch.span_mask_chosen).astype(chosen.dtype),
        jnp.asarray(batch.span_mask_rejected).astype(rejected.dtype),
        counts=True,
    )


TOKEN_WEIGHTS = frozenset({"token_weights_chosen", "token_weights_rejected"})
SPAN_MASKS = frozenset({"span_mask_chosen", "span_mask_rejected"})


def with_tokens(
    loss: Loss,
    rule: Rule = every_token,
    *,
    name: str = "every_token",
    extra: frozenset[str] = frozenset(),
    **options: float,
) -> Loss:
    """The same loss, of a batch of token log-probabilities.

    Args:
      loss: a loss of summed log-probabilities of pairs.
      rule: from the batch to the weight of each token.
      name: the rule's name in expressions, of ``WRAPPERS``.
      extra: token fields that the rule reads besides log-probabilities and masks.
      options: its numbers.
    """
    if not isinstance(loss, Loss):
        raise ChesError(f"{name}: expected a loss, such as get_loss('dpo'), not {loss!r:.80}")
    if not loss.needs >= LOGPS:
        raise ChesError(f"{name} needs a loss of summed log-probabilities of pairs; {loss!r} is none")
    reference = TOKEN_REFERENCE if loss.needs & REF_SUMS else frozenset()

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        weights = rule(batch)
        stopped = weights._replace(chosen=stop_gradient(weights.chosen), rejected=stop_gradient(weights.rejected))
        return loss(weighted_sums(batch, stopped))

    needs = (loss.needs - REFERENCE - LENGTHS) | TOKEN_LOGPS | TOKEN_MASKS | reference | extra
    return wrapped(name, loss, compute, needs, **options)  # type: ignore[arg-type]


@wrapper("every_token", source="")
def of_every_token(loss: Loss) -> Loss:
    """A loss of sums, of the log-probabilities of all tokens: the same values, from tokens."""
    return with_tokens(loss)


@wrapper("unsure_tokens", source="arXiv:2506.08712")
def of_unsure_tokens(loss: Loss) -> Loss:
    """A loss of sums, of the tokens that ``unsure_tokens`` keeps (ConfPO's rule)."""
    return with_tokens(loss, unsure_tokens, name="unsure_tokens")


@wrapper("beyond_shared_length", source="arXiv:2409.06411", alpha=0.5)
def of_shared_length(loss: Loss, alpha: float = 0.5) -> Loss:
    """A loss of sums in which tokens beyond the shorter response's length weigh ``alpha`` (LD-DPO's rule)."""
    return with_tokens(loss, beyond_shared_length(alpha), name="beyond_shared_length", alpha=alpha)


@wrapper("differing_spans", source="arXiv:2504.12083")
def of_differing_spans(loss: Loss) -> Loss:
    """A loss of sums, of the tokens that differ between the two responses (RRPO's rule)."""
    return with_tokens(loss, differing_spans, name="differing_spans", extra=SPAN_MASKS)


@wrapper("given_weights", source="")
def of_given_weights(loss: Loss) -> Loss:
    """A loss of sums in which each token has a weight of the data (``token_weights_*``)."""
    return with_tokens(loss, given_weights, name="given_weights", extra=TOKEN_WEIGHTS)
