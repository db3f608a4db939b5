r"""What an objective may ask for, and the few sums that most of them are made of.

One record, :class:`LossInputs`, holds every input of every objective; a field that was not supplied is None. A loss
declares the fields it needs, so nothing is guessed: a missing one is an error that names it.

Log-probabilities are sums over a response's tokens in nats; lengths count the tokens of that sum (the terminator too,
where it was scored).

>>> nats = [jnp.array([v]) for v in (-8.0, -12.0, -10.0, -10.0)]
>>> float(margin(LossInputs(*nats))[0])  # (-8 + 10) - (-12 + 10)
4.0
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


class RunningMean(NamedTuple):
    """State of a mean over everything seen so far; zeros to begin with."""

    mean: Float[ArrayLike, ""]
    seen: Float[ArrayLike, ""]
    """How many values the mean is of."""

    def update(self, values: Float[Array, " B"]) -> "RunningMean":
        """The mean with ``values`` added to it, without gradient.

        >>> float(RunningMean(jnp.float32(1.0), jnp.float32(3.0)).update(jnp.array([5.0])).mean)
        2.0
        """
        values = jax.lax.stop_gradient(values)
        seen = jnp.asarray(self.seen, values.dtype) + values.size
        mean = jnp.asarray(self.mean, values.dtype)
        return RunningMean(mean + (jnp.sum(values) - values.size * mean) / seen, seen)


class LossInputs(NamedTuple):
    """Arrays of one batch: B pairs (rows, for an unpaired objective), T token positions.

    Each objective says which it needs: ``get_loss(name).needs``.

    >>> import numpy as np
    >>> from ches_jax.losses import get_loss
    >>> batch = LossInputs(*(np.array([x]) for x in (-9.0, -8.0, -10.0, -8.0)))
    >>> values, logs = get_loss("dpo")(batch)  # the margin is 1 nat, beta 0.1
    >>> f"{values[0]:.3f}"
    '0.644'
    """

    logp_chosen: Float[ArrayLike, "*B"] | None = None
    logp_rejected: Float[ArrayLike, "*B"] | None = None
    ref_logp_chosen: Float[ArrayLike, "*B"] | None = None
    ref_logp_rejected: Float[ArrayLike, "*B"] | None = None
    chosen_tokens: ArrayLike | None = None
    """Length of the chosen response, in tokens."""
    rejected_tokens: ArrayLike | None = None
    weights: Float[ArrayLike, "*B"] | None = None
    """Weight of each pair, for ``with_weights``."""
    label_probability: Float[ArrayLike, "*B"] | None = None
    """Probability that the label of each pair is right, for ``with_soft_labels``."""
    pairs_per_token: Float[ArrayLike, "..."] | None = None
    """Pairs over chosen tokens of the whole update, where a batch is a part of one (``sft``)."""
    label_prior: Float[ArrayLike, ""] | None = None
    """LCPO's state: the share of labels that are right, as it is estimated so far."""
    head_norm_chosen: Float[ArrayLike, ""] | None = None
    """Norm of the gradient of the batch's mean ln pi(chosen) with respect to the unembedding matrix."""
    head_norm_rejected: Float[ArrayLike, ""] | None = None
    rewards_chosen: Float[ArrayLike, "*B"] | None = None
    """Score of the chosen response by an outside judge (REBEL, ODPO), in the judge's own unit."""
    rewards_rejected: Float[ArrayLike, "*B"] | None = None
    reward_mean: RunningMean | None = None
    """BCO's state; the updated one comes back in ``aux["state/reward_mean"]``."""
    log_delta: Float[ArrayLike, "..."] | None = None
    """State of the reward calibration: the logarithm of its strength, a moving average."""
    logp: Float[ArrayLike, "*B"] | None = None
    """Unpaired: log-probability of the row's only response."""
    ref_logp: Float[ArrayLike, "*B"] | None = None
    desirable: ArrayLike | None = None
    """Unpaired: whether the row's response is a good one."""
    kl_baseline: Float[ArrayLike, ""] | None = None
    """KTO's reference point in nats, see ``kto_baseline``."""
    logp_joint_chosen: Float[ArrayLike, "*B"] | None = None
    """Joint: log-probability of prompt and response together, ln pi(x, y), from the prompt's second token on."""
    logp_joint_rejected: Float[ArrayLike, "*B"] | None = None
    ref_logp_joint_chosen: Float[ArrayLike, "*B"] | None = None
    ref_logp_joint_rejected: Float[ArrayLike, "*B"] | None = None
    logp_candidates: Float[ArrayLike, "*B candidates"] | None = None
    """D2O: log-probabilities of the policy's own samples."""
    ref_logp_candidates: Float[ArrayLike, "*B candidates"] | None = None
    logp_responses: Float[ArrayLike, "*B K"] | None = None
    """Listwise: log-probabilities of a row's K responses, the best first."""
    ref_logp_responses: Float[ArrayLike, "*B K"] | None = None
    scores: Float[ArrayLike, "*B K"] | None = None
    """Listwise: the scores of the responses, falling, in the judge's own unit."""
    response_mask: Float[ArrayLike, "*B K"] | None = None
    """1 on the responses of a row, 0 where it has fewer than others."""
    response_tokens: ArrayLike | None = None
    """Listwise: lengths of the responses, in tokens."""
    token_logps_chosen: Float[ArrayLike, "*B T"] | None = None
    token_logps_rejected: Float[ArrayLike, "*B U"] | None = None
    ref_token_logps_chosen: Float[ArrayLike, "*B T"] | None = None
    ref_token_logps_rejected: Float[ArrayLike, "*B U"] | None = None
    token_mask_chosen: Float[ArrayLike, "*B T"] | None = None
    """1 on the response's tokens, 0 on padding."""
    token_mask_rejected: Float[ArrayLike, "*B U"] | None = None
    span_mask_chosen: Float[ArrayLike, "*B T"] | None = None
    """1 on the tokens that the other response does not have in that place, see ``data.spans``."""
    span_mask_rejected: Float[ArrayLike, "*B U"] | None = None
    token_weights_chosen: Float[ArrayLike, "*B T"] | None = None
    """Weight of each token's log-ratio."""
    token_weights_rejected: Float[ArrayLike, "*B U"] | None = None
    token_kl_chosen: Float[ArrayLike, "*B T"] | None = None
    """KL(reference || policy) of the next-token distributions at each position, nats; with a gradient in training."""
    token_kl_rejected: Float[ArrayLike, "*B U"] | None = None
    reward_mask_chosen: Float[ArrayLike, "*B T"] | None = None
    """SparsePO's learned mask of each token's log-ratio, 0 or more; with a gradient in training."""
    reward_mask_rejected: Float[ArrayLike, "*B U"] | None = None
    kl_mask_chosen: Float[ArrayLike, "*B T"] | None = None
    """And of each token's divergence."""
    kl_mask_rejected: Float[ArrayLike, "*B U"] | None = None
    activation_mask_chosen: Float[ArrayLike, "*B T"] | None = None
    """Mask from the reference's activations, 0 to 1."""
    activation_mask_rejected: Float[ArrayLike, "*B U"] | None = None


