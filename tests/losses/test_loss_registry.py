"""Names, hyper-parameters and missing inputs: nothing is silently replaced."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_batches import make_batch, pair

from ches_jax.errors import ChesError
from ches_jax.losses import (
    LossInputs,
    describe,
    get_loss,
    incentives,
    loss_names,
    mean_loss,
    parse_loss,
    weighted_sum,
    with_label_smoothing,
    with_tokens,
)
from ches_jax.losses.registry import register


def test_an_unknown_name_lists_the_names():
    with pytest.raises(
        ChesError,
        match=r"no loss is named 'ipo'; the nearest are ipo_mean, ipo_sum; the names are: alphapo, ",
    ):
        get_loss("ipo")


def test_a_name_in_capitals_is_answered_with_the_small_one():
    with pytest.raises(ChesError, match="no loss is named 'DPO'; the nearest are dpo,"):
        get_loss("DPO")


def test_arrays_in_place_of_the_inputs_are_answered_with_what_it_takes():
    one = jnp.zeros(2)
    with pytest.raises(ChesError, match="expected one ches_jax"):
        get_loss("dpo")(one, one, one, one)  # type: ignore[arg-type]


def test_problems_of_hyper_parameters_are_reported_together():
    with pytest.raises(ChesError) as raised:
        get_loss("cdpo", beta=0.0, label_smoothing=1.5, lam=1.0)
    message = str(raised.value)
    assert "loss 'cdpo': 3 problems" in message
    assert "beta=0.0 is outside (0, inf)" in message
    assert "label_smoothing=1.5 is outside [0, 1]" in message
    assert "no hyper-parameter 'lam'; it has: beta (default 0.1), label_smoothing (default 0.1)" in message


@pytest.mark.parametrize("value", [True, "0.1", None, float("nan"), float("inf")])
def test_values_that_are_no_finite_numbers(value):
    with pytest.raises(ChesError, match="beta="):
        get_loss("dpo", beta=value)


def test_open_ends():
    with pytest.raises(ChesError, match=r"label_smoothing=0.5 is outside \[0, 0.5\)"):
        get_loss("robust", label_smoothing=0.5)
    with pytest.raises(ChesError, match=r"label_smoothing=0 is outside \(0, 1\)"):
        get_loss("exo_pair", label_smoothing=0)


def test_what_was_resolved_is_what_is_shown():
    assert repr(get_loss("dpop", lam=5)) == "dpop(beta=0.3, lam=5)"
    assert repr(get_loss("dpo", beta=0.123456789)) == "dpo(beta=0.123456789)"


@pytest.mark.parametrize("name", loss_names())
def test_every_missing_field_is_named_with_the_loss(name):
    loss = get_loss(name)
    with pytest.raises(ChesError) as raised:
        loss(LossInputs())
    assert all(f"needs {field}" in str(raised.value) for field in loss.needs)
    assert f"loss {name!r}" in str(raised.value)


@pytest.mark.parametrize("name", loss_names())
def test_a_loss_reads_no_field_it_did_not_declare(name):
    loss, batch = get_loss(name), make_batch()
    loss(batch._replace(**{n: None for n in batch._fields if n not in loss.needs}))


def test_shapes_that_would_broadcast_are_refused():
    batch = pair(-1.0, -2.0)._replace(ref_logp_chosen=jnp.zeros((1, 1)))
    with pytest.raises(ChesError, match=r"its inputs differ in shape: .*ref_logp_chosen \(1, 1\)"):
        get_loss("dpo")(batch)


def test_weights_nobody_reads_are_refused():
    with pytest.raises(ChesError, match=r"wrap it: weighted\("):
        get_loss("dpo")(pair(-1.0, -2.0, weights=0.5))


@pytest.mark.parametrize("name", loss_names())
def test_docstrings_tell_equation_defaults_and_source(name):
    text = inspect.cleandoc(describe(name))
    assert ":math:" in text or ".. math::" in text
    assert "Defaults:" in text and "References:" in text
    assert get_loss(name).source
    for hyper in get_loss(name).hyper:
        assert hyper in text.replace("lambda", "lam"), hyper


def test_two_losses_cannot_share_a_name():
    with pytest.raises(ValueError, match="two losses are named 'dpo'"):
        register("dpo", source="")(lambda batch: batch)


def test_means_keep_the_state_apart():
    value, logs = mean_loss(get_loss("bco_pair"), make_batch())
    assert value.shape == () and logs["rewards/margins"].shape == ()  # pyright: ignore[reportAttributeAccessIssue]
    assert float(logs["state/reward_mean"].seen) == 8.0


def test_numbers_of_numpy_and_jax_are_numbers():
    half: Any
    for half in (np.float32(0.5), np.float64(0.5), np.array(0.5), jnp.float32(0.5)):
        assert repr(get_loss("dpo", beta=half)) == "dpo(beta=0.5)"
        assert repr(with_label_smoothing(get_loss("dpo"), half)) == "smooth(dpo(beta=0.1), label_smoothing=0.5)"
        assert repr(weighted_sum([(half, get_loss("dpo"))])) == "0.5*dpo(beta=0.1)"
    with pytest.raises(ChesError, match=r"beta=.*Tracer.* is not a number"):
        jax.jit(lambda beta: get_loss("dpo", beta=beta))(0.1)


def test_what_is_no_name_is_answered_with_what_reads_it():
    with pytest.raises(ChesError, match=r"given by its name, such as 'dpo', not \['sigmoid', 'sft'\]; .*from_trl"):
        get_loss(["sigmoid", "sft"])  # type: ignore[arg-type]
    with pytest.raises(ChesError, match=r"an expression is read by ches_jax\.losses\.parse_loss"):
        get_loss("wpo(dpo)")
    for make in (lambda: incentives("dpo"), lambda: with_label_smoothing("dpo"), lambda: with_tokens("dpo")):  # type: ignore[arg-type]
        with pytest.raises(ChesError, match=r"expected a loss, such as get_loss\('dpo'\), not 'dpo'"):
            make()


def like(shape, names):
    return {name: np.full(shape, -1.0) for name in names}


@pytest.mark.parametrize(
    ("loss", "change", "message"),
    [
        ("dpo", like((3, 1), ["logp_rejected"]), r"logp_rejected \(3, 1\)"),
        ("soft(dpo)", like((3, 1), ["label_probability"]), r"label_probability \(3, 1\)"),
        ("dove", like((1,), ["ref_logp_joint_chosen"]), r"ref_logp_joint_chosen \(1,\)"),
        ("ld_dpo", like((3, 1), ["token_mask_chosen"]), r"token_mask_chosen \(3, 1\)"),
        ("ld_dpo", like((1, 5), ["token_logps_chosen", "ref_token_logps_chosen", "token_mask_chosen"]), "token_logps"),
        ("weighted(ld_dpo)", like((1,), ["weights"]), r"weights \(1,\)"),
        ("list_mle", like((3,), ["scores"]), r"scores \(3,\)"),
        ("d2o", like((1, 4), ["logp_candidates", "ref_logp_candidates"]), r"logp_candidates \(1, 4\)"),
    ],
)
def test_shapes_of_every_kind_of_field_are_compared(loss, change, message):
    made = parse_loss(loss)
    shapes = {name: (3, 5) if "token_" in name or "mask" in name else (3,) for name in made.needs}
    shapes |= {name: (3, 4) for name in made.needs if "candidates" in name or "respons" in name or name == "scores"}
    batch: dict[str, Any] = {name: np.full(shape, -1.0) for name, shape in shapes.items()}
    made(LossInputs(**batch))
    with pytest.raises(ChesError, match=f"its inputs differ in shape: .*{message}"):
        made(LossInputs(**{**batch, **change}))
    with pytest.raises(ChesError, match="its inputs differ in shape"):
        jax.jit(lambda b: made(b)[0])(LossInputs(**{**batch, **change}))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_single(dtype):
    """A length of 1,001 tokens, or a capped exponential, has no place in half precision."""
    logps: Any = [jnp.asarray([v], dtype) for v in (-96.0, -80.0, -32.0, -64.0)]
    for name in ("fdpo_forward_kl", "ln_dpo", "dpo"):
        loss = get_loss(name)
        more: dict[str, Any] = {"chosen_tokens": [1001], "rejected_tokens": [2049]} if name == "ln_dpo" else {}
        value = loss(LossInputs(*logps, **more))[0]
        assert value.dtype == jnp.float32
        np.testing.assert_array_equal(value, loss(LossInputs(*(x.astype(jnp.float32) for x in logps), **more))[0])
    gradient = jax.grad(lambda x: get_loss("dpo")(LossInputs(x, *logps[1:]))[0].sum())(logps[0])
    assert gradient.dtype == dtype


def test_whole_numbers_are_numbers():
    ones = {
        "logp_chosen": [-8, -9],
        "logp_rejected": [-12, -9],
        "ref_logp_chosen": [-10, -9],
        "ref_logp_rejected": [-10, -9],
    }
    values: dict[str, Any] = {name: np.asarray(v, np.float32) for name, v in ones.items()}
    for name in ("odpo", "rebel", "fdpo_js", "bco_pair_unshifted"):
        loss = get_loss(name)
        rewards: dict[str, Any] = {
            n: v for n, v in {"rewards_chosen": [2, 1], "rewards_rejected": [1, 0]}.items() if n in loss.needs
        }
        np.testing.assert_allclose(loss(LossInputs(**ones, **rewards))[0], loss(LossInputs(**values, **rewards))[0])
        np.testing.assert_allclose(
            incentives(loss)(LossInputs(**ones, **rewards)).chosen,
            incentives(loss)(LossInputs(**values, **rewards)).chosen,
        )


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_quantiles_are_of_the_whole_batch_whatever_its_shape(name, batch):
    flat = get_loss(name)(LossInputs(*batch[:4]))[0]
    sides: Any = [np.asarray(a)[:, None] for a in batch[:4]]
    np.testing.assert_array_equal(get_loss(name)(LossInputs(*sides))[0][:, 0], flat)


def test_what_is_missing_is_named_by_incentives_too():
    with pytest.raises(ChesError, match="needs ref_logp_chosen, which the batch does not have"):
        incentives(get_loss("dpo"))(LossInputs(np.zeros(2), np.zeros(2)))
    with pytest.raises(ChesError, match=r"logp_chosen: no array of numbers"):
        get_loss("dpo")(LossInputs([[1.0], [1.0, 2.0]], *[np.zeros(2)] * 3))  # type: ignore[arg-type]
    with pytest.raises(ChesError, match="expected one ches_jax"):
        incentives(get_loss("dpo"))(None)  # type: ignore[arg-type]
