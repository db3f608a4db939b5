"""Loss and rewards of the held-out examples, under TRL's names with ``eval_`` in front."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ches_jax.losses import Loss
from ches_jax.train.batch_loss import loss_and_metrics, update_metrics
from ches_jax.train.data.batches import Layout, padded, without_rows
from ches_jax.train.data.examples import Examples
from ches_jax.train.forward import ResponseLogps
from ches_jax.train.objective import is_unpaired, reads_lists, reads_tokens
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
        elif is_unpaired(loss) or reads_lists(loss):
            logps = self.evaluate(params, examples.pairs)
        else:
            logps = self.watched.statistics(step, params)["held_out"].logps
        responses = jnp.asarray(np.array(examples.by_response(logps, everyone)).T, self.dtype)
        value, (metrics, _) = _program(loss)(batch, ResponseLogps(responses, per_token))
        means = update_metrics({k: float(v) for k, v in metrics.items()})
        return {"eval_loss": float(value), **{f"eval_{k}": v for k, v in means.items()}}

    def close(self) -> None:
        """Nothing is open."""
