r"""The choice of an objective: a loss as it is written, and what it reads.

>>> loss = get_objective("ipo_mean", {"tau": 0.05}, sft=0.1, sft_per="token")
>>> loss
ipo_mean(tau=0.05) + 0.1*sft_token
>>> needs_reference(loss), reads_tokens(loss)
(True, False)
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from ches_jax.errors import ChesError
from ches_jax.losses import Loss, parse_loss, with_sft, with_soft_labels, with_weights
from ches_jax.losses.inputs import JOINT, LENGTHS, REFERENCE, REWARDS
from ches_jax.losses.token_level import ACTIVATION_MASKS, KL_MASKS, REWARD_MASKS, TOKEN_KL
from ches_jax.losses.tokens import SPAN_MASKS, TOKEN_LOGPS, TOKEN_MASKS, TOKEN_REFERENCE, TOKEN_WEIGHTS
from ches_jax.losses.wrappers import JOINT_PAIRS, LISTS, kind_of
from ches_jax.types import SftUnit

SUPPLIED = (
    REFERENCE
    | JOINT
    | LENGTHS
    | REWARDS
    | TOKEN_LOGPS
    | TOKEN_MASKS
    | TOKEN_REFERENCE
    | TOKEN_WEIGHTS
    | SPAN_MASKS
    | {"weights", "label_probability", "logp", "ref_logp", "desirable", "kl_baseline"}
    | {"logp_candidates", "ref_logp_candidates"}
    | {"logp_responses", "ref_logp_responses", "scores", "response_mask", "response_tokens"}
    | {"reward_mean", "label_prior", "log_delta", "head_norm_chosen", "head_norm_rejected"}
    | TOKEN_KL
    | REWARD_MASKS
    | KL_MASKS
    | ACTIVATION_MASKS
)
"""Fields of ``LossInputs`` that training can fill."""
COLUMN_FIELDS = {"weights": "--weights", "label_probability": "--label-probabilities"}
"""Fields that are columns of the data, and the options that name them."""


def get_objective(
    text: str,
    hyper: Mapping[str, float],
    *,
    sft: float = 0.0,
    sft_per: SftUnit = "token",
    weighted: bool = False,
    soft_labels: bool = False,
) -> Loss:
    """The loss of an expression (``losses.expression``), with what options add to it.

    Args:
      text: the expression.
      hyper: hyper-parameters, where it is one bare name.
      sft: coefficient of a likelihood term.
      sft_per: its unit.
      weighted: whether the data bring weights: the whole loss is weighted, unless the expression says what is.
      soft_labels: whether they bring probabilities of the labels; likewise.

    Raises:
      ChesError: an expression that is none, or a loss that asks for more than the run supplies.
    """
    loss = parse_loss(text, hyper)
    if sft:
        loss = with_sft(loss, sft, per=sft_per)
    if soft_labels and "label_probability" not in loss.needs:
        loss = with_soft_labels(loss)
    if weighted and "weights" not in loss.needs:
        loss = with_weights(loss)
    missing = sorted(loss.needs - SUPPLIED)
    if missing:
        raise ChesError(f"loss {text!r} needs {', '.join(missing)}, which `ches train` cannot supply")
    given = {"weights": weighted, "label_probability": soft_labels}
    for field, option in COLUMN_FIELDS.items():
        if field in loss.needs and not given[field]:
            raise ChesError(f"loss {loss!r} reads a number of each pair; say in which column it is: {option} COLUMN")
    return loss


def needs_reference(loss: Loss) -> bool:
    """Whether the loss reads log-probabilities of a reference model."""
    return any(name.startswith("ref_") for name in loss.needs)


def is_supervised(loss: Loss) -> bool:
    """Whether the loss reads the chosen response alone, so that the rejected one need not be computed."""
    return kind_of(loss) == "chosen responses"


def is_unpaired(loss: Loss) -> bool:
    """Whether an example is one response with a label, as KTO's are."""
    return "logp" in loss.needs


def reads_samples(loss: Loss) -> bool:
    """Whether several responses stand where the chosen one stood, as D2O's samples do."""
    return "logp_candidates" in loss.needs


def reads_lists(loss: Loss) -> bool:
    """Whether an example is a list of responses with scores."""
    return kind_of(loss) == LISTS


def reads_joint(loss: Loss) -> bool:
    """Whether the prompt's tokens count with the response's, as in DOVE."""
    return kind_of(loss) == JOINT_PAIRS


def reads_tokens(loss: Loss) -> bool:
    """Whether the loss reads the log-probability of each token."""
    return loss.needs >= TOKEN_LOGPS


def reads_reference_tokens(loss: Loss) -> bool:
    """Whether it reads the reference's too."""
    return loss.needs >= TOKEN_REFERENCE


def initial_loss_state(loss: Loss, dtype: Any = jnp.float32) -> dict[str, Any]:
    """State of a stateful loss before the first batch; empty for all others."""
    return jax.tree.map(lambda value: jnp.asarray(value, dtype), dict(loss.initial))
