r"""From the log-probabilities of a batch to the loss of its examples, and to the metrics of an update.

Which field of ``LossInputs`` comes from where:

    logp_*, ref_logp_*, *_tokens       the responses of an item: the chosen one first, the rejected one last
    logp_candidates                    all responses but the last: samples stand where the chosen one stood
    *_joint_*                          the responses of an item, each with its prompt in front
    *_responses, response_mask         lists: all responses, the best first
    logp, kl_baseline                  unpaired: the row's own response first, another row's beside it
    token_*                            where the objective reads tokens
    token_kl_*, *_mask_*               from the states of the reference beside the policy (``beside``)
    weights, rewards_*, desirable      columns of the data (``Batch.extra``)
    head_norm_*                        gradients of the head, where a loss calibrates rewards (``forward.head_norms``)
    reward_mean, label_prior, ...      the state of a stateful loss
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from ches_jax.losses import Loss, LossInputs, kto_baseline
from ches_jax.models.attention.choose import with_gradient
from ches_jax.models.decoder import Decoder
from ches_jax.train.beside import Beside, token_fields
from ches_jax.train.data.batches import Batch
from ches_jax.train.forward import ResponseLogps, batch_logps
from ches_jax.train.objective import is_unpaired, reads_tokens


def loss_inputs(loss: Loss, batch: Batch, logps: ResponseLogps, state: Mapping[str, Any]) -> LossInputs:
    """What the loss declares that it reads, and nothing else."""
    responses, ref = logps.responses, jnp.asarray(batch.reference)
    fields: dict[str, Any] = {
        "logp_chosen": responses[:, 0],
        "logp_rejected": responses[:, -1],
        "ref_logp_chosen": ref[:, 0],
        "ref_logp_rejected": ref[:, -1],
        "chosen_tokens": batch.counts[:, 0],
        "rejected_tokens": batch.counts[:, -1],
        # joint: the prompt is a part of each response (``examples``)
        "logp_joint_chosen": responses[:, 0],
        "logp_joint_rejected": responses[:, -1],
        "ref_logp_joint_chosen": ref[:, 0],
        "ref_logp_joint_rejected": ref[:, -1],
        # samples stand where the chosen response stood
        "logp_candidates": responses[:, :-1],
        "ref_logp_candidates": ref[:, :-1],
        "logp_responses": responses,
        "ref_logp_responses": ref,
        "response_mask": (batch.counts > 0).astype(responses.dtype),
        "response_tokens": batch.counts,
        # unpaired: the first response is the row's own, the second another row's (``examples.unpaired``)
        "logp": responses[:, 0],
        "ref_logp": ref[:, 0],
        "kl_baseline": kto_baseline(responses[:, -1], ref[:, -1]),
        "head_norm_chosen": logps.head_norms[0],
        "head_norm_rejected": logps.head_norms[1],
        **batch.extra,
        **state,
        **(logps.fields or {}),
    }
    if batch.tokens is not None and logps.tokens is not None:
        for side, i in (("chosen", 0), ("rejected", -1)):
            fields[f"token_logps_{side}"] = logps.tokens[:, i]
            fields[f"ref_token_logps_{side}"] = batch.tokens.reference[:, i]
            fields[f"token_mask_{side}"] = batch.tokens.mask[:, i]
    read = loss.needs | loss.optional
    return LossInputs(**cast(Any, {name: value for name, value in fields.items() if name in read}))


def loss_and_metrics(
    loss: Loss, batch: Batch, logps: ResponseLogps, state: Mapping[str, Any]
) -> tuple[Array, tuple[dict[str, Array], dict[str, Any]]]:
    """Mean loss over the examples; means of metrics under TRL's names (see ``update_metrics``); the next state."""
    inputs = loss_inputs(loss, batch, logps, state)
    value, aux = loss(inputs)
    new_state = {k.removeprefix("state/"): v for k, v in aux.items() if k.startswith("state/")}
    metrics = {k: v for k, v in aux.items() if not k.startswith("state/")}
    if is_unpaired(loss):
        good = jnp.asarray(inputs.desirable).astype(value.dtype)
        metrics |= {DESIRABLE: good}
        metrics = {k: v for k, v in metrics.items() if k not in ("rewards", "logps")}
        if inputs.kl_baseline is not None:
            metrics["kl"] = inputs.kl_baseline
        for name in ("rewards", "logps"):
            metrics |= {f"{name}/chosen": aux[name] * good, f"{name}/rejected": aux[name] * (1 - good)}
    elif reads_tokens(loss):  # whatever tokens the objective keeps, this is the response's own
        metrics |= {"logps/chosen": logps.responses[:, 0], "logps/rejected": logps.responses[:, -1]}
    metrics[POLICY] = logps.responses
    means = {k: jnp.mean(jax.lax.stop_gradient(jnp.asarray(v))) for k, v in metrics.items()}
    return jnp.mean(value), (means, new_state)


POLICY = "policy/logps"
"""Mean log-probability of all responses: compared with the reference's before the first update."""
DESIRABLE = "share/desirable"


def update_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an update as they are logged; means over good and over bad rows become means of each."""
    out = {k: v for k, v in metrics.items() if k not in (DESIRABLE, POLICY)}
    if DESIRABLE not in metrics:
        return out
    for side, share in (("chosen", metrics[DESIRABLE]), ("rejected", 1 - metrics[DESIRABLE])):
        for name in (f"rewards/{side}", f"logps/{side}"):
            mean = out.pop(name)
            if share > 0:  # an update may have no row of a side
                out[name] = mean / share
    if {"rewards/chosen", "rewards/rejected"} <= out.keys():
        out["rewards/margins"] = out["rewards/chosen"] - out["rewards/rejected"]
    return out


def batch_loss(
    model: Decoder,
    loss: Loss,
    batch: Batch,
    state: Mapping[str, Any],
    *,
    beside: Beside | None = None,
    router_balance: float = 0.0,
    remat: bool = False,
    mesh: Mesh | None = None,
) -> tuple[Array, tuple[dict[str, Array], dict[str, Any]]]:
    """``loss_and_metrics`` of the log-probabilities that a model gives a batch.

    ``beside`` is the reference, for losses that read its states. With ``router_balance`` the loss has so many times the
    load-balancing loss of the routers added.
    """
    norms = "head_norm_chosen" in loss.needs
    attend = with_gradient(model.config, model.dtype)
    options: dict[str, Any] = {"attend": attend, "remat": remat, "mesh": mesh}
    also = None
    if beside is not None:
        where: dict[str, Any] = {"attend": attend, "mesh": mesh}
        also = lambda states: token_fields(loss, beside, model, states, batch, **where)  # noqa: E731
    logps = batch_logps(model, batch, norms=norms, balance=router_balance > 0, also=also, **options)
    value, (means, new_state) = loss_and_metrics(loss, batch, logps, state)
    if logps.balance is not None:
        value = value + router_balance * logps.balance
        means["router_balance"] = jax.lax.stop_gradient(logps.balance)
    return value, (means, new_state)
