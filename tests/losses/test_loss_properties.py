"""What holds for every loss in the list: derivatives, extremes, tracing, equivalences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from loss_batches import make_batch

from ches_jax.losses import get_loss, incentives, loss_names, swap, with_label_smoothing
from ches_jax.losses.incentives import READ_BY_CHOSEN, READ_BY_REJECTED

KINKED = {"hinge", "gpo_hinge", "slic"}  # derivatives checked once; their second ones are zero or absent
SORTING = {"aot", "aot_unpaired"}
STOPPED = {"bco_pair", "bco", "t_reg"}  # part of the value carries no gradient on purpose


def policy_fields(loss):
    return [n for n in (*READ_BY_CHOSEN, *READ_BY_REJECTED, "logp") if n in loss.needs]


def of_policy(loss, batch):
    """The loss as a function of the policy's log-probabilities only."""
    names = policy_fields(loss)

    def value(*arrays):
        return loss(batch._replace(**dict(zip(names, arrays, strict=True))))[0]

    return value, [getattr(batch, n) for n in names]


def plain(batch, loss):
    """The batch with what the loss reads, and nothing else."""
    return batch._replace(**{n: None for n in batch._fields if n not in loss.needs})


@pytest.mark.parametrize("name", sorted(set(loss_names()) - STOPPED))
def test_the_gradient_gives_the_slope_along_a_direction(name, x64):
    """Central differences along a random direction, loss by loss: in one compiled program a loss."""
    loss = get_loss(name)
    value, at = of_policy(loss, plain(make_batch(seed=3, dtype=np.float64), loss))
    rng, step = np.random.default_rng(0), 1e-6
    directions = [jnp.asarray(rng.normal(size=a.shape)) for a in at]

    @jax.jit
    def slopes(at, directions):
        up, down = (
            jnp.sum(value(*(a + sign * step * d for a, d in zip(at, directions, strict=True)))) for sign in (1, -1)
        )
        gradient = jax.grad(lambda arrays: jnp.sum(value(*arrays)))(at)
        return (up - down) / (2 * step), sum(jnp.vdot(g, d) for g, d in zip(gradient, directions, strict=True)), up

    numeric, exact, size = slopes(at, directions)
    # what rounding of the value leaves of the difference
    np.testing.assert_allclose(exact, numeric, rtol=1e-7, atol=10 * np.finfo(float).eps * abs(size) / step + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(loss_names()) - STOPPED))
def test_gradients_agree_with_differences(name, x64):
    loss = get_loss(name)
    value, at = of_policy(loss, plain(make_batch(seed=3, dtype=np.float64), loss))
    once = KINKED | SORTING | {"confpo"}
    # large constants (cal_dpo, sppo_hard, ipo_sft_sum) leave fewer digits to the differences
    check_grads(jax.jit(value), at, order=1 if name in once else 2, modes=["fwd", "rev"], atol=1e-4, rtol=1e-4)


def test_bco_boundary_carries_no_gradient(batch64):
    d = incentives(get_loss("bco_pair", beta=0.5))(batch64)
    state = get_loss("bco_pair", beta=0.5)(batch64)[1]["state/reward_mean"]
    chosen = 0.5 * (batch64.logp_chosen - batch64.ref_logp_chosen)
    np.testing.assert_allclose(d.chosen, 0.5 * jax.nn.sigmoid(state.mean - chosen), rtol=1e-12)


