r"""The updates that a run would make if every gradient were that of the start: *frozen* updates.

.. math:: \Delta = \sum_t \Delta_t(g_t), \qquad g_t = \nabla \bar L_t(\theta_0)

for the minibatches, the optimiser and the learning rates of ``ches train``. The gradients of the first epoch are
computed one by one; an update beyond it moves the epoch's mean gradient with its mean squares, so that the cost does
not grow with the number of updates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ches_jax.errors import ChesError
from ches_jax.forecast.metric import Metric, Tree
from ches_jax.forecast.minibatch import LossGradient, SideGradient, WholeGradient
from ches_jax.forecast.model import Model
from ches_jax.forecast.passes import wide_zeros
from ches_jax.train.optimizer import clipped
from ches_jax.train.reference import Logps
from ches_jax.train.setup import Run


@dataclass(frozen=True)
class Start:
    """What the gradients at the start say about a data set. Trees are by parameters' names."""

    gradient: Tree
    """Mean gradient of the loss over the examples of the minibatches; clipped as the run clips."""
    of_chosen: Tree
    """What the chosen responses make of it; empty where it was not computed by side."""
    squares: Tree
    """Mean square of the minibatches' gradients."""
    slopes: np.ndarray
    """[N, R] derivative of each example's loss by the log-probability of each of its responses; 0 where not seen;
    clipped likewise, so that they make up the gradient."""
    counted: np.ndarray
    """[N] how often each example is in the minibatches."""


class FrozenUpdates:
    """``updates(params, reference)``: the sum of all updates of a run, every gradient at ``params``; compiled once."""

    def __init__(self, run: Run, model: Model, *, by_side: bool = False):
        """Takes the run that is forecast, and its model.

        ``by_side``: compute what chosen responses make of the gradient too; for losses of whole responses of pairs.

        Raises:
          ChesError: an optimiser whose metric is not known.
        """
        config = run.config
        self.run = run
        self.metric = Metric(config.optimizer, config.optimizer_args, run.schedule)
        self._gradient_of: LossGradient = (SideGradient if by_side else WholeGradient)(run, model)
        self._step = FrozenStep(self.metric, config.clip)

    def __call__(
        self,
        params: Tree,
        reference: Logps | None,
        *,
        whole_epoch: bool = False,
        on_update: Callable[[int], Any] = lambda t: None,
    ) -> tuple[Tree, Start]:
        """The updates; and what their gradients say.

        Args:
          params: the trained parameters at the start.
          reference: log-probabilities of the examples, where they are not those of the start itself.
          whole_epoch: see every example once, also where the run is shorter; the updates are then those of an epoch.
          on_update: called with the number of each update that is done.

        Raises:
          ChesError: a gradient that is not finite.
        """
        run, plan = self.run, self.run.plan
        first = plan.steps_per_epoch if whole_epoch else min(plan.total, plan.steps_per_epoch)
        sizes = [sum(map(len, plan.update(t))) for t in range(first)]
        steps = FrozenSteps(self._step, params, [size / sum(sizes) for size in sizes])
        slopes = counted = np.zeros(0)
        for t, minibatches in enumerate(self._gradient_of.minibatches(reference, first)):
            groups, gradients = plan.update(t), None
            for group, minibatch in zip(groups, minibatches, strict=True):
                found = self._gradient_of(params, minibatch)
                if slopes.ndim == 1:
                    slopes, counted = np.zeros((len(run.train), found.slopes.shape[1])), np.zeros(len(run.train))
                slopes[group] += found.slopes * len(group)
                counted[group] += 1
                share = len(group) / sizes[t]
                gradients = _plus(gradients, (found.whole, found.of_chosen), share)
            assert gradients is not None
            try:
                slopes[np.concatenate(groups)] *= steps.add(*gradients)
            except FloatingPointError:
                rows = ", ".join(f"row {run.pairs.train[i].index}" for i in np.concatenate(groups)[:4]) or "none"
                raise not_finite(t, f"pairs of {rows} ...") from None
            on_update(t)
        sums = steps.sums
        return steps.moved_after(plan.total), Start(sums.mean, sums.of_chosen, sums.squares, slopes, counted)


