"""Losses made of losses, and rules that weigh tokens."""

import json
from math import exp, log
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.errors import ChesError
from ches_jax.losses import (
    Incentives,
    LossInputs,
    beyond_shared_length,
    get_loss,
    given_weights,
    incentives,
    log_calibration,
    moving_average,
    swap,
    unsure_tokens,
    weighted_sums,
    with_gate,
    with_label_posterior,
    with_label_smoothing,
    with_policy_weights,
    with_reward_calibration,
    with_sft,
    with_soft_labels,
    with_tokens,
    with_unbiased_labels,
    with_weights,
)
from ches_jax.types import SftUnit

DPO = get_loss("dpo", beta=0.3)


def test_sft_units(batch64):
    base = DPO(batch64)[0]
    n = jnp.asarray(batch64.chosen_tokens).astype(jnp.float64)
    nll = -jnp.asarray(batch64.logp_chosen)
    terms: dict[SftUnit, Any] = {"sum": nll, "token": nll / n, "batch_token": nll * 4 / n.sum()}
    for per, term in terms.items():
        value, aux = with_sft(DPO, 0.7, per=per)(batch64)
        np.testing.assert_allclose(value, base + 0.7 * term, rtol=1e-12)
        (logged,) = (v for k, v in aux.items() if k.startswith("terms/sft"))
        np.testing.assert_allclose(logged, term, rtol=1e-12)
    summed = get_loss("dpo_sft_sum", beta=0.3, sft_coeff=0.7)(batch64)[0]
    np.testing.assert_allclose(with_sft(DPO, 0.7, per="sum")(batch64)[0], summed, rtol=1e-12)
    per_token = get_loss("rpo", beta=0.3, alpha=0.7)(batch64)[0]
    np.testing.assert_allclose(with_sft(DPO, 0.7, per="token")(batch64)[0], per_token, rtol=1e-12)


def test_weights_multiply_each_pair(batch64):
    weights = jnp.array([0.0, 1.0, 0.5, 2.0])
    value, _ = with_weights(DPO)(batch64._replace(weights=weights))
    np.testing.assert_allclose(value, DPO(batch64)[0] * weights, rtol=1e-12)
    with pytest.raises(ChesError, match="needs weights"):
        with_weights(DPO)(batch64)


def test_policy_weights_carry_no_gradient_and_scale_the_sft_term_inside(batch64):
    b = batch64
    weight = jnp.minimum(
        1,
        jnp.exp(
            b.logp_chosen / b.chosen_tokens.astype(jnp.float64)
            + b.logp_rejected / b.rejected_tokens.astype(jnp.float64)
        ),
    )
    got = incentives(with_policy_weights(DPO))(b)
    np.testing.assert_allclose(got.chosen, weight * incentives(DPO)(b).chosen, rtol=1e-12)
    inside = incentives(with_policy_weights(with_sft(DPO, 1.0, per="sum")))(b).chosen - got.chosen
    outside = incentives(with_sft(with_policy_weights(DPO), 1.0, per="sum"))(b).chosen - got.chosen
    np.testing.assert_allclose(inside, weight, rtol=1e-9)
    np.testing.assert_allclose(outside, jnp.ones(4), rtol=1e-9)


def test_label_posterior_is_bayes_rule(batch64):
    value, aux = with_label_posterior(DPO, 0.9, decay=0.75)(batch64)  # eta is that of the batch, 0.8
    right, wrong = DPO(batch64)[0], DPO(swap(batch64))[0]
    p = jnp.exp(-right) / (jnp.exp(-right) + jnp.exp(-wrong))
    w = 0.8 * p / (0.8 * p + 0.2 * (1 - p))
    np.testing.assert_allclose(aux["label/posterior"], w, rtol=1e-12)
    np.testing.assert_allclose(value, w * right + (1 - w) * wrong, rtol=1e-12)
    np.testing.assert_allclose(aux["state/label_prior"], 0.75 * 0.8 + 0.25 * w.mean(), rtol=1e-12)
    got = incentives(with_label_posterior(DPO))(batch64)
    np.testing.assert_allclose(got.chosen, (w * right_push(batch64) - (1 - w) * wrong_push(batch64)), rtol=1e-10)


def right_push(batch):
    return incentives(DPO)(batch).chosen


def wrong_push(batch):
    """Of the flipped pair on what is rejected there: it goes down."""
    return incentives(DPO)(swap(batch)).rejected


