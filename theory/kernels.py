r"""Rates and kernels of any model behind an ``LMView``.

The rates of every probe under a batch's flow cost one backward and one forward-mode pass, whatever the number of pairs
and probes; no per-example gradient exists at any time. Kernels of single pairs take two backward passes each, one pair
at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ches_jax.scores.head import PairContributions, head_products, pair_contributions
from theory.lmview import LMView, Sequences, log_probs, path_name
from theory.ufm import PairLoss

Groups = Callable[[str], str]
"""From a parameter's dotted name to the group it is counted in."""


class PairGrams(NamedTuple):
    """Inner products of the gradients of one pair's log-probabilities, for every pair, by group of parameters."""

    chosen: dict[str, Float[Array, " N"]]
    cross: dict[str, Float[Array, " N"]]
    rejected: dict[str, Float[Array, " N"]]

    def total(self) -> tuple[Array, Array, Array]:
        """(K++, K+-, K--)."""
        return tuple(sum(parts.values(), start=jnp.zeros(())) for parts in self)  # type: ignore[return-value]

    def rates(self, up: Array | float, down: Array | float) -> Float[Array, " N"]:
        """Own-pair rate of every chosen response: what its own pair alone would do to it."""
        chosen, cross, _ = self.total()
        return up * chosen - down * cross


def direction(view: LMView, params: Any, chosen: Sequences, rejected: Sequences, loss: PairLoss) -> Any:
    """Velocity of gradient flow, -grad L, zero where a parameter is frozen."""
    gradient = jax.grad(lambda p: loss(log_probs(view, p, chosen), log_probs(view, p, rejected)))(params)
    return jax.tree.map(lambda g, moves: -g if moves else jnp.zeros_like(g), gradient, view.trainable(params))


def rates_along(view: LMView, params: Any, probes: Sequences, velocity: Any) -> Float[Array, " N"]:
    """d/dt ln pi of every probe along any direction: a gradient, or an optimiser's actual update."""
    return jax.jvp(lambda p: log_probs(view, p, probes), (params,), (velocity,))[1]


def batch_rates(
    view: LMView, params: Any, chosen: Sequences, rejected: Sequences, loss: PairLoss, probes: Sequences
) -> Float[Array, " N"]:
    """d/dt ln pi of every probe under the flow of the whole batch's loss."""
    return rates_along(view, params, probes, direction(view, params, chosen, rejected, loss))


def pair_grams(
    view: LMView, params: Any, chosen: Sequences, rejected: Sequences, groups: Groups = lambda name: "all"
) -> PairGrams:
    """The 2 x 2 kernel of every pair, by group of parameters."""

    def one(pair: tuple[Sequences, Sequences]) -> tuple[dict[str, Array], ...]:
        gradients = [
            jax.grad(lambda p, s=side: log_probs(view, p, jax.tree.map(lambda a: a[None], s))[0])(params)
            for side in pair
        ]
        flat = [jax.tree_util.tree_leaves_with_path(g) for g in gradients]
        moves = jax.tree.leaves(view.trainable(params))
        sums: tuple[dict[str, Array], ...] = ({}, {}, {})
        for (path, up), (_, down), moving in zip(*flat, moves, strict=True):
            if not moving:
                continue
            group = groups(path_name(path))
            for total, product in zip(sums, ((up * up), (up * down), (down * down)), strict=True):
                total[group] = total.get(group, jnp.zeros((), product.dtype)) + product.sum()
        return sums

    return PairGrams(*jax.lax.map(one, (chosen, rejected)))


def by_module(name: str) -> str:
    """Groups of a decoder's parameters: head, embed, attention, mlp, norm."""
    for part, group in (
        ("norm", "norm"),
        ("lm_head", "head"),
        ("embed", "embed"),
        ("attn", "attention"),
        ("mlp", "mlp"),
    ):
        if part in name:
            return group
    return "other"


def pair_head_scores(view: LMView, params: Any, chosen: Sequences, rejected: Sequences) -> PairContributions:
    """The head score of every pair (``ches_jax.scores.head``), the two responses side by side in one row."""
    w = view.unembedding(params)

    def one(pair: tuple[Sequences, Sequences]) -> PairContributions:
        rows = [jax.tree.map(lambda a: a[None], side) for side in pair]
        hidden = jnp.concatenate([view.hidden(params, side)[:, :-1] for side in rows], axis=1)
        target = jnp.concatenate([side.tokens[:, 1:] for side in rows], axis=1)
        segment = jnp.concatenate([jnp.where(s.response[:, 1:], i, 3) for i, s in enumerate(rows, 1)], axis=1)
        segment = segment.astype(jnp.int32)
        # one item, as ``data.packing`` writes it: shared, chosen (preferred as shared is), rejected
        item, preferred = jnp.array([[[0, 0, 0]], [[1, 1, 0]]], jnp.int32)
        products = head_products(hidden, target, segment, item, preferred, w, view.transform)
        return pair_contributions(products[0], segment[0], 0, 1, 2)

    return jax.lax.map(one, (chosen, rejected))


def layer_shares(view: LMView, params: Any, chosen: Sequences) -> dict[str, Float[Array, " L"]]:
    """Share of each layer in K++ of the first sequence, by parameter; layers are stacked on the leading axis."""
    first = jax.tree.map(lambda a: a[:1], chosen)
    gradient = jax.grad(lambda p: log_probs(view, p, first)[0])(params)
    total = sum((g * g).sum() for g in jax.tree.leaves(gradient))
    shares = {}
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        name = path_name(path)
        if "layers" in name:
            shares[name] = (g * g).reshape(g.shape[0], -1).sum(1) / total
    return shares
