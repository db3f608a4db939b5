"""Agreement with TRL's own arithmetic, recorded by make_trl_golden.py."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.losses import LossInputs, get_loss, kto_baseline, mean_loss, with_sft
from ches_jax.losses.expression import FROM_TRL

GOLDEN = json.loads(Path(__file__).with_name("trl_golden.json").read_text(encoding="utf-8"))
CASES = {case["case"]: case for case in GOLDEN["cases"]}
PER_PAIR = [name for name, case in CASES.items() if "per_pair" in case]


@pytest.fixture
def batch(x64):
    tokens, reference = (np.array(GOLDEN[n]) for n in ("tokens", "ref_tokens"))
    mask = np.array(GOLDEN["mask"], np.int32)
    (t_w, t_l), (r_w, r_l), (m_w, m_l) = (np.split(a, 2) for a in (tokens, reference, mask))
    sums = [jnp.asarray(a.sum(1)) for a in (t_w, t_l, r_w, r_l, m_w, m_l)]
    return LossInputs(
        *sums,  # pyright: ignore[reportArgumentType]
        token_logps_chosen=t_w,
        token_logps_rejected=t_l,
        ref_token_logps_chosen=r_w,
        ref_token_logps_rejected=r_l,
        token_mask_chosen=m_w,
        token_mask_rejected=m_l,
    )


def test_every_loss_type_of_trl_is_compared():
    """A name that the list of TRL's loss types learns needs its arithmetic recorded."""
    compared = {case["loss"] for case in GOLDEN["cases"] if "loss" in case}
    assert {*FROM_TRL.values()} - {"sft"} <= compared  # sft: together with sigmoid
    assert GOLDEN["trl"] == "1.16.0"


@pytest.mark.parametrize("name", PER_PAIR)
def test_each_pair_has_the_loss_that_trl_gives_it(name, batch):
    case = CASES[name]
    value, _ = get_loss(case["loss"], **case["hyper"])(batch)
    np.testing.assert_allclose(value, case["per_pair"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in PER_PAIR if "metrics" in CASES[n]])
def test_metrics_have_trls_names_and_values(name, batch):
    case = CASES[name]
    _, aux = get_loss(case["loss"], **case["hyper"])(batch)
    for key, expected in case["metrics"].items():
        np.testing.assert_allclose(aux[key], expected, rtol=1e-6, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_losses_of_a_whole_batch(name, batch):
    case = CASES[name]
    value, _ = mean_loss(get_loss(case["loss"], **case["hyper"]), batch)
    np.testing.assert_allclose(value, case["mean"], rtol=1e-6)


def test_trl_pools_the_likelihood_over_the_tokens_of_the_batch(batch):
    case = CASES["sigmoid + sft, batch"]
    dpo = get_loss("sigmoid")
    pooled, _ = mean_loss(with_sft(dpo, case["sft"], per="batch_token"), batch)
    np.testing.assert_allclose(pooled, case["mean"], rtol=1e-6)
    per_pair, _ = mean_loss(get_loss("rpo", alpha=case["sft"]), batch)
    assert abs(float(per_pair) - case["mean"]) > 1e-3


def test_orpo_has_trls_odds_ratio_term(batch):
    with_odds, _ = get_loss("orpo")(batch)
    likelihood_only, _ = get_loss("orpo", beta=0.0)(batch)
    np.testing.assert_allclose(with_odds - likelihood_only, CASES["orpo"]["odds_term"], rtol=1e-5, atol=1e-6)


def test_kto(x64):
    case = CASES["kto"]
    baseline = kto_baseline(jnp.array(case["kl_logp"]), jnp.array(case["ref_kl_logp"]))
    batch = LossInputs(
        logp=np.array(GOLDEN["tokens"]).sum(1),
        ref_logp=np.array(GOLDEN["ref_tokens"]).sum(1),
        desirable=np.array(case["desirable"]),
        kl_baseline=baseline,
    )
    value, _ = mean_loss(get_loss("kto", **case["hyper"]), batch)
    assert baseline > 0
    np.testing.assert_allclose(value, case["mean"], rtol=1e-6)
