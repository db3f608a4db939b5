r"""Rates and kernels of any model behind an ``LMView``.

The rates of every probe under a batch's flow cost one backward and one forward-mode pass, whatever the number of pairs
and probes; no per-example gradient exists at any time. Kernels of single pairs take two backward passes each, one pair
at a time.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ches_jax.forecast.linear import pull, push
from ches_jax.scores.unembedding_gradients import PairContributions, head_products, pair_contributions, token_gram
from theory.models.lmview import LMView, Sequences, errors, log_probs, pair_log_probs, path_name, states
from theory.toy.dynamics import moving
from theory.toy.ufm import PairLoss

Groups = Callable[[str], str]
"""From a parameter's dotted name to the group it is counted in."""
Layers = Callable[[str], Sequence[int]]
"""From a parameter's dotted name to the layers along its leading axis; none where it is not stacked over layers."""


class PairGrams(NamedTuple):
    """Inner products of the gradients of one pair's log-probabilities, for every pair, by group of parameters.

    [N], or [N, L] for a group of parameters that are counted layer by layer.
    """

    chosen: dict[str, Float[Array, "*n"]]
    cross: dict[str, Float[Array, "*n"]]
    rejected: dict[str, Float[Array, "*n"]]

    def by_group(self) -> "PairGrams":
        """Layers added up, [N] for every group."""
        return PairGrams(*({g: v.reshape(len(v), -1).sum(1) for g, v in parts.items()} for parts in self))

    def total(self) -> tuple[Array, Array, Array]:
        """(K++, K+-, K--)."""
        return tuple(sum(parts.values(), start=jnp.zeros(())) for parts in self.by_group())  # type: ignore[return-value]

    def rates(self, up: Array | float, down: Array | float) -> Float[Array, " N"]:
        """Own-pair rate of every chosen response: what its own pair alone would do to it."""
        chosen, cross, _ = self.total()
        return up * chosen - down * cross


def one_of(rows: Any) -> Any:
    """A single row as a batch of one."""
    return jax.tree.map(lambda a: a[None], rows)


def direction(view: LMView, params: Any, chosen: Sequences, rejected: Sequences, loss: PairLoss) -> Any:
    """Velocity of gradient flow, -grad L, zero where a parameter is frozen."""
    gradient = jax.grad(lambda p: loss(*pair_log_probs(view, p, chosen, rejected)))(params)
    return moving(jax.tree.map(jnp.negative, gradient), view.trainable(params))


def rates_along(view: LMView, params: Any, probes: Sequences, velocity: Any) -> Float[Array, " N"]:
    """d/dt ln pi of every probe along any direction: a gradient, or an optimiser's actual update."""
    return push(lambda p: log_probs(view, p, probes), params, velocity)[1]


def batch_rates(
    view: LMView, params: Any, chosen: Sequences, rejected: Sequences, loss: PairLoss, probes: Sequences
) -> Float[Array, " N"]:
    """d/dt ln pi of every probe under the flow of the whole batch's loss."""
    return rates_along(view, params, probes, direction(view, params, chosen, rejected, loss))


def sign_rates(view: LMView, params: Any, chosen: Sequences, rejected: Sequences, loss: PairLoss) -> Float[Array, " N"]:
    """d/dt ln pi(y+) of every pair along the signs of its own descent direction: the start of Adam and RMSProp."""

    def one(pair: tuple[Sequences, Sequences]) -> Array:
        up, down = one_of(pair)
        velocity = jax.tree.map(jnp.sign, direction(view, params, up, down, loss))
        return rates_along(view, params, up, velocity)[0]

    return jax.lax.map(one, (chosen, rejected))


def gram(view: LMView, params: Any, sequences: Sequences) -> Float[Array, "N N"]:
    """K between all the responses: each column one backward and one forward-mode pass, no gradient kept."""

    def column(sequence: Sequences) -> Array:
        gradient = pull(lambda p: log_probs(view, p, one_of(sequence))[0], params, jnp.ones(()))[1]
        return rates_along(view, params, sequences, moving(gradient, view.trainable(params)))

    return jax.lax.map(column, sequences)


