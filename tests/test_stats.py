"""Rank statistics on cases with known answers."""

import numpy as np
import pytest

from ches_jax import stats

RNG = np.random.default_rng(0)


def test_partial_correlation_removes_what_is_held_fixed():
    length = RNG.permutation(400).astype(float)
    one, other = length + RNG.normal(size=400), length + RNG.normal(size=400)
    assert stats.spearman(one, other) > 0.99
    assert abs(stats.partial_spearman(one, other, [length])) < 0.15


def test_partial_correlation_finds_what_length_hides():
    length, cause = RNG.normal(size=500), RNG.normal(size=500)
    score = cause - 3 * length
    other = cause + 3 * length
    assert stats.spearman(score, other) < -0.5
    assert stats.partial_spearman(score, other, [length]) > 0.8


def test_partial_correlation_with_no_control_is_spearman():
    a, b = RNG.normal(size=30), RNG.normal(size=30)
    assert stats.partial_spearman(a, b, []) == pytest.approx(stats.spearman(a, b))


@pytest.mark.parametrize("control", [np.ones(9), np.arange(9.0)])
def test_what_is_explained_or_constant_has_no_partial_correlation(control):
    assert np.isnan(stats.partial_spearman(np.arange(9.0), RNG.normal(size=9), [np.arange(9.0)]))
    assert np.isnan(stats.partial_spearman(np.ones(9), RNG.normal(size=9), [control]))
    assert np.isnan(stats.partial_spearman(np.arange(3.0), np.arange(3.0), [control[:3]]))


def test_auc_counts_wins_and_half_the_ties():
    values = np.array([1.0, 2.0, 2.0, 3.0, np.nan])
    inside = np.array([False, False, True, True, True])
    wins = (1 + 0.5) + (1 + 1)
    assert stats.auc(values, inside) == wins / (2 * 2)
    assert np.isnan(stats.auc(values, np.ones(5, bool)))


def test_quantiles_and_mean_of_nothing():
    nothing = np.full(3, np.nan)
    assert np.isnan(stats.quantiles(nothing)).all() and np.isnan(stats.mean(nothing))
    assert stats.quantiles(np.array([5.0])) == [5.0] * 7


def test_ranks_and_proportions_are_scipys():
    from scipy.stats import binomtest, rankdata

    values = np.array([3.0, -0.0, 0.0, np.inf, 3.0, -np.inf, 3.0, 1e-300])
    assert stats.ranks(values).tolist() == rankdata(values).tolist()
    for k, n in ((0, 7), (7, 7), (3, 11), (1, 1)):
        theirs = binomtest(k, n).proportion_ci(stats.LEVEL, method="wilson")
        assert stats.wilson(k, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
