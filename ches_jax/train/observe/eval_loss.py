"""Loss and rewards of the held-out examples, under TRL's names with ``eval_`` in front."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ches_jax.train.data.batches import numbers_of, padded
from ches_jax.train.objective import Logps, is_unpaired, loss_and_metrics, named, reads_tokens
from ches_jax.train.observe.pair_logprobs import Evaluator, PairLogps
from ches_jax.train.reference import Logps as ReferenceLogps
from ches_jax.train.setup import Run


def held_out_metrics(
    run: Run, evaluate: Evaluator, params: Mapping[str, Any], now: PairLogps, reference: ReferenceLogps | None
) -> dict[str, float]:
    """The objective on the held-out examples, as one batch.

    Args:
      run: the run.
      evaluate: gives log-probabilities, where ``now`` has not all that the objective reads.
      params: weights of this moment.
      now: log-probabilities of the held-out pairs under them.
      reference: the reference's, of the held-out examples.
    """
    loss, examples, dtype = run.loss, run.held_out, np.float64 if run.config.dtype == "float64" else np.float32
    if loss.stateful:
        return {}
    given = dict(examples.given)
    if loss.name == "sft":
        tokens = sum(len(p.chosen.targets(run.config.eos)) for p in examples.pairs)
        given["weights"] = np.full(len(examples), len(examples) / max(1, tokens))
    everyone = range(len(examples))
    ref = None if reference is None else examples.by_response(reference, everyone)
    batch = numbers_of(examples.items(), run.layout, ref, given, dtype)
    per_token = None
    if reads_tokens(loss):
        tokens = evaluate.tokens(params, examples.pairs)
        now, width = tokens.sums(), run.layout.response_tokens
        per_token = np.stack([padded(side, width, dtype) for side in examples.by_response(tokens, everyone)], axis=1)
    elif is_unpaired(loss):
        now = evaluate(params, examples.pairs)
    responses = jnp.asarray(np.array(examples.by_response(now, everyone)).T, dtype)
    found = Logps(responses, None if per_token is None else jnp.asarray(per_token))
    value, (metrics, _) = loss_and_metrics(loss, batch, found, {})
    means = named({k: float(v) for k, v in metrics.items()})
    return {"eval_loss": float(value), **{f"eval_{k}": v for k, v in means.items()}}
