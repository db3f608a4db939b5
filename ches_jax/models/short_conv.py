r"""Short causal convolutions over the tokens of a sequence, in rows that hold several; LFM2's gated ones.

.. math:: y_t = \sum_{j=0}^{K-1} w_{K-1-j} \odot x_{t-j}

x_{t-j} is the token j places before t *in its own sequence*: a response that follows a shared prompt in the row reaches
back to the prompt's last tokens, whatever stands between, and nothing reaches beyond the first token.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ches_jax.models.attention.mask import KeyRanges
from ches_jax.models.cache import Memory
from ches_jax.models.config import DecoderConfig
from ches_jax.models.layers import Context, LayerData, Linear
from ches_jax.models.precision import accumulate


class Taps(nnx.Module):
    """The weights of a depthwise convolution: K numbers for each channel, the last one for the token itself."""

    def __init__(self, channels: int, kernel: int, *, bias: bool, rngs: nnx.Rngs, dtype: DTypeLike):
        """Draws from N(0, 0.02^2); the bias is zero."""
        self.weight = nnx.Param(
            (jax.random.normal(rngs.params(), (channels, kernel), jnp.float32) * 0.02).astype(dtype)
        )
        self.bias = nnx.Param(jnp.zeros((channels,), dtype)) if bias else None

    def __call__(
        self, x: Float[Array, "B T C"], ranges: KeyRanges, kept: Float[Array, "B J C"] | None
    ) -> tuple[Float[Array, "B T C"], Float[Array, "B J C"]]:
        """The convolution, and the last K - 1 inputs of each row: ``kept`` of the tokens that come next.

        Args:
          x: inputs of all tokens of the rows, or where ``kept`` is given of those that follow.
          ranges: what each token sees, in the coordinates of the row.
          kept: the K - 1 inputs before ``x``, zero before the first token.
        """
        reach = self.weight[...].shape[1] - 1
        if kept is None:
            shifted = [before(x, ranges, j) for j in range(reach + 1)]
            last = jnp.concatenate([x[:, :0], *(a[:, -1:] for a in reversed(shifted[:reach]))], axis=1)
        else:
            every = jnp.concatenate([kept.astype(x.dtype), x], axis=1)
            shifted = [every[:, reach - j : reach - j + x.shape[1]] for j in range(reach + 1)]
            last = every[:, x.shape[1] :]
        weight = self.weight[...].astype(accumulate(x.dtype))
        y = jnp.zeros(x.shape, weight.dtype)
        for j, a in enumerate(shifted):
            y = y + weight[None, None, :, reach - j] * a.astype(weight.dtype)
        y = y if self.bias is None else y + self.bias[...].astype(weight.dtype)[None, None]
        return y.astype(x.dtype), last


def before(x: Float[Array, "B T C"], ranges: KeyRanges, places: int) -> Float[Array, "B T C"]:
    """For each token the ``x`` of the one ``places`` before it in its sequence; zero where there is none."""
    if places == 0:
        return x
    index = ranges.own_end - 1
    beyond = places - (index - ranges.own_start)
    at = jnp.where(beyond <= 0, index - places, ranges.context_end - beyond)
    exists = (beyond <= 0) | ((at >= ranges.context_start) & (ranges.context_end > ranges.context_start))
    moved = jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=1)
    return jnp.where(exists[..., None], moved, jnp.zeros_like(moved))


class ShortConv(nnx.Module):
    """LFM2's mixer: ``out(c * conv(b * x))`` with b, c, x three projections of the token."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        """Makes the two projections and the taps."""
        s = config.short_conv
        assert s is not None
        options = {"bias": s.bias, "rngs": rngs, "dtype": dtype}
        self.in_proj = Linear(config.width, 3 * config.width, **options)
        self.conv = Taps(config.width, s.kernel, **options)
        self.out_proj = Linear(config.width, config.width, **options)

    @staticmethod
    def empty(config: DecoderConfig, rows: int, slots: int, dtype: jnp.dtype) -> Float[Array, "B J D"]:
        """The inputs of the convolution before the text: none."""
        assert config.short_conv is not None
        return jnp.zeros((rows, config.short_conv.kernel - 1, config.width), dtype)

    def __call__(
        self, x: Float[Array, "B T D"], context: Context, data: LayerData, memory: Memory
    ) -> Float[Array, "B T D"]:
        """The mixed tokens."""
        b, c, x = jnp.split(self.in_proj(x), 3, axis=-1)
        y, last = self.conv(b * x, context.ranges, None if memory.slot is None else memory.state())
        if memory.kept is not None:
            memory.keep(last)
        return self.out_proj(c * y)