Aux: TypeAlias = dict[str, Any]
"""What a loss reports beside itself: arrays of the batch's shape under TRL's names, new state under ``state/``."""

LOGPS = frozenset({"logp_chosen", "logp_rejected"})
REFERENCE = LOGPS | {"ref_logp_chosen", "ref_logp_rejected"}
JOINT = frozenset({"logp_joint_chosen", "logp_joint_rejected", "ref_logp_joint_chosen", "ref_logp_joint_rejected"})
LENGTHS = frozenset({"chosen_tokens", "rejected_tokens"})
REWARDS = frozenset({"rewards_chosen", "rewards_rejected"})


SIDES = ("chosen", "rejected")
PER_PAIR = (
    LOGPS | REFERENCE | JOINT | LENGTHS | REWARDS | {"logp", "ref_logp", "desirable", "weights", "label_probability"}
)
"""Fields with one number for each pair, or row."""
PER_TOKEN = {
    side: frozenset(n for n in LossInputs._fields if n.endswith(f"_{side}") and ("token_" in n or "mask_" in n))
    for side in SIDES
}
"""Fields with one number for each token of a response."""
PER_CANDIDATE = frozenset({"logp_candidates", "ref_logp_candidates"})
PER_RESPONSE = frozenset({"logp_responses", "ref_logp_responses", "scores", "response_mask", "response_tokens"})


def shape_problems(batch: LossInputs, names: Collection[str]) -> list[str]:
    """What is wrong with the shapes of these fields, which would broadcast otherwise: none if they fit together."""
    groups: Sequence[tuple[frozenset[str], int]] = (
        (PER_PAIR, 0),
        *((tokens, 1) for tokens in PER_TOKEN.values()),
        (PER_CANDIDATE, 1),
        (PER_RESPONSE, 1),
    )
    shapes = [{n: jnp.shape(getattr(batch, n)) for n in sorted(group & {*names})} for group, _ in groups]
    unlike = [group for group in shapes if len({*group.values()}) > 1]
    if not unlike:  # one of each group stands for it
        of_a_pair = {
            n: shape[: len(shape) - own]
            for group, (_, own) in zip(shapes, groups, strict=True)
            for n, shape in [*group.items()][:1]
        }
        if len({*of_a_pair.values()}) > 1:
            unlike = [{n: jnp.shape(getattr(batch, n)) for n in of_a_pair}]
    return ["its inputs differ in shape: " + ", ".join(f"{n} {s}" for n, s in group.items()) for group in unlike]


