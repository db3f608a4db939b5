"""The gradient of a minibatch's mean loss: whole, or as the two parts that chosen and rejected responses make of it.

Whole, pairs lie in rows that share the prompt, as in training. By side, each side has rows of its own: the prompt is
computed twice, which costs less than a further pass over one side, and both parts are known.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import put_replicated
from ches_jax.forecast.metric import Tree
from ches_jax.forecast.model import Model
from ches_jax.models.attention.choose import with_gradient
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.train.batch_loss import loss_and_metrics
from ches_jax.train.data.batches import Batch
from ches_jax.train.data.examples import Examples, one_sided
from ches_jax.train.data.loader import Loader
from ches_jax.train.forward import ResponseLogps, batch_logps
from ches_jax.train.objective import initial_loss_state
from ches_jax.train.reference import Logps
from ches_jax.train.setup import Run
from ches_jax.train.step import put


class Gradients(NamedTuple):
    """Of the mean loss of a minibatch of P examples. Trees are by parameters' names."""

    whole: Tree
    of_chosen: Tree
    """What the chosen responses make of it; empty where it was not computed by side."""
    slopes: np.ndarray
    """[P, R] derivatives of the mean loss by the responses' log-probabilities, float64."""


class LossGradient(Protocol):
    """How minibatches are laid out, and their gradients."""

    def minibatches(self, reference: Logps | None, total: int) -> Iterator[list[Any]]:
        """Of the first ``total`` updates: what each hands to a call, one at a time."""
        ...

    def __call__(self, params: Tree, minibatch: Any) -> Gradients:
        """At these parameters."""
        ...


class WholeGradient:
    """In rows that share the prompt.

    Where the reference is the policy at the start, its log-probabilities are those of the same pass.
    """

    def __init__(self, run: Run, model: Model):
        """Compiles at the first minibatch."""
        self._run = run
        logps_of, slopes_of = _logps(model), _slopes(run)

        def compute(params: Tree, frozen: Tree, batch: Batch) -> tuple[Tree, jax.Array]:
            logps, transposed = jax.vjp(lambda p: logps_of(p, frozen, batch), params)
            slopes = slopes_of(batch, logps)
            return transposed(slopes)[0], slopes.responses

        self._compute = jax.jit(compute, out_shardings=(None, NamedSharding(run.mesh, PartitionSpec())))
        self._frozen = model.frozen

    def minibatches(self, reference: Logps | None, total: int) -> Iterator[list[Batch]]:
        """One batch for each group of an update."""
        return _loaded(self._run, self._run.train, reference, total)

    def __call__(self, params: Tree, minibatch: Batch) -> Gradients:
        """At these parameters."""
        gradient, slopes = self._compute(params, self._frozen, put(minibatch, self._run.mesh))
        return Gradients(gradient, {}, np.asarray(slopes, np.float64))


class SideGradient:
    """With rows for each side; for losses of the whole responses of pairs."""

    def __init__(self, run: Run, model: Model):
        """Compiles at the first minibatch."""
        self._run = run
        logps_of, slopes_of = _logps(model), _slopes(run)

        def compute(params: Tree, frozen: Tree, batch: Batch, sides: list[Batch]) -> tuple[Tree, Tree, jax.Array]:
            found = [jax.vjp(lambda p, side=side: logps_of(p, frozen, side).responses[:, 0], params) for side in sides]
            slopes = slopes_of(batch, ResponseLogps(jnp.stack([logps for logps, _ in found], axis=1))).responses
            chosen, rejected = (transposed(side)[0] for (_, transposed), side in zip(found, slopes.T, strict=True))
            return jax.tree.map(jnp.add, chosen, rejected), chosen, slopes

        self._compute = jax.jit(compute, out_shardings=(None, None, NamedSharding(run.mesh, PartitionSpec())))
        self._frozen = model.frozen

    def minibatches(self, reference: Logps | None, total: int) -> Iterator[list[tuple[Batch, Batch, Batch]]]:
        """For each group of an update its pairs, its chosen responses and its rejected ones."""
        run = self._run
        sides = (_loaded(run, one_sided(run.train, side), None, total) for side in (0, 1))
        for batches in zip(_loaded(run, run.train, reference, total), *sides, strict=True):
            yield list(zip(*batches, strict=True))

    def __call__(self, params: Tree, minibatch: tuple[Batch, Batch, Batch]) -> Gradients:
        """At these parameters."""
        pairs, mesh = minibatch[0], self._run.mesh
        # the rows of the pairs are not computed
        objective = put_replicated(pairs._replace(rows=()), mesh)
        gradient, chosen, slopes = self._compute(
            params, self._frozen, objective, [put(side, mesh) for side in minibatch[1:]]
        )
        return Gradients(gradient, chosen, np.asarray(slopes, np.float64))


def _loaded(run: Run, examples: Examples, reference: Logps | None, total: int) -> Iterator[list[Batch]]:
    """The batches of the first ``total`` updates."""
    return Loader(run.loss, examples, run.plan, run.layout, reference, run.master).ahead(0, total)


def _logps(model: Model) -> Any:
    def logps_of(params: Tree, frozen: Tree, batch: Batch) -> ResponseLogps:
        decoder = with_parameters(model.trained, {**frozen, **params})
        attend = with_gradient(decoder.config, decoder.dtype)
        return batch_logps(decoder, batch, attend=attend, remat=model.remat, mesh=model.on)

    return logps_of


def _slopes(run: Run) -> Any:
    loss, own = run.loss, run.starts_at_the_reference
    state = initial_loss_state(loss, run.master)

    def slopes_of(batch: Batch, logps: ResponseLogps) -> ResponseLogps:
        seen = _with_reference(batch, logps) if own else batch
        return jax.grad(lambda at: loss_and_metrics(loss, seen, at, state)[0])(logps)

    return slopes_of


def _with_reference(batch: Batch, logps: ResponseLogps) -> Batch:
    tokens = batch.tokens
    if tokens is not None and logps.tokens is not None:
        tokens = tokens._replace(reference=logps.tokens)
    return batch._replace(reference=logps.responses, tokens=tokens)
