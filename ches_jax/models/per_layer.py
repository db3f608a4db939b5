"""Per-layer embeddings (Gemma 3n, Gemma 4): every layer is given a vector for each token besides the stream.

For a token t with embedding x, layer l is given ``(e_l[t] sqrt(W) + norm(P_l x / sqrt(D))) / sqrt(2)`` of width W, and
adds ``norm(U_l (act(G_l h) * given))`` to its stream h.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ches_jax.distributed.mesh import LogicalMesh
from ches_jax.models.config import DecoderConfig
from ches_jax.models.layers import ACTIVATIONS, Embedding, Linear, Norm
from ches_jax.models.vocabulary import looked_up


class PerLayer(nnx.Module):
    """What all layers are given."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes the embedding of all layers, and the projection of the stream's."""
        assert config.per_layer_width is not None
        self.layers, self.width = config.num_layers, config.per_layer_width
        every = self.layers * self.width
        self.embed_tokens = Embedding(config.per_layer_vocab, every, rngs=rngs, dtype=dtype)
        self.projection = Linear(config.width, every, bias=False, rngs=rngs, dtype=dtype)
        self.norm = Norm(self.width, config, dtype=dtype)

    def __call__(
        self, tokens: Int[Array, "B T"], x: Float[Array, "B T D"], logical: LogicalMesh | None
    ) -> Float[Array, "L B T W"]:
        """Of each layer, from token ids and their embeddings in the stream."""
        shape = (*tokens.shape, self.layers, self.width)
        own = looked_up(self.embed_tokens.weight[...], tokens, x.dtype, logical)
        own = own * jnp.asarray(self.width**0.5, x.dtype)
        seen = self.projection(x) * jnp.asarray(x.shape[-1] ** -0.5, x.dtype)
        both = (self.norm(seen.reshape(shape)) + own.reshape(shape)) * jnp.asarray(2**-0.5, x.dtype)
        return jnp.moveaxis(both, 2, 0)


class Given(nnx.Module):
    """What one layer makes of what it is given."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes the gate, the projection back, and its norm."""
        assert config.per_layer_width is not None
        options = {"bias": False, "rngs": rngs, "dtype": dtype}
        self.gate = Linear(config.width, config.per_layer_width, **options)
        self.projection = Linear(config.per_layer_width, config.width, **options)
        self.norm = Norm(config.width, config, dtype=dtype)
        self.activation = config.activation

    def __call__(self, x: Float[Array, "B T D"], given: Float[Array, "B T W"]) -> Float[Array, "B T D"]:
        """What is added to the stream."""
        return self.norm(self.projection(ACTIVATIONS[self.activation](self.gate(x)) * given))
