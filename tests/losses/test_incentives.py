"""Incentives by autodiff against their closed forms, and who is pushed where."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_batches import make_batch

from ches_jax.losses import get_loss, incentives, loss_names, unpair

BETA, TAU = 0.3, 0.1


@pytest.fixture
def gradients(batch64):
    b = batch64
    chosen, rejected = b.logp_chosen - b.ref_logp_chosen, b.logp_rejected - b.ref_logp_rejected
    n_w, n_l = (jnp.maximum(n, 1).astype(jnp.float64) for n in (b.chosen_tokens, b.rejected_tokens))
    return b, chosen, rejected, n_w, n_l


def table(gradients):
    """Rows of the table of incentives: loss, upward push on chosen, downward push on rejected."""
    b, r_w, r_l, n_w, n_l = gradients
    sig, m, u = jax.nn.sigmoid, r_w - r_l, b.logp_chosen - b.logp_rejected
    one = jnp.ones_like(m)
    dpo, ipo, slic = BETA * sig(-BETA * m), 2 * (1 / (2 * TAU) - m), (u < 1.0).astype(m.dtype)
    z = 2 * b.logp_chosen / n_w - 2 * b.logp_rejected / n_l
    penalised = BETA * (m - 5 * jnp.maximum(0, -r_w))
    shift = BETA * sig(-BETA * (r_w - 0.5 * r_l))
    ratio = jnp.exp(jnp.minimum(r_l, np.log(1.9)))
    return {
        "dpo": (get_loss("dpo", beta=BETA), dpo, dpo),
        "ipo": (get_loss("ipo_sum", tau=TAU), ipo, ipo),
        "cpo": (get_loss("cpo", beta=BETA, lam=0.2), BETA * sig(-BETA * u) + 0.2, BETA * sig(-BETA * u)),
        "slic": (get_loss("slic", lam=0.2), slic + 0.2, slic),
        "simpo": (get_loss("simpo", beta=2, gamma=0.5), 2 / n_w * sig(0.5 - z), 2 / n_l * sig(0.5 - z)),
        "dpop": (
            get_loss("dpop", beta=BETA, lam=5),
            BETA * (1 + 5 * (r_w < 0).astype(m.dtype)) * sig(-penalised),
            BETA * sig(-penalised),
        ),
        "dpo_shift": (get_loss("dpo_shift", beta=BETA, lam=0.5), shift, 0.5 * shift),
        "dpo_sft_sum": (get_loss("dpo_sft_sum", beta=BETA, sft_coeff=0.1), dpo + 0.1, dpo),
        "rpo": (get_loss("rpo", beta=BETA, alpha=0.5), dpo + 0.5 / n_w, dpo),
        "lsif": (get_loss("lsif"), jnp.exp(r_w), jnp.exp(2 * r_l)),
        "bce": (get_loss("bce"), sig(-r_w), sig(r_l)),
        "ukl": (get_loss("ukl"), one, jnp.exp(r_l)),
        "ddro": (get_loss("ddro"), one, ratio / (2 - ratio)),
    }


ROWS = ["dpo", "ipo", "cpo", "slic", "simpo", "dpop", "dpo_shift", "dpo_sft_sum", "rpo", "lsif", "bce", "ukl", "ddro"]


@pytest.mark.parametrize("name", ROWS)
def test_closed_forms(name, gradients):
    loss, chosen, rejected = table(gradients)[name]
    got = incentives(loss)(gradients[0])
    np.testing.assert_allclose(got.chosen, chosen, rtol=1e-9)
    np.testing.assert_allclose(got.rejected, rejected, rtol=1e-9)


# losses that by design push a response the other way somewhere
DOWN_FOR_CHOSEN = {"apo_down"}
TARGETS = {
    "ipo_mean",
    "ipo_sum",
    "gpo_squared",
    "rebel",
    "cdpo",
    "nca",
    "exo_pair",
    "discopop",
    "squaredpo",
    "cal_dpo",
    "sppo_hard",
    "ipo_sft_sum",
}


OF_LISTS = {name for name in loss_names() if "logp_responses" in get_loss(name).needs}
"""Their incentives are one for each response, and add up to nothing where the loss is of differences: test_listwise."""


@pytest.mark.parametrize("name", sorted(set(loss_names()) - TARGETS - DOWN_FOR_CHOSEN - OF_LISTS))
def test_chosen_is_never_pushed_down_nor_rejected_up(name):
    batches = jax.tree.map(lambda *a: jnp.stack(a), *(make_batch(seed) for seed in range(3)))
    got = jax.vmap(incentives(get_loss(name)))(batches)
    assert bool(jnp.all(got.chosen >= 0)) and bool(jnp.all(got.rejected >= 0))


@pytest.mark.parametrize("name", sorted(TARGETS - {"discopop"}))
def test_losses_with_a_target_push_towards_it_from_the_reference(name):
    batch = make_batch()
    batch = batch._replace(logp_chosen=batch.ref_logp_chosen, logp_rejected=batch.ref_logp_rejected)
    got = incentives(get_loss(name))(batch)
    assert bool(jnp.all(got.chosen > 0)) and bool(jnp.all(got.rejected > 0))


def test_discopop_pushes_the_wrong_way_at_the_reference_and_the_right_way_far_from_it():
    batch = make_batch()
    start = batch._replace(logp_chosen=batch.ref_logp_chosen, logp_rejected=batch.ref_logp_rejected)
    push = incentives(get_loss("discopop"))
    assert bool(jnp.all(push(start).chosen < 0))
    for shift in (-10.0, 10.0):
        assert bool(jnp.all(push(start._replace(logp_chosen=start.logp_chosen + shift)).chosen > 0))


def test_apo_down_pushes_both_down():
    batch = make_batch()
    batch = batch._replace(logp_chosen=batch.ref_logp_chosen, logp_rejected=batch.ref_logp_rejected + 0.1)
    got = incentives(get_loss("apo_down"))(batch)
    assert bool(jnp.all(got.rejected > 0))
    batch = batch._replace(logp_rejected=batch.ref_logp_rejected - 40.0)
    assert bool(jnp.all(incentives(get_loss("apo_down"))(batch).chosen < 0))


def test_rows_of_an_unpaired_loss_have_one_side(batch64):
    rows = unpair(batch64)
    got = incentives(get_loss("kto"))(rows)
    good = np.asarray(rows.desirable)
    assert np.all(got.chosen[good] > 0) and np.all(got.chosen[~good] == 0)
    assert np.all(got.rejected[~good] > 0) and np.all(got.rejected[good] == 0)


def test_shapes_follow_what_a_loss_reads(batch):
    assert incentives(get_loss("d2o"))(batch).chosen.shape == (4, 3)
    assert incentives(get_loss("ld_dpo"))(batch).chosen.shape == (4, 5)
    assert jax.jit(incentives(get_loss("dpo")))(batch).chosen.shape == (4,)
