r"""What is logged for each pair, under the names TRL uses; nothing here carries a gradient.

``rewards/chosen``, ``rewards/rejected``, ``rewards/margins``, ``rewards/accuracies``, ``logps/chosen``,
``logps/rejected``: arrays of the batch's shape, so that a mean, a histogram or a table of pairs can follow. An unpaired
objective has one response in a row and logs ``rewards`` and ``logps``.

>>> nats = [jnp.array([v]) for v in (-8.0, -12.0, -10.0, -10.0)]
>>> logged = pair_metrics(LossInputs(*nats), log_ratio_rewards, {"beta": 0.5})
>>> {name: float(value[0]) for name, value in logged.items() if name.startswith("rewards")}
{'rewards/chosen': 1.0, 'rewards/rejected': -1.0, 'rewards/margins': 2.0, 'rewards/accuracies': 1.0}
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ches_jax.losses.inputs import LossInputs, log_ratios, logps, mean_logps

Rewards: TypeAlias = Callable[[LossInputs, Mapping[str, float]], dict[str, Array]]
"""From a batch and the hyper-parameters to the rewards and log-probabilities that are logged."""


def scale(hyper: Mapping[str, float]) -> float:
    """The factor that makes a log-ratio a reward: beta, IPO's tau, one over REBEL's eta, or 1."""
    return hyper.get("beta", hyper.get("tau", 1.0 / hyper.get("eta", 1.0)))


def log_ratio_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    r"""Implicit rewards :math:`\beta (\ln \pi - \ln \pi_{ref})` of the summed log-probabilities."""
    return _pair(log_ratios(batch), logps(batch), scale(hyper))


def logp_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    r"""Rewards without a reference, :math:`\beta \ln \pi`."""
    return _pair(logps(batch), logps(batch), scale(hyper))


def mean_logp_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    r"""Rewards per token, :math:`\beta \ln \pi / |y|`."""
    return _pair(mean_logps(batch), logps(batch), scale(hyper))


def row_rewards(batch: LossInputs, hyper: Mapping[str, float]) -> dict[str, Array]:
    """Implicit rewards of single responses."""
    logp = jnp.asarray(batch.logp)
    return {"rewards": scale(hyper) * (logp - jnp.asarray(batch.ref_logp)), "logps": logp}


def _pair(values: tuple[Array, Array], logs: tuple[Array, Array], factor: float) -> dict[str, Array]:
    return {
        "rewards/chosen": factor * values[0],
        "rewards/rejected": factor * values[1],
        "logps/chosen": logs[0],
        "logps/rejected": logs[1],
    }


def pair_metrics(batch: LossInputs, rewards: Rewards, hyper: Mapping[str, float]) -> dict[str, Array]:
    """Rewards, their margin and whether it is positive; log-probabilities in nats."""
    out = rewards(jax.lax.stop_gradient(batch), hyper)
    if "rewards/chosen" in out:
        chosen, rejected = out["rewards/chosen"], out["rewards/rejected"]
        out["rewards/margins"] = chosen - rejected
        out["rewards/accuracies"] = (chosen > rejected).astype(chosen.dtype)
    return out
