"""A language model with preference pairs, ready for the claims: loaded in float64, everything measured once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array
from rapidfuzz.distance import Levenshtein

from ches_jax.data.sources import open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
from ches_jax.embedded import pairs_file
from ches_jax.errors import DataError
from ches_jax.hf.directory import resolve
from ches_jax.models.load import load_model
from ches_jax.scores import derive
from ches_jax.types import TokenPair
from theory import kernels
from theory.lmview import DecoderView, Sequences, decoder_view, log_probs, sequences_of
from theory.ufm import PairLoss

BETA = 0.1
LONGEST = 192
"""Tokens of prompt and response; longer pairs are passed over, since each costs several gradients."""


@dataclass(frozen=True)
class RealModel:
    """A model, its pairs, and what the claims measure on them."""

    name: str
    view: DecoderView
    params: Any
    pairs: tuple[TokenPair, ...]
    chosen: Sequences
    rejected: Sequences

    @cached_property
    def loss(self) -> PairLoss:
        """DPO, the model being its own reference: every incentive is beta / 2 at the start."""
        start = self.log_probs(self.params, self.chosen) - self.log_probs(self.params, self.rejected)
        return lambda up, down: jax.nn.softplus(-BETA * (up - down - start)).mean()

    @cached_property
    def log_probs(self) -> Callable[[Any, Sequences], Array]:
        """Compiled log-probabilities."""
        return jax.jit(lambda params, sequences: log_probs(self.view, params, sequences))

    @cached_property
    def grams(self) -> kernels.PairGrams:
        """2 x 2 kernels by module."""
        run = jax.jit(lambda p, c, r: kernels.pair_grams(self.view, p, c, r, kernels.by_module))
        return run(self.params, self.chosen, self.rejected)

    @cached_property
    def velocity(self) -> Any:
        """-grad L of the whole batch."""
        return jax.jit(lambda p, c, r: kernels.direction(self.view, p, c, r, self.loss))(
            self.params, self.chosen, self.rejected
        )

    @cached_property
    def batch_rates(self) -> np.ndarray:
        """d/dt ln pi(y+) of every pair under the whole batch's flow."""
        run = jax.jit(lambda p, probes, v: kernels.rates_along(self.view, p, probes, v))
        return np.asarray(run(self.params, self.chosen, self.velocity))

    @cached_property
    def own_rates(self) -> np.ndarray:
        """d/dt ln pi(y+) if each pair were trained alone, from its kernel."""
        return np.asarray(self.grams.rates(BETA / 2, BETA / 2))

    @cached_property
    def head(self) -> Any:
        """Head scores."""
        run = jax.jit(lambda p, c, r: kernels.pair_head_scores(self.view, p, c, r))
        return run(self.params, self.chosen, self.rejected)

    @cached_property
    def states(self) -> tuple[np.ndarray, np.ndarray]:
        """Hidden states of both sides."""
        run = jax.jit(self.view.hidden)
        return tuple(np.asarray(run(self.params, s)) for s in (self.chosen, self.rejected))  # type: ignore[return-value]

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """Every score of similarity, higher meaning more alike, one number per pair."""
        sums, lasts = [], []
        for hidden, side in zip(self.states, (self.chosen, self.rejected), strict=True):
            predicts = np.asarray(side.response)[:, 1:, None]
            sums.append((hidden[:, :-1] * predicts).sum(1))
            # the state at the last content token: the one that predicts the terminator
            last = hidden.shape[1] - 2 - predicts[:, ::-1, 0].argmax(1)
            lasts.append(hidden[np.arange(len(hidden)), last])
        inner, own = (sums[0] * sums[1]).sum(1), (sums[0] ** 2).sum(1)
        n = [np.asarray(side.response).sum(1) for side in (self.chosen, self.rejected)]
        distance = [Levenshtein.normalized_distance(p.chosen.content, p.rejected.content) for p in self.pairs]
        return {
            "head_score": np.asarray(self.head.score),
            "ches": np.asarray(derive.ches(inner, own)),
            "ln_ches": np.asarray(derive.ln_ches(inner, own, n[0], n[1])),
            "last_hidden": (lasts[0] * lasts[1]).sum(1),
            "minus_edit_distance": -np.array(distance),
        }

    def train_alone(self, optimiser: optax.GradientTransformation, steps: int) -> np.ndarray:
        """Change of every ln pi(y+) after a few steps on its own pair alone, nats."""

        def one(pair: tuple[Sequences, Sequences]) -> Array:
            up, down = (jax.tree.map(lambda a: a[None], side) for side in pair)
            first = [log_probs(self.view, self.params, side)[0] for side in (up, down)]

            def loss(params):
                margin = log_probs(self.view, params, up)[0] - log_probs(self.view, params, down)[0]
                return jax.nn.softplus(-BETA * (margin - first[0] + first[1]))

            def step(carry, _):
                params, state = carry
                updates, state = optimiser.update(jax.grad(loss)(params), state, params)
                return (optax.apply_updates(params, updates), state), None

            start = (self.params, optimiser.init(self.params))
            (after, _), _ = jax.lax.scan(step, start, None, length=steps)
            return log_probs(self.view, after, up)[0] - first[0]

        with jax.numpy_dtype_promotion("standard"):
            return np.asarray(jax.jit(lambda pairs: jax.lax.map(one, pairs))((self.chosen, self.rejected)))


def open_real_model(model: str | Path, pairs: str | Path | None = None, *, limit: int = 32) -> RealModel:
    """Loads a model directory in float64 and the first pairs that are fit and not too long.

    Raises:
      ChesError: for a directory or a file that cannot be read, or without a pair to use.
    """
    directory = resolve(model)
    decoder = load_model(directory, dtype="float64", param_dtype="float64")
    source = open_pairs(str(pairs or pairs_file()))
    tokenizer = PairTokenizer(
        load_tokenizer(directory), max_length=decoder.config.max_positions, vocab_size=decoder.config.vocab_size
    )
    found: list[TokenPair] = []
    seen: set[tuple] = set()
    for row in source:
        pair = tokenizer([row])[0]
        key = (pair.prompt, pair.chosen.content, pair.rejected.content)
        if fit(pair) and key not in seen:
            seen.add(key)
            found.append(pair)
        if len(found) == limit:
            break
    if len(found) < 2:
        raise DataError(f"{source.name}: fewer than two pairs of at most {LONGEST} tokens without findings")
    view, params = decoder_view(decoder)
    chosen, rejected = sequences_of(found)
    return RealModel(str(directory), view, params, tuple(found), chosen, rejected)


def fit(pair: TokenPair) -> bool:
    """Whether the claims can use a pair: nothing found by the audit, short enough, two different responses."""
    longest = len(pair.prompt) + max(len(r.targets("include")) for r in (pair.chosen, pair.rejected))
    return not pair.flags and longest <= LONGEST and bool(pair.prompt)


def bootstrap_spearman(a: np.ndarray, b: np.ndarray, rng: np.random.Generator, draws: int = 500) -> dict[str, float]:
    """Spearman's correlation with a 95% percentile interval over resampled pairs."""
    rows = rng.integers(0, len(a), (draws, len(a)))
    values = [derive.spearman(a[r], b[r]) for r in rows]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return {"rho": derive.spearman(a, b), "low": float(low), "high": float(high)}
