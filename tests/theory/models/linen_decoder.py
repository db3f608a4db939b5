"""A small decoder in flax.linen, written from the equations of Llama, to be held against the library's own in nnx."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def rotate(x, theta):
    """Rotary embedding of [B, T, N, H]: the two halves of a head are the coordinates that turn."""
    half = x.shape[-1] // 2
    turns = theta ** (-jnp.arange(half, dtype=x.dtype) / half)
    angle = jnp.arange(x.shape[1], dtype=x.dtype)[:, None] * turns[None, :]
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Norm(nn.Module):
    """Root mean square norm."""

    eps: float

    @nn.compact
    def __call__(self, x):
        weight = self.param("weight", nn.initializers.ones, x.shape[-1:])
        return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + self.eps) * weight[None, None]


class Block(nn.Module):
    """Attention and mlp, each after a norm and beside the stream."""

    heads: int
    kv_heads: int
    mlp: int
    theta: float
    eps: float

    def dense(self, features, name):
        return nn.Dense(features, use_bias=False, name=name, param_dtype=jnp.float64)

    @nn.compact
    def __call__(self, x, real):
        size, width = x.shape[-1] // self.heads, x.shape[-1]
        h = Norm(self.eps, name="attn_norm")(x)
        q, k, v = (
            self.dense(n * size, name)(h).reshape(*h.shape[:2], n, size)
            for name, n in (("q_proj", self.heads), ("k_proj", self.kv_heads), ("v_proj", self.kv_heads))
        )
        q, k = rotate(q, self.theta), rotate(k, self.theta)
        k, v = (jnp.repeat(a, self.heads // self.kv_heads, axis=2) for a in (k, v))
        seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None] & real[:, None, :]
        # padding sees itself, so that nothing is divided by nothing
        seen |= jnp.eye(x.shape[1], dtype=bool)[None]
        scores = jnp.where(seen[:, None], jnp.einsum("bqnh,bknh->bnqk", q, k) / size**0.5, -jnp.inf)
        mixed = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(scores, axis=-1), v)
        x = x + self.dense(width, "o_proj")(mixed.reshape(*x.shape))
        h = Norm(self.eps, name="mlp_norm")(x)
        gated = jax.nn.silu(self.dense(self.mlp, "gate_proj")(h)) * self.dense(self.mlp, "up_proj")(h)
        return x + self.dense(width, "down_proj")(gated)


class LinenDecoder(nn.Module):
    """Embedding, blocks, norm; the unembedding is a parameter that ``hidden`` does not use."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    theta: float
    eps: float
    remat: bool = False

    def setup(self):
        block = nn.remat(Block) if self.remat else Block
        self.embed = nn.Embed(self.vocabulary, self.width, param_dtype=jnp.float64)
        shape = (self.heads, self.kv_heads, self.mlp, self.theta, self.eps)
        self.blocks = [block(*shape, name=f"layer_{i}") for i in range(self.layers)]
        self.norm = Norm(self.eps)

    def hidden(self, tokens, real):
        """States after the final norm."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, real)
        return self.norm(x)


def of_decoder(model, **options):
    """The linen module of a Llama of the library, and its parameters from there (``lm_head`` beside them)."""
    from ches_jax.models.decoder import named_parameters

    c, weights = model.config, named_parameters(model)
    module = LinenDecoder(
        c.vocab_size,
        c.width,
        c.num_layers,
        c.num_heads,
        c.num_kv_heads,
        c.mlp_width,
        c.rope.theta,
        c.norm_eps,
        **options,
    )
    params = {
        "embed": {"embedding": weights["embed_tokens.weight"]},
        "norm": {"weight": weights["norm.weight"]},
        "lm_head": {"kernel": weights["lm_head.weight"].T},
    }
    for i in range(c.num_layers):
        of = {}
        for name, values in weights.items():
            if name.startswith("layers."):
                module_name = name.split(".")[-2]
                of[module_name] = {"weight": values[i]} if "norm" in module_name else {"kernel": values[i].T}
        params[f"layer_{i}"] = of
    return module, params
