"""Random instances of fixed shape, so that a thousand of them are one compiled call.

Numbers are drawn outside the compiled call and handed out inside it by ``Draw``: compiling a generator for every claim
would take longer than the claims. Scales are log-uniform (W and h between about 0.3 and 3), since which term wins
depends on them.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from theory.statements.objectives import MARGIN_LOSSES, margin_loss, margin_slope
from theory.toy.ufm import UFM, Pairs, Responses, log_probs, pair_responses, share_contexts

UNIFORM, NORMAL = 192, 1024
"""Numbers an instance may use."""
MANY = 5000
"""From here on only the numbers that are used are drawn; counting them traces the check once more."""


class Noise(NamedTuple):
    """Raw random numbers of one instance (or, with a leading axis, of many)."""

    uniform: Float[Array, " U"]
    normal: Float[Array, " G"]


def noise(seed: tuple[int, ...], instances: int, uniform: int = UNIFORM, normal: int = NORMAL) -> Noise:
    """Numbers for many instances; the same for the same seed."""
    rng = np.random.default_rng(seed)
    return Noise(rng.random((instances, uniform)), rng.standard_normal((instances, normal)))  # type: ignore[arg-type]


def noise_for(check: Callable[["Draw"], Any], seed: tuple[int, ...], instances: int) -> Noise:
    """Numbers for many instances of a check."""
    if instances < MANY:
        return noise(seed, instances)
    used = {}

    def trace(numbers: Noise) -> Any:
        draw = Draw(numbers)
        result = check(draw)
        used.update(draw.used)
        return result

    jax.eval_shape(trace, jax.tree.map(lambda a: a[0], noise(seed, 1)))
    return noise(seed, instances, **used)


class Draw:
    """Hands out an instance's numbers, each once."""

    def __init__(self, numbers: Noise):
        self._numbers = numbers
        self.used = {"uniform": 0, "normal": 0}
        """How many were handed out, by kind."""

    def _take(self, kind: str, shape: tuple[int, ...]) -> Array:
        start = self.used[kind]
        self.used[kind] = end = start + math.prod(shape)
        values = getattr(self._numbers, kind)
        if end > values.shape[0]:
            raise ValueError(f"an instance needs {end} {kind} numbers; there are {values.shape[0]}")
        return values[start:end].reshape(shape)

    def uniform(self, shape: tuple[int, ...] = (), low: float = 0.0, high: float = 1.0) -> Array:
        """Uniform on [low, high)."""
        return low + (high - low) * self._take("uniform", shape)

    def normal(self, shape: tuple[int, ...]) -> Array:
        """Standard normal."""
        return self._take("normal", shape)

    def integers(self, shape: tuple[int, ...], low: int, high: int) -> Array:
        """Integers low .. high - 1."""
        return (low + jnp.floor(self._take("uniform", shape) * (high - low))).astype(jnp.int32)


class LossDraw(NamedTuple):
    """A margin loss: which, and its parameters."""

    which: Int[Array, ""]
    ref: Float[Array, ""]
    scale: Float[Array, ""]

    def ell(self, u: Array) -> Array:
        """The loss at margin u."""
        return margin_loss(self.which, u, self.ref, self.scale)

    def slope(self, u: Array) -> Array:
        """ell'(u)."""
        return margin_slope(self.which, u, self.ref, self.scale)


class PairInstance(NamedTuple):
    """One pair (or several) with a probe response z, in a model of its own."""

    model: UFM
    pairs: Pairs
    probe: Responses
    loss: LossDraw


def random_model(draw: Draw, vocabulary: int, width: int, contexts: int) -> UFM:
    """Gaussian parameters of random scale."""
    scale = jnp.exp(draw.uniform((2,), math.log(0.3), math.log(3.0))) / width**0.25
    w, h = draw.normal((vocabulary, width)), draw.normal((contexts, width))
    return UFM(w * scale[0], h * scale[1])


def random_loss(draw: Draw, margin: Array) -> LossDraw:
    """A loss near whose minimum the model is not, but may be above or below the reference."""
    which = draw.integers((), 0, len(MARGIN_LOSSES))
    return LossDraw(which, margin + draw.uniform((), -0.5, 0.5), draw.uniform((), 0.05, 0.5))