def test_reward_calibration_scales_incentives_and_keeps_the_value(batch64):
    delta = float(jnp.exp(batch64.log_delta))
    wrapped, before = with_reward_calibration(DPO), incentives(DPO)(batch64)
    after = incentives(wrapped)(batch64)
    np.testing.assert_allclose(wrapped(batch64)[0], DPO(batch64)[0], rtol=1e-15)
    np.testing.assert_allclose(after.chosen, before.chosen * delta, rtol=1e-12)
    np.testing.assert_allclose(after.rejected, before.rejected / delta, rtol=1e-12)


def test_the_state_of_the_calibration_moves_towards_the_batch(batch64):
    before = incentives(DPO)(batch64)
    target = 0.5 * (jnp.log(2.0) - jnp.log(4.0) - jnp.log(before.chosen.sum()) + jnp.log(before.rejected.sum()))
    state = with_reward_calibration(DPO, decay=0.75)(batch64)[1]["state/log_delta"]
    np.testing.assert_allclose(state, 0.75 * 0.3 + 0.25 * target, rtol=1e-12)
    still = with_reward_calibration(DPO)(batch64._replace(head_norm_chosen=jnp.zeros(())))[1]["state/log_delta"]
    np.testing.assert_allclose(still, 0.3, rtol=1e-12)


def test_labels_in_doubt_mix_both_orders(batch64):
    right, wrong = DPO(batch64)[0], DPO(swap(batch64))[0]
    p = batch64.label_probability
    np.testing.assert_allclose(with_soft_labels(DPO)(batch64)[0], p * right + (1 - p) * wrong, rtol=1e-12)
    even = batch64._replace(label_probability=jnp.full(4, 0.7))
    np.testing.assert_allclose(with_soft_labels(DPO)(even)[0], with_label_smoothing(DPO, 0.3)(batch64)[0], rtol=1e-12)
    for name, wrap in (("cdpo", with_label_smoothing), ("robust", with_unbiased_labels)):
        registered = get_loss(name, beta=0.3, label_smoothing=0.2)(batch64)[0]
        np.testing.assert_allclose(wrap(DPO, 0.2)(batch64)[0], registered, rtol=1e-12)


def test_calibration_centres_the_ratio_of_incentives():
    pushes = Incentives(jnp.array([2.0]), jnp.array([1.0]))
    log_delta = log_calibration(pushes, jnp.array([4.0]), jnp.array([2.0]))
    # incentives become delta d+ and d-/delta: their ratio lands on the ideal |g-|/|g+|
    ratio = 2.0 * jnp.exp(log_delta) / (1.0 / jnp.exp(log_delta))
    np.testing.assert_allclose(ratio, [2.0 / 4.0], rtol=1e-6)
    np.testing.assert_allclose(moving_average(jnp.zeros(1), jnp.ones(1)), [0.02], rtol=1e-5)


def test_gate_touches_only_the_rejected_gradient(batch64):
    b = batch64
    gate = jax.nn.sigmoid(5 * (jnp.exp(b.logp_rejected / b.rejected_tokens.astype(jnp.float64)) - 0.1))
    wrapped, before = with_gate(DPO, alpha=5.0, threshold=0.1), incentives(DPO)(b)
    after = incentives(wrapped)(b)
    np.testing.assert_allclose(wrapped(b)[0], DPO(b)[0], rtol=1e-15)
    np.testing.assert_allclose(after.chosen, before.chosen, rtol=1e-12)
    np.testing.assert_allclose(after.rejected, before.rejected * gate, rtol=1e-12)


def test_wrappers_tell_what_they_are_made_of():
    loss = with_weights(with_sft(DPO, 0.5, per="token"))
    assert repr(loss) == "weighted(dpo(beta=0.3) + 0.5*sft_token)"
    assert loss.needs == DPO.needs | {"weights", "chosen_tokens"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_weights(get_loss("aot")), "sorts the batch"),
        (lambda: with_sft(get_loss("kto"), 1.0, per="sum"), "summed log-probabilities of pairs"),
        (lambda: with_sft(DPO, -1.0, per="sum"), "coef=-1.0 is outside"),
        (lambda: with_sft(DPO, 1.0, per="mean"), "none of sum, token, batch_token"),  # pyright: ignore[reportArgumentType]
        (lambda: with_label_smoothing(get_loss("bco_pair"), 0.1), "stateless loss of pairs"),
        (lambda: with_label_smoothing(get_loss("d2o"), 0.1), "stateless loss of pairs"),
        (lambda: with_label_smoothing(DPO, 1.5), "outside"),
        (lambda: with_label_posterior(DPO, 1.0), "outside"),
        (lambda: with_gate(DPO, alpha=0.0, threshold=0.5), r"alpha=0.0 is outside \(0, inf\)"),
        (lambda: with_tokens(get_loss("kto")), "summed log-probabilities of pairs"),
        (lambda: beyond_shared_length(2.0), "outside"),
    ],
)
def test_what_cannot_be_wrapped(make, message):
    with pytest.raises(ChesError, match=message):
        make()


