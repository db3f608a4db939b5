r"""How much every response of a data set will change in training, forecast from the start.

.. math:: \Delta \ln \pi(y) \approx \langle \nabla \ln \pi(y), \Delta \rangle
          \; \big(+ \tfrac{1}{2} \Delta^T \nabla^2 \ln \pi(y)\, \Delta\big)

with the frozen updates :math:`\Delta` of the run (``frozen``). What a direction costs is one pass of gradients over the
training pairs; what it does to a response, one forward-mode pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np

from ches_jax.data.packing import Item
from ches_jax.forecast.frozen import FrozenUpdates, Start
from ches_jax.forecast.metric import Tree
from ches_jax.forecast.model import Model, open_model
from ches_jax.forecast.passes import Derivatives, Measure, Pull, Push, Rows
from ches_jax.forecast.products import Products, products
from ches_jax.train.data.examples import NOTHING
from ches_jax.train.objective import is_unpaired, reads_tokens
from ches_jax.train.observe.pair_logprobs import Evaluator
from ches_jax.train.setup import OtherModel, Run, references
from ches_jax.types import TokenPair

CHECKED = 64
"""Pairs of each set on which the updates are taken, to see whether they leave the linear range."""
LINEAR = 0.5
"""Mean error of first order against the change when all updates are taken at once, over that change, up to which the
range counts as linear."""


class PairChanges(NamedTuple):
    """[N] of the chosen and of the rejected responses of pairs, float64."""

    chosen: np.ndarray
    rejected: np.ndarray


@dataclass
class Passes:
    """A run that is not made: its model at the start, and what is computed of it."""

    run: Run
    model: Model
    params: Tree
    rows: Rows

    @classmethod
    def of(cls, run: Run, batch_tokens: int | None = None) -> "Passes":
        """Loads the weights.

        Raises:
          ChesError: weights that cannot be read; a model without a forward mode.
        """
        config = run.config
        model, params = open_model(
            run.model, run.mesh, dtype=config.dtype, remat=config.remat, lora=run.lora, seed=config.seed
        )
        fit = [*run.pairs.train, *run.pairs.held_out]
        return cls(run, model, params, Rows(run.layout, run.mesh, batch_tokens, fit))

    def reference(self) -> Any:
        """Reference log-probabilities of the training examples; None where those of the start are meant, or none."""
        run = self.run
        if run.starts_at_the_reference:
            return None
        evaluate = Evaluator(self.model.plain, run.mesh, run.layout, run.attention.attend)
        every = {**self.model.frozen, **self.params}
        found = references(
            run.config,
            run.loss,
            {"train": run.train},
            run.identity,
            initial=evaluate.under(every),
            other=None if run.reference is None else OtherModel(run, run.reference),
            folder=run.out,
            write=False,
        )
        return found.get("train")

    @cached_property
    def updates(self) -> FrozenUpdates:
        """The frozen updates of the run, compiled once."""
        return FrozenUpdates(self.run, self.model)

    @cached_property
    def updates_by_side(self) -> FrozenUpdates:
        """The same, with what chosen responses make of the gradient; for losses that split (``splits``)."""
        return FrozenUpdates(self.run, self.model, by_side=True)

    @cached_property
    def pull(self) -> Pull:
        """Gradients of weighted sums, compiled once."""
        return Pull(self.model, self.rows)

    @cached_property
    def _of_run(self) -> Callable[[Tree], Tree]:
        metric, total = self.updates.metric, self.run.plan.total
        return jax.jit(lambda squares: metric.of_run(squares, total))

    def frozen_updates(self, *, by_side: bool = False, **options: Any) -> tuple[Tree, Start]:
        """``frozen.FrozenUpdates`` at the start; their options. ``by_side`` where ``products`` follow."""
        updates = self.updates_by_side if by_side else self.updates
        return updates(self.params, self.reference(), **options)

    def metric(self, start: Start) -> Tree:
        """``Metric.of_run`` of the run."""
        return self._of_run(start.squares)

    def mean_gradient(self, pairs: Sequence[TokenPair]) -> Tree:
        """Mean gradient of ln pi(chosen)."""
        return self.chosen_gradient(pairs, np.full(len(pairs), 1 / len(pairs)))

    def chosen_gradient(self, pairs: Sequence[TokenPair], coefficients: np.ndarray) -> Tree:
        """Gradient of the weighted sum of ln pi(chosen); pairs of weight 0 cost nothing."""
        counted = np.flatnonzero(coefficients).tolist()
        items: list[Item] = [replace(pairs[i], rejected=NOTHING) for i in counted]
        return self.pull(self.params, items, [np.array([coefficients[i], 0.0]) for i in counted], even=True)

    def products(self, start: Start, probes: Sequence[TokenPair]) -> Products | None:
        """The three inner products, of gradients by side; None for losses that do not weigh the responses of a pair."""
        if not splits(self.run):
            return None
        pairs, seen = self.run.pairs.train, start.counted > 0
        up, down = (-start.slopes[:, side] / seen.sum() for side in (0, -1))
        chosen, rejected = _by_side(start.of_chosen, start.gradient)
        used = up[seen]
        if used.min() == used.max() != 0:
            own = _times(chosen, np.asarray(1 / up.sum()))
        else:
            own = self.chosen_gradient(pairs, seen / seen.sum())
        of_probes = self.mean_gradient(probes) if probes else None
        return products(chosen, rejected, self.metric(start), own, float(down.sum()), of_probes)

    def push(self, direction: Tree, order: int = 1) -> Callable[[Sequence[TokenPair]], Derivatives]:
        """What a direction does to the responses of pairs."""
        run = Push(self.model, self.rows, order)
        return lambda pairs: run(self.params, direction, list(pairs))

    def at_once(self, direction: Tree) -> Callable[[Sequence[TokenPair]], list[np.ndarray]]:
        """Log-probabilities of the responses of pairs where the parameters have moved by all of a direction."""
        moved = _moved(self.params, direction)
        measure = Measure(self.model, self.rows)
        return lambda pairs: measure(moved, list(pairs))


# one program each: operations on trees one by one are a program for each shape of a parameter
@jax.jit
def _by_side(of_chosen: Tree, gradient: Tree) -> tuple[Tree, Tree]:
    """Minus the gradient, in what chosen and what rejected responses make of it."""
    chosen = {k: -g for k, g in of_chosen.items()}
    return chosen, {k: -g - chosen[k] for k, g in gradient.items()}


@jax.jit
def _times(tree: Tree, factor: jax.Array) -> Tree:
    return {k: g * factor.astype(g.dtype) for k, g in tree.items()}


@jax.jit
def _moved(params: Tree, direction: Tree) -> Tree:
    return {k: p + direction[k].astype(p.dtype) for k, p in params.items()}


def changes(found: list[np.ndarray]) -> PairChanges:
    """Numbers of the two responses of pairs, from those of items of two."""
    sides = np.array(found, np.float64).reshape(len(found), 2).T
    return PairChanges(*sides)


def splits(run: Run) -> bool:
    """Whether the loss is one of whole responses of pairs, so that its gradient splits into theirs."""
    return run.train.size == 1 and not is_unpaired(run.loss) and not reads_tokens(run.loss)


def taken(derivatives: Derivatives) -> list[np.ndarray]:
    """The forecast of each response in nats: all orders that were computed."""
    if derivatives.second is None:
        return derivatives.first
    return [a + b / 2 for a, b in zip(derivatives.first, derivatives.second, strict=True)]


def linear_error(first: np.ndarray, actual: np.ndarray) -> float:
    """Mean error of first order against the change when all updates are taken at once, over that change.

    >>> linear_error(np.array([1.0, -2.0]), np.array([1.0, -4.0]))
    0.4
    """
    size = float(np.abs(actual).mean())
    return float(np.abs(first - actual).mean()) / size if size else 0.0