FAR = np.array(
    [
        (chosen, rejected, reference)
        for chosen, rejected in ((0.0, -1000.0), (-1000.0, 0.0), (-1000.0, -1000.0), (0.0, 0.0))
        for reference in (0.0, -1000.0)
    ]
)
"""Log-probabilities of chosen and rejected response under the policy, and of both under the reference."""


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", loss_names())
def test_a_thousand_nats_either_way_leave_all_finite(name, dtype, x64):
    loss = get_loss(name)
    batch = plain(make_batch(dtype=dtype), loss)
    if not loss.needs.isdisjoint(("chosen_tokens", "rejected_tokens")):
        batch = batch._replace(chosen_tokens=jnp.ones(4, jnp.int32), rejected_tokens=jnp.ones(4, jnp.int32))

    def far(field):
        which = 2 if field.startswith("ref_") else int(field in READ_BY_REJECTED)
        like = getattr(batch, field)
        return jnp.stack([jnp.full_like(like, value) for value in FAR[:, which]])

    def evaluate(policy, reference):
        def total(policy):
            value, _ = loss(batch._replace(**policy, **reference))
            return jnp.sum(value), value

        return jax.grad(total, has_aux=True)(policy)

    reference = {n: far(n) for n in loss.needs if n.startswith("ref_")}
    slopes, out = jax.jit(jax.vmap(evaluate))({n: far(n) for n in policy_fields(loss)}, reference)
    for array in (out, *slopes.values()):
        assert array.dtype == dtype
        # squares of gradients are summed for the norm, which must not overflow either
        for values in (np.asarray(array), np.square(array)):
            finite = np.isfinite(values).reshape(len(FAR), -1).all(1)
            assert finite.all(), FAR[~finite]


@pytest.mark.parametrize("name", loss_names())
def test_jit_and_vmap_change_nothing(name, batch):
    loss = get_loss(name)
    batch = plain(batch, loss)
    expected, aux = loss(batch)
    stacked = jax.tree.map(lambda a: np.stack([a, a]), batch)
    (jitted, jitted_aux), (mapped, _) = jax.jit(lambda one, two: (loss(one), jax.vmap(loss)(two)))(batch, stacked)
    np.testing.assert_allclose(jitted, expected, rtol=1e-5, atol=1e-5)
    assert jax.tree.structure(aux) == jax.tree.structure(jitted_aux)
    np.testing.assert_allclose(mapped, np.stack([expected, expected]), rtol=1e-5, atol=1e-5)
    assert expected.dtype == jnp.float32 and expected.shape == (4,)


@pytest.mark.parametrize(
    "name", sorted(set(loss_names()) - SORTING - STOPPED - {"sft"})
)  # a mean over the tokens of all
def test_a_pair_alone_has_the_loss_it_has_in_company(name, batch):
    loss = get_loss(name)
    batch = plain(batch, loss)
    whole, _ = loss(batch)
    second = jax.tree.map(lambda a: np.asarray(a)[1:2] if a.ndim else a, batch)
    np.testing.assert_allclose(loss(second)[0], whole[1:2], rtol=1e-6)


CHOSEN_ALONE = {"sft", "sft_sum", "sft_token"}


@pytest.mark.parametrize("name", sorted(CHOSEN_ALONE))
def test_a_loss_of_chosen_responses_alone_claims_no_reward(name, batch):
    _, aux = get_loss(name)(batch)
    assert "logp_rejected" not in get_loss(name).needs and not [key for key in aux if key.startswith("rewards/")]


@pytest.mark.parametrize("name", sorted(set(loss_names()) - {"kto", "bco"} - CHOSEN_ALONE))
def test_metrics_of_pairs(name, batch):
    _, aux = get_loss(name)(batch)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert aux[key].shape == (4,)
    np.testing.assert_array_equal(aux["rewards/accuracies"], (aux["rewards/margins"] > 0).astype(np.float32))


def ones(batch):
    one = jnp.ones(batch.logp_chosen.shape, jnp.int32)
    return batch._replace(chosen_tokens=one, rejected_tokens=one)


def no_reference(batch):
    nothing = jnp.zeros_like(batch.logp_chosen)
    return batch._replace(ref_logp_chosen=nothing, ref_logp_rejected=nothing)


