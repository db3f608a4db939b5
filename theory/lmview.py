"""One small protocol through which the same claims run on the toy model and on a language model.

A view is stateless: parameters go in with every call, as a tree of arrays. What a model must offer is the hidden state
that multiplies the unembedding matrix, that matrix, and the elementwise map from their product to the logits; the
log-probabilities follow. Everything is plain jax (dense attention, no kernel without a forward mode), so forward-mode
derivatives exist, and layers may be recomputed and parameters dealt out over devices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ches_jax.models.decoder import Decoder
from ches_jax.types import TokenPair
from theory.ufm import UFM

MICROBATCH = 8
"""Sequences that are passed through the model at a time."""


class Sequences(NamedTuple):
    """Prompt and response together, padded on the right."""

    tokens: Int[Array, "N T"]
    real: Bool[Array, "N T"]
    response: Bool[Array, "N T"]
    """True on tokens that count: token t is predicted by the state at t - 1."""


class LMView(Protocol):
    """What the claims ask of a model."""

    def hidden(self, params: Any, sequences: Sequences) -> Float[Array, "N T D"]:
        """States after the final norm: what multiplies the unembedding matrix."""
        ...

    def unembedding(self, params: Any) -> Float[Array, "V D"]:
        """W."""
        ...

    def transform(self, raw: Array) -> Array:
        """From h W^T to the logits, elementwise: the identity, a scale, a soft-cap."""
        ...

    def trainable(self, params: Any) -> Any:
        """Tree of booleans: which parameters move."""
        ...


@dataclass(frozen=True)
class DecoderView:
    """A ``ches_jax`` decoder; ``params`` are its nnx state.

    Attributes:
      graph: the model without its arrays (``nnx.split``).
      config: its architecture.
      remat: recompute layers in the backward pass.
      only: substring that a trainable parameter's path contains; empty: everything moves.
    """

    graph: Any
    config: Any
    remat: bool = False
    only: str = ""

    def hidden(self, params: Any, sequences: Sequences) -> Float[Array, "N T D"]:
        model = nnx.merge(self.graph, params)
        return model.hidden(sequences.tokens, mask=sequences.real, remat=self.remat)

    def unembedding(self, params: Any) -> Float[Array, "V D"]:
        return nnx.merge(self.graph, params).unembedding

    def transform(self, raw: Array) -> Array:
        c = self.config
        if c.logit_scale is not None:
            raw = raw * c.logit_scale
        return raw if c.logit_softcap is None else c.logit_softcap * jnp.tanh(raw / c.logit_softcap)

    def trainable(self, params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: self.only in path_name(path), params)


@dataclass(frozen=True)
class ToyView:
    """The unconstrained-features model; ``prefixes`` [C, T] (padded with -1) says which prefix each feature is of."""

    prefixes: np.ndarray

    def hidden(self, params: UFM, sequences: Sequences) -> Float[Array, "N T D"]:
        tokens = sequences.tokens
        length = tokens.shape[1]
        up_to = jnp.tril(jnp.ones((length, length), bool))
        prefix = jnp.where(up_to[None], tokens[:, None, :], -1)
        table = jnp.asarray(self.prefixes, tokens.dtype)
        same = (prefix[:, :, None, :] == table[None, None]).all(-1)
        return params.features[jnp.argmax(same, axis=-1)]

    def unembedding(self, params: UFM) -> Float[Array, "V D"]:
        return params.unembedding

    def transform(self, raw: Array) -> Array:
        return raw

    def trainable(self, params: UFM) -> UFM:
        return UFM(True, True)  # type: ignore[arg-type]


def decoder_view(model: Decoder, **options: Any) -> tuple[DecoderView, Any]:
    """A view of a loaded decoder, and its parameters."""
    graph, params = nnx.split(model)
    return DecoderView(graph, model.config, **options), params


def toy_view(sequences: Sequences, key: Array, vocabulary: int, width: int) -> tuple[ToyView, UFM]:
    """A toy model with a feature for every prefix of the given sequences."""
    tokens, real = np.asarray(sequences.tokens), np.asarray(sequences.real)
    length = tokens.shape[1]
    prefixes = {tuple(row[: t + 1]) for row, ok in zip(tokens, real, strict=True) for t in range(length) if ok[t]}
    table = np.array([(*p, *[-1] * (length - len(p))) for p in sorted(prefixes)], np.int32)
    keys = jax.random.split(key)
    w, h = jax.random.normal(keys[0], (vocabulary, width)), jax.random.normal(keys[1], (len(table), width))
    return ToyView(table), UFM(w, h)


def path_name(path: Any) -> str:
    """A parameter's dotted name."""
    return ".".join(
        str(getattr(p, "key", getattr(p, "name", p))) for p in path if not hasattr(p, "name") or p.name != "value"
    )


def log_probs(view: LMView, params: Any, sequences: Sequences) -> Float[Array, " N"]:
    """Log-probability of every response, nats; a few sequences at a time."""

    def one(sequence: Sequences) -> Array:
        alone = jax.tree.map(lambda a: a[None], sequence)
        hidden = view.hidden(params, alone)[0, :-1]
        return response_log_prob(view, hidden, view.unembedding(params), sequence)

    return jax.lax.map(one, sequences, batch_size=MICROBATCH)


def response_log_prob(view: LMView, hidden: Float[Array, "T D"], w: Float[Array, "V D"], sequence: Any) -> Array:
    """Log-probability of one response from its predicting states and W."""
    log_pi = jax.nn.log_softmax(view.transform(hidden @ w.T), axis=-1)
    picked = jnp.take_along_axis(log_pi, sequence.tokens[1:, None], axis=-1)[:, 0]
    return jnp.where(sequence.response[1:], picked, 0.0).sum()


def sequences_of(pairs: Sequence[TokenPair], length: int | None = None) -> tuple[Sequences, Sequences]:
    """Chosen and rejected sequences of tokenised pairs, terminators included, in one padded shape."""
    sides = [[(p.prompt, r.targets("include")) for p, r in zip(pairs, side, strict=True)] for side in (
        [p.chosen for p in pairs], [p.rejected for p in pairs])]  # fmt: skip
    longest = max(len(prompt) + len(response) for side in sides for prompt, response in side)
    length = length or longest
    return tuple(_pad(side, length) for side in sides)  # type: ignore[return-value]


def _pad(side: Sequence[tuple[Sequence[int], Sequence[int]]], length: int) -> Sequences:
    tokens = np.zeros((len(side), length), np.int32)
    real, response = np.zeros((2, len(side), length), bool)
    for row, (prompt, answer) in enumerate(side):
        end = len(prompt) + len(answer)
        tokens[row, :end] = [*prompt, *answer]
        real[row, :end] = True
        response[row, len(prompt) : end] = True
    return Sequences(jnp.asarray(tokens), jnp.asarray(real), jnp.asarray(response))