def tokens_of_one_pair(**more) -> Any:
    return LossInputs(
        token_logps_chosen=jnp.log(jnp.array([[0.5, 0.1, 0.9, 1.0]])),
        token_logps_rejected=jnp.log(jnp.array([[0.2, 0.8]])),
        token_mask_chosen=jnp.array([[1, 1, 1, 0]]),
        token_mask_rejected=jnp.array([[1, 1]]),
        **more,
    )


def test_confpo_keeps_the_tokens_below_the_mean_probability(x64):
    weights = unsure_tokens(tokens_of_one_pair())
    # the means are 0.5 and 0.5; the first token is the mean, not below it
    assert weights.chosen.tolist() == [[0, 1, 0, 0]] and weights.rejected.tolist() == [[1, 0]]
    value, aux = get_loss("confpo", beta=2.0, gamma=0.5)(tokens_of_one_pair())
    np.testing.assert_allclose(value, [log(1 + exp(-(2 * log(0.1) - 2 * log(0.2) - 0.5)))], rtol=1e-12)
    np.testing.assert_allclose(aux["rewards/chosen"], [2 * log(0.1)], rtol=1e-12)


def test_confpo_leaves_out_a_pair_without_unsure_tokens(x64):
    batch = tokens_of_one_pair()._replace(
        token_logps_rejected=jnp.log(jnp.array([[0.3]])), token_mask_rejected=jnp.array([[1]])
    )
    assert get_loss("confpo")(batch)[0].tolist() == [0.0]
    assert not np.any(incentives(get_loss("confpo"))(batch).chosen)


def test_ld_weighs_what_lies_beyond_the_shorter_response(x64):
    weights = beyond_shared_length(0.25)(tokens_of_one_pair())
    sums: Any = weighted_sums(tokens_of_one_pair(), weights)
    np.testing.assert_allclose(sums.logp_chosen, [log(0.5) + log(0.1) + 0.25 * log(0.9)], rtol=1e-12)
    np.testing.assert_allclose(sums.logp_rejected, [log(0.2) + log(0.8)], rtol=1e-12)
    assert sums.chosen_tokens.tolist() == [3.0]


def test_ld_with_weight_one_is_dpo_of_sums(batch64):
    plain = weighted_sums(batch64, beyond_shared_length(1.0)(batch64))
    np.testing.assert_allclose(get_loss("ld_dpo", alpha=1)(batch64)[0], get_loss("dpo")(plain)[0], rtol=1e-12)


def test_padding_is_never_read(batch64):
    mask = jnp.asarray(batch64.token_mask_chosen)
    for filler in (-jnp.inf, 0.0, 7.0):
        padded = batch64._replace(token_logps_chosen=jnp.where(mask == 1, batch64.token_logps_chosen, filler))
        for name in ("confpo", "ld_dpo", *TOKEN_LEVEL):
            np.testing.assert_allclose(get_loss(name)(padded)[0], get_loss(name)(batch64)[0], rtol=1e-12)
            assert bool(jnp.all(jnp.isfinite(incentives(get_loss(name))(padded).chosen)))


TOKEN_LEVEL = ("tdpo", "tdpo2", "mapo", "sparsepo", "sparsepo_common")


def distributions_of_tokens(seed=5, pairs=3, width=4, vocabulary=6):
    """Random next-token distributions of policy and reference, tokens, masks, and learned masks with zeros."""
    rng = np.random.default_rng(seed)
    sides = {}
    for side in ("chosen", "rejected"):
        logits = rng.normal(0, 2, (2, pairs, width, vocabulary))
        logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        sides[side] = {
            "policy": logps[0],
            "reference": logps[1],
            "token": rng.integers(0, vocabulary, (pairs, width)),
            "inside": (np.arange(width) < rng.integers(1, width + 1, pairs)[:, None]).astype(float),
            "reward": np.maximum(rng.normal(0.2, 1, (pairs, width)), 0),
            "kl": np.maximum(rng.normal(0.2, 1, (pairs, width)), 0),
        }
    return sides


