"""The reference model beside the policy: what a loss reads of its states at every token.

Its log-probabilities are numbers of the data, computed once (``train.reference``). Divergences of next-token
distributions need its state at each prediction, and masks its states behind every layer: too much to keep on disk, so
the reference is run again in each update. Under LoRA it is the frozen base with the adapters as they started, and no
second copy of the weights is held; in full training it is one.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ches_jax.losses import Loss
from ches_jax.losses.token_level import ACTIVATION_MASKS, TOKEN_KL
from ches_jax.models.attention.dense import Attend
from ches_jax.models.attention.mask import Visibility
from ches_jax.models.decoder import Decoder
from ches_jax.models.logprobs import token_divergences
from ches_jax.models.precision import accumulate
from ches_jax.train.data.batches import Batch
from ches_jax.train.forward import head_of
from ches_jax.train.token_masks import activation_masks, learned_kinds, learned_mask


class Reference(NamedTuple):
    """A decoder without arrays, and its arrays."""

    abstract: Decoder
    params: Mapping[str, Any]


class Beside(NamedTuple):
    """The reference with its arrays, and the parameters of the masks that are learned."""

    model: Decoder
    masks: Mapping[str, Any]


def token_fields(
    loss: Loss,
    beside: Beside,
    policy: Decoder,
    states: Float[Array, "B M D"],
    batch: Batch,
    *,
    attend: Attend,
    mesh: Mesh | None,
) -> dict[str, Array]:
    """Fields of ``LossInputs`` that the reference's states give, each [items, T] of one side.

    Args:
      loss: decides which.
      beside: the reference and the masks.
      policy: the policy.
      states: its states at the predictions of the batch.
      batch: rows and items.
      attend: how attention is computed.
      mesh: where parameters and rows lie.
    """
    assert batch.tokens is not None
    rows, at, row = batch.rows, batch.tokens.at, batch.row[:, None, None]
    kinds, by_activation = learned_kinds(loss), bool(loss.needs & ACTIVATION_MASKS)

    def predicting(x: Array) -> Array:
        return jnp.take_along_axis(x, rows.source[..., None], axis=1)

    def tap(x: Array) -> Array:
        return predicting(x) if kinds else jnp.mean(predicting(x).astype(accumulate(x.dtype)), -1)

    seen = Visibility(rows.context_start, rows.context_end, rows.own_start)
    hidden, layers = beside.model.hidden_and_layers(
        rows.tokens, rows.positions, seen, rows.lengths, tap, attend=attend, mesh=mesh
    )
    hidden, layers = stop_gradient((predicting(hidden), layers))
    fields: dict[str, Array] = {}

    def sides(name: str, values: Array) -> None:
        fields[f"{name}_chosen"], fields[f"{name}_rejected"] = values[:, 0], values[:, -1]

    if loss.needs & TOKEN_KL:
        kl = token_divergences(
            states,
            policy.unembedding,
            head_of(policy, mesh),
            hidden,
            beside.model.unembedding,
            head_of(beside.model, mesh),
        )
        sides("token_kl", kl[row, at])
    for kind in kinds:
        sides(f"{kind}_mask", learned_mask(beside.masks, kind, layers)[row, at])
    if by_activation:
        means = jnp.mean(layers.astype(accumulate(layers.dtype)), -1) if kinds else layers
        sides("activation_mask", activation_masks(means[:, row, at], batch.tokens.mask))
    return fields
