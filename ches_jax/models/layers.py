"""The modules of a decoder layer. Weights have Hugging Face's names and its [out, in] orientation.

Parameters may be stored in another dtype than the computation runs in: every use casts to the dtype of the
activations. ``kinds`` puts a layer together from them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from ches_jax.distributed.mesh import LogicalMesh
from ches_jax.models import rope
from ches_jax.models.attention.dense import KEPT, Attend, AttentionInputs, AttentionParams
from ches_jax.models.attention.mask import KeyRanges, SeenByBlock, within
from ches_jax.models.cache import KeysValues, Memory, empty_keys_values
from ches_jax.models.config import Activation, DecoderConfig, QueryGrowth
from ches_jax.models.platform import platform
from ches_jax.models.precision import accumulate, matmul_precision

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


FEW_ROWS = 64
"""Most rows, of one token each, whose product is turned round on a CPU: measured, 4 rows take a quarter less time, 16 a
seventh, 64 as long as before."""
PIECE = 512
"""Tokens whose MLP is computed at once on a CPU, without a derivative: of all of a row (2,048) what its matrices make
does not fit in the cache. Scoring 48 pairs of HH harmless with the 31M Llama takes 0.94 of the CPU seconds, on an
AVX2 machine (two runs in turn); 256 and 1,024 differ by less than its noise."""


def few_rows(rows: int) -> bool:
    """Whether a product of so many rows, of one token each, is turned round: on a CPU, of 2 to ``FEW_ROWS``."""
    return platform() == "cpu" and 1 < rows <= FEW_ROWS


def matmul(x: Float[Array, "... I"], weight: Float[Array, "O I"]) -> Float[Array, "... O"]:
    """``x @ weight.T`` in the dtype of x; float32 and float64 at full precision on every backend."""
    weight, precision = weight.astype(x.dtype), matmul_precision(x.dtype)
    rows = x.size // x.shape[-1]
    one_each = x.ndim > 2 and x.shape[-2] == 1
    if one_each and few_rows(rows):
        # XLA packs the right factor anew at every call, which costs more than the product if that is the weights;
        # the barrier keeps it from turning the product round
        turned = lax.dot_general(weight, x.reshape(rows, -1), (((1,), (1,)), ((), ())), precision=precision)
        return lax.optimization_barrier(turned).T.reshape(*x.shape[:-1], -1)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return lax.dot_general(x, weight, contract, precision=precision)


@jax.custom_vjp
def trained_matmul(x: Float[Array, "... I"], weight: Float[Array, "O I"]) -> Float[Array, "... O"]:
    r"""``matmul`` for weights that are trained: its gradient transposes whichever factor is smaller.

    .. math:: dW = g^T x = (x^T g)^T

    A derived gradient always transposes ``g``; on a CPU XLA fuses that with the gradient of the activation before
    it, and reads all of that across its rows. No forward mode.
    """
    return matmul(x, weight)


def _trained_forward(x, weight):
    return matmul(x, weight), (x, weight)


def _trained_backward(kept, g):
    x, weight = kept
    precision = matmul_precision(x.dtype)
    dx = lax.dot_general(g, weight.astype(g.dtype), (((g.ndim - 1,), (0,)), ((), ())), precision=precision)
    lead = tuple(range(x.ndim - 1))
    first, last = (x, g) if x.shape[-1] < g.shape[-1] else (g, x)
    dw = lax.dot_general(first, last, ((lead, lead), ((), ())), precision=precision)
    return dx, (dw if first is g else dw.T).astype(weight.dtype)


trained_matmul.defvjp(_trained_forward, _trained_backward)


def along_last(vector: Float[Array, " D"], like: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """A vector with leading axes of length 1, in the rank and dtype of ``like``: broadcasting made visible."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)


