"""Scores on arrays against plain double loops in numpy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.errors import DataError
from ches_jax.scores import ches, head_score, ln_ches, pair_statistics

B, T, U, D, V = 2, 5, 7, 4, 11


@pytest.fixture
def case():
    """States of two pairs; masks begin after a prompt of two tokens and end before padding that is not finite."""
    rng = np.random.default_rng(0)
    chosen, rejected, w = rng.normal(size=(B, T, D)), rng.normal(size=(B, U, D)), rng.normal(size=(V, D))
    mask_chosen, mask_rejected = np.zeros((B, T), bool), np.zeros((B, U), bool)
    mask_chosen[0, 1:4] = mask_chosen[1, 1:3] = True
    mask_rejected[0, 1:7] = mask_rejected[1, 1:5] = True
    chosen[:, -1], rejected[1, -1] = np.nan, np.nan
    targets = rng.integers(0, V, (B, T)), rng.integers(0, V, (B, U))
    return (chosen, targets[0], mask_chosen), (rejected, targets[1], mask_rejected), w


def double_loop(one, other, coefficient):
    """The sum over two tokens of coefficient x inner product of their states."""
    total = 0.0
    for h, y, counts in zip(*one, strict=True):
        for g, z, also in zip(*other, strict=True):
            if counts and also:
                total += coefficient(h, y, g, z) * float(h @ g)
    return total


def pairs(case):
    return [tuple(tuple(a[b] for a in side) for side in case[:2]) for b in range(B)]


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_ches_and_ln_ches_are_the_double_sums(case, xp, x64):
    (chosen, _, mask_chosen), (rejected, _, mask_rejected), _ = case
    stats = pair_statistics(xp.asarray(chosen), mask_chosen, xp.asarray(rejected), mask_rejected)
    assert isinstance(stats.inner, jax.Array if xp is jnp else np.ndarray)
    for b, (up, down) in enumerate(pairs(case)):
        inner, own = double_loop(up, down, lambda *a: 1.0), double_loop(up, up, lambda *a: 1.0)
        n, m = up[2].sum(), down[2].sum()
        np.testing.assert_allclose(ches(stats)[b], inner - own, rtol=1e-12)
        np.testing.assert_allclose(ln_ches(stats)[b], inner / n / m - own / n / n, rtol=1e-12)
        np.testing.assert_allclose(stats.sqnorm_rejected[b], double_loop(down, down, lambda *a: 1.0), rtol=1e-12)


def test_the_head_score_is_the_double_sum_with_coefficients(case, x64):
    (chosen, y, mask_chosen), (rejected, z, mask_rejected), w = case

    def residual(h, token):
        p = np.exp(w @ h - np.logaddexp.reduce(w @ h))
        return np.eye(V)[token] - p

    def alpha(h, token, g, other):
        return float(residual(h, token) @ residual(g, other))

    scores = head_score(chosen, y, mask_chosen, rejected, z, mask_rejected, w, chunk=4)
    assert scores.shape == (B,)
    for b, (up, down) in enumerate(pairs(case)):
        expected = double_loop(up, down, alpha) - double_loop(up, up, alpha)
        np.testing.assert_allclose(scores[b], expected, rtol=1e-11)
    alone = head_score(chosen[1], y[1], mask_chosen[1], rejected[1], z[1], mask_rejected[1], w)
    assert alone.shape == ()
    np.testing.assert_allclose(alone, scores[1], rtol=1e-11)


def test_sixteen_bits_accumulate_in_float32():
    half = np.ones((4096, 1), np.float16)
    stats = pair_statistics(half, np.ones(4096), half, np.ones(4096))
    assert stats.inner.dtype == np.float32 and float(stats.inner) == 4096.0**2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({1: np.ones((B, T + 1))}, "mask_chosen"),
        ({2: np.ones((B, U, D + 1))}, "same width"),
        ({2: np.ones((U, D)), 3: np.ones(U)}, "leading axes"),
    ],
)
def test_shapes_that_do_not_fit_are_named(case, change, message):
    arguments = [case[0][0], case[0][2], case[1][0], case[1][2]]
    for i, value in change.items():
        arguments[i] = value
    with pytest.raises(DataError, match=message.replace("leading axes", "leading")):
        pair_statistics(*arguments)


STATES, MASK, TARGETS = np.ones((2, 3, 4)), np.array([[0, 1, 1], [1, 1, 0]]), np.array([[0, 1, 2], [3, 4, 5]])
HEAD = np.zeros((6, 4))


@pytest.mark.parametrize("xp", [np, jnp], ids=["numpy", "jax"])
def test_a_mask_is_of_zeros_and_ones(xp):
    """An additive mask, or token ids in its place, would be read as something else."""
    of_booleans = ches(pair_statistics(STATES, MASK.astype(bool), STATES, MASK))
    for dtype in (np.int32, np.float32, np.uint8):
        sums = pair_statistics(xp.asarray(STATES), xp.asarray(MASK.astype(dtype)), xp.asarray(STATES), MASK)
        np.testing.assert_allclose(ches(sums), of_booleans)
    for wrong in (np.where(MASK, 0.0, -np.inf), TARGETS):
        with pytest.raises(DataError, match=r"mask_chosen: holds (-inf|2, 3, 4); expected true or 1 where the state"):
            pair_statistics(xp.asarray(STATES), xp.asarray(wrong), xp.asarray(STATES), MASK)
    traced = jax.jit(lambda mask: ches(pair_statistics(STATES, mask, STATES, MASK)))(MASK)
    np.testing.assert_allclose(traced, of_booleans)


@pytest.mark.parametrize(
    ("targets", "mask", "message"),
    [
        (MASK, TARGETS, "mask_chosen: holds 2, 3, 4"),
        (MASK.astype(bool), MASK, "targets_chosen: bool; expected token ids"),
        (TARGETS + 0.5, MASK, "targets_chosen: float32; expected token ids"),
        (TARGETS + 1, np.ones_like(MASK), "holds 6 where the mask is true; expected token ids from 0 to 5"),
        (np.where(MASK, TARGETS, -100), np.ones_like(MASK), "holds -100 where the mask is true"),
    ],
)
def test_targets_are_tokens_of_the_vocabulary(targets, mask, message):
    with pytest.raises(DataError, match=message):
        head_score(STATES, targets, mask, STATES, TARGETS, MASK, HEAD)


def test_targets_outside_the_mask_do_not_matter():
    ignored = np.where(MASK, TARGETS, -100)
    expected = head_score(STATES, TARGETS, MASK, STATES, TARGETS, MASK, HEAD)
    np.testing.assert_array_equal(head_score(STATES, ignored, MASK, STATES, ignored, MASK, HEAD), expected)


def test_what_is_no_array_is_named():
    for wrong in ([[[1.0, 2.0]], [[1.0]]], None, "states"):
        with pytest.raises(DataError, match="hidden_chosen"):
            pair_statistics(wrong, MASK, STATES, MASK)
    for score in (ches, ln_ches):
        with pytest.raises(DataError, match=r"a ndarray; expected the result of pair_statistics\(\.\.\.\)"):
            score(STATES)  # type: ignore[arg-type]


def test_no_position_and_no_pair_have_a_score():
    nothing = head_score(STATES[:, :0], TARGETS[:, :0], MASK[:, :0], STATES, TARGETS, MASK, HEAD)
    np.testing.assert_array_equal(nothing, [0, 0])
    assert head_score(STATES[:0], TARGETS[:0], MASK[:0], STATES[:0], TARGETS[:0], MASK[:0], HEAD).shape == (0,)
