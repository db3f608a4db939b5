"""A batch cut into micro-batches has the values and gradient of the whole, or the loss says that it has not."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.errors import ChesError
from ches_jax.losses import Loss, LossInputs, get_loss, loss_names, parse_loss
from ches_jax.losses.wrappers import WRAPPERS
from ches_jax.train.config import TrainConfig
from ches_jax.train.setup import require_cuttable
from tests.losses.loss_batches import PAIRS, make_batch

POLICY = frozenset(n for n in LossInputs._fields if n.startswith(("logp", "token_logps_", "token_kl_")))
"""What the policy's parameters move; a new kind of log-probability is in it by its name."""
SUMS = ("dpo + 0.3*sft", "0.5*ipo_mean + aot", "rpo + bco_pair", "kto", "simpo + 0.1*sft_token")
EVERY = [*loss_names(), *(f"{name}(dpo)" for name in WRAPPERS), *SUMS]


def part(batch: LossInputs, rows: np.ndarray) -> LossInputs:
    """The batch of some of its pairs; what belongs to the whole update stays."""
    fields = {n: v for n, v in batch._asdict().items() if v is not None and np.ndim(v) and len(v) == PAIRS}
    return batch._replace(**{n: np.asarray(v)[rows] for n, v in fields.items()})


def value(loss: Loss, batch: LossInputs) -> dict[str, Any]:
    """The loss of each pair."""
    return {"loss": jax.jit(lambda batch: loss(batch)[0])(batch)}


def gradient(loss: Loss, batch: LossInputs) -> dict[str, Any]:
    """Of the sum over the batch's pairs, for each log-probability of the policy."""
    inputs = {n: getattr(batch, n) for n in sorted(POLICY & loss.needs)}
    assert inputs
    return jax.jit(jax.grad(lambda x: jnp.sum(loss(batch._replace(**x))[0])))(inputs)


@pytest.mark.parametrize("of", [value, pytest.param(gradient, marks=pytest.mark.slow)])
@pytest.mark.parametrize("text", EVERY)
def test_parts_make_the_whole_or_the_loss_says_that_they_do_not(text: str, of: Any, x64: None):
    try:
        loss = parse_loss(text)
    except ChesError:
        loss = parse_loss(text.replace("dpo", "confpo"))  # a wrapper of losses of tokens
    batch = make_batch(3, np.float64)
    if "weights" in loss.needs:
        batch = batch._replace(weights=jnp.asarray([0.2, 1.0, 3.0, 0.5]))
    whole = of(loss, batch)
    if "pairs_per_token" in loss.optional:  # what the loader puts into the parts of an update
        batch = batch._replace(pairs_per_token=jnp.full(PAIRS, PAIRS / batch.chosen_tokens.sum()))
    parts = [of(loss, part(batch, np.arange(PAIRS)[cut])) for cut in (slice(0, 2), slice(2, 4))]
    off = 0.0
    for name, wanted in whole.items():
        summed = np.concatenate([np.asarray(p[name]) for p in parts])
        largest = np.abs(np.asarray(wanted)).max() or 1.0  # TDPO2 stops the gradient of one side's divergence
        off = max(off, float(np.abs(summed - np.asarray(wanted)).max() / largest))
    assert loss.needs_whole_batches or off < 1e-12, f"{loss!r}: off by {off:.1%}"
    if loss.couples_rows:
        assert off > 1e-3  # it is refused for a reason


@pytest.mark.parametrize(
    ("loss", "why"),
    [("aot", "compares the pairs of a batch"), ("dpo + 0.1*aot_unpaired", "compares"), ("bco_pair", "keeps a mean")],
)
def test_training_refuses_micro_batches_that_would_change_the_objective(loss: str, why: str):
    with pytest.raises(ChesError, match=f"--accumulate 2: loss .* {why}.* leave --accumulate out"):
        require_cuttable(TrainConfig(loss=loss, accumulate=2), parse_loss(loss))
    require_cuttable(TrainConfig(loss=loss, accumulate=1), parse_loss(loss))
    require_cuttable(TrainConfig(loss="dpo", accumulate=2), get_loss("dpo"))
