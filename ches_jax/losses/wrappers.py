r"""Losses made of losses: each takes one and gives another, with the needs of both; and weighted sums of losses.

``repr`` of what comes out is an expression that ``expression.parse_loss`` reads back, so each has a name there:

>>> from ches_jax.losses import get_loss
>>> with_weights(with_sft(get_loss("ipo_sum", tau=0.01), 0.1, per="sum"))
weighted(ipo_sum(tau=0.01) + 0.1*sft_sum)
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from ches_jax.errors import ChesError, many
from ches_jax.losses.incentives import Incentives, incentives
from ches_jax.losses.inputs import (
    JOINT,
    LENGTHS,
    LOGPS,
    REWARDS,
    Aux,
    LossInputs,
    logps,
    mean_logps,
    swap,
)
from ches_jax.losses.registry import Hyper, Loss, as_number, at_least_zero, exactly, fraction, get_loss, positive
from ches_jax.types import SftUnit


@dataclasses.dataclass(frozen=True)
class WrappedLoss(Loss):
    """A loss whose name already says what it is made of."""

    def __repr__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Wrapper:
    """A function from a loss to a loss, under its name in expressions."""

    name: str
    make: Callable[..., Loss]
    defaults: Mapping[str, float]
    """Its numbers, all by name."""
    source: str


WRAPPERS: dict[str, Wrapper] = {}
"""By their names in expressions."""


def wrapper(name: str, *, source: str, **defaults: float) -> Callable[[Callable[..., Loss]], Callable[..., Loss]]:
    """Enter a function of (loss, numbers) under a name for expressions."""

    def enter(make: Callable[..., Loss]) -> Callable[..., Loss]:
        WRAPPERS[name] = Wrapper(name, make, MappingProxyType(defaults), source)
        return make

    return enter


def wrapped(
    name: str,
    loss: Loss,
    compute: Callable[[LossInputs], tuple[Array, Aux]],
    needs: frozenset[str] | None = None,
    initial: Mapping[str, Any] | None = None,
    **options: float,
) -> Loss:
    """What a wrapper of ``WRAPPERS`` gives.

    Args:
      name: the wrapper's.
      loss: what it wraps.
      compute: of a batch.
      needs: all that the result reads; default: what ``loss`` does.
      initial: state of the wrapper itself.
      options: its numbers.

    Raises:
      ChesError: ``loss`` keeps a state of the same name.
    """
    shown = "".join(f", {k}={exactly(v)}" for k, v in options.items())
    whole = f"{name}({loss!r}{shown})"
    return WrappedLoss(
        name=whole,
        needs=loss.needs if needs is None else needs,
        compute=compute,
        hyper=loss.hyper,
        source="; ".join(s for s in (loss.source, WRAPPERS[name].source) if s),
        initial=_states(whole, [(name, initial or {}), (repr(loss), loss.initial)]),
        couples_rows=loss.couples_rows,
        optional=loss.optional,
    )


def _states(whole: str, parts: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The states of all parts, each under the name of one field.

    Raises:
      ChesError: two parts keep the same one.
    """
    owner: dict[str, str] = {}
    for part, initial in parts:
        for name in initial:
            if name in owner:
                raise ChesError(
                    f"{whole}: {owner[name]} and {part} would share one state ({name}), and each would move it; a loss "
                    "may keep it once"
                )
            owner[name] = part
    return {name: value for _, initial in parts for name, value in initial.items()}


def _require(wrapper: str, loss: Loss, *, pairs: bool = False, rows: bool = False) -> None:
    if not isinstance(loss, Loss):
        raise ChesError(f"{wrapper}: expected a loss, such as get_loss('dpo'), not {loss!r:.80}")
    if pairs and not loss.needs >= LOGPS:
        raise ChesError(f"{wrapper} needs a loss of summed log-probabilities of pairs; {loss!r} is none")
    if rows and loss.couples_rows:
        raise ChesError(f"{wrapper} needs a loss whose rows are pairs; {loss!r} sorts the batch")


def _in_range(wrapper: str, name: str, value: float, allowed: Hyper) -> float:
    """The number, if it is one and lies in the interval."""
    number = as_number(value)
    if number is None or not allowed.admits(number):
        fault = "is not a number" if number is None else f"is outside {allowed.interval()}"
        raise ChesError(f"{wrapper}: {name}={value!r} {fault}")
    return number