def pair_grams(
    view: LMView,
    params: Any,
    chosen: Sequences,
    rejected: Sequences,
    groups: Groups = lambda name: "all",
    *,
    layers: Layers = lambda name: (),
) -> PairGrams:
    """The 2 x 2 kernel of every pair, by group of parameters.

    Parameters that are stacked over ``layers`` are counted layer by layer, each at its own place of the axis of all
    layers; no group may then hold such and others. The stacks of a decoder are those of ``stacks.layers_of``.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    numbers = {path_name(path): np.asarray(layers(path_name(path)), int) for path, _ in leaves}
    count = 1 + max((int(n.max()) for n in numbers.values() if n.size), default=-1)

    def one(pair: tuple[Sequences, Sequences]) -> tuple[dict[str, Array], ...]:
        up_and_down = jax.jacrev(lambda p: log_probs(view, p, jax.tree.map(lambda a, b: jnp.stack([a, b]), *pair)))(
            params
        )
        moves = jax.tree.leaves(view.trainable(params))
        sums: tuple[dict[str, Array], ...] = ({}, {}, {})
        for (path, (up, down)), moving_too in zip(jax.tree_util.tree_leaves_with_path(up_and_down), moves, strict=True):
            if not moving_too:
                continue
            name = path_name(path)
            at, group = numbers[name], groups(name)
            axes = tuple(range(int(at.size > 0), up.ndim))
            for total, product in zip(sums, (up * up, up * down, down * down), strict=True):
                part = product.sum(axes)
                part = jnp.zeros(count, part.dtype).at[at].set(part) if at.size else part
                total[group] = total[group] + part if group in total else part
        return sums

    return PairGrams(*jax.lax.map(one, (chosen, rejected)))


def by_module(name: str) -> str:
    """Groups of a decoder's parameters: head, embed, attention, mlp, norm; the last norm is a group of its own."""
    for part, group in (
        ("per_layer", "embed"),  # embeddings of their own for each layer
        ("norm", "norm" if "layers" in name else "final norm"),
        ("lm_head", "head"),
        ("embed", "embed"),
        ("attn", "attention"),
        ("mlp", "mlp"),
    ):
        if part in name:
            return group
    return "other"


def pair_head_scores(view: LMView, params: Any, chosen: Sequences, rejected: Sequences) -> PairContributions:
    """The head score of every pair (``ches_jax.scores.head_score``), the two responses side by side in one row."""
    w = view.unembedding(params)

    def one(pair: tuple[Sequences, Sequences]) -> PairContributions:
        rows = [one_of(side) for side in pair]
        hidden = jnp.concatenate([states(view, params, side) for side in rows], axis=1)
        target = jnp.concatenate([side.tokens[:, 1:] for side in rows], axis=1)
        segment = jnp.concatenate([jnp.where(s.response[:, 1:], i, 3) for i, s in enumerate(rows, 1)], axis=1)
        segment = segment.astype(jnp.int32)
        # one item, as ``data.packing`` writes it: shared, chosen (preferred as shared is), rejected
        item, preferred = jnp.array([[[0, 0, 0]], [[1, 1, 0]]], jnp.int32)
        products = head_products(hidden, target, segment, item, preferred, w, view.transform)
        return pair_contributions(products[0], segment[0], 0, 1, 2)

    return jax.lax.map(one, (chosen, rejected))


def head_gram(view: LMView, params: Any, sequences: Sequences) -> Float[Array, "N N"]:
    """The part of K between all responses that goes through the unembedding's output side.

    From coefficients between tokens, in chunks of the vocabulary (``unembedding_gradients.token_gram``): no gradient
    of W, [V, D], is ever formed. Holds N^2 / 2 blocks of [T, T].
    """
    hidden = states(view, params, sequences)
    n, length, width = hidden.shape
    first, second = jnp.triu_indices(n)
    alpha = token_gram(
        hidden.reshape(n * length, width),
        sequences.tokens[:, 1:].reshape(-1),
        jnp.stack([first, second]).astype(jnp.int32),
        jnp.int32(len(first)),
        view.unembedding(params),
        view.transform,
        tile=length,
    )
    counted = jnp.where(sequences.response[:, 1:, None], hidden, 0.0)
    products = (alpha * jnp.einsum("btd,bsd->bts", counted[first], counted[second])).sum((1, 2))
    upper = jnp.zeros((n, n), products.dtype).at[first, second].set(products)
    return jnp.where(jnp.triu(jnp.ones((n, n), bool)), upper, upper.T)


def pair_feature_kernels(
    view: LMView, params: Any, chosen: Sequences, rejected: Sequences
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    r"""(K++, K+-) of every pair through the features alone, had the model free features for every prefix.

    .. math:: \sum_k \|G_k\|^2, \qquad \sum_{k:\ \text{same prefix}} \langle G^+_k, G^-_k \rangle

    The second part of the kernel of the unconstrained-features model; in a language model the layers take its place.
    """
    w = view.unembedding(params)

    def one(pair: tuple[Sequences, Sequences]) -> tuple[Array, Array]:
        pulls = [errors(view, states(view, params, one_of(side))[0], w, side) @ w for side in pair]
        alike = jnp.cumprod((pair[0].tokens == pair[1].tokens).astype(jnp.int32))[:-1] == 1
        cross = jnp.where(alike, (pulls[0] * pulls[1]).sum(-1), 0.0).sum()
        return (pulls[0] ** 2).sum(), cross

    return jax.lax.map(one, (chosen, rejected))
