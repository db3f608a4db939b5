r"""The updates that a run would make if every gradient were that of the start: *frozen* updates.

.. math:: \Delta = \sum_t \Delta_t(g_t), \qquad g_t = \nabla \bar L_t(\theta_0)

for the minibatches, the optimiser and the learning rates of ``ches train``. The gradients of the first epoch are
computed one by one; an update beyond it moves the epoch's mean gradient with its mean squares, so that the cost does
not grow with the number of updates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ches_jax.errors import ChesError
from ches_jax.forecast.metric import Metric, Tree
from ches_jax.forecast.model import Model
from ches_jax.forecast.passes import wide_zeros
from ches_jax.models.attention.choose import with_gradient
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.train.batch_loss import loss_and_metrics
from ches_jax.train.data.batches import Batch
from ches_jax.train.data.loader import Loader
from ches_jax.train.forward import ResponseLogps, batch_logps
from ches_jax.train.objective import initial_loss_state
from ches_jax.train.optimizer import clipped
from ches_jax.train.reference import Logps
from ches_jax.train.setup import Run
from ches_jax.train.step import put


@dataclass(frozen=True)
class Start:
    """What the gradients at the start say about a data set. Trees are by parameters' names."""

    gradient: Tree
    """Mean gradient of the loss over the examples of the minibatches; clipped as the run clips."""
    squares: Tree
    """Mean square of the minibatches' gradients."""
    slopes: np.ndarray
    """[N, R] derivative of each example's loss by the log-probability of each of its responses; 0 where not seen;
    clipped likewise, so that they make up the gradient."""
    counted: np.ndarray
    """[N] how often each example is in the minibatches."""


class LossGradient:
    """Gradient of the mean loss of a minibatch, and its derivatives by the responses' log-probabilities."""

    def __init__(self, run: Run, model: Model):
        """Where the reference is the policy at the start, its log-probabilities are those of the same pass."""
        loss, own = run.loss, run.starts_at_the_reference
        state = initial_loss_state(loss, run.master)

        def compute(params: Tree, frozen: Tree, batch: Batch) -> tuple[Tree, jax.Array]:
            def logps_of(p: Tree) -> ResponseLogps:
                decoder = with_parameters(model.trained, {**frozen, **p})
                attend = with_gradient(decoder.config, decoder.dtype)
                return batch_logps(decoder, batch, attend=attend, remat=model.remat, mesh=model.on)

            logps, transposed = jax.vjp(logps_of, params)
            seen = _with_reference(batch, logps) if own else batch
            slopes = jax.grad(lambda at: loss_and_metrics(loss, seen, at, state)[0])(logps)
            return transposed(slopes)[0], slopes.responses

        whole = NamedSharding(run.mesh, PartitionSpec())
        self._compute = jax.jit(compute, out_shardings=(None, whole))
        self._frozen, self._mesh = model.frozen, run.mesh

    def __call__(self, params: Tree, batch: Batch) -> tuple[Tree, np.ndarray]:
        """(gradient, [P, R] derivatives of the mean loss)."""
        gradient, slopes = self._compute(params, self._frozen, put(batch, self._mesh))
        return gradient, np.asarray(slopes, np.float64)


def _with_reference(batch: Batch, logps: ResponseLogps) -> Batch:
    tokens = batch.tokens
    if tokens is not None and logps.tokens is not None:
        tokens = tokens._replace(reference=logps.tokens)
    return batch._replace(reference=logps.responses, tokens=tokens)