LISTS = "lists of responses with scores"
JOINT_PAIRS = "pairs of prompts with their responses, taken together"
KINDS = {
    "single responses with a label": frozenset({"logp", "desirable"}),
    "a rejected response with samples": frozenset({"logp_candidates"}),
    LISTS: frozenset({"logp_responses", "scores"}),
    JOINT_PAIRS: JOINT,
}
"""What a row of the data is for losses that are not of pairs, and fields that only such a loss reads."""


def kind_of(loss: Loss) -> str:
    """What a row of the data is for a loss: ``pairs``, one of ``KINDS``, or ``chosen responses``.

    The last go with pairs and with lists, whose best response they read.
    """
    for kind, fields in KINDS.items():
        if loss.needs & fields:
            return kind
    return "pairs" if any("rejected" in name for name in loss.needs) else "chosen responses"


def weighted_sum(terms: Sequence[tuple[float, Loss]]) -> Loss:
    r"""Several losses of the same rows at once.

    .. math:: \sum_i w_i L_i

    Args:
      terms: weights, 0 or more, and losses. A term of weight 0 is left out. The first term with rewards gives those
        that are logged; the value of each term is logged under ``terms/NAME``.

    Raises:
      ChesError: weights that sum to nothing or lie below 0, losses of different rows, two that keep the same state.

    >>> weighted_sum([(1.0, get_loss("dpo")), (0.5, get_loss("sft"))])
    dpo(beta=0.1) + 0.5*sft
    """
    for _, loss in terms:
        _require("weighted_sum", loss)
    problems = [f"{w!r}*{loss!r}: a weight is a finite number, 0 or more" for w, loss in terms if not _is_weight(w)]
    if problems:
        raise ChesError(many("a sum of losses", problems))
    kept = [(float(w), loss) for w, loss in terms if w > 0]
    if not kept:
        shown = " + ".join(f"{exactly(w)}*{loss!r}" for w, loss in terms) or "a sum of no losses"
        raise ChesError(f"{shown}: its weights sum to nothing")
    if len(kept) == 1 and kept[0][0] == 1.0:
        return kept[0][1]
    whole = " + ".join(_term(w, loss) for w, loss in kept)
    kinds = {kind_of(loss): loss for _, loss in reversed(kept)}
    alone = kinds.keys() & (KINDS.keys() - {LISTS}) if "chosen responses" in kinds else ()
    if len({*kinds} - {"chosen responses"}) > 1 or alone:
        reads = "; ".join(f"{loss!r} reads {kind}" for kind, loss in reversed(kinds.items()))
        raise ChesError(f"{whole}: its terms are of different inputs: {reads}")
    names = _distinct([loss.name.partition("(")[0] for _, loss in kept])

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        total: Any = 0.0
        logged: Aux = {}
        for name, (weight, loss) in zip(names, kept, strict=True):
            own = batch._replace(weights=batch.weights if "weights" in loss.needs else None)
            value, aux = loss(own)
            total = total + weight * value
            logged = {**aux, **logged, f"terms/{name}": stop_gradient(value)}
        return total, logged

    return WrappedLoss(
        name=whole,
        needs=frozenset().union(*(loss.needs for _, loss in kept)),
        compute=compute,
        hyper=_shared_hyper([loss for _, loss in kept]),
        source="; ".join(dict.fromkeys(loss.source for _, loss in kept if loss.source)),
        initial=_states(whole, [(repr(loss), loss.initial) for _, loss in kept]),
        couples_rows=any(loss.couples_rows for _, loss in kept),
        optional=frozenset().union(*(loss.optional for _, loss in kept)),
    )


def _is_weight(weight: float) -> bool:
    number = as_number(weight)
    return number is not None and math.isfinite(number) and number >= 0


def _term(weight: float, loss: Loss) -> str:
    """A term of a sum as an expression; a sum inside one keeps its brackets."""
    inner = f"({loss!r})" if " + " in _outside_brackets(repr(loss)) else repr(loss)
    return inner if weight == 1.0 else f"{exactly(weight)}*{inner}"


