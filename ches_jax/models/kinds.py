"""The kinds of layers, and one layer put together from them.

A layer is a *mixer* (tokens see each other) and an *MLP* (each token by itself) between norms and residual sums. What a
mixer is called with, and what it keeps while a text is made, is the same for all: see ``Mixer``.
"""

from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from ches_jax.models.cache import Memory
from ches_jax.models.config import DecoderConfig, LayerKind
from ches_jax.models.delta_rule import GatedDelta
from ches_jax.models.experts import DenseAndRouted, Routed
from ches_jax.models.latent import LatentAttention
from ches_jax.models.layers import Attention, Context, LayerData, Mlp, Norm
from ches_jax.models.per_layer import Given
from ches_jax.models.short_conv import ShortConv


class Mixer(Protocol):
    """A module that mixes tokens, made with (config, rngs=, dtype=)."""

    @staticmethod
    def empty(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Any:
        """What one layer keeps of a text, before it: arrays with the rows first."""
        ...

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, data: LayerData, memory: Memory
    ) -> Float[Array, "B T D"]:
        """The mixed tokens; what later tokens need goes into ``memory``."""
        ...


MIXERS: dict[str, Any] = {
    "attention": Attention,
    "delta_rule": GatedDelta,
    "latent": LatentAttention,
    "short_conv": ShortConv,
}
MLPS: dict[str, Any] = {"dense": Mlp, "routed": Routed, "dense_and_routed": DenseAndRouted}


class Layer(nnx.Module):
    """One decoder layer; norms are named by where they stand."""

    def __init__(self, config: DecoderConfig, kind: LayerKind, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes the mixer, the MLP and the norms the family has."""
        c = config.of_kind(kind)
        self.parallel, self.shared_norm, self.residual_scale = c.parallel_residual, c.shared_norm, c.residual_scale
        self.attn_norm = Norm(c.width, c, dtype=dtype) if c.norm_before else None
        self.self_attn = MIXERS[kind.mixer](c, rngs=rngs, dtype=dtype)
        self.attn_out_norm = Norm(c.width, c, dtype=dtype) if c.norm_after else None
        self.mlp_norm = Norm(c.width, c, dtype=dtype) if c.norm_before and not c.shared_norm else None
        self.mlp = MLPS[kind.mlp](c, rngs=rngs, dtype=dtype)
        self.mlp_out_norm = Norm(c.width, c, dtype=dtype) if c.norm_after else None
        self.given = None if c.per_layer_width is None else Given(c, rngs=rngs, dtype=dtype)
        self.scalar = nnx.Param(jnp.ones((1,), dtype)) if c.layer_scalar else None

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, data: LayerData, memory: Memory
    ) -> Float[Array, "B T D"]:
        """Residual stream in, residual stream out."""
        before_mlp = self.attn_norm if self.shared_norm else self.mlp_norm

        def scaled(y, norm):
            y = y if norm is None else norm(y)
            return y if self.residual_scale is None else y * jnp.asarray(self.residual_scale, y.dtype)

        def attn(x):
            y = self.self_attn(x if self.attn_norm is None else self.attn_norm(x), context, data, memory)
            return scaled(y, self.attn_out_norm)

        def mlp(x):
            return scaled(self.mlp(x if before_mlp is None else before_mlp(x), context, x), self.mlp_out_norm)

        if self.parallel:
            return x + attn(x) + mlp(x)
        x = x + attn(x)
        x = x + mlp(x)
        if self.given is not None:
            assert data.given is not None
            x = x + self.given(x, data.given)
        # stored, and not trained: a buffer of the family's own code
        return x if self.scalar is None else x * lax.stop_gradient(self.scalar[...]).astype(x.dtype)[None, None]