def in_single_precision(batch: LossInputs, names: Collection[str]) -> tuple[LossInputs, list[str]]:
    """The batch with these fields as arrays, and what is wrong with those that are none.

    What has half precision, and log-probabilities, rewards and scores that are whole numbers, become float32: lengths
    and sums of thousands of nats have no place in half precision.
    """
    arrays, problems = {}, []
    for name in sorted({*names} - {"reward_mean"}):
        value = getattr(batch, name)
        if value is None:
            continue
        try:
            array = jnp.asarray(value)
        except (TypeError, ValueError, RuntimeError) as error:
            problems.append(f"{name}: no array of numbers ({str(error).partition(chr(10))[0]:.120})")
            continue
        half = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
        whole = jnp.issubdtype(array.dtype, jnp.integer) and ("logp" in name or name in REWARDS | {"scores"})
        arrays[name] = array.astype(jnp.float32) if half or whole else array
    return batch._replace(**arrays), problems


def swap(batch: LossInputs) -> LossInputs:
    """The same pairs with their labels exchanged.

    >>> swap(LossInputs(logp_chosen=1.0, logp_rejected=2.0)).logp_chosen
    2.0
    """
    exchanged = {}
    for name in (n for n in LossInputs._fields if "chosen" in n):
        twin = name.replace("chosen", "rejected")
        exchanged |= {name: getattr(batch, twin), twin: getattr(batch, name)}
    return batch._replace(**exchanged)


def unpair(batch: LossInputs) -> LossInputs:
    """Rows for an unpaired objective: all chosen responses, then all rejected ones."""
    pairs = {name: jnp.asarray(getattr(batch, name)) for name in REFERENCE}
    chosen, rejected = pairs["logp_chosen"], pairs["logp_rejected"]
    return LossInputs(
        logp=jnp.concatenate([chosen, rejected]),
        ref_logp=jnp.concatenate([pairs["ref_logp_chosen"], pairs["ref_logp_rejected"]]),
        desirable=jnp.concatenate([jnp.ones(chosen.shape, bool), jnp.zeros(rejected.shape, bool)]),
        kl_baseline=batch.kl_baseline,
        reward_mean=batch.reward_mean,
    )


def log_ratios(batch: LossInputs) -> tuple[Array, Array]:
    r"""Log-ratios to the reference in nats, :math:`r_\pm = \ln \pi(y_\pm|x) - \ln \pi_{ref}(y_\pm|x)`."""
    chosen = jnp.asarray(batch.logp_chosen) - jnp.asarray(batch.ref_logp_chosen)
    return chosen, jnp.asarray(batch.logp_rejected) - jnp.asarray(batch.ref_logp_rejected)


def margin(batch: LossInputs) -> Array:
    r"""Margin of the log-ratios in nats, :math:`m = r_+ - r_-`."""
    chosen, rejected = log_ratios(batch)
    return chosen - rejected


def logps(batch: LossInputs) -> tuple[Array, Array]:
    """Summed log-probabilities of the pair, nats."""
    return jnp.asarray(batch.logp_chosen), jnp.asarray(batch.logp_rejected)


def lengths(batch: LossInputs) -> tuple[Array, Array]:
    """Token counts in the dtype of the log-probabilities; an empty response counts as one token, so its mean is 0."""
    chosen, rejected = logps(batch)
    return (
        jnp.maximum(jnp.asarray(batch.chosen_tokens).astype(chosen.dtype), 1),
        jnp.maximum(jnp.asarray(batch.rejected_tokens).astype(rejected.dtype), 1),
    )


def mean_logps(batch: LossInputs) -> tuple[Array, Array]:
    """Log-probabilities per token, nats."""
    (chosen, rejected), (n_chosen, n_rejected) = logps(batch), lengths(batch)
    return chosen / n_chosen, rejected / n_rejected


def mean_log_ratios(batch: LossInputs) -> tuple[Array, Array]:
    """Log-ratios to the reference per token, nats."""
    (chosen, rejected), (n_chosen, n_rejected) = log_ratios(batch), lengths(batch)
    return chosen / n_chosen, rejected / n_rejected