DPO = partial(get_loss, "dpo", beta=0.3)
EQUIVALENT = {
    "cdpo 0": (get_loss("cdpo", beta=0.3, label_smoothing=0), DPO(), None),
    "robust 0": (get_loss("robust", beta=0.3, label_smoothing=0), DPO(), None),
    "smoothed dpo": (with_label_smoothing(DPO(), 0.2), get_loss("cdpo", beta=0.3, label_smoothing=0.2), None),
    "rpo 0": (get_loss("rpo", beta=0.3, alpha=0), DPO(), None),
    "dpo_sft_sum 0": (get_loss("dpo_sft_sum", beta=0.3, sft_coeff=0), DPO(), None),
    "ipo_sft_sum 0": (get_loss("ipo_sft_sum", tau=0.3, sft_coeff=0), get_loss("ipo_sum", tau=0.3), None),
    "dpop 0": (get_loss("dpop", beta=0.3, lam=0), DPO(), None),
    "dpo_shift 1": (get_loss("dpo_shift", beta=0.3, lam=1), DPO(), None),
    "flex equal": (get_loss("flex_dpo", beta=0.3, beta_rejected=0.3), DPO(), None),
    "odpo 0": (get_loss("odpo", beta=0.3, alpha=0), DPO(), None),
    "fdpo_alpha 1": (get_loss("fdpo_alpha", beta=0.3, alpha=1), DPO(), None),
    "gpo_logistic": (get_loss("gpo_logistic", beta=0.3), DPO(), None),
    "gpo_hinge": (get_loss("gpo_hinge", beta=0.3), get_loss("hinge", beta=0.3), None),
    "ln_dpo, one token": (get_loss("ln_dpo", beta=0.3), DPO(), ones),
    "ipo_mean, one token": (get_loss("ipo_mean", tau=0.3), get_loss("ipo_sum", tau=0.3), ones),
    "simpo, one token": (get_loss("simpo", beta=0.3, gamma=0), get_loss("cpo", beta=0.3, lam=0), ones),
    "simpo": (get_loss("simpo", beta=0.3, gamma=0), get_loss("ln_dpo", beta=0.3), no_reference),
    "alphapo 0": (get_loss("alphapo", beta=2, gamma=0.5, alpha=0), get_loss("simpo", beta=2, gamma=0.5), None),
    "cpo": (get_loss("cpo", beta=0.3, lam=0), DPO(), no_reference),
    "cpo with likelihood": (get_loss("cpo", beta=0.3), get_loss("dpo_sft_sum", beta=0.3, sft_coeff=1), no_reference),
}


@pytest.mark.parametrize("case", EQUIVALENT)
def test_equivalent_losses(case, batch64):
    one, other, change = EQUIVALENT[case]
    batch = change(batch64) if change else batch64
    np.testing.assert_allclose(one(batch)[0], other(batch)[0], rtol=1e-12)


def test_squares_are_ipo_in_other_scales(batch64):
    tau = 0.2
    ipo = get_loss("ipo_sum", tau=tau)(batch64)[0]
    np.testing.assert_allclose(get_loss("gpo_squared", beta=2 * tau)(batch64)[0], 4 * tau**2 * ipo, rtol=1e-12)
    gap = batch64._replace(rewards_chosen=batch64.rewards_rejected + 1 / (2 * tau))
    np.testing.assert_allclose(get_loss("rebel", eta=1.0)(gap)[0], ipo, rtol=1e-12)


def test_slic_is_a_hinge_without_reference(batch64):
    batch = no_reference(batch64)
    hinge = get_loss("hinge", beta=1.0)(batch)[0]
    np.testing.assert_allclose(get_loss("slic", delta=1.0)(batch)[0], hinge, rtol=1e-12)


def test_aot_of_one_pair_is_dpo(batch64):
    one = jax.tree.map(lambda a: a[:1] if a.ndim else a, batch64)
    for name in SORTING:
        np.testing.assert_allclose(get_loss(name, beta=0.3)(one)[0], DPO()(one)[0], rtol=1e-12)


def test_swapping_twice_is_the_same_batch(batch):
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, swap(swap(batch)), batch))
