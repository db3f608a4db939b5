r"""Masks of tokens: how much of a token's log-ratio and divergence counts (``losses.token_level``).

Learned masks are linear maps of the reference's states h_l behind its L layers, at the position that predicts a token:

.. math:: m_t = \mathrm{ReLU}\Big(\sum_l c_l\, \mathrm{ReLU}(\langle w_l, \mathrm{LN}(h_{l,t}) \rangle + b_l)\Big)

with one layer norm for all layers. They are trained with the policy and lie beside its parameters, under names that
begin with ``token_masks.``. Masks from activations are not learned.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from ches_jax.losses import Loss
from ches_jax.losses.token_level import ACTIVATION_MASKS, KL_MASKS, REWARD_MASKS, TOKEN_KL
from ches_jax.models.precision import accumulate, einsum
from ches_jax.runs.files import replacing

PREFIX = "token_masks."
TOKEN_MASKS = "token_masks.safetensors"
"""The file of a run that holds the masks it learned."""
FIELDS = {"reward": REWARD_MASKS, "kl": KL_MASKS}
"""Kinds of learned masks, and the fields of ``LossInputs`` that hold them."""
EPSILON = 1e-5


def reads_reference_states(loss: Loss) -> bool:
    """Whether the loss needs the reference model beside the policy, not its log-probabilities alone."""
    return bool(loss.needs & (TOKEN_KL | ACTIVATION_MASKS | REWARD_MASKS | KL_MASKS))


def learned_kinds(loss: Loss) -> tuple[str, ...]:
    """Kinds of masks that the loss learns."""
    return tuple(kind for kind, fields in FIELDS.items() if loss.needs & fields)


def initial_masks(kinds: tuple[str, ...], layers: int, width: int, seed: list[int]) -> dict[str, np.ndarray]:
    """Parameters of the masks as they start, by name.

    Weights are uniform within one over the root of their inputs, as torch's linear layers start; the mixer's are
    positive, so that no mask starts with every token at zero, where it would have no gradient.
    """
    rng = np.random.default_rng(seed)
    out: dict[str, np.ndarray] = {}
    for kind in kinds:
        bound = width**-0.5
        values = {
            "norm.weight": np.ones(width),
            "norm.bias": np.zeros(width),
            "probe.weight": rng.uniform(-bound, bound, (layers, width)),
            "probe.bias": rng.uniform(-bound, bound, layers),
            "mixer.weight": rng.uniform(0, layers**-0.5, layers),
        }
        out |= {f"{PREFIX}{kind}.{name}": value for name, value in values.items()}
    return out


def is_mask(name: str) -> bool:
    """Whether a parameter belongs to a mask and not to the policy."""
    return name.startswith(PREFIX)


def without_masks(params: Mapping[str, Any]) -> dict[str, Any]:
    """The policy's own parameters."""
    return {name: value for name, value in params.items() if not is_mask(name)}


def learned_mask(params: Mapping[str, Any], kind: str, states: Float[Array, "layers B M D"]) -> Float[Array, "B M"]:
    """The mask of every prediction, 0 or more, from the reference's states behind each layer."""
    acc = accumulate(states.dtype)
    norm, shift, weight, bias, mixer = (
        jnp.asarray(params[f"{PREFIX}{kind}.{name}"]).astype(acc)
        for name in ("norm.weight", "norm.bias", "probe.weight", "probe.bias", "mixer.weight")
    )
    h = states.astype(acc)
    h = h - jnp.mean(h, axis=-1, keepdims=True)
    h = h * jax.lax.rsqrt(jnp.mean(jnp.square(h), axis=-1, keepdims=True) + jnp.asarray(EPSILON, acc))
    of_layer = jax.nn.relu(
        einsum("lbmd,ld->lbm", h * norm[None, None, None] + shift[None, None, None], weight) + bias[:, None, None]
    )
    return jax.nn.relu(einsum("lbm,l->bm", of_layer, mixer))


def activation_masks(
    means: Float[Array, "layers *items T"], inside: Int[Array, "*items T"]
) -> Float[Array, "*items T"]:
    r"""Masks from the mean activation of each layer at each token: scaled to 0 to 1 within a response.

    .. math:: m_t = \frac1L \sum_l \frac{a_{l,t} - \min_s a_{l,s}}{\max_s a_{l,s} - \min_s a_{l,s}}

    The authors normalise to mean 0 and variance 1 before they scale, which the scaling undoes. Where all tokens of a
    response have one activation (a response of one token), each counts whole.

    Args:
      means: mean of the stream's features behind each layer.
      inside: 1 on the response's tokens, 0 on padding.

    >>> activation_masks(jnp.array([[[1.0, 3.0, 2.0, 9.0]]]), jnp.array([[1, 1, 1, 0]])).tolist()
    [[0.0, 1.0, 0.5, 0.0]]
    """
    mask = jnp.asarray(inside) != 0
    low = jnp.min(jnp.where(mask[None], means, jnp.inf), axis=-1, keepdims=True)
    high = jnp.max(jnp.where(mask[None], means, -jnp.inf), axis=-1, keepdims=True)
    varies = high > low
    scaled = (means - jnp.where(varies, low, 0.0)) / jnp.where(varies, high - low, 1.0)
    of_layer = jnp.where(varies, scaled, 1.0)
    return jnp.where(mask, jnp.mean(of_layer, axis=0), 0.0)


def write_masks(path: Path, params: Mapping[str, Any]) -> None:
    """The parameters of the masks as safetensors; no file where there are none."""
    masks = {name.removeprefix(PREFIX): np.asarray(value) for name, value in params.items() if is_mask(name)}
    if masks:
        with replacing(path) as temporary:
            save_file(masks, temporary)
