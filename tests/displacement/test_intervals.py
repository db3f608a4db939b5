"""Intervals of mean changes against independent arithmetic, and how often they cover."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from ches_jax.displacement import intervals
from ches_jax.displacement.intervals import FEWEST, Interval
from ches_jax.stats import LEVEL, MOST_RESAMPLED, RESAMPLES, SMALLEST_SPREAD, studentized_means


def by_loop(values, clusters, seed=0):
    """Bootstrap-t written out: one resample at a time, from the definition of the ratio's standard error."""
    labels = np.unique(clusters)
    sums = np.array([values[clusters == label].sum() for label in labels])
    sizes = np.array([(clusters == label).sum() for label in labels])

    def estimate(counts):
        rows = np.repeat(np.arange(len(labels)), counts)
        mean = sums[rows].sum() / sizes[rows].sum()
        residuals = sums[rows] - mean * sizes[rows]
        return mean, np.sqrt((residuals**2).sum() * len(rows) / (len(rows) - 1)) / sizes[rows].sum()

    mean, error = estimate(np.ones(len(labels), int))
    drawn = np.random.default_rng(seed).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), RESAMPLES)
    t = []
    for counts in drawn:
        again, spread = estimate(counts)
        t.append((again - mean) / max(spread, SMALLEST_SPREAD * error))
    low, high = np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean - high * error, mean - low * error


def test_the_interval_is_the_bootstrap_t_of_its_definition():
    rng = np.random.default_rng(3)
    values, clusters = rng.exponential(size=37), rng.integers(0, 12, 37)
    assert studentized_means(values[None], clusters=clusters)[:, 0] == pytest.approx(by_loop(values, clusters))
    both = studentized_means(np.stack([values, values**2]), clusters=clusters)  # of one resample, numerator and spread
    assert both[:, 1] == pytest.approx(by_loop(values**2, clusters))
    alone = studentized_means(values[None])[:, 0]
    assert alone == pytest.approx(by_loop(values, np.arange(37)))


def test_beyond_the_resampled_sizes_the_expansion_says_the_same(monkeypatch):
    values = -np.random.default_rng(4).lognormal(0, 1, MOST_RESAMPLED)
    resampled = studentized_means(values[None])[:, 0]
    monkeypatch.setattr("ches_jax.stats.MOST_RESAMPLED", 10)
    expanded = studentized_means(values[None])[:, 0]
    assert expanded == pytest.approx(resampled, abs=0.02)
    # t_q = z_q - g (2 z_q^2 + 1) / (6 sqrt n), Hall 1988
    n, g, z = len(values), scipy_stats.skew(values), scipy_stats.norm.ppf(0.975)
    t = np.array([z, -z]) - g * (2 * z**2 + 1) / (6 * np.sqrt(n))
    assert expanded == pytest.approx(values.mean() - t * values.std(ddof=1) / np.sqrt(n), rel=1e-6)


@pytest.mark.parametrize(("count", "known"), [(1, False), (2, False), (FEWEST - 1, False), (FEWEST, True)])
def test_fewer_than_eight_units_have_no_interval(count, known):
    values = np.random.default_rng(0).normal(size=(1, count))
    for method in (intervals.of_pairs, intervals.of_steps, intervals.of_evaluations):
        (found,) = method(values)
        assert found.known is known and np.isfinite(found.mean)
        assert (found.to_json()["low"] is None) is not known
    few = intervals.of_pairs(np.repeat(values, 10, axis=1), np.repeat(np.arange(count), 10))
    assert few[0].known is known


def test_the_interval_of_equal_sides_has_no_width():
    chosen = np.random.default_rng(4).normal(size=50)
    *_, margin = intervals.of_pairs(np.stack([chosen, chosen - 1, chosen - (chosen - 1)]))
    assert (margin.low, margin.high) == pytest.approx((1, 1))


def test_an_interval_of_pairs_is_the_wider_at_both_ends():
    skewed = -np.random.default_rng(8).lognormal(0, 1.5, (1, 20))
    (found,), resampled = intervals.of_pairs(skewed), studentized_means(skewed)[:, 0]
    student = scipy_stats.t.interval(LEVEL, 19, skewed.mean(), skewed.std(ddof=1) / np.sqrt(20))
    assert resampled[0] < student[0] and resampled[1] < student[1]  # each end is the wider one of another method
    assert (found.low, found.high) == pytest.approx((resampled[0], student[1]))


