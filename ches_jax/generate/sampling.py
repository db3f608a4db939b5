r"""From logits to the next token: temperature, top-k, top-p, and one stream of random numbers per row.

The order is that of transformers: the logits are divided by the temperature, then cut to the k largest, then to the
smallest set of tokens whose probability reaches p. A token is drawn by the Gumbel maximum,

.. math:: y = \operatorname{argmax}_z \big( \ell_z + g_z \big), \qquad g_z \sim \mathrm{Gumbel}(0, 1),

with noise that depends on nothing but the row's own key and the number of the token: not on the batch, the rows beside
it or the padding. Temperature 0 is greedy; of logits that are equal the first is taken.
"""

import hashlib
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from ches_jax.errors import ChesError
from ches_jax.models.layers import few_rows

WORDS = 4
"""32-bit words of a row's key."""
BLOCK = 128
"""Tokens whose largest logit is found first."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = 1.0
    """0: greedy."""
    top_k: int = 0
    """Only the k likeliest tokens; 0: all."""
    top_p: float = 1.0
    """Only the likeliest tokens that together reach this probability; 1: all."""

    def __post_init__(self):
        """Raises ChesError for numbers that mean nothing."""
        if not 0 <= self.temperature < float("inf"):
            raise ChesError(f"--temperature {self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise ChesError(f"--top-k {self.top_k}: expected a number of tokens, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise ChesError(f"--top-p {self.top_p}: expected a probability above 0, at most 1")


def key_data(seed: int, row_id: str, sample: int) -> np.ndarray:
    """The data of a row's PRNG key: a hash of the seed, the row and the number of the sample.

    >>> key_data(0, "a", 0).tolist() == key_data(0, "a", 1).tolist()
    False
    """
    digest = hashlib.sha256(f"{seed}/{row_id}/{sample}".encode()).digest()
    return np.frombuffer(digest[: 4 * WORDS], "<u4").astype(np.uint32)


def row_keys(data: UInt32[Array, "B W"]) -> Array:
    """A PRNG key for each row from its data."""

    def one(data):
        key = jax.random.key(0, impl="threefry2x32")
        return lax.fori_loop(0, WORDS, lambda i, key: jax.random.fold_in(key, data[i]), key)

    return jax.vmap(one)(data)


def filtered(logits: Float[Array, "B V"], how: Sampling) -> Float[Array, "B V"]:
    """Logits over the temperature, -inf where a token is cut off; ``how.temperature`` is not 0.

    Tokens whose logit equals the smallest that is kept are kept.
    """
    x = logits / jnp.asarray(how.temperature, logits.dtype)
    if 0 < how.top_k < x.shape[-1]:
        x = _from(x, lax.top_k(x, how.top_k)[0][:, -1:])
    if how.top_p < 1:
        rising = jnp.sort(x, axis=-1)
        # summed from the unlikeliest on, as transformers does; the likeliest token always stays
        cut = jnp.cumsum(jax.nn.softmax(rising, axis=-1), axis=-1) <= jnp.asarray(1 - how.top_p, x.dtype)
        smallest = jnp.where(cut, jnp.inf, rising).min(axis=-1, keepdims=True)
        x = _from(x, jnp.minimum(smallest, rising[:, -1:]))
    return x


def _from(x: Float[Array, "B V"], smallest: Float[Array, "B 1"]) -> Float[Array, "B V"]:
    return jnp.where(x >= smallest, x, -jnp.inf)


def draw(
    keys: Array, step: Int[Array, ""], logits: Float[Array, "B V"], how: Sampling
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    r"""Token number ``step`` of each row, and :math:`\ln \pi(y_k | x, y_{<k})` under the model itself (nats).

    The log-probability is that of the unfiltered logits at temperature 1: what scoring a text computes.
    """
    likeliest, total = _likeliest_and_total(logits)
    if how.temperature == 0:
        tokens = likeliest
    else:
        here = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
        tokens = jax.vmap(jax.random.categorical)(here, filtered(logits, how))
    tokens = tokens.astype(jnp.int32)
    taken = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, taken - total


def _likeliest_and_total(logits: Float[Array, "B V"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Of each row the first token with the largest logit, and the logarithm of the sum of exponentials.

    Of few rows on a CPU the logits come token by token (``layers.matmul``). There the maxima of all rows, of ``BLOCK``
    tokens at a time, are vectors' work, and the logits are not turned round.
    """
    rows, vocabulary = logits.shape
    if not few_rows(rows):
        return logits.argmax(-1), jax.nn.logsumexp(logits, axis=-1)
    size = math.gcd(vocabulary, BLOCK)
    blocks = logits.T.reshape(-1, size, rows)
    block = blocks.max(1).argmax(0)
    within = jnp.take_along_axis(blocks, block[None, None], axis=0)[0].argmax(0)
    return block * size + within, jax.nn.logsumexp(blocks, axis=(0, 1))
