"""Every loss on one pair, its value spelled out as arithmetic."""

import json
from math import exp, expm1, log, log1p
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_batches import pair

from ches_jax.losses import LossInputs, RunningMean, get_loss, kto_baseline, loss_names, parse_loss, unpair
from ches_jax.losses.stable import capped_exp, capped_expm1


def sig(x):
    return 1 / (1 + exp(-x))


def nls(x):
    """Minus the log of the sigmoid."""
    return log(1 + exp(-x))


# r+ = -3 - -4 = 1, r- = -6 - -5 = -1, m = 2; 2 and 3 tokens; scores 1.5 and 1
PAIR = {
    "logp_chosen": -3.0,
    "logp_rejected": -6.0,
    "ref_chosen": -4.0,
    "ref_rejected": -5.0,
    "chosen_tokens": 2.0,
    "rejected_tokens": 3.0,
    "rewards_chosen": 1.5,
    "rewards_rejected": 1.0,
    "logp_joint_chosen": -8.0,
    "logp_joint_rejected": -20.0,
    "ref_logp_joint_chosen": -10.0,
    "ref_logp_joint_rejected": -19.0,
}

EXPECTED = {
    "dpo": ({"beta": 0.5}, nls(0.5 * 2)),
    "sigmoid": ({"beta": 0.5}, nls(0.5 * 2)),
    "gpo_logistic": ({"beta": 0.5}, nls(0.5 * 2)),
    "cdpo": ({"beta": 0.5, "label_smoothing": 0.2}, 0.8 * nls(1) + 0.2 * nls(-1)),
    "robust": ({"beta": 0.5, "label_smoothing": 0.2}, (0.8 * nls(1) - 0.2 * nls(-1)) / (1 - 0.4)),
    "ipo_sum": ({"tau": 0.1}, (2 - 5) ** 2),
    "ipo_mean": ({"tau": 0.1}, (1 / 2 + 1 / 3 - 5) ** 2),
    "hinge": ({"beta": 0.1}, 1 - 0.1 * 2),
    "gpo_hinge": ({"beta": 0.1}, 1 - 0.1 * 2),
    "gpo_squared": ({"beta": 0.1}, (0.2 - 1) ** 2),
    "gpo_exponential": ({"beta": 0.1}, exp(-0.2)),
    "gpo_truncated_quadratic": ({"beta": 0.1}, (1 - 0.2) ** 2),
    "gpo_savage": ({"beta": 0.1}, 1 / (1 + exp(0.2)) ** 2),
    "rebel": ({"eta": 4.0}, (2 / 4 - (1.5 - 1.0)) ** 2),
    "odpo": ({"beta": 0.5, "alpha": 2.0}, nls(1 - 2 * log(0.5))),
    "exo_pair": (
        {"beta": 0.5, "label_smoothing": 0.1},
        sig(1) * log(sig(1) / 0.9) + sig(-1) * log(sig(-1) / 0.1),
    ),
    "discopop": ({"beta": 0.1, "tau": 0.5}, (1 - sig(0.4)) * nls(0.2) + sig(0.4) * exp(-0.2)),
    "aot": ({"beta": 0.5}, nls(0.5 * ((-3 + 6) - (-4 + 5)))),
    "aot_unpaired": ({"beta": 0.5}, nls(0.5 * (1 + 1))),
    "fdpo_forward_kl": ({"beta": 0.5}, nls(0.5 * ((1 - exp(-1)) - (1 - exp(1))))),
    "fdpo_js": ({"beta": 0.5}, nls(0.5 * (log(2 * exp(1) / (1 + exp(1))) - log(2 * exp(-1) / (1 + exp(-1)))))),
    "fdpo_alpha": ({"beta": 0.5, "alpha": 0.5}, nls(0.5 * (expm1(-0.5) - expm1(0.5)) / -0.5)),
    "dpop": ({"beta": 0.5, "lam": 3.0}, nls(0.5 * 2)),
    "dpo_shift": ({"beta": 0.5, "lam": 0.75}, nls(0.5 * (1 + 0.75))),
    "flex_dpo": ({"beta": 0.5, "beta_rejected": 0.25}, nls(0.5 + 0.25)),
    "cal_dpo": ({"beta": 0.1}, nls(2) + (1 - 5) ** 2 / 2 + (-1 + 5) ** 2 / 2),
    "squaredpo": ({"beta": 0.5}, nls(0.5 * (1 * exp(-1) + 1 * exp(1)))),
    "nca": ({"beta": 0.5}, nls(0.5) + 0.5 * nls(-0.5) + 0.5 * nls(0.5)),
    "apo_zero": ({"beta": 0.5}, 1 - sig(0.5) + sig(-0.5)),
    "apo_down": ({"beta": 0.5}, sig(0.5) + 1 - sig(1.0)),
    "bco_pair_unshifted": ({"beta": 0.5}, nls(0.5) + nls(0.5)),
    "bce": ({"beta": 0.5}, nls(0.5) + nls(0.5)),
    "sppo_hard": ({"beta": 0.1}, (1 - 5) ** 2 + (-1 + 5) ** 2),
    "lsif": ({}, -exp(1) + 0.5 * exp(-2)),
    "ukl": ({}, -1 + exp(-1)),
    "ddro": ({}, -1 - log(2 - exp(-1))),
    "ln_dpo": ({"beta": 6.0}, nls(6 * (1 / 2 + 1 / 3))),
    "sigmoid_norm": ({"beta": 6.0}, nls(6 * (1 / 2 + 1 / 3))),
    "simpo": ({"beta": 2.0, "gamma": 0.5}, nls(2 * (-3 / 2) - 2 * (-6 / 3) - 0.5)),
    "alphapo": (
        {"beta": 2.0, "gamma": 0.5, "alpha": 0.5},
        nls(2 * ((1 - exp(1.5) ** 0.5) / 0.5 - (1 - exp(2.0) ** 0.5) / 0.5) - 0.5),
    ),
    "orpo": ({"beta": 0.1}, 1.5 + 0.1 * nls(log(exp(-1.5) / (1 - exp(-1.5))) - log(exp(-2) / (1 - exp(-2))))),
    "dpo_sft_sum": ({"beta": 0.5, "sft_coeff": 0.1}, nls(1) + 0.1 * 3),
    "ipo_sft_sum": ({"tau": 0.1, "sft_coeff": 10.0}, (2 - 5) ** 2 + 10 * 3),
    "rpo": ({"beta": 0.5, "alpha": 0.2}, nls(1) + 0.2 * 3 / 2),
    "cpo": ({"beta": 0.5, "lam": 0.1}, nls(0.5 * 3) + 0.1 * 3),
    "sft": ({}, 3 / 2),
    "sft_token": ({}, 3 / 2),
    "sft_sum": ({}, 3.0),
    "slic": ({"delta": 5.0, "lam": 0.1}, (5 - 3) + 0.1 * 3),
    "dove": ({"beta": 0.5}, nls(0.5 * ((-8 + 10) - (-20 + 19)))),
}
OTHERS = {
    "bco_pair",
    "kto",
    "bco",
    "d2o",
    "confpo",
    "ld_dpo",
    "t_reg",
    "tdpo",
    "tdpo2",
    "mapo",
    "sparsepo",
    "sparsepo_common",
    "list_mle",
    "list_softmax",
    "lipo_lambda",
    "pro",
}  # below, and in test_tokens


