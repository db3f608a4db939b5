r"""The choice of an objective: a loss of the registry or a supervised one, and what it reads.

>>> loss = get_objective("ipo_mean", {"tau": 0.05}, sft=0.1, sft_per="token")
>>> loss
with_sft(ipo_mean(tau=0.05), coef=0.1, per=token)
>>> needs_reference(loss), reads_tokens(loss)
(True, False)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.errors import ChesError
from ches_jax.losses import Loss, LossInputs, RunningMean, get_loss, loss_names, with_sft, with_weights
from ches_jax.losses.inputs import LENGTHS, REFERENCE, REWARDS, Aux
from ches_jax.losses.registry import unknown_name
from ches_jax.losses.tokens import TOKEN_LOGPS, TOKEN_MASKS, TOKEN_REFERENCE
from ches_jax.types import SftUnit

SUPPLIED = (
    REFERENCE
    | LENGTHS
    | REWARDS
    | TOKEN_LOGPS
    | TOKEN_MASKS
    | TOKEN_REFERENCE
    | {"weights", "reward_mean", "logp", "ref_logp", "desirable", "kl_baseline"}
    | {"logp_candidates", "ref_logp_candidates"}
)
"""Fields of ``LossInputs`` that training can fill."""
WHY_NOT = (
    "divergences over the whole vocabulary at each position need the reference model beside the policy, and a run "
    "keeps one model in memory"
)
"""Why the others cannot be filled: they are SparsePO's."""
SFT = {
    "sft": "mean over the tokens of all chosen responses of the update",
    "sft_sum": "mean over the pairs of the summed negative log-probability of the chosen response",
}
"""Supervised objectives: cross-entropy on the chosen response."""


def get_objective(
    name: str, hyper: Mapping[str, float], *, sft: float = 0.0, sft_per: SftUnit = "token", weighted: bool = False
) -> Loss:
    """A loss of the registry or a supervised one, with an SFT term and weights of the pairs where asked.

    Raises:
      ChesError: unknown name (the names are listed), wrong hyper-parameters, or a loss that asks for more than
        training supplies.
    """
    if name in SFT:
        if hyper or sft or weighted:
            raise ChesError(f"loss {name!r}: has no hyper-parameters and takes neither an SFT term nor weights")
        return _supervised(name)
    if name not in loss_names():
        raise ChesError(unknown_name(name, sorted({*loss_names(), *SFT})))
    loss = get_loss(name, **hyper)
    if sft:
        loss = with_sft(loss, sft, per=sft_per)
    if weighted:
        loss = with_weights(loss)
    missing = sorted(loss.needs - SUPPLIED)
    if missing:
        raise ChesError(f"loss {name!r} needs {', '.join(missing)}, which `ches train` cannot supply: {WHY_NOT}")
    return loss


def needs_reference(loss: Loss) -> bool:
    """Whether the loss reads log-probabilities of a reference model."""
    return any(name.startswith("ref_") for name in loss.needs)


def is_supervised(loss: Loss) -> bool:
    """Whether the loss reads the chosen response alone, so that the rejected one need not be computed."""
    return loss.name in SFT


def is_unpaired(loss: Loss) -> bool:
    """Whether an example is one response with a label, as KTO's are."""
    return "logp" in loss.needs


def reads_samples(loss: Loss) -> bool:
    """Whether several responses stand where the chosen one stood, as D2O's samples do."""
    return "logp_candidates" in loss.needs


def reads_tokens(loss: Loss) -> bool:
    """Whether the loss reads the log-probability of each token."""
    return loss.needs >= TOKEN_LOGPS


def reads_reference_tokens(loss: Loss) -> bool:
    """Whether it reads the reference's too."""
    return loss.needs >= TOKEN_REFERENCE


def _supervised(name: str) -> Loss:
    r"""Cross-entropy on the chosen response in nats, :math:`-w \ln \pi(y_+|x)`.

    ``sft_sum`` has w = 1. For ``sft`` the batch brings w = pairs / tokens of the whole update, so that the mean over
    its pairs is the mean over its tokens, however it is cut into micro-batches.
    """

    def compute(inputs: LossInputs) -> tuple[Array, Aux]:
        logp = jnp.asarray(inputs.logp_chosen)
        value = -logp if name == "sft_sum" else -logp * jnp.asarray(inputs.weights)
        stopped = jax.lax.stop_gradient(logp)
        per_token = stopped / jnp.asarray(inputs.chosen_tokens).astype(logp.dtype)
        return value, {"logps/chosen": stopped, "logps_per_token/chosen": per_token}

    needs = frozenset({"logp_chosen", "chosen_tokens"} | ({"weights"} if name == "sft" else set()))
    return Loss(name=name, needs=needs, compute=compute, source=SFT[name])


def initial_loss_state(loss: Loss, dtype: Any = jnp.float32) -> dict[str, Any]:
    """State of a stateful loss before the first batch; empty for all others."""
    return {"reward_mean": RunningMean(jnp.zeros((), dtype), jnp.zeros((), dtype))} if loss.stateful else {}
