"""Losses made of losses, and rules that weigh tokens."""

from math import exp, log
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
        (lambda: with_gate(DPO, alpha=0.0, threshold=0.5), "not above 0"),
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
        for name in ("confpo", "ld_dpo", "sparsepo"):
            np.testing.assert_allclose(get_loss(name)(padded)[0], get_loss(name)(batch64)[0], rtol=1e-12)
            assert bool(jnp.all(jnp.isfinite(incentives(get_loss(name))(padded).chosen)))


def test_sparsepo_weighs_rewards_and_divergences(x64):
    batch = tokens_of_one_pair(
        ref_token_logps_chosen=jnp.log(jnp.array([[0.25, 0.1, 0.9, 1.0]])),
        ref_token_logps_rejected=jnp.log(jnp.array([[0.2, 0.4]])),
        token_weights_chosen=jnp.array([[0.5, 1.0, 1.0, 1.0]]),
        token_weights_rejected=jnp.array([[1.0, 0.25]]),
        token_kl_chosen=jnp.array([[1.0, 2.0, 0.0, 9.0]]),
        token_kl_rejected=jnp.array([[3.0, 1.0]]),
        token_kl_weights_chosen=jnp.array([[1.0, 0.5, 1.0, 1.0]]),
        token_kl_weights_rejected=jnp.array([[0.0, 1.0]]),
    )
    value, _ = get_loss("sparsepo", beta=0.5)(batch)
    u, d = 0.5 * (0.5 * log(2) - 0.25 * log(2)), 0.5 * (1.0 - (1.0 + 1.0))
    np.testing.assert_allclose(value, [log(1 + exp(-(u - d)))], rtol=1e-12)


def test_any_loss_can_read_tokens(batch64):
    loss = with_tokens(
        get_loss("ipo_mean"), given_weights, name="given_weights", extra=frozenset({"token_weights_chosen"})
    )
    assert "logp_chosen" not in loss.needs and "ref_token_logps_chosen" in loss.needs
    assert repr(loss) == "given_weights(ipo_mean(tau=0.1))"
    expected = get_loss("ipo_mean")(weighted_sums(batch64, given_weights(batch64)))[0]
    np.testing.assert_allclose(loss(batch64)[0], expected, rtol=1e-12)
    assert "ref_token_logps_chosen" not in with_tokens(get_loss("simpo")).needs