class Linear(nnx.Module):
    """``x W^T (+ b)``, and ``s (x A^T) B^T`` where ``lora.adapted`` has put an adapter beside W.

    ``trained`` is for those who take gradients by W, or by the adapter beside it, and nothing in forward mode.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Draws W from N(0, 0.02^2), the initialisation of the GPT-2 line; b is zero."""
        init = jax.random.normal(rngs.params(), (outputs, inputs), jnp.float32) * 0.02
        self.weight: Any = nnx.Param(init.astype(dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 1.0
        self.packed: Any = nnx.data(None)  # a module that gives W, in place of ``weight`` (``adapters.packed``)
        self.trained = False

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        """Applies the map."""
        weight = self.weight[...] if self.packed is None else self.packed()
        product = trained_matmul if self.trained else matmul
        if self.lora_a is None or self.lora_b is None:
            y = product(x, weight)
        else:
            # the scale joins B before B is rounded to the dtype of x
            low = product(product(x, self.lora_a[...]), self.lora_scale * self.lora_b[...])
            # the sum is kept for the backward pass: without the name both of its terms would be
            y = checkpoint_name(matmul(x, weight) + low, KEPT)
        return y if self.bias is None else y + along_last(self.bias[...], y)


def in_pieces(
    f: Callable[[Any, Array], Array], weights: Any, x: Float[Array, "B T D"], used: Int[Array, ""] | int
) -> Float[Array, "B T D"]:
    """``f(weights, x)``, of each token by itself: ``PIECE`` at a time on a CPU, where nothing is differentiated.

    What ``f`` makes of a piece on the way stays in the processor's cache. With a derivative it is kept anyway. Pieces
    behind the first ``used`` tokens, counted through all rows, hold padding alone and are left as they are.
    """
    batch, tokens, _ = x.shape
    if platform() != "cpu" or batch * tokens <= PIECE or batch * tokens % PIECE:
        return f(weights, x)

    @jax.custom_jvp
    def run(weights: Any, x: Array, used: Array) -> Array:
        def with_piece(i: Int[Array, ""], row: Array) -> Array:
            own = lax.dynamic_slice_in_dim(row, i * PIECE, PIECE, 1)
            return lax.dynamic_update_slice_in_dim(row, f(weights, own), i * PIECE, 1)

        pieces = (used + PIECE - 1) // PIECE
        return lax.fori_loop(0, pieces, with_piece, x.reshape(1, batch * tokens, -1)).reshape(x.shape)

    @run.defjvp
    def derivative(primals, tangents):
        return jax.jvp(f, primals[:2], tangents[:2])

    return run(weights, x, jnp.asarray(used, jnp.int32))


class Embedding(nnx.Module):
    """A table of vectors."""

    def __init__(self, rows: int, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Draws from N(0, 0.02^2)."""
        self.weight = nnx.Param((jax.random.normal(rngs.params(), (rows, width), jnp.float32) * 0.02).astype(dtype))


class Norm(nnx.Module):
    """RMSNorm or LayerNorm, computed in float32 at least.

    RMSNorm: ``x / sqrt(mean(x^2) + eps) * w``; LayerNorm: ``(x - mean) / sqrt(var + eps) * w + b``.
    """

    def __init__(
        self, size: int, config: DecoderConfig, *, dtype: jnp.dtype, kind: str | None = None, eps: float | None = None
    ):
        """A norm over the last axis; ``kind`` and ``eps`` override the config's (query/key norms are always RMS)."""
        self.kind = kind or config.norm
        self.eps = config.norm_eps if eps is None else eps
        self.plus_one = config.norm_plus_one
        self.rounds_last = config.norm_rounds_last or self.kind == "layer"
        start = jnp.zeros if self.plus_one else jnp.ones
        self.weight = nnx.Param(start((size,), dtype)) if config.norm_weight else None
        self.bias = nnx.Param(jnp.zeros((size,), dtype)) if config.norm_bias and self.kind == "layer" else None

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        y = x.astype(accumulate(x.dtype))
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + jnp.asarray(self.eps, y.dtype))
        y = y if self.rounds_last else y.astype(x.dtype)
        if self.weight is not None:
            scale = along_last(self.weight[...], y)
            y = y * (1 + scale if self.plus_one else scale)
        y = y if self.bias is None else y + along_last(self.bias[...], y)
        return y.astype(x.dtype)


def unit_rms(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """``x / sqrt(mean(x^2) + eps)``: RMSNorm without weights."""
    y = x.astype(accumulate(x.dtype))
    return (y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + jnp.asarray(eps, y.dtype))).astype(x.dtype)


Rotations: TypeAlias = tuple[tuple[Float[Array, "B T _"], Float[Array, "B T _"]], ...]
"""(cos, sin) of the global layers and, where it differs, of the sliding-window layers."""


class Context(NamedTuple):
    """What every layer of one pass shares."""

    ranges: KeyRanges
    """Which keys each position sees, where the layer has no window."""
    rotations: Rotations
    positions: Int[Array, "B T"]
    """Of each token in its own sequence."""
    attend: Attend
    """How attention is computed."""
    logical: LogicalMesh | None
    """Where the arrays lie."""
    used: Int[Array, ""]
    """Tokens up to the last that is no padding, counted through all rows."""
    counted: Bool[Array, "B T"] | None = None
    """Tokens whose routing is added up; None: of none."""
    routing: list[Array] | None = None
    """Where a layer puts the sums of its router (``experts.routing_sums``) while it is traced."""
    lent: Mapping[str, tuple[Array, Array]] = MappingProxyType({})
    """Keys and values of earlier layers that later ones borrow, by the kind of layer."""
    seen: tuple[KeyRanges, SeenByBlock | None] | None = None
    """Which keys each position sees in every layer, where it is the same in all, also as ``attend`` reads it."""
    keys: Int[Array, "B S"] | None = None
    """Which keys the tokens attend to, where they are not those of the tokens (``cache.Memory``)."""


class LayerData(NamedTuple):
    """What differs from layer to layer besides the parameters."""

    window: Int[Array, ""]
    local: Int[Array, ""]
    """1 where the layer has a window; it rotates by ``local_rope`` if there is one."""
    rotated: Int[Array, ""]
    """1 where the layer rotates."""
    given: Float[Array, "B T W"] | None = None
    """What the layer is given for each token besides the stream."""


def rotation(
    config: DecoderConfig, context: Context, data: LayerData
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """(cos, sin) of a layer; of angle zero where it does not rotate."""
    cos, sin = context.rotations[int(bool(config.local))]
    if config.local is None and len(context.rotations) > 1:
        local_cos, local_sin = context.rotations[1]
        cos = jnp.where(data.local > 0, local_cos, cos)
        sin = jnp.where(data.local > 0, local_sin, sin)
    if config.rotated:
        cos = jnp.where(data.rotated > 0, cos, jnp.ones_like(cos))
        sin = jnp.where(data.rotated > 0, sin, jnp.zeros_like(sin))
    return cos, sin


def growth(config: QueryGrowth, positions: Int[Array, "B T"], data: LayerData, dtype: jnp.dtype) -> Float[Array, "B T"]:
    """What the queries of a layer are multiplied by."""
    logs = jnp.log1p(((positions + config.shift) // config.every).astype(accumulate(dtype)))
    logs = logs.astype(jnp.float32) if config.single else logs
    factor = (1 + jnp.asarray(config.strength, logs.dtype) * logs).astype(dtype)
    return jnp.where(data.rotated > 0, jnp.ones_like(factor), factor) if config.unrotated_only else factor


def visible_to(config: DecoderConfig, context: Context, data: LayerData) -> tuple[KeyRanges, SeenByBlock | None]:
    """Which keys each position of a layer sees, also as attention reads it where it is the same in all layers."""
    if context.seen is not None:
        return context.seen
    window = data.window
    if config.chunked:
        window = jnp.where(data.local > 0, context.positions % window + 1, window)
    return within(context.ranges, window), None


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes the four projections and, where the family has them, the query and key norms."""
        c = config
        self.config = c
        qkv = {"bias": c.qkv_bias, "rngs": rngs, "dtype": dtype}
        self.q_proj = Linear(c.width, c.num_heads * c.head_dim, **qkv)
        own = c.kv != "borrowed"
        self.k_proj = Linear(c.width, c.num_kv_heads * c.head_dim, **qkv) if own else None
        self.v_proj = Linear(c.width, c.num_kv_heads * c.head_dim, **qkv) if own and not c.values_are_keys else None
        self.o_proj = Linear(c.num_heads * c.head_dim, c.width, bias=c.out_bias, rngs=rngs, dtype=dtype)
        self.gate_proj = Linear(c.width, c.num_heads * c.head_dim, **qkv) if c.output_gate else None
        self.sinks = nnx.Param(jnp.zeros((c.num_heads,), dtype)) if c.sinks else None
        if c.qk_norm in ("none", "rotated"):
            self.q_norm = self.k_norm = None
        else:
            per_head = c.qk_norm == "head"
            self.q_norm = Norm(c.head_dim if per_head else c.num_heads * c.head_dim, c, dtype=dtype, kind="rms")
            size = c.head_dim if per_head else c.num_kv_heads * c.head_dim
            self.k_norm = Norm(size, c, dtype=dtype, kind="rms") if own else None

    def _heads(self, x, projection: Linear, norm: Norm | None, heads: int) -> Float[Array, "B T N H"]:
        """Project, normalise, clip, split into heads (and normalise those)."""
        y = projection(x)
        if norm is not None and self.config.qk_norm == "full":
            y = norm(y)
        if self.config.qkv_clip is not None:
            limit = jnp.asarray(self.config.qkv_clip, y.dtype)
            y = jnp.clip(y, -limit, limit)
        y = y.reshape(*y.shape[:-1], heads, self.config.head_dim)
        return norm(y) if norm is not None and self.config.qk_norm == "head" else y

    def _turned(self, a: Float[Array, "B T N H"], context: Context, data: LayerData) -> Float[Array, "B T N H"]:
        """Queries or keys after the rotation, and the norm that comes after it in some families."""
        c = self.config
        if c.rope is not None:
            cos, sin = rotation(c, context, data)
            a = rope.rotate(a, cos, sin, neighbours=c.rope.neighbours)
        return jnp.where(data.rotated > 0, unit_rms(a, c.norm_eps), a) if c.qk_norm == "rotated" else a

    def _keys_values(
        self, x: Float[Array, "B T D"], context: Context, data: LayerData, memory: Memory
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """What the queries attend to: of this call, with the cache before it, or of an earlier layer."""
        c = self.config
        kind = "local" if c.local else "global"
        if self.k_proj is None:
            return context.lent[kind]
        k = self._heads(x, self.k_proj, self.k_norm, c.num_kv_heads)
        v = self._heads(x, self.v_proj or self.k_proj, None, c.num_kv_heads)
        v = unit_rms(v, c.norm_eps) if c.value_norm else v
        pair = memory.extended(self._turned(k, context, data), v)
        if c.kv == "lent":
            memory.lent[kind] = pair
        return pair

    @staticmethod
    def empty(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> KeysValues | None:
        """What a layer keeps of a text, before it; nothing where it borrows."""
        if config.kv == "borrowed":
            return None
        return empty_keys_values(rows, config.num_kv_heads, slots, config.head_dim, dtype)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, data: LayerData, memory: Memory
    ) -> Float[Array, "B T D"]:
        """Attention of the whole row."""
        c = self.config
        q = self._turned(self._heads(x, self.q_proj, self.q_norm, c.num_heads), context, data)
        if c.query_growth is not None:
            q = q * growth(c.query_growth, context.positions, data, q.dtype)[:, :, None, None]
        k, v = self._keys_values(x, context, data, memory)
        heads = (c.num_kv_heads, c.num_heads // c.num_kv_heads)
        sinks = None if self.sinks is None else self.sinks[...].reshape(heads)
        ranges, by_block = visible_to(c, context, data)
        inputs = AttentionInputs(q.reshape(*q.shape[:2], *heads, c.head_dim), k, v, ranges, sinks, by_block)
        out = context.attend(inputs, AttentionParams(c.attention_scale, c.attention_softcap))
        out = out.reshape(*x.shape[:2], c.num_heads * c.head_dim)
        return self.o_proj(out if self.gate_proj is None else out * jax.nn.sigmoid(self.gate_proj(x)))


class Mlp(nnx.Module):
    """``down(act(gate x) * up x)``, or ``down(act(up x))`` without a gate."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes the projections."""
        c = config
        options = {"bias": c.mlp_bias, "rngs": rngs, "dtype": dtype}
        self.gate_proj = Linear(c.width, c.mlp_width, **options) if c.gated_mlp else None
        self.up_proj = Linear(c.width, c.mlp_width, **options)
        self.down_proj = Linear(c.mlp_width, c.width, **options)
        self.activation: Activation = c.activation

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, before: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """Applies the block to x; ``before`` is the stream that x is the norm of."""
        if self.up_proj.trained or context.logical is not None:
            return self._of_tokens(x)
        graph, weights = nnx.split(self)
        return in_pieces(lambda weights, x: nnx.merge(graph, weights)._of_tokens(x), weights, x, context.used)

    def _of_tokens(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        act = ACTIVATIONS[self.activation]
        up = self.up_proj(x)
        return self.down_proj(act(up) if self.gate_proj is None else act(self.gate_proj(x)) * up)
