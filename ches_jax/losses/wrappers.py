r"""Losses made of losses: each takes one and gives another, with the needs of both.

>>> from ches_jax.losses import get_loss
>>> with_weights(with_sft(get_loss("ipo_sum", tau=0.01), 0.1, per="sum"))
with_weights(with_sft(ipo_sum(tau=0.01), coef=0.1, per=sum))
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from ches_jax.errors import ChesError
from ches_jax.losses.incentives import Incentives
from ches_jax.losses.inputs import LENGTHS, LOGPS, Aux, LossInputs, lengths, logps, mean_logps, swap
from ches_jax.losses.registry import Loss, exactly
from ches_jax.types import SftUnit


@dataclasses.dataclass(frozen=True)
class WrappedLoss(Loss):
    """A loss whose name already says what it is made of."""

    def __repr__(self) -> str:
        return self.name


def _wrap(
    wrapper: str,
    loss: Loss,
    compute: Callable[[LossInputs], tuple[Array, Aux]],
    needs: frozenset[str] = frozenset(),
    source: str = "",
    **options: float | str,
) -> Loss:
    shown = "".join(f", {k}={v if isinstance(v, str) else exactly(v)}" for k, v in options.items())
    return WrappedLoss(
        name=f"{wrapper}({loss!r}{shown})",
        needs=loss.needs | needs,
        compute=compute,
        hyper=loss.hyper,
        source="; ".join(s for s in (loss.source, source) if s),
        stateful=loss.stateful,
        couples_rows=loss.couples_rows,
    )


def _require(wrapper: str, loss: Loss, *, pairs: bool = False, rows: bool = False) -> None:
    if pairs and not loss.needs >= LOGPS:
        raise ChesError(f"{wrapper} needs a loss of summed log-probabilities of pairs; {loss!r} is none")
    if rows and loss.couples_rows:
        raise ChesError(f"{wrapper} needs a loss whose rows are pairs; {loss!r} sorts the batch")


def _in_range(wrapper: str, name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ChesError(f"{wrapper}: {name}={value!r} is outside [{low:g}, {high:g}]")


def with_sft(loss: Loss, coef: float, *, per: SftUnit) -> Loss:
    r"""Adds a likelihood term of the chosen response.

    .. math:: L - \lambda\, n \ln \pi(y_+|x)

    Args:
      loss: any loss of pairs.
      coef: lambda, 0 or more.
      per: the unit of the term. ``sum``: n = 1, nats of the whole response (the displacement paper's code).
        ``token``: n = 1/|y+|, nats per token (iterative RPO). ``batch_token``: n = B over the batch's number of chosen
        tokens, so that the mean over the batch is a mean over its tokens (TRL); rows then depend on one another.
    """
    _require("with_sft", loss, pairs=True)
    _in_range("with_sft", "coef", coef, 0.0, math.inf)
    if per not in ("sum", "token", "batch_token"):
        raise ChesError(f"with_sft: per={per!r} is none of sum, token, batch_token")

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        value, aux = loss(batch)
        if per == "sum":
            nll = -logps(batch)[0]
        elif per == "token":
            nll = -mean_logps(batch)[0]
        else:
            tokens = lengths(batch)[0]
            nll = -logps(batch)[0] * (tokens.size / jnp.sum(tokens))
        return value + coef * nll, {**aux, "nll_loss": stop_gradient(nll)}

    return _wrap("with_sft", loss, compute, frozenset() if per == "sum" else LENGTHS, coef=coef, per=per)


def with_weights(loss: Loss) -> Loss:
    """Multiplies each pair's loss by the batch's ``weights``, which carry no gradient.

    The mean over the batch is not divided by the sum of the weights.
    """
    _require("with_weights", loss, rows=True)

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        value, aux = loss(batch._replace(weights=None))
        return value * stop_gradient(jnp.asarray(batch.weights)), aux

    return _wrap("with_weights", loss, compute, frozenset({"weights"}))


def with_policy_weights(loss: Loss) -> Loss:
    r"""WPO: weighs each pair by how likely the policy finds it, at most 1, without gradient.

    .. math:: \min\left(1,\ e^{\ln \pi(y_+|x)/|y_+| + \ln \pi(y_-|x)/|y_-|}\right) L

    The weight, ``aux["weights/policy"]``, is a small number early on and scales every term of the loss, an SFT term
    inside it too: to keep that term's strength, put ``with_sft`` outside.

    References:
      Zhou et al., WPO (https://arxiv.org/abs/2406.11827), without the alignment of weights that TRL adds.
    """
    _require("with_policy_weights", loss, pairs=True, rows=True)

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        value, aux = loss(batch)
        chosen, rejected = mean_logps(batch)
        weight = stop_gradient(jnp.exp(jnp.minimum(chosen + rejected, 0.0)))
        return value * weight, {**aux, "weights/policy": weight}

    return _wrap("with_policy_weights", loss, compute, LENGTHS, source="arXiv:2406.11827")


def with_label_smoothing(loss: Loss, label_smoothing: float) -> Loss:
    r"""Mixes in the loss of the pair with its labels exchanged; of DPO this makes cDPO.

    .. math:: (1 - e) L(y_+, y_-) + e\, L(y_-, y_+)

    Args:
      loss: any loss of pairs, without state.
      label_smoothing: e, the share of wrong labels, 0 to 1.
    """
    _require_swappable("with_label_smoothing", loss)
    _in_range("with_label_smoothing", "label_smoothing", label_smoothing, 0.0, 1.0)

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        value, aux = loss(batch)
        return (1.0 - label_smoothing) * value + label_smoothing * loss(swap(batch))[0], aux

    return _wrap("with_label_smoothing", loss, compute, label_smoothing=label_smoothing)


def with_label_posterior(loss: Loss, prior: float) -> Loss:
    r"""Mixes both orders of a pair by the probability, under the current losses, that its label is right.

    .. math::
      w L + (1 - w) L_{flip}, \qquad w = \sigma\left(\ln \frac{\eta}{1 - \eta} + L_{flip} - L\right)

    w carries no gradient and comes back as ``aux["label/posterior"]``; its mean over the data is the next eta of an
    expectation maximisation.

    Args:
      loss: any loss of pairs, without state.
      prior: eta, the share of right labels, between 0 and 1; 0.5 to 0.9 to begin with.

    References:
      https://arxiv.org/abs/2509.24159, from a summary of it.
    """
    _require_swappable("with_label_posterior", loss)
    if not 0.0 < prior < 1.0:
        raise ChesError(f"with_label_posterior: prior={prior!r} is outside (0, 1)")

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        value, aux = loss(batch)
        flipped = loss(swap(batch))[0]
        posterior = stop_gradient(jax.nn.sigmoid(math.log(prior) - math.log1p(-prior) + flipped - value))
        return posterior * value + (1.0 - posterior) * flipped, {**aux, "label/posterior": posterior}

    return _wrap("with_label_posterior", loss, compute, source="arXiv:2509.24159", prior=prior)


def _require_swappable(wrapper: str, loss: Loss) -> None:
    _require(wrapper, loss, rows=True)
    if loss.stateful or not any(n.endswith("_chosen") and "logp" in n for n in loss.needs):
        raise ChesError(f"{wrapper} needs a stateless loss of pairs whose sides can change places; {loss!r} is none")


def with_reward_calibration(loss: Loss) -> Loss:
    r"""Scales the two incentives against each other and leaves the loss's value as it is.

    .. math::
      z_+ \leftarrow \delta z_+ + (1 - \delta)\, \mathrm{sg}(z_+), \qquad
      z_- \leftarrow z_-/\delta + (1 - 1/\delta)\, \mathrm{sg}(z_-)

    z are the log-probabilities, sg stops gradients; incentives become delta d+ and d-/delta. ``log_delta`` comes with
    the batch: ``log_calibration`` computes it, ``moving_average`` smooths its logarithms.

    References:
      https://arxiv.org/abs/2604.18239.
    """
    _require("with_reward_calibration", loss, pairs=True)

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        chosen, rejected = logps(batch)
        strength = stop_gradient(jnp.exp(jnp.asarray(batch.log_delta, chosen.dtype)))
        return loss(
            batch._replace(
                logp_chosen=scale_gradient(chosen, strength), logp_rejected=scale_gradient(rejected, 1.0 / strength)
            )
        )

    return _wrap("with_reward_calibration", loss, compute, frozenset({"log_delta"}), source="arXiv:2604.18239")


def scale_gradient(x: Array, factor: Array | float) -> Array:
    """``x``, whose gradient is multiplied by ``factor``; exact in value, whatever the factor."""
    return stop_gradient(x) + factor * (x - stop_gradient(x))


def log_calibration(incentives: Incentives, norm_chosen: Array, norm_rejected: Array) -> Array:
    r"""The logarithm of the calibration that centres a pair in its band.

    .. math:: \ln \delta = \tfrac12 (\ln r^* - \ln r), \qquad r = d_+ / d_-, \qquad r^* = \|g_-\| / \|g_+\|

    Args:
      incentives: of the loss, both positive.
      norm_chosen: norm of the gradient of the chosen log-probability.
      norm_rejected: the same for the rejected one.
    """
    ideal = jnp.log(norm_rejected) - jnp.log(norm_chosen)
    return 0.5 * (ideal - (jnp.log(incentives.chosen) - jnp.log(incentives.rejected)))


def moving_average(previous: Float[Array, "*A"], new: Float[Array, "*A"], decay: float = 0.98) -> Float[Array, "*A"]:
    """Exponential moving average of the calibration's logarithms; decay 0.98 in the paper."""
    return decay * previous + (1.0 - decay) * new


def with_gate(loss: Loss, *, alpha: float, threshold: float) -> Loss:
    r"""Gate-DPO: the rejected response is pushed less, the less likely it has become.

    .. math:: g = \sigma(\alpha (\bar p_- - \tau)), \qquad \bar p_- = e^{\ln \pi(y_-|x)/|y_-|}

    g multiplies the rejected response's gradient only and carries none itself; the value stays.

    Args:
      loss: any loss of summed log-probabilities of pairs.
      alpha: steepness, above 0.
      threshold: tau, a probability per token.

    References:
      https://arxiv.org/abs/2605.02626, with the geometric mean probability (its other form takes a quantile of tokens).
    """
    _require("with_gate", loss, pairs=True)
    _in_range("with_gate", "threshold", threshold, 0.0, 1.0)
    if not alpha > 0.0:
        raise ChesError(f"with_gate: alpha={alpha!r} is not above 0")

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        gate = stop_gradient(jax.nn.sigmoid(alpha * (jnp.exp(mean_logps(batch)[1]) - threshold)))
        value, aux = loss(batch._replace(logp_rejected=scale_gradient(logps(batch)[1], gate)))
        return value, {**aux, "gate/rejected": gate}

    return _wrap("with_gate", loss, compute, LENGTHS, source="arXiv:2605.02626", alpha=alpha, threshold=threshold)