def _outside_brackets(text: str) -> str:
    depth, out = 0, ""
    for letter in text:
        depth -= letter == ")"
        out += letter if depth == 0 else ""
        depth += letter == "("
    return out


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, those that come again with a number."""
    return [n if n not in names[:i] else f"{n}_{names[: i + 1].count(n)}" for i, n in enumerate(names)]


def _shared_hyper(losses: Sequence[Loss]) -> dict[str, float]:
    """Hyper-parameters of the first loss that has some: they scale the rewards that are logged."""
    return dict(next((loss.hyper for loss in losses if loss.hyper), {}))


def with_sft(loss: Loss, coef: float, *, per: SftUnit) -> Loss:
    r"""Adds a likelihood term of the chosen response: a sum with ``sft``, ``sft_token`` or ``sft_sum``.

    .. math:: L - \lambda\, n \ln \pi(y_+|x)

    Args:
      loss: any loss of pairs.
      coef: lambda, 0 or more.
      per: the unit of the term. ``sum``: n = 1, nats of the whole response (the displacement paper's code).
        ``token``: n = 1/|y+|, nats per token (iterative RPO). ``batch_token``: n = B over the update's number of chosen
        tokens, so that the mean over the update is a mean over its tokens (TRL); rows then depend on one another.
    """
    _require("with_sft", loss, pairs=True)
    coef = _in_range("with_sft", "coef", coef, at_least_zero(0.0))
    if per not in SFT_TERMS:
        raise ChesError(f"with_sft: per={per!r} is none of sum, token, batch_token")
    return weighted_sum([(1.0, loss), (coef, get_loss(SFT_TERMS[per]))])


SFT_TERMS = {"sum": "sft_sum", "token": "sft_token", "batch_token": "sft"}
"""Units of a likelihood term, and the loss that is one."""


@wrapper("weighted", source="")
def with_weights(loss: Loss) -> Loss:
    """Multiplies each pair's loss by the batch's ``weights``, which carry no gradient.

    The mean over the batch is not divided by the sum of the weights.
    """
    _require("with_weights", loss, rows=True)

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        value, aux = loss(batch._replace(weights=None))
        return value * stop_gradient(jnp.asarray(batch.weights)), aux

    if "weights" in loss.needs:
        raise ChesError(f"weighted({loss!r}): what is inside is weighted already")
    return wrapped("weighted", loss, compute, loss.needs | {"weights"})


@wrapper("wpo", source="arXiv:2406.11827")
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

    return wrapped("wpo", loss, compute, loss.needs | LENGTHS)


@wrapper("smooth", source="Mitchell 2023, note on cDPO", label_smoothing=0.1)
def with_label_smoothing(loss: Loss, label_smoothing: float = 0.1) -> Loss:
    r"""Mixes in the loss of the pair with its labels exchanged; of DPO this makes cDPO.

    .. math:: (1 - e) L(y_+, y_-) + e\, L(y_-, y_+)

    Args:
      loss: any loss of pairs, without state.
      label_smoothing: e, the share of wrong labels, 0 to 1.
    """
    _require_swappable("with_label_smoothing", loss)
    label_smoothing = _in_range("with_label_smoothing", "label_smoothing", label_smoothing, fraction(0.0))

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        value, aux = loss(batch)
        return (1.0 - label_smoothing) * value + label_smoothing * loss(swap(batch))[0], aux

    return wrapped("smooth", loss, compute, label_smoothing=label_smoothing)


@wrapper("unbiased", source="Chowdhury et al. 2024, arXiv:2403.00409", label_smoothing=0.1)
def with_unbiased_labels(loss: Loss, label_smoothing: float = 0.1) -> Loss:
    r"""An unbiased estimate of the loss of clean labels when a share e is flipped; of DPO this makes ``robust``.

    .. math:: \frac{(1 - e) L(y_+, y_-) - e\, L(y_-, y_+)}{1 - 2e}

    Args:
      loss: any loss of pairs, without state.
      label_smoothing: e, the share of flipped labels, below 0.5.

    References:
      Chowdhury et al., Provably Robust DPO (https://arxiv.org/abs/2403.00409).
    """
    _require_swappable("with_unbiased_labels", loss)
    below_half = Hyper(0.0, low=0.0, high=0.5, open_high=True)
    label_smoothing = _in_range("with_unbiased_labels", "label_smoothing", label_smoothing, below_half)

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        value, aux = loss(batch)
        clean = (1.0 - label_smoothing) * value - label_smoothing * loss(swap(batch))[0]
        return clean / (1.0 - 2.0 * label_smoothing), aux

    return wrapped("unbiased", loss, compute, label_smoothing=label_smoothing)


@wrapper("soft", source="Mitchell 2023, note on cDPO; arXiv:2410.12735")
def with_soft_labels(loss: Loss) -> Loss:
    r"""Mixes both orders of each pair by the probability that its own label is right: a column of the data.

    .. math:: p L(y_+, y_-) + (1 - p) L(y_-, y_+)

    p comes with the batch as ``label_probability`` and carries no gradient; with the same p for all pairs this is
    ``smooth``.

    Args:
      loss: any loss of pairs, without state.

    References:
      Wang et al., CREAM (https://arxiv.org/abs/2410.12735) trains on such mixtures of its self-made labels.
    """
    _require_swappable("with_soft_labels", loss)
    if "label_probability" in loss.needs:
        raise ChesError(f"soft({loss!r}): what is inside has soft labels already")

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        p = stop_gradient(jnp.asarray(batch.label_probability))
        value, aux = loss(batch)
        return p * value + (1.0 - p) * loss(swap(batch))[0], {**aux, "label/probability": p}

    return wrapped("soft", loss, compute, loss.needs | {"label_probability"})


@wrapper("lcpo", source="arXiv:2509.24159", prior=0.9, decay=0.9)
def with_label_posterior(loss: Loss, prior: float = 0.9, decay: float = 0.9) -> Loss:
    r"""Mixes both orders of a pair by the probability, under the current losses, that its label is right (LCPO).

    .. math::
      w L + (1 - w) L_{flip}, \qquad w = \sigma\left(\ln \frac{\eta}{1 - \eta} + L_{flip} - L\right), \qquad
      \eta \leftarrow \gamma \eta + (1 - \gamma)\, \mathrm{mean}(w)

    The E step is w, without gradient, ``aux["label/posterior"]``. The M step moves eta, the share of right labels,
    towards the mean of w over each batch: eta comes in as ``label_prior`` and goes out as ``aux["state/label_prior"]``,
    so that checkpoints hold it.

    Args:
      loss: any loss of pairs, without state.
      prior: eta before the first batch, between 0 and 1; 0.5 to 0.9 in use.
      decay: gamma, from 0 up to 1; at 1 eta stays where it is.

    References:
      Cao et al., LCPO, later RE-PO (https://arxiv.org/abs/2509.24159), for one annotator (the paper has a reliability
      for each). Neither the paper's equations nor its code could be had here: these follow its abstract and a public
      note, which has Gibbs probabilities of losses, posteriors as soft labels, and a moving average over batches.
    """
    _require_swappable("with_label_posterior", loss)
    prior = _in_range("with_label_posterior", "prior", prior, Hyper(0.5, 0.0, 1.0, open_low=True, open_high=True))
    decay = _in_range("with_label_posterior", "decay", decay, fraction(0.0))

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        value, aux = loss(batch)
        flipped = loss(swap(batch))[0]
        eta = jnp.asarray(batch.label_prior, value.dtype)
        posterior = stop_gradient(label_posterior(value, flipped, eta))
        aux = {**aux, "label/posterior": posterior, "label/prior": jnp.broadcast_to(eta, posterior.shape)}
        # short of 0 and 1, where no evidence would move it any more
        after = jnp.clip(decay * eta + (1.0 - decay) * jnp.mean(posterior), LEAST_PRIOR, 1.0 - LEAST_PRIOR)
        return posterior * value + (1.0 - posterior) * flipped, {**aux, "state/label_prior": after}

    needs = loss.needs | {"label_prior"}
    return wrapped("lcpo", loss, compute, needs, {"label_prior": prior}, prior=prior, decay=decay)


LEAST_PRIOR = 1e-3


def label_posterior(
    value: Float[Array, "*B"], flipped: Float[Array, "*B"], prior: Float[Array, ""] | float
) -> Float[Array, "*B"]:
    r"""Probability that a label is right, from its loss, that of the flipped label, and the share of right labels.

    .. math:: w = \sigma\left(\ln \frac{\eta}{1 - \eta} + L_{flip} - L\right)

    >>> round(float(label_posterior(jnp.float32(0.0), jnp.float32(0.0), 0.75)), 6)
    0.75
    """
    return jax.nn.sigmoid(jnp.log(prior) - jnp.log1p(-jnp.asarray(prior)) + flipped - value)


def _require_swappable(wrapper: str, loss: Loss) -> None:
    _require(wrapper, loss, rows=True)
    if loss.needs & REWARDS:
        raise ChesError(
            f"{wrapper}: {loss!r} reads scores, and these say which response is better; with labels in doubt beside "
            "them a pair would have two opinions of its order"
        )
    sides = ("logp", "logp_joint", "token_logps")
    if loss.stateful or not any(loss.needs >= {f"{n}_chosen", f"{n}_rejected"} for n in sides):
        raise ChesError(f"{wrapper} needs a stateless loss of pairs whose sides can change places; {loss!r} is none")


@wrapper("rc", source="arXiv:2604.18239", decay=0.98)
def with_reward_calibration(loss: Loss, decay: float = 0.98) -> Loss:
    r"""Scales the two incentives against each other and leaves the loss's value as it is.

    .. math::
      z_+ \leftarrow \delta z_+ + (1 - \delta)\, \mathrm{sg}(z_+), \qquad
      z_- \leftarrow z_-/\delta + (1 - 1/\delta)\, \mathrm{sg}(z_-)

    z are the log-probabilities, sg stops gradients; incentives become delta d+ and d-/delta. ln delta is a moving
    average over the batches of ``log_calibration`` of the batch's mean incentives and of the norms of the gradients of
    its mean log-probabilities with respect to the unembedding matrix (``head_norm_chosen``, ``head_norm_rejected``). It
    comes in as ``log_delta`` (0 at first) and goes out as ``aux["state/log_delta"]``; a batch without an upward and a
    downward push leaves it where it is.

    Args:
      loss: a loss of summed log-probabilities of pairs.
      decay: of the moving average, from 0 up to 1; 0.98 in the paper.

    References:
      https://arxiv.org/abs/2604.18239, with gradients of the head.
    """
    _require("with_reward_calibration", loss, pairs=True)
    decay = _in_range("with_reward_calibration", "decay", decay, fraction(0.0))

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        chosen, rejected = logps(batch)
        before = jnp.asarray(batch.log_delta, chosen.dtype)
        strength = stop_gradient(jnp.exp(before))
        value, aux = loss(
            batch._replace(
                logp_chosen=scale_gradient(chosen, strength), logp_rejected=scale_gradient(rejected, 1.0 / strength)
            )
        )
        pushes = Incentives(*(jnp.sum(push) for push in incentives(loss)(stop_gradient(batch))))
        norms = jnp.asarray(batch.head_norm_chosen), jnp.asarray(batch.head_norm_rejected)
        known = (pushes.chosen > 0) & (pushes.rejected > 0) & (norms[0] > 0) & (norms[1] > 0)
        safe = [jnp.where(known, v, 1.0) for v in (*pushes, *norms)]
        now = log_calibration(Incentives(*safe[:2]), *safe[2:])
        after = jnp.where(known, moving_average(before, now.astype(before.dtype), decay), before)
        shown = jnp.broadcast_to(strength, chosen.shape)
        return value, {**aux, "calibration/delta": shown, "state/log_delta": stop_gradient(after)}

    needs = loss.needs | {"log_delta", "head_norm_chosen", "head_norm_rejected"}
    return wrapped("rc", loss, compute, needs, {"log_delta": 0.0}, decay=decay)


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


@wrapper("gate", source="arXiv:2605.02626", alpha=10.0, threshold=0.1)
def with_gate(loss: Loss, *, alpha: float = 10.0, threshold: float = 0.1) -> Loss:
    r"""Gate-DPO: the rejected response is pushed less, the less likely it has become.

    .. math:: g = \sigma(\alpha (\bar p_- - \tau)), \qquad \bar p_- = e^{\ln \pi(y_-|x)/|y_-|}

    g multiplies the rejected response's gradient only and carries none itself; the value stays.

    Args:
      loss: any loss of summed log-probabilities of pairs.
      alpha: steepness, above 0.
      threshold: tau, a probability per token. Both defaults are ours; the paper's are not known here.

    References:
      https://arxiv.org/abs/2605.02626, with the geometric mean probability (its other form takes a quantile of tokens).
    """
    _require("with_gate", loss, pairs=True)
    threshold = _in_range("with_gate", "threshold", threshold, fraction(0.0))
    alpha = _in_range("with_gate", "alpha", alpha, positive(1.0))

    def compute(batch: LossInputs) -> tuple[Array, Aux]:
        gate = stop_gradient(jax.nn.sigmoid(alpha * (jnp.exp(mean_logps(batch)[1]) - threshold)))
        value, aux = loss(batch._replace(logp_rejected=scale_gradient(logps(batch)[1], gate)))
        return value, {**aux, "gate/rejected": gate}

    return wrapped("gate", loss, compute, loss.needs | LENGTHS, alpha=alpha, threshold=threshold)