def three_tokens(draw: Draw, vocabulary: int, rows: int = 1) -> Int[Array, "rows three"]:
    """Three different tokens in each row."""
    first = draw.integers((rows,), 0, vocabulary)
    second = (first + 1 + draw.integers((rows,), 0, vocabulary - 1)) % vocabulary
    third = draw.integers((rows,), 0, vocabulary - 2)
    low, high = jnp.minimum(first, second), jnp.maximum(first, second)
    third = third + (third >= low).astype(jnp.int32)
    third = third + (third >= high).astype(jnp.int32)
    return jnp.stack([first, second, third], axis=1)


def random_masks(draw: Draw, count: int, longest: int, shortest: int = 1) -> Bool[Array, "count longest"]:
    """Masks of random lengths."""
    lengths = draw.integers((count, 1), shortest, longest + 1)
    return jnp.arange(longest, dtype=jnp.int32)[None, :] < lengths


def random_pair(
    draw: Draw, *, vocabulary: int, width: int, length: int, shared: int = 0, probe_shared: int = 0
) -> PairInstance:
    """One pair whose first ``shared`` tokens agree and whose next ones differ; z begins with a third token.

    With ``probe_shared`` z begins with this many tokens of the chosen response instead, and then differs. Responses are
    longer than what they share, so that none is a prefix of another.
    """
    tokens = draw.integers((3, length), 0, vocabulary)
    first = three_tokens(draw, vocabulary)[0]
    tokens = tokens.at[1, :shared].set(tokens[0, :shared])
    tokens = tokens.at[:2, shared].set(first[:2])
    if probe_shared:
        tokens = tokens.at[2, :probe_shared].set(tokens[0, :probe_shared])
        another = (tokens[0, probe_shared] + draw.integers((), 1, vocabulary)) % vocabulary
        tokens = tokens.at[2, probe_shared].set(another)
    elif shared == 0:
        tokens = tokens.at[2, 0].set(first[2])
    mask = random_masks(draw, 3, length, max(shared, probe_shared) + 1)
    contexts = share_contexts(jnp.zeros(3, jnp.int32), tokens)
    model = random_model(draw, vocabulary, width, 3 * length)
    chosen, rejected, probe = (Responses(tokens[i : i + 1], contexts[i : i + 1], mask[i : i + 1]) for i in range(3))
    margin = log_probs(model, chosen)[0] - log_probs(model, rejected)[0]
    return PairInstance(model, Pairs(chosen, rejected), probe, random_loss(draw, margin))


def random_batch(draw: Draw, *, vocabulary: int, width: int, length: int, pairs: int) -> PairInstance:
    """Pairs of repeated prompts, with shared and strict prefixes and equal responses among them; probes of any kind."""
    prompts = draw.integers((pairs,), 0, max(1, pairs // 2))
    chosen, rejected, probe = draw.integers((3, pairs, length), 0, vocabulary)
    copied = jnp.arange(length, dtype=jnp.int32)[None, :] < draw.integers((pairs, 1), 0, length + 1)
    rejected = jnp.where(copied, chosen, rejected)
    masks = random_masks(draw, 3 * pairs, length).reshape(3, pairs, length)
    tokens = jnp.concatenate([chosen, rejected, probe])
    contexts = share_contexts(jnp.tile(prompts, 3), tokens).reshape(3, pairs, length)
    parts = [Responses(t, contexts[i], masks[i]) for i, t in enumerate((chosen, rejected, probe))]
    model = random_model(draw, vocabulary, width, 3 * pairs * length)
    margin = (log_probs(model, parts[0]) - log_probs(model, parts[1])).mean()
    return PairInstance(model, Pairs(parts[0], parts[1]), parts[2], random_loss(draw, margin))


def random_single_token(draw: Draw, *, vocabulary: int, width: int, prompts: int = 1) -> PairInstance:
    """Pairs of single tokens on prompts that do not repeat (the setting of Theorems 4, 5, 8 and 9)."""
    tokens = three_tokens(draw, vocabulary, prompts)
    mask = jnp.ones((prompts, 1), bool)
    pairs = pair_responses(jnp.arange(prompts, dtype=jnp.int32), tokens[:, :1], tokens[:, 1:2], mask, mask)
    model = random_model(draw, vocabulary, width, 2 * prompts)
    margin = (log_probs(model, pairs.chosen) - log_probs(model, pairs.rejected)).mean()
    return PairInstance(model, pairs, pairs.chosen, random_loss(draw, margin))
