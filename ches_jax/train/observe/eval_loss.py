"""Loss and rewards of the held-out examples, under TRL's names with ``eval_`` in front."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.distributed.mesh import put_replicated, put_rows
from ches_jax.losses import Loss
from ches_jax.models.checkpoint.load import with_parameters
from ches_jax.models.decoder import Decoder
from ches_jax.train.batch_loss import batch_loss, loss_and_metrics, update_metrics
from ches_jax.train.beside import Beside, Reference
from ches_jax.train.data.batches import Batch, Layout, padded, without_rows
from ches_jax.train.data.examples import Examples
from ches_jax.train.data.loader import Loader
from ches_jax.train.forward import ResponseLogps
from ches_jax.train.objective import is_unpaired, reads_joint, reads_lists, reads_tokens
from ches_jax.train.observe.observer import Params
from ches_jax.train.observe.pair_logprobs import Evaluator, WatchedPairs
from ches_jax.train.reference import Logps


@lru_cache(maxsize=8)
def _program(loss: Loss) -> Any:
    """The loss of a batch as one compiled program, however long its expression is."""
    return jax.jit(lambda batch, logps: loss_and_metrics(loss, batch, logps, {}))


@dataclass(frozen=True)
class EvalLoss:
    """The objective on the held-out examples, as one batch: an observer."""

    every: int | None
    loss: Loss
    """Without state: a stateful loss has no value apart from its training batches."""
    examples: Examples
    reference: Logps | None
    """Log-probabilities under the reference, where the loss has one."""
    layout: Layout
    evaluate: Evaluator
    """Gives log-probabilities where those of the watched pairs are not all that the objective reads."""
    watched: WatchedPairs
    """Whose set ``held_out`` are the pairs of ``examples``."""
    dtype: Any = np.float32

    def observe(self, step: int, params: Params) -> dict[str, float]:
        """``eval_loss``, and means of the loss's own metrics."""
        loss, examples, everyone = self.loss, self.examples, range(len(self.examples))
        extra = dict(examples.extra)
        ref = None if self.reference is None else examples.by_response(self.reference, everyone)
        batch = without_rows(examples.items(), self.layout, ref, extra, self.dtype)
        per_token = None
        if reads_tokens(loss):
            tokens = self.evaluate.tokens(params, examples.pairs)
            logps, width = tokens.sums(), self.layout.response_tokens
            sides = examples.by_response(tokens, everyone)
            per_token = jnp.asarray(np.stack([padded(side, width, self.dtype) for side in sides], axis=1))
        elif is_unpaired(loss) or reads_lists(loss) or reads_joint(loss):
            logps = self.evaluate(params, examples.pairs)
        else:
            logps = self.watched.statistics(step, params)["held_out"].logps
        responses = jnp.asarray(np.array(examples.by_response(logps, everyone)).T, self.dtype)
        value, (metrics, _) = _program(loss)(batch, ResponseLogps(responses, per_token))
        means = update_metrics({k: float(v) for k, v in metrics.items()})
        return {"eval_loss": float(value), **{f"eval_{k}": v for k, v in means.items()}}

    def close(self) -> None:
        """Nothing is open."""


class EvalPass:
    """The objective on the held-out examples where it reads the reference's states: a pass of both models, an observer.

    The mean over the examples of what ``batch_loss`` gives, a batch at a time.
    """

    def __init__(
        self, every: int | None, loss: Loss, batches: Loader, abstract: Decoder, reference: Reference, mesh: Mesh
    ):
        """Takes the policy without arrays, the reference, and the examples as the updates of one pass."""
        self.every, self.mesh, self._batches, self._reference = every, mesh, batches, reference
        on = mesh if mesh.size > 1 else None

        def run(params: Params, frozen: Params, batch: Batch) -> Any:
            beside = Beside(with_parameters(reference.abstract, dict(frozen)), params)
            model = with_parameters(abstract, dict(params))
            value, (metrics, _) = batch_loss(model, loss, batch, {}, beside=beside, mesh=on)
            return {"loss": value, **metrics}

        self._run = jax.jit(run, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def observe(self, step: int, params: Params) -> dict[str, float]:
        """``eval_loss``, and means of the loss's own metrics."""
        total: dict[str, float] = {}
        count = 0
        for update in range(self._batches.updates):
            (batch,) = self._batches(update)
            placed = put_replicated(batch._replace(rows=()), self.mesh)._replace(rows=put_rows(batch.rows, self.mesh))
            found, size = jax.device_get(self._run(params, self._reference.params, placed)), len(batch.row)
            count += size
            total = {name: total.get(name, 0.0) + size * float(value) for name, value in found.items()}
        means = update_metrics({name: value / count for name, value in total.items()})
        return {f"eval_{name}": value for name, value in means.items()}

    def close(self) -> None:
        """Nothing is open."""
