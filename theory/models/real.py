"""A language model with preference pairs, ready for the claims: loaded in float64, everything measured once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array
from rapidfuzz.distance import Levenshtein

from ches_jax.bundled import pairs_file
from ches_jax.data.sources import open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
from ches_jax.errors import DataError
from ches_jax.hf.directory import resolve
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.stacks import layers_of
from ches_jax.scores import formulas
from ches_jax.types import TokenPair
from theory.models import kernels
from theory.models.lmview import (
    LMView,
    Sequences,
    both_sides,
    decoder_view,
    log_probs,
    pair_log_probs,
    sequences_of,
    states,
)
from theory.toy.ufm import PairLoss

BETA = 0.1
LONGEST = 192
"""Tokens of prompt and response; longer pairs are passed over, since each costs several gradients."""
FEW = 6
"""Pairs where a claim costs a gradient of the unembedding, or a column of a Gram matrix, for each."""
AMONG = 10
"""Pairs are taken evenly from this many times as many: neighbours in a file are often alike."""


def dpo_at(start: Any) -> PairLoss:
    """DPO with the reference margin ``start``."""
    return lambda up, down: jax.nn.softplus(-BETA * (up - down - start)).mean()


@dataclass(frozen=True)
class RealModel:
    """A model, its pairs, and what the claims measure on them."""

    name: str
    view: LMView
    params: Any
    pairs: tuple[TokenPair, ...]
    chosen: Sequences
    rejected: Sequences
    text: Callable[[int], str] = str
    """A token in words."""
    layers: kernels.Layers = lambda name: ()
    """Which layers a parameter is stacked over."""

    @cached_property
    def loss(self) -> PairLoss:
        """DPO, the model being its own reference: every incentive is beta / 2 at the start."""
        return self.loss_of(len(self.pairs))

    def loss_of(self, count: int) -> PairLoss:
        """The same for the first pairs only."""
        chosen, rejected = self.start
        return dpo_at((chosen - rejected)[:count])

    @cached_property
    def start(self) -> tuple[Array, Array]:
        """Log-probabilities of both sides."""
        chosen, rejected = (self.log_probs(self.params, side) for side in (self.chosen, self.rejected))
        return chosen, rejected

    @cached_property
    def log_probs(self) -> Callable[[Any, Sequences], Array]:
        """Compiled log-probabilities."""
        return jax.jit(lambda params, sequences: log_probs(self.view, params, sequences))

    @cached_property
    def grams(self) -> kernels.PairGrams:
        """2 x 2 kernels by module and layer."""
        run = jax.jit(lambda p, c, r: kernels.pair_grams(self.view, p, c, r, kernels.by_module, layers=self.layers))
        return run(self.params, self.chosen, self.rejected)

    @cached_property
    def velocity(self) -> Any:
        """-grad L of the whole batch."""
        loss = self.loss  # measured before the tracing begins
        run = jax.jit(lambda p, c, r: kernels.direction(self.view, p, c, r, loss))
        return run(self.params, self.chosen, self.rejected)

    @cached_property
    def few_gram(self) -> np.ndarray:
        """K between the responses of the first ``FEW`` pairs, chosen ones first."""
        few = both_sides(*(jax.tree.map(lambda a: a[:FEW], side) for side in (self.chosen, self.rejected)))
        return np.asarray(jax.jit(lambda p, s: kernels.gram(self.view, p, s))(self.params, few))

    @cached_property
    def _step(self) -> Callable[..., Array]:
        def after(params, velocity, size, side):
            return log_probs(self.view, jax.tree.map(lambda p, v: p + size * v, params, velocity), side)

        return jax.jit(after)

    def stepped(self, velocity: Any, size: float) -> np.ndarray:
        """Change of every ln pi(y+) by one step along a direction."""
        return np.asarray(self._step(self.params, velocity, size, self.chosen) - self.start[0])

    @cached_property
    def rates_along(self) -> Callable[[Any], np.ndarray]:
        """Rates of every ln pi(y+) along a direction; one compilation for all directions."""
        run = jax.jit(lambda p, probes, v: kernels.rates_along(self.view, p, probes, v))
        return lambda velocity: np.asarray(run(self.params, self.chosen, velocity))

    @cached_property
    def batch_rates(self) -> np.ndarray:
        """d/dt ln pi(y+) of every pair under the whole batch's flow."""
        return self.rates_along(self.velocity)

    @cached_property
    def own_rates(self) -> np.ndarray:
        """d/dt ln pi(y+) if each pair were trained alone, from its kernel."""
        return np.asarray(self.grams.rates(BETA / 2, BETA / 2))

    @cached_property
    def sign_rates(self) -> np.ndarray:
        """d/dt ln pi(y+) of each pair along the signs of its own descent direction."""
        run = jax.jit(
            lambda p, c, r: kernels.sign_rates(self.view, p, c, r, lambda up, down: (BETA * (down - up)).mean())
        )
        return np.asarray(run(self.params, self.chosen, self.rejected))

    @cached_property
    def head(self) -> Any:
        """Head scores."""
        run = jax.jit(lambda p, c, r: kernels.pair_head_scores(self.view, p, c, r))
        return run(self.params, self.chosen, self.rejected)

    @cached_property
    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """(K++, K+-) through the features of the unconstrained-features model."""
        run = jax.jit(lambda p, c, r: kernels.pair_feature_kernels(self.view, p, c, r))
        own, cross = run(self.params, self.chosen, self.rejected)
        return np.asarray(own), np.asarray(cross)

    @cached_property
    def statistics(self) -> dict[str, np.ndarray]:
        """The columns of a score table, from the hidden states in double precision; and |A+|^2 of the head."""
        run = jax.jit(lambda p, s: states(self.view, p, s))
        sums, lasts, lengths = [], [], []
        for side in (self.chosen, self.rejected):
            hidden, predicts = np.asarray(run(self.params, side)), np.asarray(side.response)[:, 1:, None]
            sums.append((hidden * predicts).sum(1))
            # the state at the last content token: the one that predicts the terminator
            lasts.append(hidden[np.arange(len(hidden)), predicts.shape[1] - 1 - predicts[:, ::-1, 0].argmax(1)])
            lengths.append(predicts.sum((1, 2)))
        inner, own, other = ((sums[i] * sums[j]).sum(1) for i, j in ((0, 1), (0, 0), (1, 1)))
        distance = [Levenshtein.normalized_distance(p.chosen.content, p.rejected.content) for p in self.pairs]
        return {
            "ches": formulas.ches(inner, own),
            "ln_ches": formulas.ln_ches(inner, own, *lengths),
            "head_score": np.asarray(self.head.score),
            "last_hidden_inner": (lasts[0] * lasts[1]).sum(1),
            "cosine": formulas.cosine(inner, own, other),
            "edit_distance": np.array(distance),
            "inner": inner,
            "sqnorm_chosen": own,
            "sqnorm_rejected": other,
            "chosen_tokens": lengths[0],
            "rejected_tokens": lengths[1],
            "sqnorm_head": np.asarray(self.head.sqnorm_chosen),
            "logp_chosen": np.asarray(self.start[0]),
            "logp_rejected": np.asarray(self.start[1]),
        }

    @cached_property
    def scores(self) -> dict[str, np.ndarray]:
        """Every score of the library's list that a pair has by itself, and two that the theory adds.

        ``ufm_score`` is K+- - K++ of the unconstrained-features model, the head score with the features' part;
        ``length_difference`` is |y-| - |y+|.
        """
        columns = self.statistics
        of_library = {
            name: np.asarray(score.compute(*(columns[c] for c in score.columns)), np.float64)
            for name, score in formulas.SCORES.items()
            if score.columns and columns.keys() >= set(score.columns)
        }
        own, cross = self.features
        difference = columns["rejected_tokens"] - columns["chosen_tokens"]
        return of_library | {"ufm_score": columns["head_score"] + cross - own, "length_difference": difference}

    def train_alone(self, optimiser: optax.GradientTransformation, steps: int) -> np.ndarray:
        """Change of every ln pi(y+) after a few steps on its own pair alone, nats."""

        def one(pair: tuple[Sequences, Sequences]) -> Array:
            up, down = kernels.one_of(pair)
            first = pair_log_probs(self.view, self.params, up, down)
            objective = dpo_at(first[0] - first[1])

            def loss(params):
                return objective(*pair_log_probs(self.view, params, up, down))

            def step(carry, _):
                params, state = carry
                updates, state = optimiser.update(jax.grad(loss)(params), state, params)
                return (optax.apply_updates(params, updates), state), None

            start = (self.params, optimiser.init(self.params))
            (after, _), _ = jax.lax.scan(step, start, None, length=steps)
            return (log_probs(self.view, after, up) - first[0])[0]

        with jax.numpy_dtype_promotion("standard"):
            return np.asarray(jax.jit(lambda pairs: jax.lax.map(one, pairs))((self.chosen, self.rejected)))


