"""Names, hyper-parameters and missing inputs: nothing is silently replaced."""

import inspect

import jax.numpy as jnp
import pytest
from loss_batches import make_batch, pair

from ches_jax.errors import ChesError
from ches_jax.losses import LossInputs, describe, get_loss, loss_names, mean_loss
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