def inputs_of(sides):
    fields = {}
    for side, d in sides.items():
        for name, prefix in (("policy", ""), ("reference", "ref_")):
            fields[f"{prefix}token_logps_{side}"] = np.take_along_axis(d[name], d["token"][..., None], -1)[..., 0]
        fields[f"token_mask_{side}"] = d["inside"]
        kl = np.sum(np.exp(d["reference"]) * (d["reference"] - d["policy"]), -1)
        fields |= {f"token_kl_{side}": kl, f"reward_mask_{side}": d["reward"], f"kl_mask_{side}": d["kl"]}
        fields[f"activation_mask_{side}"] = d["reward"]
    columns: Any = {k: jnp.asarray(v) for k, v in fields.items()}
    return LossInputs(**columns)


def authors_sparse_loss(sides, beta, l1_u, l1_d, *, common=False):
    """The arithmetic of the authors' ``sparse_trainer.py``: their divergence is minus KL(reference || policy)."""
    u, d, penalty = [], [], 0.0
    for s in sides.values():
        at = [np.take_along_axis(s[name], s["token"][..., None], -1)[..., 0] for name in ("policy", "reference")]
        kl_mask = s["reward"] if common else s["kl"]
        u.append(np.sum(s["reward"] * (at[0] - at[1]) * s["inside"], -1))
        minus_kl = np.sum(np.exp(s["reference"]) * (s["policy"] - s["reference"]), -1)
        d.append(np.sum(kl_mask * minus_kl * s["inside"], -1))
        penalty = penalty + l1_u * np.abs(s["reward"] * s["inside"]).sum(-1)
        penalty = penalty + l1_d * np.abs(kl_mask * s["inside"]).sum(-1)
    return np.log1p(np.exp(-beta * (u[0] - u[1] - (d[0] - d[1])))) + penalty


def test_sparsepo_is_the_arithmetic_of_its_authors(x64):
    sides = distributions_of_tokens()
    batch, hyper = inputs_of(sides), {"beta": 0.7, "l1_reward": 0.3, "l1_kl": 0.2}
    own, _ = get_loss("sparsepo", **hyper)(batch)
    np.testing.assert_allclose(own, authors_sparse_loss(sides, 0.7, 0.3, 0.2), rtol=1e-12)
    common, _ = get_loss("sparsepo_common", **hyper)(batch)
    np.testing.assert_allclose(common, authors_sparse_loss(sides, 0.7, 0.3, 0.2, common=True), rtol=1e-12)
    mapo, _ = get_loss("mapo", beta=0.7)(batch)
    np.testing.assert_allclose(mapo, authors_sparse_loss(sides, 0.7, 0, 0, common=True), rtol=1e-12)
    whole = {side: {**s, "reward": np.ones_like(s["kl"])} for side, s in sides.items()}
    for loss, alpha in (("tdpo", {}), ("tdpo2", {"alpha": 1.0})):
        value, _ = get_loss(loss, beta=0.7, **alpha)(batch)
        np.testing.assert_allclose(value, authors_sparse_loss(whole, 0.7, 0, 0, common=True), rtol=1e-12)
    half, _ = get_loss("tdpo2", beta=0.7)(batch)
    kl = {side: np.sum(getattr(batch, f"token_kl_{side}") * s["inside"], -1) for side, s in sides.items()}
    ratio = {
        side: np.sum(
            (getattr(batch, f"token_logps_{side}") - getattr(batch, f"ref_token_logps_{side}")) * s["inside"], -1
        )
        for side, s in sides.items()
    }
    z = ratio["chosen"] - ratio["rejected"] - 0.5 * (kl["rejected"] - kl["chosen"])
    np.testing.assert_allclose(half, np.log1p(np.exp(-0.7 * z)), rtol=1e-12)


AUTHORS = json.loads(Path(__file__).with_name("authors_golden.json").read_text(encoding="utf-8"))
"""What authors' own code gives on random numbers; ``make_authors_golden.py`` names the commits."""


@pytest.mark.parametrize("case", AUTHORS["cases"], ids=lambda case: case["loss"])
def test_token_level_dpo_is_that_of_its_authors_code(x64, case):
    """From the same logits and labels: our log-ratios and divergences by numpy, their losses by torch."""
    fields: dict[str, Any] = {}
    for side, d in AUTHORS["sides"].items():
        labels = np.array(d["labels"])[:, 1:]
        logps = [np.array(d[name])[:, :-1] for name in ("logits", "reference")]
        logps = [x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in logps]
        at = np.maximum(labels, 0)[..., None]
        for prefix, table in zip(("", "ref_"), logps, strict=True):
            fields[f"{prefix}token_logps_{side}"] = np.take_along_axis(table, at, -1)[..., 0]
        fields[f"token_mask_{side}"] = (labels >= 0).astype(float)
        fields[f"token_kl_{side}"] = np.sum(np.exp(logps[1]) * (logps[1] - logps[0]), -1)
    arrays: dict[str, Any] = {name: jnp.asarray(value) for name, value in fields.items()}
    batch = LossInputs(**arrays)
    value, _ = get_loss(case["loss"], **case["hyper"])(batch)
    np.testing.assert_allclose(value, case["per_pair"], rtol=1e-9)


