r"""Objectives of prompts and responses together, for pairs whose responses answer prompts of their own.

.. math:: r_\pm = \ln \frac{\pi(x_\pm, y_\pm)}{\pi_{ref}(x_\pm, y_\pm)}, \qquad
  \ln \pi(x, y) = \ln \pi(x) + \ln \pi(y|x)

with ln pi(x) the sum over the tokens of the prompt but its first. Where both prompts are equal their part cancels in a
margin.

>>> from ches_jax.losses import get_loss
>>> nats = {"logp_joint_chosen": -20.0, "logp_joint_rejected": -31.0}
>>> nats |= {"ref_logp_joint_chosen": -22.0, "ref_logp_joint_rejected": -31.0}
>>> value, _ = get_loss("dove", beta=0.5)(LossInputs(**{k: jnp.array([v]) for k, v in nats.items()}))
>>> f"{float(value[0]):.4f}"  # ln(1 + exp(-0.5 * 2))
'0.3133'
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses.inputs import JOINT, LossInputs
from ches_jax.losses.margins import sigmoid
from ches_jax.losses.metrics import log_ratio_rewards
from ches_jax.losses.registry import positive, register


def _as_pairs(batch: LossInputs) -> LossInputs:
    """The joint log-probabilities where those of responses stand."""
    return LossInputs(**{name.replace("_joint", ""): getattr(batch, name) for name in JOINT})


def _joint_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    """Rewards of the joint log-ratios; log-probabilities under a name that says what they are of."""
    logged = log_ratio_rewards(_as_pairs(batch), hyper)
    return {name.replace("logps/", "logps_joint/"): jnp.asarray(value) for name, value in logged.items()}


@register(
    "dove", source="Bansal et al. 2024, arXiv:2404.00530", needs=JOINT, rewards=_joint_rewards, beta=positive(0.1)
)
def dove(batch: LossInputs, *, beta: float) -> Array:
    r"""DOVE (later JPO): DPO on the joint log-probabilities of prompt and response.

    .. math:: -\ln \sigma\left(\beta \ln \frac{\pi(x_+, y_+)}{\pi_{ref}(x_+, y_+)}
      - \beta \ln \frac{\pi(x_-, y_-)}{\pi_{ref}(x_-, y_-)}\right)

    Reads pairs with one prompt, where it is DPO, or with two (``chosen_prompt``, ``rejected_prompt``). The conditional
    form, in which the prompts have no likelihood of their own, is ``dpo`` on the same rows.

    Defaults:
      beta 0.1.

    References:
      Bansal et al., Comparing Bad Apples to Good Oranges (https://arxiv.org/abs/2404.00530); the authors'
      ``custom_dove_trainer.py`` with ``joint_distribution``.
    """
    return sigmoid(_as_pairs(batch), beta=beta)