def open_real_model(model: str | Path, pairs: str | Path | None = None, *, limit: int = 32) -> RealModel:
    """Loads a model directory in float64, and pairs that are fit and not too long, evenly from the file's beginning.

    Raises:
      ChesError: for a directory or a file that cannot be read, or without a pair to use.
    """
    directory = resolve(model)
    decoder = load_model(directory, dtype="float64", param_dtype="float64")
    source = open_pairs(str(pairs or pairs_file()))
    tokenizer = load_tokenizer(directory)
    of_pairs = PairTokenizer(tokenizer, max_length=decoder.config.max_positions, vocab_size=decoder.config.vocab_size)
    unique: dict[tuple, TokenPair] = {}
    for row in islice(source, AMONG * limit):
        pair = of_pairs([row])[0]
        if fit(pair):
            unique.setdefault((pair.prompt, pair.chosen.content, pair.rejected.content), pair)
    if len(unique) < 2:
        raise DataError(f"{source.name}: fewer than two pairs of at most {LONGEST} tokens without findings")
    evenly = np.unique(np.linspace(0, len(unique) - 1, min(limit, len(unique))).round().astype(int))
    taken = [list(unique.values())[i] for i in evenly]
    view, params = decoder_view(decoder)
    chosen, rejected = sequences_of(taken)
    return RealModel(
        str(directory),
        view,
        params,
        tuple(taken),
        chosen,
        rejected,
        text=lambda token: str(tokenizer.decode([token])),
        layers=partial(layers_of, decoder.config),
    )


def fit(pair: TokenPair) -> bool:
    """Whether the claims can use a pair: no flag of the audit, short enough, two different responses."""
    longest = len(pair.prompt) + max(len(r.targets("include")) for r in (pair.chosen, pair.rejected))
    return not pair.flags and longest <= LONGEST and bool(pair.prompt)