def test_every_loss_has_its_arithmetic():
    assert set(EXPECTED) | OTHERS == set(loss_names())


@pytest.mark.parametrize("name", EXPECTED)
def test_value(name, x64):
    hyper, expected = EXPECTED[name]
    value, _ = get_loss(name, **hyper)(pair(**PAIR))
    np.testing.assert_allclose(value, [expected], rtol=1e-12)


def test_dpop_penalises_a_fallen_chosen_response_inside_the_sigmoid(x64):
    value, _ = get_loss("dpop", beta=0.5, lam=3.0)(pair(-6.0, -9.0, -4.0, -5.0))
    np.testing.assert_allclose(value, [nls(0.5 * ((-2 + 4) - 3 * 2))], rtol=1e-12)


def test_dpo_is_ln_2_and_ipo_its_squared_target_at_the_reference(x64):
    same = pair(-7.0, -2.0, -7.0, -2.0)
    np.testing.assert_allclose(get_loss("dpo")(same)[0], [log(2)], rtol=1e-15)
    np.testing.assert_allclose(get_loss("ipo_sum", tau=0.2)(same)[0], [1 / (4 * 0.2**2)], rtol=1e-12)


def test_ddro_is_exact_at_the_reference(x64):
    assert float(get_loss("ddro")(pair(-7.0, -2.0, -7.0, -2.0))[0][0]) == 0.0


def test_bco_takes_a_state_and_gives_the_next_one(x64):
    loss = get_loss("bco_pair", beta=0.5)
    batch = pair(**{k: PAIR[k] for k in ("logp_chosen", "logp_rejected", "ref_chosen")}, ref_rejected=-9.0)
    before = RunningMean(jnp.asarray(0.25), jnp.asarray(4.0))
    value, aux = loss(batch._replace(reward_mean=before))
    delta = (4 * 0.25 + 0.5 * 1 + 0.5 * 3) / 6
    np.testing.assert_allclose(value, [nls(0.5 * 1 - delta) + nls(-(0.5 * 3 - delta))], rtol=1e-12)
    after = aux["state/reward_mean"]
    np.testing.assert_allclose((after.mean, after.seen), (delta, 6.0), rtol=1e-12)
    assert loss.stateful


