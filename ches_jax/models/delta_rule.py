r"""The gated delta rule (arXiv:2412.06464): a layer with a matrix of memory, in rows that hold several sequences.

.. math::
   \tilde S_t = e^{g_t} S_{t-1}, \quad u_t = \beta_t (v_t - \tilde S_t^\top k_t), \quad
   S_t = \tilde S_t + k_t u_t^\top, \quad o_t = S_t^\top q_t

S_{t-1} is that of the token before t *in its own sequence*. A row is a small forest: a response continues its prompt,
whose state it starts from wherever it stands in the row, and another pair starts from nothing. It is computed in chunks
of tokens (as arXiv:2406.06484). Within a chunk, with G_i the sum of g over i and those of its ancestors that are in the
chunk, and \Gamma_{ij} = e^{G_i - G_j} where j is i or an ancestor, else 0,

.. math::
   (I + L) U = \beta \odot (V - e^{G} \odot S_0^\top k), \quad L_{ij} = \beta_i \Gamma_{ij}\, k_i \cdot k_j \;(j < i),
   \quad o_i = e^{G_i} S_0^\top q_i + \sum_j \Gamma_{ij} (q_i \cdot k_j)\, u_j .

S_0 of a token is the state of its nearest ancestor before the chunk. That is the chunk's predecessor in the row, or
the end of the prompt that the token continues (an earlier response stands between), or none: two states are carried
from chunk to chunk. Nothing is approximated.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from ches_jax.models.attention.mask import KeyRanges, visible
from ches_jax.models.cache import Memory
from ches_jax.models.config import DecoderConfig
from ches_jax.models.layers import Context, LayerData, Linear, Norm
from ches_jax.models.precision import accumulate, matmul_precision
from ches_jax.models.short_conv import Taps

CHUNK = 64
L2_EPS = 1e-6


class Inputs(NamedTuple):
    """What the rule is computed from, of one chunk or of all."""

    q: Float[Array, "B T N K"]
    k: Float[Array, "B T N K"]
    v: Float[Array, "B T N V"]
    g: Float[Array, "B T N"]
    """Logarithm of the decay, 0 at most."""
    beta: Float[Array, "B T N"]
    """How much of the state along k is written anew."""


class States(NamedTuple):
    """What is carried from chunk to chunk."""

    last: Float[Array, "B N K V"]
    """After the token before the chunk."""
    fork: Float[Array, "B N K V"]
    """After the prompt that this token continues, if it continues one that stands apart from it."""


def gated_delta_rule(
    inputs: Inputs, ranges: KeyRanges, state: Float[Array, "B N K V"] | None, chunk: int = CHUNK
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """The outputs o, and the state after the last token of each row.

    Args:
      inputs: of all tokens of the rows, or where ``state`` is given of those that follow. float32 or float64.
      ranges: what each token sees; its ancestors.
      state: after the token before the first of ``inputs``; None: there is none.
      chunk: tokens of a chunk.
    """
    rows, length, heads, keys = inputs.k.shape
    size = min(chunk, length)
    missing = -length % size
    # what is added at the end changes no state: it continues the last token, decays nothing and writes nothing
    padded = Inputs(*(jnp.pad(a, [(0, 0), (0, missing)] + [(0, 0)] * (a.ndim - 2)) for a in inputs))
    longer = KeyRanges(*(jnp.pad(a, [(0, 0), (0, missing)], mode="edge") for a in ranges))
    longer = longer._replace(own_end=longer.own_end[:, :1] + jnp.arange(length + missing, dtype=jnp.int32)[None])
    start = jnp.zeros((rows, heads, keys, inputs.v.shape[-1]), inputs.v.dtype) if state is None else state

    def chunks(a):
        return a.reshape(rows, -1, size, *a.shape[2:]).swapaxes(0, 1)

    def step(states, one):
        return _one_chunk(one[0], one[1], states)

    every = (Inputs(*map(chunks, padded)), KeyRanges(*map(chunks, longer)))
    states, out = lax.scan(step, States(start, jnp.zeros_like(start)), every)
    return out.swapaxes(0, 1).reshape(rows, -1, *out.shape[3:])[:, :length], states.last


def _one_chunk(x: Inputs, r: KeyRanges, states: States) -> tuple[States, Float[Array, "B T N V"]]:
    """One chunk: the states after it, and its outputs."""
    dtype, precision = x.v.dtype, matmul_precision(x.v.dtype)
    # the same tokens of every row, and yet taken from each: on a mesh nothing is asked of another device's row
    index = r.own_end - 1
    first, size = index[:, :1], index.shape[1]
    sees = visible(r, index)
    related = sees.astype(dtype)
    diagonal = jnp.eye(size, dtype=dtype)[None]

    def product(text, a, b):
        return jnp.einsum(text, a, b, precision=precision)

    decay = product("bij,bjn->bin", related, x.g)
    between = jnp.where(sees[:, None], decay.swapaxes(1, 2)[..., None] - decay.swapaxes(1, 2)[:, :, None, :], 0)
    gamma = jnp.exp(between) * related[:, None]
    from_start = jnp.exp(decay)[..., None]
    # which of the two carried states a token continues from
    has_context = r.context_end > r.context_start
    from_last = visible(r, first - 1)[:, :, 0]
    from_fork = ~from_last & has_context & (r.own_start >= first) & (r.context_end < first)
    which = [a.astype(dtype)[..., None, None] for a in (from_last, from_fork)]

    def of_start(a):
        read = [product("bink,bnkv->binv", a, s) * w for s, w in zip(states, which, strict=True)]
        return from_start * (read[0] + read[1])

    beta = x.beta.swapaxes(1, 2)[..., None]
    lower = beta * gamma * (1 - diagonal[:, None]) * product("bink,bjnk->bnij", x.k, x.k)
    wanted = beta * (x.v - of_start(x.k)).swapaxes(1, 2)
    u = product("bnij,bnjv->bniv", inverse(lower), wanted)
    out = of_start(x.q) + product("bnij,bnjv->binv", gamma * product("bink,bjnk->bnij", x.q, x.k), u)

    def state_after(place: Int[Array, " B"]) -> Float[Array, "B N K V"]:
        def at(a, axis=1):
            shape = [1] * a.ndim
            shape[0] = -1
            return jnp.take_along_axis(a, place.reshape(shape), axis=axis)

        carried = sum(s * at(w)[:, 0][..., None] for s, w in zip(states, which, strict=True))
        left = x.k * at(gamma, 2)[:, :, 0].swapaxes(1, 2)[..., None]
        written = product("bjnk,bnjv->bnkv", left, u)
        return at(from_start)[:, 0, :, :, None] * carried + written

    end = r.context_end[:, -1]
    place = end - 1 - first[:, 0]
    in_chunk = (has_context[:, -1] & (place >= 0))[:, None, None, None]
    before_chunk = (place == -1)[:, None, None, None]
    fork = jnp.where(in_chunk, state_after(jnp.maximum(place, 0)), jnp.where(before_chunk, states.last, states.fork))
    return States(state_after(jnp.full_like(place, size - 1)), fork), out


@jax.custom_jvp
def inverse(lower: Float[Array, "*n C C"]) -> Float[Array, "*n C C"]:
    """The inverse of I + L for an L that is zero on and above its diagonal, by products of matrices alone.

    The inverse of the blocks along the diagonal becomes that of blocks of twice the size: where L_s is what L has below
    the blocks of size s within those of size 2 s, ``X_{2s} = X_s - X_s L_s X_s``. The solver of triangular systems that
    XLA calls on CPUs shares the work of a batch among the threads that wait for it: as many devices as threads stop
    each other for ever.

    >>> inverse(jnp.array([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [3.0, 5.0, 0.0]])).tolist()
    [[1.0, 0.0, 0.0], [-2.0, 1.0, 0.0], [7.0, -5.0, 1.0]]
    """
    size = lower.shape[-1]
    x = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    block = np.arange(size)
    while block.any():
        outer = block // 2
        within = (outer[:, None] == outer[None]) & (block[:, None] > block[None])
        x = x - _product(_product(x, jnp.where(within, lower, 0)), x)
        block = outer
    return x


@inverse.defjvp
def _of_inverse(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    x = inverse(*primals)
    return x, -_product(_product(x, tangents[0]), x)


def _product(a: Float[Array, "*n C C"], b: Float[Array, "*n C C"]) -> Float[Array, "*n C C"]:
    return jnp.matmul(a, b, precision=matmul_precision(a.dtype))


class Kept(NamedTuple):
    """What a layer keeps of a text."""

    conv: Float[Array, "*L B J C"]
    """The last inputs of the convolution."""
    state: Float[Array, "*L B N K V"]


class GatedDelta(nnx.Module):
    """The mixer of Qwen 3.5 and Qwen 3 Next: a short convolution, the rule, and a gated norm of each head."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes the projections, the taps, and the numbers that the decay is made of."""
        m = config.delta_rule
        assert m is not None
        self.sizes = m
        options = {"bias": False, "rngs": rngs, "dtype": dtype}
        self.in_proj_qkv = Linear(config.width, m.channels, **options)
        self.in_proj_z = Linear(config.width, m.value_heads * m.value_dim, **options)
        self.in_proj_b = Linear(config.width, m.value_heads, **options)
        self.in_proj_a = Linear(config.width, m.value_heads, **options)
        self.conv = Taps(m.channels, m.kernel, **options)
        self.dt_bias = nnx.Param(jnp.ones((m.value_heads,), dtype))
        self.a_log = nnx.Param(jnp.zeros((m.value_heads,), dtype))
        plain = replace(config, norm="rms", norm_plus_one=False, norm_rounds_last=False)
        self.norm = Norm(m.value_dim, plain, dtype=dtype)
        self.out_proj = Linear(m.value_heads * m.value_dim, config.width, **options)

    @staticmethod
    def empty(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Kept:
        """What a layer keeps of a text, before it."""
        m = config.delta_rule
        assert m is not None
        state = (rows, m.value_heads, m.key_dim, m.value_dim)
        return Kept(jnp.zeros((rows, m.kernel - 1, m.channels), dtype), jnp.zeros(state, accumulate(dtype)))

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, data: LayerData, memory: Memory
    ) -> Float[Array, "B T D"]:
        """The mixed tokens."""
        m, acc = self.sizes, accumulate(x.dtype)
        kept = None if memory.slot is None else memory.state()
        mixed, last = self.conv(self.in_proj_qkv(x), context.ranges, None if kept is None else kept.conv)
        of_keys = m.key_heads * m.key_dim
        q, k, v = jnp.split(jax.nn.silu(mixed), [of_keys, 2 * of_keys], axis=-1)
        share = m.value_heads // m.key_heads
        q, k = (a.reshape(*a.shape[:2], m.key_heads, m.key_dim).astype(acc) for a in (q, k))
        q, k = (jnp.repeat(_length_one(a), share, axis=2) for a in (q, k))
        v = v.reshape(*v.shape[:2], m.value_heads, m.value_dim).astype(acc)
        rate = jax.nn.softplus(self.in_proj_a(x).astype(acc) + self.dt_bias[...].astype(acc)[None, None])
        g = -jnp.exp(self.a_log[...].astype(acc))[None, None] * rate
        beta = jax.nn.sigmoid(self.in_proj_b(x)).astype(acc)
        inputs = Inputs(q * m.key_dim**-0.5, k, v, g, beta)
        out, state = gated_delta_rule(inputs, context.ranges, None if kept is None else kept.state)
        if memory.kept is not None:
            memory.keep(Kept(last, state))
        gate = jax.nn.silu(self.in_proj_z(x).astype(acc)).reshape(out.shape)
        gated = (self.norm(out.astype(x.dtype)).astype(acc) * gate).astype(x.dtype)
        return self.out_proj(gated.reshape(*x.shape[:2], -1))


def _length_one(x: Float[Array, "B T N K"]) -> Float[Array, "B T N K"]:
    """Vectors of length one."""
    return x * lax.rsqrt((x * x).sum(-1, keepdims=True) + jnp.asarray(L2_EPS, x.dtype))