def _plus(total: Any, trees: Any, share: float) -> Any:
    """``total``, if there is any, and a share of further trees."""
    if share != 1:
        trees = jax.tree.map(lambda g: g * jnp.asarray(share, g.dtype), trees)
    return trees if total is None else jax.tree.map(jnp.add, total, trees)


def not_finite(update: int, whose: str) -> ChesError:
    """The refusal of an update whose gradient is not finite."""
    return ChesError(f"update {update}: the gradient is not finite ({whose}); try --dtype float32")


class Sums(NamedTuple):
    """What the steps of an optimiser at one point have added up."""

    moved: Tree
    moments: Any
    mean: Tree
    of_chosen: Tree
    squares: Tree


class FrozenStep:
    """One step of an optimiser among those of one point, and the sum of further ones; compiled once."""

    def __init__(self, metric: Metric, clip: float | None = None):
        """``clip``: the norm to which the run clips its gradients."""
        self.metric = metric

        def apply(sums: Sums, g: Tree, of_chosen: Tree, share: Any, part: Any, count: Any, p: Tree) -> Any:
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in g.values()))
            used, factor = g, jnp.ones_like(norm)
            if clip is not None:
                used, factor = clipped(g, norm, clip), jnp.minimum(1.0, clip / (norm + 1e-6))
            squared = jax.tree.map(jnp.square, used)
            added, moments = metric.step(sums.moments, used, squared, count, p)
            new = Sums(
                moved=jax.tree.map(jnp.add, sums.moved, added),
                moments=moments,
                mean={k: v + share.astype(v.dtype) * used[k] for k, v in sums.mean.items()},
                of_chosen={
                    k: sums.of_chosen[k] + (share * factor).astype(sums.of_chosen[k].dtype) * v
                    for k, v in of_chosen.items()
                },
                squares={k: v + squared[k] * part.astype(v.dtype) for k, v in sums.squares.items()},
            )
            return new, norm, factor

        def beyond(sums: Sums, done: Any, total: Any, p: Tree) -> Tree:
            more = metric.further(sums.moments, sums.mean, sums.squares, done, total, p)
            return jax.tree.map(jnp.add, sums.moved, more)

        self.zeros, self.apply, self.beyond = jax.jit(wide_zeros), jax.jit(apply, donate_argnums=0), jax.jit(beyond)


class FrozenSteps:
    """The steps of an optimiser on gradients of one point, added up; with their mean and mean squares."""

    def __init__(self, step: FrozenStep, params: Tree, shares: Sequence[float]):
        """``shares``: of each update of the first epoch among its examples; they add up to 1."""
        self.step, self.params, self.shares, self.done = step, params, shares, 0
        moved, mean, squares = (step.zeros(params) for _ in range(3))
        self.sums = Sums(moved, step.metric.start(params), mean, {}, squares)

    def add(self, gradient: Tree, of_chosen: Tree | None = None) -> float:
        """One update; by what its gradient was multiplied when it was clipped.

        Args:
          gradient: of the update.
          of_chosen: what chosen responses make of it, where that is added up too; of every update or of none.

        Raises:
          FloatingPointError: a gradient that is not finite.
        """
        share, part = np.float64(self.shares[self.done]), np.float64(1 / len(self.shares))
        if of_chosen and not self.sums.of_chosen:
            self.sums = self.sums._replace(of_chosen=self.step.zeros(self.params))
        self.sums, norm, factor = self.step.apply(
            self.sums, gradient, of_chosen or {}, share, part, jnp.int32(self.done), self.params
        )
        if not np.isfinite(float(norm)):
            raise FloatingPointError
        self.done += 1
        return float(factor)

    def moved_after(self, total: int) -> Tree:
        """The sum of ``total`` updates: those that were added, and further ones of their mean."""
        if total <= self.done:
            return self.sums.moved
        return self.step.beyond(self.sums, jnp.int32(self.done), jnp.int32(total), self.params)