def test_bco_state_does_not_depend_on_how_data_is_cut(batch64):
    loss = get_loss("bco_pair")
    whole = loss(batch64)[1]["state/reward_mean"]
    state = batch64.reward_mean
    for half in (slice(0, 1), slice(1, 4)):
        names = ("logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected")
        fields: dict[str, Any] = {n: getattr(batch64, n)[half] for n in names}
        part = LossInputs(**fields)._replace(reward_mean=state)
        state = loss(part)[1]["state/reward_mean"]
    np.testing.assert_allclose(state, whole, rtol=1e-12)


def test_kto_judges_each_row_against_the_baseline(x64):
    rows = LossInputs(
        logp=jnp.array([-3.0, -6.0]),
        ref_logp=jnp.array([-4.0, -5.0]),
        desirable=jnp.array([True, False]),
        kl_baseline=jnp.asarray(0.5),
    )
    value, aux = get_loss("kto", beta=0.5, weight_desirable=1.3, weight_undesirable=0.8)(rows)
    np.testing.assert_allclose(value, [1.3 * (1 - sig(0.5 * 0.5)), 0.8 * (1 - sig(0.5 * 1.5))], rtol=1e-12)
    np.testing.assert_allclose(aux["rewards"], [0.5, -0.5])


def test_bco_of_single_rows_weighs_bad_ones_by_the_density_of_their_prompts(x64):
    rows = LossInputs(
        logp=jnp.array([-3.0, -6.0]),
        ref_logp=jnp.array([-4.0, -5.0]),
        desirable=jnp.array([True, False]),
        reward_mean=RunningMean(jnp.asarray(0.25), jnp.asarray(4.0)),
    )
    delta = (4 * 0.25 + 0.5 - 0.5) / 6
    value, aux = get_loss("bco", beta=0.5)(rows)
    np.testing.assert_allclose(value, [nls(0.5 - delta), nls(0.5 + delta)], rtol=1e-12)
    np.testing.assert_allclose(aux["state/reward_mean"].mean, delta, rtol=1e-12)
    weighted, _ = parse_loss("weighted(bco(0.5))")(rows._replace(weights=jnp.array([1.0, 2.5])))
    np.testing.assert_allclose(weighted, [nls(0.5 - delta), 2.5 * nls(0.5 + delta)], rtol=1e-12)
    # the rows of pairs have the loss and the state of the pairs
    same: Any = pair(-3.0, -6.0, -4.0, -5.0)._replace(reward_mean=rows.reward_mean)
    of_pairs, paired = get_loss("bco_pair", beta=0.5)(same)
    np.testing.assert_allclose(get_loss("bco", beta=0.5)(unpair(same))[0].sum(), of_pairs[0], rtol=1e-12)
    np.testing.assert_allclose(paired["state/reward_mean"].mean, delta, rtol=1e-12)


def test_pairs_become_rows_chosen_first():
    rows: Any = unpair(pair(-3.0, -6.0, -4.0, -5.0)._replace(kl_baseline=jnp.asarray(0.0)))
    assert rows.logp.tolist() == [-3.0, -6.0] and rows.desirable.tolist() == [True, False]
    assert get_loss("kto")(rows)[0].shape == (2,)


def test_kto_baseline_is_never_negative():
    assert float(kto_baseline(jnp.array([1.0, 2.0]), jnp.array([0.0, 0.0]))) == 1.5
    assert float(kto_baseline(jnp.array([-1.0]), jnp.array([0.0]))) == 0.0


def test_d2o_averages_its_candidates(x64):
    batch = LossInputs(
        logp_candidates=jnp.array([[-1.0, -4.0]]),
        ref_logp_candidates=jnp.array([[-2.0, -3.0]]),
        logp_rejected=jnp.array([-6.0]),
        ref_logp_rejected=jnp.array([-5.0]),
    )
    value, aux = get_loss("d2o", beta=0.6, alpha=0.3)(batch)
    np.testing.assert_allclose(value, [nls(0.6 / 2 * (1 - 1) + 0.3 * 1)], rtol=1e-12)
    np.testing.assert_allclose(aux["rewards/margins"], [0.3], rtol=1e-12)


def test_odpo_asks_nothing_of_a_pair_whose_chosen_response_scores_no_higher():
    batch = pair(-3.0, -6.0, -4.0, -5.0, rewards_chosen=1.0, rewards_rejected=1.0)
    assert float(get_loss("odpo")(batch)[0][0]) == pytest.approx(0.0, abs=1e-12)


def test_cdpo_is_least_at_its_finite_margin(x64):
    best = log1p(-0.1) - log(0.1)
    values = [float(get_loss("cdpo", beta=1.0)(pair(best + d, 0.0))[0][0]) for d in (-0.1, 0.0, 0.1)]
    assert values[1] < min(values[0], values[2])


