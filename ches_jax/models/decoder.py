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

from ches_jax.models import cache, rope
from ches_jax.models.attention import dense
from ches_jax.models.attention.dense import Attend
from ches_jax.models.attention.mask import KeyRanges, Visibility, causal, key_ranges
from ches_jax.models.cache import Cache
from ches_jax.models.config import DecoderConfig
from ches_jax.models.layers import Context, Layer, LayerData, Norm, matmul
from ches_jax.models.precision import accumulate
from ches_jax.models.sharding import attention_on, gathered, keep_heads, keep_rows

NO_WINDOW = 2**30
PRODUCTS_AND_ATTENTION = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(dense.KEPT),
)
"""What layers keep for the backward pass; the rest is elementwise."""


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
        attend: Attend = dense.dense,
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
          attend: how attention is computed (``attention``, ``kernels``); not all ways have a gradient.
          remat: recompute layers in the backward pass instead of keeping their activations.
          mesh: where parameters (``partition.placement``) and rows lie; default: wherever the parameters are.

        Returns:
          h, in the compute dtype. States of padding are finite and mean nothing.
        """
        if mask is None:
            mask = jnp.ones(tokens.shape, bool)
        if not isinstance(mask, Visibility):
            if positions is None:
                positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
            mask = causal(mask)
        if positions is None:
            raise ValueError("positions are needed with a Visibility")
        x, context = self._start(tokens, positions, key_ranges(mask), lengths, mesh)
        return self.norm(self._run_layers(x, context, attend, mesh, remat=remat)[0])

    def prefill(
        self,
        tokens: Int[Array, "B T"],
        first: Int[Array, " B"],
        slots: int,
        lengths: Int[Array, " B"] | None = None,
        *,
        attend: Attend = dense.dense,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """``hidden`` of rows padded on the left, and their keys and values in a cache of ``slots`` slots.

        Args:
          tokens: token ids; row b is real from index ``first[b]`` on.
          first: see ``models.cache``.
          slots: room in the cache, T at least.
          lengths: length of each whole sequence, for rope kinds that depend on it; default: that of the prompt.
          attend: how attention is computed.
          mesh: as for ``hidden``.
        """
        here = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        seen, positions = key_ranges(causal(here >= first[:, None])), jnp.maximum(here - first[:, None], 0)
        x, context = self._start(tokens, positions, seen, _per_token(lengths, positions), mesh)
        kept = cache.empty(self.config, len(tokens), slots, self.dtype)
        x, kept = self._run_layers(x, context, attend, mesh, kept=kept)
        assert kept is not None
        return self.norm(x), kept

    def extend(
        self,
        tokens: Int[Array, "B T"],
        kept: Cache,
        slot: Int[Array, ""],
        first: Int[Array, " B"],
        lengths: Int[Array, " B"] | None = None,
        *,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Hidden states of tokens that go into slots ``slot``, ``slot + 1``, ..., and the cache with them in it."""
        slots = slot + jnp.arange(tokens.shape[1], dtype=jnp.int32)
        positions = slots[None] - first[:, None]
        seen = cache.visibility(first, slots)
        x, context = self._start(tokens, positions, seen, _per_token(lengths, positions), mesh)
        x, kept_now = self._run_layers(x, context, dense.dense, mesh, kept=kept, slot=slot)
        assert kept_now is not None
        return self.norm(x), kept_now

    def _start(
        self, tokens, positions, seen: KeyRanges, lengths: Int[Array, "B T"] | None, mesh: Mesh | None
    ) -> tuple[Float[Array, "B T D"], Context]:
        """Embedded tokens, and what every layer needs besides them."""
        c = self.config
        if lengths is None:
            lengths = jnp.broadcast_to(positions.max(axis=1, keepdims=True) + 1, positions.shape)
        x = jnp.take(gathered(self.embed_tokens.weight[...], mesh), tokens, axis=0).astype(self.dtype)
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, self.dtype)
        if self.embed_positions is not None:
            x = x + jnp.take(gathered(self.embed_positions.weight[...], mesh), positions, axis=0).astype(self.dtype)
        ropes = [r for r in (c.rope, c.local_rope) if r is not None]
        rotations = tuple(rope.tables(r, positions, lengths, accumulate(self.dtype)) for r in ropes)
        return keep_rows(x, mesh), Context(seen, rotations)

    def _run_layers(
        self,
        x,
        context: Context,
        attend: Attend,
        mesh: Mesh | None,
        *,
        remat: bool = False,
        kept: Cache | None = None,
        slot: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """The layers, one after the other, in a scan over their stacked parameters.

        With ``kept`` every layer writes its keys and values there; with ``slot`` too it attends to what is there.
        """
        graph, params = nnx.split(self.layers)
        windows = self.config.windows
        data = LayerData(
            window=jnp.array([w or NO_WINDOW for w in windows], jnp.int32),
            local=jnp.array([w is not None for w in windows], jnp.int32),
        )
        here = attention_on(mesh, attend)

        def step(carry, layer):
            x, kept = carry
            params, data, number = layer

            def attend_and_keep(q, k, v, seen, **options):
                nonlocal kept
                if kept is not None:
                    kept = keep_heads(cache.write(kept, number, jnp.int32(0) if slot is None else slot, k, v), mesh)
                    k, v = (k, v) if slot is None else cache.of_layer(kept, number)
                return here(q, k, v, seen, **options)

            x = keep_rows(nnx.merge(graph, params)(x, context, data, attend_and_keep), mesh)
            return (x, kept), None

        numbers = jnp.arange(len(windows), dtype=jnp.int32)
        # without remat what is kept are products and attention: the rest costs less to compute again than to keep
        step = jax.checkpoint(step, prevent_cse=False, policy=None if remat else PRODUCTS_AND_ATTENTION)
        return lax.scan(step, (x, kept), (params, data, numbers))[0]

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


def _per_token(lengths: Int[Array, " B"] | None, like: Int[Array, "B T"]) -> Int[Array, "B T"] | None:
    """A number of each row, at each of its tokens."""
    return None if lengths is None else jnp.broadcast_to(lengths[:, None], like.shape)


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
