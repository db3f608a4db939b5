"""Rank statistics on cases with known answers."""

import math
from fractions import Fraction

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


@pytest.mark.parametrize("rows", [300, stats._MANY])
def test_partial_correlation_is_that_of_the_residuals_of_least_squares(rows):
    """However many rows, and where two controls say the same."""
    one, other, third = (RNG.normal(size=rows).round(2) for _ in range(3))
    a, b = one + other + RNG.normal(size=rows), 3 * one - other + RNG.normal(size=rows)
    for controls in ([one], [one, other], [one, one, third], [np.ones(rows), one]):
        x, y, *held = (stats.ranks(v) for v in (a, b, *controls))
        design, sides = np.stack([np.ones(rows), *held], 1), np.stack([x, y], 1)
        residual = sides - design @ np.linalg.lstsq(design, sides, rcond=None)[0]
        want = residual[:, 0] @ residual[:, 1] / np.sqrt((residual**2).sum(0).prod())
        assert stats.partial_spearman(a, b, controls) == pytest.approx(want, abs=1e-12)
    assert stats.spearman(a, b) == pytest.approx(stats.partial_spearman(a, b, []), abs=1e-12)


def test_rank_correlations_are_those_of_exact_fractions(monkeypatch):
    """Of any rows, whichever way they are cut for the sums, and in whichever order they come."""
    values = [RNG.integers(0, 40, 500).astype(float) for _ in range(4)]
    values[0][::7] = np.nan

    def exact(a, b):
        x, y = ([Fraction(float(r)) - Fraction(len(a) + 1, 2) for r in stats.ranks(v)] for v in (a, b))
        products = [sum(p * q for p, q in zip(s, t, strict=True)) for s, t in ((x, y), (x, x), (y, y))]
        return float(products[0]) / math.sqrt(products[1] * products[2])

    both, order = np.isfinite(values[0]), RNG.permutation(500)
    want = exact(values[0][both], values[1][both])
    partial = stats.partial_spearman(values[0], values[1], values[2:])
    for at_once in (1 << 16, 100):
        monkeypatch.setattr(stats, "_AT_ONCE", at_once)
        assert stats.spearman(values[0], values[1]) == want
        assert stats.spearman(values[0][order], values[1][order]) == want
        mixed = [v[order] for v in values]
        assert stats.partial_spearman(mixed[0], mixed[1], mixed[2:]) == partial


def test_sums_of_products_stay_whole_numbers_beyond_64_bits(monkeypatch):
    columns = [np.full(9, (1 << 30) - 1, np.int32), np.full(9, 1 - (1 << 30), np.int32)]
    monkeypatch.setattr(stats, "_AT_ONCE", 8)  # no block of eight such products overflows
    square = 9 * ((1 << 30) - 1) ** 2
    assert stats._products(columns) == [[square, -square], [-square, square]]
    assert square > 1 << 63


def test_ranks_that_are_shared_are_those_of_each_column(monkeypatch):
    monkeypatch.setattr(stats, "_MANY", 0)
    monkeypatch.setattr(stats, "_KEPT", {})
    columns = [RNG.normal(size=20) for _ in range(stats._MOST_KEPT + 3)]
    for column in [*columns, *columns[::-1], columns[0], columns[0]]:
        assert (stats._shared_ranks(column) == 2 * stats.ranks(column) - 21).all()
    assert len(stats._KEPT) == stats._MOST_KEPT


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


def test_beyond_the_resampled_the_interval_is_halls_expansion():
    """t_q = z_q - g (2 z_q^2 + 1) / (6 sqrt n): few large values move both ends up."""
    n, z = stats.MOST_RESAMPLED + 200, 1.959963984540054
    values = np.where(np.arange(n) % 20 == 0, 10.0, 0.0)
    centred = values - values.mean()
    skewness = (centred**3).mean() / (centred**2).mean() ** 1.5
    shift, error = skewness * (2 * z**2 + 1) / (6 * np.sqrt(n)), values.std(ddof=1) / np.sqrt(n)
    low, high = stats.studentized_means(values[None])
    assert low[0] == pytest.approx(values.mean() - (z - shift) * error, rel=1e-12)
    assert high[0] == pytest.approx(values.mean() + (z + shift) * error, rel=1e-12)
