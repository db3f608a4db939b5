r"""How hard a loss pushes each response, by automatic differentiation of the loss itself.

.. math::
  d_+ = -\frac{\partial L}{\partial \ln \pi(y_+|x)}, \qquad d_- = \frac{\partial L}{\partial \ln \pi(y_-|x)}

Both are positive where a loss raises the chosen and lowers the rejected response, and have the loss's unit per nat.
Under gradient flow the chosen log-probability moves by :math:`d_+ \|g_+\|^2 - d_- \langle g_+, g_- \rangle`,
with g the gradients of the log-probabilities.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ches_jax.errors import ChesError
from ches_jax.losses.inputs import LossInputs
from ches_jax.losses.registry import Loss, check_inputs

READ_BY_CHOSEN = ("logp_chosen", "logp_joint_chosen", "logp_candidates", "logp_responses", "token_logps_chosen")
READ_BY_REJECTED = ("logp_rejected", "logp_joint_rejected", "token_logps_rejected")


class Incentives(NamedTuple):
    """Upward push on the chosen, downward push on the rejected side of each pair.

    The shape follows what the loss reads: one number for each response, for each of D2O's candidates, or for each token
    of a loss of tokens. Rows of an unpaired loss have one side, and 0 for the other. Of a list ``chosen`` is the upward
    push on every response, which is negative for those that go down, and ``rejected`` is 0.
    """

    chosen: Float[Array, "*B"]
    rejected: Float[Array, "*B"]


def incentives(loss: Loss) -> Callable[[LossInputs], Incentives]:
    r"""The function from a batch to the loss's incentives, of the sum of the loss over the batch.

    .. math:: d_+ = -\partial L / \partial \ln \pi(y_+|x), \qquad d_- = \partial L / \partial \ln \pi(y_-|x)

    Args:
      loss: any of the library; its state, where it has one, is that of the batch.

    Returns:
      A function; its numbers are in the loss's unit per nat, of the shape of the log-probabilities that the loss reads.

    >>> from ches_jax.losses import get_loss
    >>> batch = LossInputs(*(jnp.zeros(1) for _ in range(4)))
    >>> incentives(get_loss("dpo", beta=0.5))(batch).chosen.tolist()
    [0.25]
    """
    if not isinstance(loss, Loss):
        raise ChesError(f"incentives: expected a loss, such as get_loss('dpo'), not {loss!r:.80}")
    of = _of_rows if "logp" in loss.needs else _of_pairs
    return lambda batch: of(loss, check_inputs(loss, batch))


def _gradient(loss: Loss, batch: LossInputs, names: tuple[str, ...]) -> dict[str, Array]:
    def total(values):
        return jnp.sum(loss(batch._replace(**values))[0])

    return jax.grad(total)({n: jnp.asarray(getattr(batch, n)) for n in names})


def _of_pairs(loss: Loss, batch: LossInputs) -> Incentives:
    names = tuple(n for n in READ_BY_CHOSEN + READ_BY_REJECTED if n in loss.needs)
    gradients = _gradient(loss, batch, names)
    chosen = next(-gradients[n] for n in READ_BY_CHOSEN if n in gradients)
    rejected = next((gradients[n] for n in READ_BY_REJECTED if n in gradients), jnp.zeros_like(chosen))
    return Incentives(chosen, rejected)


def _of_rows(loss: Loss, batch: LossInputs) -> Incentives:
    gradient = _gradient(loss, batch, ("logp",))["logp"]
    good = jnp.asarray(batch.desirable)
    nothing = jnp.zeros_like(gradient)
    return Incentives(jnp.where(good, -gradient, nothing), jnp.where(good, nothing, gradient))