def test_t_reg_is_dpo_with_a_rewarded_likelihood_that_counts_as_much_as_dpo_pushes(x64):
    sides, rng = distributions_of_tokens(), np.random.default_rng(3)
    batch = inputs_of(sides)
    rewards = {side: rng.uniform(-0.5, 0.5, s["inside"].shape) for side, s in sides.items()}
    batch = batch._replace(**{f"token_weights_{side}": jnp.asarray(r) for side, r in rewards.items()})
    ratios, likelihood = [], 0.0
    for side, s in sides.items():
        at = [np.take_along_axis(s[name], s["token"][..., None], -1)[..., 0] for name in ("policy", "reference")]
        ratios.append(np.sum((at[0] - at[1]) * s["inside"], -1))
        likelihood = likelihood + np.sum(rewards[side] * at[0] * s["inside"], -1)
    z = 0.7 * (ratios[0] - ratios[1])
    weight = 1 / (1 + np.exp(z))
    value, logged = get_loss("t_reg", beta=0.7, alpha=0.3)(batch)
    np.testing.assert_allclose(value, np.log1p(np.exp(-z)) - 0.3 * weight * 0.7 * likelihood, rtol=1e-12)
    np.testing.assert_allclose(logged["rewards/margins"], z, rtol=1e-12)
    push = incentives(get_loss("t_reg", beta=0.7, alpha=0.3))(batch)  # the weight is held
    inside = sides["chosen"]["inside"]
    expected = (0.7 * weight)[:, None] * (1 + 0.3 * rewards["chosen"]) * inside
    np.testing.assert_allclose(push.chosen, expected, rtol=1e-12)


def test_masks_learn_and_their_sparsity_is_logged(x64):
    """A mask at zero still has a gradient; TDPO2 holds the chosen response's divergence."""
    sides = distributions_of_tokens()
    batch = inputs_of(sides)
    loss = get_loss("sparsepo", l1_reward=0.3)

    def total(mask):
        return jnp.sum(loss(batch._replace(reward_mask_chosen=mask))[0])

    at = jnp.asarray(sides["chosen"]["reward"])
    slope, step = jax.grad(total)(at), 1e-6
    for place in np.argwhere(sides["chosen"]["inside"] > 0):
        moved = [total(at.at[tuple(place)].add(sign * step)) for sign in (1, -1)]
        if at[tuple(place)] > 0:
            np.testing.assert_allclose(slope[tuple(place)], (moved[0] - moved[1]) / (2 * step), rtol=1e-6, atol=1e-9)
    # at a mask of 0 the penalty has no slope, and the loss has one
    zeros = (at == 0) & (sides["chosen"]["inside"] > 0)
    assert zeros.any() and np.all(np.asarray(slope)[zeros] != 0)
    _, aux = loss(batch)
    inside = sides["rejected"]["inside"]
    share = np.sum((sides["rejected"]["kl"] == 0) * inside, -1) / inside.sum(-1)
    np.testing.assert_allclose(aux["sparsity/kl_rejected"], share, rtol=1e-12)
    held = jax.grad(lambda kl: jnp.sum(get_loss("tdpo2")(batch._replace(token_kl_chosen=kl))[0]))
    assert not np.any(held(batch.token_kl_chosen))


def test_any_loss_can_read_tokens(batch64):
    loss = with_tokens(
        get_loss("ipo_mean"), given_weights, name="given_weights", extra=frozenset({"token_weights_chosen"})
    )
    assert "logp_chosen" not in loss.needs and "ref_token_logps_chosen" in loss.needs
    assert repr(loss) == "given_weights(ipo_mean(tau=0.1))"
    expected = get_loss("ipo_mean")(weighted_sums(batch64, given_weights(batch64)))[0]
    np.testing.assert_allclose(loss(batch64)[0], expected, rtol=1e-12)
    assert "ref_token_logps_chosen" not in with_tokens(get_loss("simpo")).needs
