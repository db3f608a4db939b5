"""One small protocol through which the same claims run on the toy model and on a language model.

A view is stateless: parameters go in with every call, as a tree of arrays. What a model must offer is the hidden state
that multiplies the unembedding matrix, that matrix, and the elementwise map from their product to the logits; the
log-probabilities follow. Everything is plain jax: attention is the dense one, since a kernel with a backward pass of
its own has no forward mode. Layers may be recomputed, and parameters and sequences sharded over a mesh.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ches_jax.distributed.mesh import row_shards
from ches_jax.models.decoder import Decoder
from ches_jax.scores.unembedding_gradients import identity
from ches_jax.types import TokenPair
from theory.toy.ufm import UFM, residual

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

    @property
    def rows(self) -> int:
        """Sequences come in multiples of this: the parts into which a mesh deals them."""
        ...

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


def named(params: Any, part: str) -> Any:
    """Tree of booleans: the parameters whose dotted name contains ``part``."""
    return jax.tree_util.tree_map_with_path(lambda path, _: part in path_name(path), params)


@dataclass(frozen=True)
class DecoderView:
    """A ``ches_jax`` decoder (flax.nnx); ``params`` are its state.

    Attributes:
      graph: the model without its arrays (``nnx.split``).
      logit_transform: the model's scale and soft-cap.
      remat: recompute layers in the backward pass.
      only: substring that a trainable parameter's name contains; empty: everything moves.
      mesh: where parameters (``ches_jax.models.sharding.placement``) and sequences lie.
    """

    graph: Any
    logit_transform: Callable[[Array], Array] = identity
    remat: bool = False
    only: str = ""
    mesh: Mesh | None = None

    @property
    def rows(self) -> int:
        return 1 if self.mesh is None else row_shards(self.mesh)

    def hidden(self, params: Any, sequences: Sequences) -> Float[Array, "N T D"]:
        model = nnx.merge(self.graph, params)
        return model.hidden(sequences.tokens, mask=sequences.real, remat=self.remat, mesh=self.mesh)

    def unembedding(self, params: Any) -> Float[Array, "V D"]:
        return nnx.merge(self.graph, params).unembedding

    def transform(self, raw: Array) -> Array:
        return self.logit_transform(raw)

    def trainable(self, params: Any) -> Any:
        return named(params, self.only)


@dataclass(frozen=True)
class LinenView:
    """A flax.linen module; ``params`` are its ``params`` collection.

    Attributes:
      module: has a method from (tokens, mask of real tokens) to the states after the final norm.
      unembed: from the parameters to W, [V, D] (a Dense layer's kernel is its transpose).
      method: the name of that method.
      logit_transform: elementwise, from h W^T to the logits.
      only: substring that a trainable parameter's name contains; empty: everything moves.
    """

    module: Any
    unembed: Callable[[Any], Array]
    method: str = "hidden"
    logit_transform: Callable[[Array], Array] = identity
    only: str = ""
    rows: int = 1

    def hidden(self, params: Any, sequences: Sequences) -> Float[Array, "N T D"]:
        return self.module.apply({"params": params}, sequences.tokens, sequences.real, method=self.method)

    def unembedding(self, params: Any) -> Float[Array, "V D"]:
        return self.unembed(params)

    def transform(self, raw: Array) -> Array:
        return self.logit_transform(raw)

    def trainable(self, params: Any) -> Any:
        return named(params, self.only)


@dataclass(frozen=True)
class ToyView:
    """The unconstrained-features model; ``prefixes`` [C, T] (padded with -1) says which prefix each feature is of."""

    prefixes: np.ndarray
    rows: int = 1

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
    """A view of a loaded decoder, and its parameters; ``options`` are fields of ``DecoderView``."""
    graph, params = nnx.split(model)
    return DecoderView(graph, model.logit_transform, **options), params


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


def in_batches(function: Callable[[Any], Any], rows: Any, size: int) -> Any:
    """``function`` on ``size`` rows at a time (leading axis of the tree), the last batch padded with zeros."""
    count = len(jax.tree.leaves(rows)[0])
    batches = -(-count // size)

    def batched(a: Array) -> Array:
        filled = jnp.pad(a, [(0, batches * size - count), *[(0, 0)] * (a.ndim - 1)])
        return filled.reshape(batches, size, *a.shape[1:])

    results = jax.lax.map(function, jax.tree.map(batched, rows))
    return jax.tree.map(lambda a: a.reshape(batches * size, *a.shape[2:])[:count], results)


def batch_size(view: LMView, count: int) -> int:
    """Rows to pass through the model at a time: about ``MICROBATCH``, no more than there are, in the view's parts."""
    return -(-min(MICROBATCH, count) // view.rows) * view.rows


def states(view: LMView, params: Any, sequences: Sequences) -> Float[Array, "N U D"]:
    """The states that predict: of every position but the last, U = T - 1."""
    size = batch_size(view, len(sequences.tokens))
    return in_batches(lambda some: view.hidden(params, some)[:, :-1], sequences, size)


def log_probs(view: LMView, params: Any, sequences: Sequences) -> Float[Array, " N"]:
    """Log-probability of every response, nats; a few sequences at a time."""
    w = view.unembedding(params)

    def some(batch: Sequences) -> Array:
        hidden = view.hidden(params, batch)[:, :-1]
        return jax.vmap(lambda h, s: response_log_prob(view, h, w, s))(hidden, batch)

    return in_batches(some, sequences, batch_size(view, len(sequences.tokens)))


def pair_log_probs(
    view: LMView, params: Any, chosen: Sequences, rejected: Sequences
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Log-probabilities of both sides, passed through the model together."""
    values = log_probs(view, params, both_sides(chosen, rejected))
    count = len(chosen.tokens)
    return values[:count], values[count:]


def both_sides(chosen: Sequences, rejected: Sequences) -> Sequences:
    """All chosen sequences, then all rejected ones."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), chosen, rejected)


def response_log_prob(view: LMView, hidden: Float[Array, "U D"], w: Float[Array, "V D"], sequence: Any) -> Array:
    """Log-probability of one response from its predicting states and W."""
    log_pi = jax.nn.log_softmax(view.transform(hidden @ w.T), axis=-1)
    picked = jnp.take_along_axis(log_pi, sequence.tokens[1:, None], axis=-1)[:, 0]
    return jnp.where(sequence.response[1:], picked, 0.0).sum()


def errors(view: LMView, hidden: Float[Array, "U D"], w: Float[Array, "V D"], sequence: Any) -> Float[Array, "U V"]:
    """E of every prediction of one sequence, with the derivative of the logits' transform; 0 off the response."""
    raw = hidden @ w.T
    logits, slope = jax.jvp(view.transform, (raw,), (jnp.ones_like(raw),))
    return jnp.where(sequence.response[1:, None], slope * residual(logits, sequence.tokens[1:]), 0.0)


def sequences_of(pairs: Sequence[TokenPair], length: int | None = None) -> tuple[Sequences, Sequences]:
    """Chosen and rejected sequences of tokenised pairs, terminators included, in one padded shape."""
    sides = [
        [(p.prompt, r.targets("include")) for p, r in zip(pairs, side, strict=True)]
        for side in ([p.chosen for p in pairs], [p.rejected for p in pairs])
    ]
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
