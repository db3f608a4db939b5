"""A decoder-only language model: ``hidden`` up to and with the final norm, ``logits`` from there.

The two calls are apart because scores need no logits, and log-probabilities need them only at a few positions:
``hidden`` returns h, the vector that multiplies the unembedding matrix W, and ``logits(h) = cap(scale * h W^T)``.

Parameters of the layers are stacked on a leading axis and the layers run in ``lax.scan``: one layer is compiled,
whatever the depth (measured in experiments/benchmarks).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ches_jax.models import attention, rope
from ches_jax.models.attention import Attend
from ches_jax.models.config import DecoderConfig
from ches_jax.models.layers import Context, Layer, LayerData, Norm, matmul
from ches_jax.models.partition import attention_on, gathered, keep_rows
from ches_jax.models.precision import accumulate
from ches_jax.models.visibility import Visibility, causal, key_ranges

NO_WINDOW = 2**30


class Embedding(nnx.Module):
    """A table of vectors."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Draws from N(0, 0.02^2)."""
        self.weight = nnx.Param((jax.random.normal(rngs.params(), (rows, width), jnp.float32) * 0.02).astype(dtype))


class Decoder(nnx.Module):
    """A decoder of any supported family; see ``DecoderConfig`` for what can differ.

    Args:
      config: the architecture.
      rngs: a stream named ``params`` for the initial weights.
      param_dtype: dtype the parameters are stored in.
      dtype: dtype of the computation.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = "float32",
        dtype: DTypeLike = "float32",
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        param_dtype = jnp.dtype(param_dtype)
        param_dtype = jnp.dtype(param_dtype)
        make = partial(Layer, config, dtype=param_dtype)
        self.embed_tokens = Embedding(config.vocab_size, config.width, rngs=rngs, dtype=param_dtype)
        self.embed_positions = (
            Embedding(config.max_positions, config.width, rngs=rngs, dtype=param_dtype) if config.rope is None else None
        )
        stack = nnx.split_rngs(splits=config.num_layers)(nnx.vmap(lambda rngs: make(rngs=rngs), in_axes=0, out_axes=0))
        self.layers = stack(rngs)
        self.norm = Norm(config.width, config, dtype=param_dtype)
        self.lm_head = (
            None if config.tie_embeddings else Embedding(config.vocab_size, config.width, rngs=rngs, dtype=param_dtype)
        )

    @property
    def unembedding(self) -> Float[Array, "V D"]:
        """W: row z is the unembedding of token z."""
        return (self.embed_tokens if self.lm_head is None else self.lm_head).weight[...]

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | Visibility | None = None,
        lengths: Int[Array, "B T"] | None = None,
        *,
        block: int | None = None,
        backward: bool = False,
        remat: bool = False,
        mesh: Mesh | None = None,
    ) -> Float[Array, "B T D"]:
        """Hidden states after the final norm: what multiplies the unembedding matrix.

        Args:
          tokens: token ids.
          positions: position of each token in its own sequence; default: counted from the first real token.
          mask: True on real tokens (padding on either side), or a ``Visibility`` for rows that hold several sequences;
            default: every token is real.
          lengths: length of the sequence each token belongs to; only rope kinds that depend on it read it; default:
            the largest position of the row plus one.
          block: tile size of block-skipping attention (T must be a multiple); default: dense attention.
          backward: a gradient will be taken: attention in slices of ``block`` queries instead, which has one.
          remat: recompute layers in the backward pass instead of keeping their activations.
          mesh: where parameters (``partition.placement``) and rows lie; default: wherever the parameters are.

        Returns:
          h, in the compute dtype. States of padding are finite and mean nothing.
        """
        c = self.config
        if mask is None:
            mask = jnp.ones(tokens.shape, bool)
        if not isinstance(mask, Visibility):
            if positions is None:
                positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
            mask = causal(mask)
        if positions is None:
            raise ValueError("positions are needed with a Visibility")
        if lengths is None:
            lengths = jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
        x = jnp.take(gathered(self.embed_tokens.weight[...], mesh), tokens, axis=0).astype(self.dtype)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, self.dtype)
        if self.embed_positions is not None:
            x = x + jnp.take(gathered(self.embed_positions.weight[...], mesh), positions, axis=0).astype(self.dtype)
        ropes = [r for r in (c.rope, c.local_rope) if r is not None]
        context = Context(
            key_ranges(mask),
            tuple(rope.tables(r, positions, lengths, accumulate(self.dtype)) for r in ropes),
        )
        tiled = attention.slices if backward else attention.blocks
        attend = attention.dense if block is None else partial(tiled, block=block)
        return self.norm(self._run_layers(keep_rows(x, mesh), context, attention_on(mesh, attend), remat, mesh))

    def _run_layers(self, x, context: Context, attend: Attend, remat: bool, mesh: Mesh | None):
        """The layers, one after the other, in a scan over their stacked parameters."""
        graph, params = nnx.split(self.layers)
        windows = self.config.windows
        data = LayerData(
            window=jnp.array([w or NO_WINDOW for w in windows], jnp.int32),
            local=jnp.array([w is not None for w in windows], jnp.int32),
        )

        def step(x, layer):
            params, data = layer
            return keep_rows(nnx.merge(graph, params)(x, context, data, attend), mesh), None

        return lax.scan(jax.checkpoint(step) if remat else step, x, (params, data))[0]

    def logits(self, hidden: Float[Array, "*n D"]) -> Float[Array, "*n V"]:
        """``cap(scale * h W^T)`` in float32 at least."""
        return self.logit_transform(matmul(hidden, self.unembedding).astype(accumulate(hidden.dtype)))

    def logit_transform(self, products: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """Elementwise, from ``h W^T`` to the logits: the family's scale and soft-cap."""
        c, y = self.config, products
        if c.logit_scale is not None:
            y = y * jnp.asarray(c.logit_scale, y.dtype)
        if c.logit_softcap is not None:
            cap = jnp.asarray(c.logit_softcap, y.dtype)
            y = cap * jnp.tanh(y / cap)
        return y


def abstract_decoder(config: DecoderConfig, **options: Any) -> Decoder:
    """The decoder with shapes in place of arrays: nothing is allocated."""
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), **options))


def abstract_parameters(config: DecoderConfig, **options: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by its dotted name (``layers.self_attn.q_proj.weight``)."""
    return named_parameters(abstract_decoder(config, **options))


def named_parameters(model: nnx.Module) -> dict[str, Any]:
    """The parameters by dotted name, layers stacked on the leading axis."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): leaf.get_value() for path, leaf in flat}
