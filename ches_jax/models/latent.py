"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434; V3, arXiv:2412.19437).

Keys and values of all heads come from one vector of low rank for each token, and queries from another. A head has
channels that do not rotate, with keys of its own, and channels that rotate, whose keys all heads share.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ches_jax.models import rope
from ches_jax.models.attention.dense import AttentionInputs, AttentionParams
from ches_jax.models.cache import KeysValues, Memory, empty_keys_values
from ches_jax.models.config import DecoderConfig
from ches_jax.models.layers import Context, LayerData, Linear, Norm, rotation, visible_to


class LatentAttention(nnx.Module):
    """Attention whose keys and values pass through a vector of low rank; what is shorter than a head is padded."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes the projections down to the low ranks and up again."""
        c, m = config, config.latent
        assert m is not None
        self.config = c
        down = {"bias": c.qkv_bias, "rngs": rngs, "dtype": dtype}
        up = {"bias": False, "rngs": rngs, "dtype": dtype}
        heads = c.num_heads
        queries = heads * (m.plain_dim + m.rotary_dim)
        if m.query_rank is None:
            self.q_proj = Linear(c.width, queries, **up)
            self.q_a_proj = self.q_a_norm = self.q_b_proj = None
        else:
            self.q_proj = None
            self.q_a_proj = Linear(c.width, m.query_rank, **down)
            self.q_a_norm = Norm(m.query_rank, c, dtype=dtype, eps=m.norm_eps)
            self.q_b_proj = Linear(m.query_rank, queries, **up)
        self.kv_a_proj = Linear(c.width, m.kv_rank + m.rotary_dim, **down)
        self.kv_a_norm = Norm(m.kv_rank, c, dtype=dtype, eps=m.norm_eps)
        self.kv_b_proj = Linear(m.kv_rank, heads * (m.plain_dim + m.value_dim), **up)
        self.o_proj = Linear(heads * m.value_dim, c.width, bias=c.out_bias, rngs=rngs, dtype=dtype)

    @staticmethod
    def empty(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> KeysValues:
        """What a layer keeps of a text, before it: the keys and values of all heads."""
        return empty_keys_values(rows, config.num_kv_heads, slots, config.head_dim, dtype)

    def _queries(self, x: Float[Array, "B T D"]) -> Float[Array, "B T Q"]:
        if self.q_proj is not None:
            return self.q_proj(x)
        assert self.q_a_proj is not None and self.q_a_norm is not None and self.q_b_proj is not None
        return self.q_b_proj(self.q_a_norm(self.q_a_proj(x)))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, data: LayerData, memory: Memory
    ) -> Float[Array, "B T D"]:
        """Attention of the whole row."""
        c, m = self.config, self.config.latent
        assert m is not None and c.rope is not None
        lead, heads = x.shape[:2], c.num_heads
        cos, sin = rotation(c, context, data)
        neighbours = c.rope.neighbours

        def rotated(a):
            return rope.rotate(a, cos, sin, neighbours=neighbours)

        def padded(a):
            """As long as ``head_dim``: every way to compute attention takes queries, keys and values of one length."""
            return jnp.pad(a, [(0, 0)] * 3 + [(0, c.head_dim - a.shape[-1])])

        q = self._queries(x).reshape(*lead, heads, -1)
        q = jnp.concatenate([q[..., : m.plain_dim], rotated(q[..., m.plain_dim :])], axis=-1)
        low = self.kv_a_proj(x)
        shared = rotated(low[..., None, m.kv_rank :])
        kv = self.kv_b_proj(self.kv_a_norm(low[..., : m.kv_rank])).reshape(*lead, heads, m.plain_dim + m.value_dim)
        k = jnp.concatenate([kv[..., : m.plain_dim], jnp.broadcast_to(shared, (*lead, heads, m.rotary_dim))], axis=-1)
        k, v = memory.extended(padded(k), padded(kv[..., m.plain_dim :]))
        ranges, by_block = visible_to(c, context, data)
        inputs = AttentionInputs(padded(q)[:, :, :, None], k, v, ranges, by_block=by_block)
        out = context.attend(inputs, AttentionParams(c.attention_scale, c.attention_softcap))
        return self.o_proj(out[:, :, :, 0, : m.value_dim].reshape(*lead, heads * m.value_dim))