class FrozenUpdates:
    """``updates(params, reference)``: the sum of all updates of a run, every gradient at ``params``; compiled once."""

    def __init__(self, run: Run, model: Model):
        """Takes the run that is forecast, and its model.

        Raises:
          ChesError: an optimiser whose metric is not known.
        """
        config = run.config
        self.run = run
        self.metric = Metric(config.optimizer, config.optimizer_args, run.schedule)
        self._gradient_of = LossGradient(run, model)
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
        loader = Loader(run.loss, run.train, plan, run.layout, reference, run.master)
        first = plan.steps_per_epoch if whole_epoch else min(plan.total, plan.steps_per_epoch)
        sizes = [sum(map(len, plan.update(t))) for t in range(first)]
        steps = FrozenSteps(self._step, params, [size / sum(sizes) for size in sizes])
        slopes = counted = np.zeros(0)
        for t, batches in enumerate(loader.ahead(0, first)):
            groups = plan.update(t)
            gradient = None
            for group, batch in zip(groups, batches, strict=True):
                share = len(group) / sizes[t]
                part, of_batch = self._gradient_of(params, batch)
                if slopes.ndim == 1:
                    slopes, counted = np.zeros((len(run.train), of_batch.shape[1])), np.zeros(len(run.train))
                slopes[group] += of_batch * len(group)
                counted[group] += 1
                if len(groups) == 1:
                    gradient = part
                else:
                    scaled = jax.tree.map(lambda g, s=share: g * jnp.asarray(s, g.dtype), part)
                    gradient = scaled if gradient is None else jax.tree.map(jnp.add, gradient, scaled)
            assert gradient is not None
            try:
                slopes[np.concatenate(groups)] *= steps.add(gradient)
            except FloatingPointError:
                rows = ", ".join(f"row {run.pairs.train[i].index}" for i in np.concatenate(groups)[:4]) or "none"
                raise not_finite(t, f"pairs of {rows} ...") from None
            on_update(t)
        return steps.moved_after(plan.total), Start(steps.mean, steps.squares, slopes, counted)


def not_finite(update: int, whose: str) -> ChesError:
    """The refusal of an update whose gradient is not finite."""
    return ChesError(f"update {update}: the gradient is not finite ({whose}); try --dtype float32")


class FrozenStep:
    """One step of an optimiser among those of one point, and the sum of further ones; compiled once."""

    def __init__(self, metric: Metric, clip: float | None = None):
        """``clip``: the norm to which the run clips its gradients."""
        self.metric = metric

        def apply(
            moved: Tree, moments: Any, mean: Tree, squares: Tree, g: Tree, share: Any, part: Any, count: Any, p: Tree
        ) -> Any:
            norm = jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in g.values()))
            used, factor = g, jnp.ones_like(norm)
            if clip is not None:
                used, factor = clipped(g, norm, clip), jnp.minimum(1.0, clip / (norm + 1e-6))
            squared = jax.tree.map(jnp.square, used)
            added, moments = metric.step(moments, used, squared, count, p)
            plus = jax.tree.map(jnp.add, moved, added)
            mean = {k: v + share.astype(v.dtype) * used[k] for k, v in mean.items()}
            squares = {k: v + squared[k] * part.astype(v.dtype) for k, v in squares.items()}
            return plus, moments, mean, squares, norm, factor

        def beyond(moved: Tree, moments: Any, mean: Tree, squares: Tree, done: Any, total: Any, p: Tree) -> Tree:
            return jax.tree.map(jnp.add, moved, metric.further(moments, mean, squares, done, total, p))

        self.zeros, self.apply, self.beyond = (
            jax.jit(wide_zeros), jax.jit(apply, donate_argnums=(0, 1, 2, 3)), jax.jit(beyond),
        )  # fmt: skip


class FrozenSteps:
    """The steps of an optimiser on gradients of one point, added up; with their mean and mean squares."""

    def __init__(self, step: FrozenStep, params: Tree, shares: Sequence[float]):
        """``shares``: of each update of the first epoch among its examples; they add up to 1."""
        self.step, self.params, self.shares, self.done = step, params, shares, 0
        self.moved, self.moments, self.mean, self.squares = (
            step.zeros(params), step.metric.start(params), step.zeros(params), step.zeros(params),
        )  # fmt: skip

    def add(self, gradient: Tree) -> float:
        """One update; by what its gradient was multiplied when it was clipped.

        Raises:
          FloatingPointError: a gradient that is not finite.
        """
        share, part = np.float64(self.shares[self.done]), np.float64(1 / len(self.shares))
        self.moved, self.moments, self.mean, self.squares, norm, factor = self.step.apply(
            self.moved, self.moments, self.mean, self.squares, gradient, share, part, jnp.int32(self.done), self.params
        )
        if not np.isfinite(float(norm)):
            raise FloatingPointError
        self.done += 1
        return float(factor)

    def moved_after(self, total: int) -> Tree:
        """The sum of ``total`` updates: those that were added, and further ones of their mean."""
        if total <= self.done:
            return self.moved
        done = jnp.int32(self.done)
        return self.step.beyond(self.moved, self.moments, self.mean, self.squares, done, jnp.int32(total), self.params)
