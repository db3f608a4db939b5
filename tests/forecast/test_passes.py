"""Pull and push: transposes of each other, derivatives of what training computes, whatever the rows and the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ches_jax.forecast.linear import push_twice
from ches_jax.forecast.passes import Measure, Pull, Push, Rows
from ches_jax.forecast.setup import changes
from ches_jax.models.checkpoint.load import load_model, with_parameters
from ches_jax.models.precision import inner
from theory.models import kernels
from theory.models.lmview import decoder_view, sequences_of


@pytest.fixture(autouse=True)
def double(x64):
    """Everything here is in double precision."""


def shifted(passes, direction, size):
    return {k: p + size * direction[k] for k, p in passes.params.items()}


@pytest.mark.slow
def test_push_is_the_derivative_and_its_second_order_the_next(exact):
    """A wrong shared segment, a lost chunk or a missing cap would show in both."""
    passes, direction, _ = exact
    pairs = passes.run.pairs.held_out
    found = Push(passes.model, passes.rows, order=2)(passes.params, direction, pairs)
    measure, eps = Measure(passes.model, passes.rows), 1e-3
    at = [np.array(measure(shifted(passes, direction, k * eps), pairs)) for k in (-2, -1, 0, 1, 2)]
    np.testing.assert_allclose(found.logps, at[2], rtol=1e-12)
    # five points: the error is of order eps^4
    first = (at[0] - 8 * at[1] + 8 * at[3] - at[4]) / (12 * eps)
    second = (-at[0] + 16 * at[1] - 30 * at[2] + 16 * at[3] - at[4]) / (12 * eps**2)
    assert found.second is not None
    size = np.abs(found.first).max()
    np.testing.assert_allclose(found.first, first, atol=1e-8 * size)
    np.testing.assert_allclose(found.second, second, atol=1e-6 * np.abs(found.second).max())


def test_the_second_order_of_a_cube():
    """x^3 at 2 along 3: 8, 3 * 4 * 3 and 6 * 2 * 9."""
    found = push_twice(lambda x: x**3, jnp.float32(2.0), jnp.float32(3.0))
    assert [float(v) for v in found] == [8.0, 36.0, 108.0]


@pytest.mark.slow
def test_push_gives_the_rates_of_the_theorys_kernels(exact):
    passes, direction, _ = exact
    pairs = passes.run.pairs.held_out
    found = changes(Push(passes.model, passes.rows)(passes.params, direction, pairs).first)
    view, state = decoder_view(load_model(passes.run.model.directory, dtype="float64", param_dtype="float64"))
    velocity = nnx.split(with_parameters(passes.model.plain, direction))[1]
    velocity = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(velocity))
    for side, ours in zip(sequences_of(pairs), found, strict=True):
        rates = np.asarray(kernels.rates_along(view, state, side, velocity))
        np.testing.assert_allclose(ours, rates, atol=1e-8 * np.abs(rates).max())


def test_coefficients_times_rates_are_the_squared_length_of_what_they_pull(exact):
    passes, _, start = exact
    pairs = passes.run.pairs.train
    coefficients = list(-start.slopes / len(pairs))
    u = Pull(passes.model, passes.rows)(passes.params, pairs, coefficients)
    rates = np.array(Push(passes.model, passes.rows)(passes.params, u, pairs).first)
    square = float(inner(u, u))
    assert (np.array(coefficients) * rates).sum() == pytest.approx(square, rel=1e-10)
    # and it is the descent direction of the loss itself
    assert float(inner(u, start.gradient)) == pytest.approx(-square, rel=1e-10)


@pytest.mark.slow
def test_packing_and_meshes_change_nothing_beyond_rounding(exact, passes_of):
    passes, direction, start = exact
    pairs, run = passes.run.pairs.train, passes.run
    whole = np.array(Push(passes.model, passes.rows)(passes.params, direction, pairs).first)
    alone = Rows(run.layout._replace(row_tokens=64), run.mesh, batch_tokens=64)
    few = np.array(Push(passes.model, alone)(passes.params, direction, pairs).first)
    np.testing.assert_allclose(few, whole, atol=1e-11 * np.abs(whole).max())
    spread = passes_of(epochs=2.0, mesh="data=2,fsdp=2", steps=2)
    there, begun = spread.frozen_updates(whole_epoch=True)
    for name, g in start.gradient.items():
        np.testing.assert_allclose(np.asarray(begun.gradient[name]), g, atol=1e-11 * np.abs(g).max())
    numbers = np.array(spread.push(there)(pairs).first)
    moved = {k: jnp.asarray(np.asarray(v)) for k, v in there.items()}
    expected = np.array(Push(passes.model, passes.rows)(passes.params, moved, pairs).first)
    np.testing.assert_allclose(numbers, expected, atol=1e-10 * np.abs(expected).max())


@pytest.mark.slow
def test_directions_of_adapters_move_only_adapters(passes_of):
    """LoRA: the push against central differences in the adapters, and the split of the pull."""
    passes = passes_of(lora_rank=2, steps=2)
    assert passes.params.keys().isdisjoint(passes.model.frozen) and all("lora" in k for k in passes.params)
    moved, start = passes.frozen_updates()
    assert moved.keys() == start.gradient.keys() == passes.params.keys()
    pairs = passes.run.pairs.held_out
    rng = np.random.default_rng(0)
    direction = {k: jnp.asarray(rng.normal(size=p.shape), p.dtype) for k, p in passes.params.items()}
    found = np.array(passes.push(direction)(pairs).first)
    measure, eps = Measure(passes.model, passes.rows), 1e-5
    at = [np.array(measure(shifted(passes, direction, k * eps), pairs)) for k in (-2, -1, 1, 2)]
    np.testing.assert_allclose(
        found, (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * eps), atol=1e-8 * np.abs(found).max()
    )


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_sums_in_float32(exact, passes_of):
    passes, direction, _ = exact
    pairs = passes.run.pairs.held_out
    truth = np.array(Push(passes.model, passes.rows)(passes.params, direction, pairs).first)
    with jax.enable_x64(False):
        low = passes_of(epochs=2.0, dtype="bfloat16")
        moved, begun = low.frozen_updates()
        for tree in (low.params, moved, begun.gradient, begun.squares, low.metric(begun)):
            assert {v.dtype for v in tree.values()} == {jnp.dtype("float32")}
        found = np.array(
            low.push({k: jnp.asarray(np.asarray(v), jnp.float32) for k, v in direction.items()})(pairs).first
        )
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert np.linalg.norm(found - truth) <= 16 * eps * np.linalg.norm(truth)


def test_even_rows_leave_no_batch_half_empty(passes_of):
    """Every item once, in as many batches, of which none has two rows more than another."""
    passes = passes_of()
    pairs = [*passes.run.pairs.train] * 4
    rows = Rows(passes.run.layout._replace(row_tokens=256), passes.run.mesh, batch_tokens=256 * 7)
    full, even = (list(rows.batches(pairs, even=even)) for even in (False, True))
    used = [int((batch.lengths > 0).any(1).sum()) for batch, _ in even]
    assert len(even) == len(full) and len({batch.lengths.shape for batch, _ in even}) == 1
    assert max(used) == len(even[0][0].lengths) < len(full[0][0].lengths)
    assert sorted(p.item for _, places in even for p in places) == list(range(len(pairs)))