def test_golden_losses_of_every_family(shared, x64):
    records = sorted((shared / "golden").glob("*/golden.json"))
    assert records
    for path in records:
        golden = json.loads(path.read_text(encoding="utf-8"))
        policy, ref, expected = (golden["fp64"][k] for k in ("policy", "ref", "loss"))
        batch = LossInputs(
            logp_chosen=jnp.array(policy["logp_chosen"]),
            logp_rejected=jnp.array(policy["logp_rejected"]),
            ref_logp_chosen=jnp.array(ref["logp_chosen"]),
            ref_logp_rejected=jnp.array(ref["logp_rejected"]),
            chosen_tokens=jnp.array([len(p["chosen_ids"]) for p in golden["pairs"]]),
            rejected_tokens=jnp.array([len(p["rejected_ids"]) for p in golden["pairs"]]),
        )
        # the newer records hold float64 log-probabilities, but losses of float32 ones, and of single pairs only DPO's
        double = "fp64_hf_double" in golden
        tolerance = 1e-12 if double else 2e-5
        # the record's beta stands for tau too
        for loss, key in (
            (get_loss("dpo", beta=golden["beta"]), "dpo_per_pair"),
            (get_loss("ipo_sum", tau=golden["beta"]), "ipo_per_pair"),
            (get_loss("ipo_mean", tau=golden["beta"]), "ipo_avg_per_pair"),
        ):
            if double or key == "dpo_per_pair":
                actual = loss(batch)[0]
                np.testing.assert_allclose(actual, expected[key], rtol=tolerance, err_msg=f"{path.parent.name} {key}")


@pytest.mark.parametrize("name", ["hinge", "gpo_hinge", "gpo_truncated_quadratic"])
def test_a_hinge_is_flat_beyond_its_bound(name, x64):
    far = LossInputs(jnp.array([-3.0]), jnp.array([-26.0]), jnp.array([-4.0]), jnp.array([-5.0]))  # m = 22
    assert get_loss(name, beta=0.1)(far)[0].tolist() == [0.0]


@pytest.mark.parametrize(
    ("name", "moved"),
    [("aot", ("ref_logp_chosen", "ref_logp_rejected")), ("aot_unpaired", ("logp_rejected", "ref_logp_rejected"))],
)
def test_aot_compares_quantiles_of_a_batch_and_not_its_pairs(name, moved, x64):
    numbers = np.random.default_rng(0).normal(-5, 2, (4, 6))
    columns: Any = [jnp.asarray(n) for n in numbers]
    batch = LossInputs(*columns)
    other = batch._replace(**{field: getattr(batch, field)[::-1] for field in moved})
    values = [np.sort(np.asarray(get_loss(name, beta=0.5)(b)[0])) for b in (batch, other)]
    np.testing.assert_allclose(*values, rtol=1e-12)
    one, two = (np.sort(np.asarray(get_loss("dpo", beta=0.5)(b)[0])) for b in (batch, other))
    assert not np.allclose(one, two)


def test_dpo_shift_lessens_the_rejected_side_alone(x64):
    uneven = LossInputs(jnp.array([-3.0]), jnp.array([-8.0]), jnp.array([-4.0]), jnp.array([-5.0]))  # r+ = 1, r- = -3
    assert float(get_loss("dpo_shift", beta=0.5, lam=0.75)(uneven)[0][0]) == pytest.approx(nls(0.5 * (1 + 0.75 * 3)))


def test_equal_rewards_are_not_right(x64):
    same = LossInputs(jnp.array([-3.0]), jnp.array([-4.0]), jnp.array([-4.0]), jnp.array([-5.0]))
    assert float(get_loss("dpo")(same)[1]["rewards/accuracies"][0]) == 0.0


def test_joint_log_probabilities_are_logged_under_a_name_that_says_so(x64):
    joint = LossInputs(
        logp_joint_chosen=jnp.array([-8.0]),
        logp_joint_rejected=jnp.array([-20.0]),
        ref_logp_joint_chosen=jnp.array([-10.0]),
        ref_logp_joint_rejected=jnp.array([-19.0]),
    )
    logged = get_loss("dove", beta=0.5)(joint)[1]
    assert float(logged["logps_joint/chosen"][0]) == -8 and float(logged["rewards/chosen"][0]) == 1
    assert not [name for name in logged if name.startswith("logps/")]


def test_a_capped_exponential_goes_on_along_its_tangent(x64):
    for function, at_the_cap in ((capped_exp, exp(30)), (capped_expm1, expm1(30))):
        value, slope = jax.value_and_grad(function)(jnp.float64(32.0))
        assert float(value) == pytest.approx(at_the_cap + 2 * exp(30)) and float(slope) == pytest.approx(exp(30))
        assert float(function(jnp.float64(2.0))) == pytest.approx(exp(2) - (function is capped_expm1))