def coverage(draw, truth, repeats=100):
    hits = 0
    for _ in range(repeats):
        values, clusters = draw()
        found = intervals.of_pairs(values[None], clusters)[0]
        hits += found.low <= truth <= found.high
    return hits / repeats


@pytest.mark.parametrize(
    "count, per, correlation", [(8, 1, 0.0), (20, 1, 0.0), (20, 4, 0.7)], ids=["eight", "twenty", "four of a prompt"]
)
def test_intervals_cover_what_they_say(count, per, correlation):
    """At 100 draws 95 % is 95 +- 2; a plain bootstrap covers 89 %, 93 % and 70 % here."""
    rng = np.random.default_rng(5)

    def draw():
        shared = rng.normal(size=(count, 1)) * np.sqrt(correlation)
        values = shared + rng.normal(size=(count, per)) * np.sqrt(1 - correlation)
        return values.ravel(), np.repeat(np.arange(count), per)

    assert coverage(draw, 0.0) >= 0.88


def test_steps_are_cut_into_blocks_of_the_end():
    rng = np.random.default_rng(6)
    values = rng.normal(size=(2, 300)) + np.linspace(-50, 0, 300)
    end = values[:, -30:].reshape(2, 10, 3).mean(2)
    for found, blocks, r in zip(intervals.of_steps(values), end, intervals.dependence(values), strict=True):
        assert 0 <= r < 0.25
        error = blocks.std(ddof=1) / np.sqrt(10) * widening(r, 30, 10)
        expected = scipy_stats.t.interval(LEVEL, 9, blocks.mean(), error)
        assert (found.low, found.high) == pytest.approx(expected)
        assert found.mean == pytest.approx(blocks.mean())
    assert [intervals.end(n) for n in (3, 8, 50, 79, 80, 200)] == [3, 8, 8, 8, 8, 20]


def widening(r, count, blocks):
    """From the covariance of every step with every other, in float64."""
    covariance = r ** np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
    cut = np.kron(np.eye(blocks), np.full((1, count // blocks), blocks / count))
    of_blocks = cut @ covariance @ cut.T
    spread = (np.trace(of_blocks) - of_blocks.sum() / blocks) / (blocks - 1)  # the expected variance of their means
    return np.sqrt(covariance.sum() / count**2 / (spread / blocks))


def test_dependent_steps_have_wider_intervals_by_what_their_correlation_says():
    assert widening(0.0, 30, 10) == pytest.approx(1) and widening(0.6, 8, 4) > 1.5
    rng = np.random.default_rng(9)
    white = rng.normal(size=(1, 2000))
    noise = white.copy()
    for i in range(1, 2000):
        noise[:, i] += 0.5 * noise[:, i - 1]
    moving = noise + np.linspace(0, 40, 2000) ** 1.5
    assert intervals.dependence(white)[0] < 0.1 and intervals.dependence(moving)[0] == pytest.approx(0.5, abs=0.1)
    first = np.array([[0.0, 1.0, 1.5, 2.5, 3.0, 4.0, 4.5, 5.5]])
    assert intervals.dependence(first)[0] == 0 and intervals.dependence(np.zeros((1, 8)))[0] * 18 / 8 <= 0.9
    last = moving[:, -200:]
    means = last.reshape(1, 10, 20).mean(2)
    (found,), r = intervals.of_steps(moving), intervals.dependence(moving)[0]
    error = means.std(ddof=1) / np.sqrt(10) * widening(r, 200, 10)
    assert found.high - found.mean == pytest.approx(scipy_stats.t.ppf(0.975, 9) * error)


def test_the_last_evaluation_counts_and_a_smooth_course_has_no_noise():
    course = np.linspace(0, -6, 10)
    (found,) = intervals.of_evaluations(course[None])
    assert (found.mean, found.low, found.high) == pytest.approx((-6, -6, -6))
    noisy = course + 0.1 * np.random.default_rng(7).normal(size=10)
    (found,) = intervals.of_evaluations(noisy[None])
    noise = np.sqrt(((noisy[2:] - 2 * noisy[1:-1] + noisy[:-2]) ** 2).mean() / 6)
    assert found.mean == noisy[-1]
    assert found.high - found.mean == pytest.approx(scipy_stats.t.ppf(0.975, 4) * noise)


def test_an_interval_in_words():
    assert str(Interval(-0.5, -1.0, 0.25)) == "-0.500 [-1.000, +0.250]"
    assert str(Interval(-0.5, float("nan"), float("nan"))) == "-0.500 (no interval)"
