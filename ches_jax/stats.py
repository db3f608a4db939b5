"""Statistics of tables of pairs: ranks and rank correlations, quantiles, bootstrap intervals.

What describes scores is based on ranks or quantiles, so that a heavy tail does not decide it. Missing values are NaN:
they are left out, and a statistic that is undefined is NaN. Importing ``scipy.stats`` takes longer than all that is
computed here, so what needs little of it does without.
"""

import hashlib
import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from statistics import NormalDist

import numpy as np

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}
LEVEL = 0.95
"""Coverage of the intervals."""


def quantiles(values: np.ndarray) -> list[float]:
    """The values at ``QUANTILES`` of the finite ones; NaN when there is none.

    >>> quantiles(np.array([0.0, np.nan, 1.0, 2.0]))[0::3]
    [0.0, 1.0, 2.0]
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return [float("nan")] * len(QUANTILES)
    return [float(q) for q in np.quantile(finite, list(QUANTILES.values()), overwrite_input=True)]


def mean(values: np.ndarray) -> float:
    """The mean of the finite values; NaN when there is none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing their mean rank.

    >>> ranks(np.array([3.0, 1.0, 3.0]))
    array([2.5, 1. , 2.5])
    """
    return (_centred_ranks(values) + (len(values) + 1)) / 2


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Twice the ranks less their mean: whole numbers that add up to 0, [rows] int32."""
    order = np.argsort(values)
    ordered = values[order]
    starts = np.ones(len(values), dtype=bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    del ordered
    first = np.flatnonzero(starts).astype(np.int32)
    del starts
    counts = np.diff(first, append=np.int32(len(values)))
    centred = 2 * first + counts - np.int32(len(values))
    del first
    out = np.empty(len(values), dtype=np.int32)
    out[order] = np.repeat(centred, counts)
    return out


def _shared_ranks(values: np.ndarray) -> np.ndarray:
    """``_centred_ranks``, sorted once for each column: a page correlates every score with the same lengths."""
    if values.size < _MANY:
        return _centred_ranks(values)
    key = hashlib.sha256(np.ascontiguousarray(values).data).digest()
    found = _KEPT.pop(key) if key in _KEPT else _centred_ranks(values)
    while len(_KEPT) >= _MOST_KEPT:
        del _KEPT[next(iter(_KEPT))]
    _KEPT[key] = found
    return found


_MANY = 50_000
"""Rows from which on a sort takes longer than it does to look it up."""
_MOST_KEPT = 4
"""The columns that a page correlates at a time: two, and the lengths."""
_AT_ONCE = 1 << 16
"""Rows whose products are added up at once."""
_KEPT: dict[bytes, np.ndarray] = {}
"""Centred ranks of columns by a hash of these, the one that was needed last at the end."""


def _products(columns: Sequence[np.ndarray]) -> list[list[int]]:
    """The inner products of columns of centred ranks, exact, [columns][columns]."""
    rows = len(columns[0])
    # what is added up at once stays within 64 bits
    size = max(1, min(_AT_ONCE, ((1 << 63) - 1) // max(1, rows * rows)))
    found = [[0] * len(columns) for _ in columns]
    for start in range(0, rows, size):
        block = np.stack([column[start : start + size] for column in columns]).astype(np.int64)
        for row, more in zip(found, (block @ block.T).tolist(), strict=True):
            row[:] = map(operator.add, row, more)
    return found


def wilson(successes: int, n: int) -> tuple[float, float]:
    r"""Wilson's score interval of a proportion, at ``LEVEL`` (E. B. Wilson 1927).

    With p = successes / n and z the normal quantile of the level:

    .. math:: \frac{p + z^2 / 2n \pm z \sqrt{p (1 - p) / n + z^2 / 4n^2}}{1 + z^2 / n}

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.49, 0.943]
    """
    p, z = successes / n, NormalDist().inv_cdf((1 + LEVEL) / 2)
    scale = 2 * (n + z * z)
    middle, half = (2 * n * p + z * z) / scale, z / scale * math.sqrt(4 * n * p * (1 - p) + z * z)
    # at 0 and n a bound is 0 or 1, which the rounding of a difference would miss
    return middle - half if successes else 0.0, middle + half if successes < n else 1.0


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation over the rows where both are finite; NaN when it is undefined.

    Undefined: fewer than two rows, or all values of one side the same. The sums are those of whole numbers, without
    rounding: neither the order of the rows nor the number of threads is in the result.

    >>> round(spearman(np.array([1.0, 2.0, 3.0, np.nan]), np.array([2.0, 8.0, 4.0, 0.0])), 3)
    0.5
    """
    return partial_spearman(a, b, [])


def partial_spearman(a: np.ndarray, b: np.ndarray, controls: Sequence[np.ndarray]) -> float:
    """Spearman's correlation of ``a`` and ``b`` with the ranks of ``controls`` held fixed.

    The ranks of both are regressed on the ranks of the controls (with an intercept) and the residuals are
    correlated. NaN where nothing is left to correlate: too few rows, or a side that the controls explain.
    """
    finite = np.isfinite(a)
    for column in (b, *controls):
        finite &= np.isfinite(column)
    if finite.sum() < len(controls) + 2 + bool(controls):
        return float("nan")
    whole = finite.all()
    columns = [_shared_ranks(v if whole else v[finite]) for v in (*controls, a, b)]
    xx, xy, yy = _without_controls(_products(columns))
    return float(xy) / math.sqrt(xx * yy) if xx and yy else float("nan")


def _without_controls(products: Sequence[Sequence[int]]) -> tuple[Fraction, Fraction, Fraction]:
    """Of inner products of columns, those of the last two at right angles to all before them: exact elimination."""
    left = [[Fraction(value) for value in row] for row in products]
    for k in range(len(left) - 2):
        if not left[k][k]:  # constant, or said by those before it
            continue
        for row in left[k + 1 :]:
            factor = row[k] / left[k][k]
            row[:] = [value - factor * other for value, other in zip(row, left[k], strict=True)]
    return left[-2][-2], left[-2][-1], left[-1][-1]


def auc(values: np.ndarray, inside: np.ndarray) -> float:
    """Area under the ROC curve: the chance that a row inside has the higher value than a row outside, ties half.

    >>> auc(np.array([1.0, 2.0, 3.0]), np.array([False, False, True]))
    1.0
    """
    finite = np.isfinite(values)
    member = inside[finite]
    n, m = int(member.sum()), int((~member).sum())
    if n == 0 or m == 0:
        return float("nan")
    return float((ranks(values[finite])[member].sum() - n * (n + 1) / 2) / (n * m))


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray | float],
    rows: int,
    *,
    draws: int,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> np.ndarray:
    """Percentile bootstrap interval of a statistic, at ``LEVEL``.

    Args:
      statistic: from row numbers (with repetitions) to a number or an array of numbers; several quantities that
        share their rows are best computed together, so that they are resampled together.
      rows: how many rows there are.
      draws: resamples.
      seed: of the resampling. The same seed and number of rows give the same resamples for every statistic.
      clusters: a label for each row, [rows]; rows of one label are drawn together, as the pairs of one prompt must
        be, which are not independent. Default: every row by itself.

    Returns:
      The lower and the upper end, stacked in front: [2, ...]. Resamples whose statistic is NaN are left out.

    The interval is too short for few rows (at 8 normal ones it covers 89% where it says 95%) and for skewed ones.

    >>> values = np.arange(100.0)
    >>> bootstrap(lambda rows: values[rows].mean(), 100, draws=500).round(1).tolist()
    [43.7, 54.8]
    """
    rng = np.random.default_rng(seed)
    members = None
    if clusters is not None:
        _, label, counts = np.unique(clusters, return_inverse=True, return_counts=True)
        if counts.size < rows:
            members = np.split(np.argsort(label, kind="stable"), np.cumsum(counts)[:-1])
    if members is None:
        samples = rng.integers(0, rows, (draws, rows))
    else:
        drawn = rng.integers(0, len(members), (draws, len(members)))
        samples = (np.concatenate([members[c] for c in chosen]) for chosen in drawn)
    values = np.array([statistic(sample) for sample in samples], float)
    if np.isnan(values).all():  # no draw has the statistic: an effect size of equal values
        return np.full((2, *values.shape[1:]), np.nan)
    return np.nanquantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)


RESAMPLES = 2000
"""Resamples of a bootstrap-t interval."""
SMALLEST_SPREAD = 0.1
"""Least standard error of a resample, as a share of the sample's: one that missed the outliers has hardly any."""
MOST_RESAMPLED = 1000
"""Clusters up to which the distribution of t is resampled; beyond, its expansion says the same to the same order."""


def studentized_means(values: np.ndarray, *, clusters: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    r"""Bootstrap-t interval, at ``LEVEL``, of the mean of each row of [quantities, rows], over clusters of rows.

    .. math:: t^* = (\bar x^* - \bar x) / s^*, \qquad [\bar x - t^*_{0.975}\, s,\; \bar x - t^*_{0.025}\, s]

    with s the standard error of a ratio (sum over clusters over number of rows), which is the usual one where every row
    is a cluster. Quantities share the resamples, so that the interval of a difference of two equal ones has no width.
    With more than ``MOST_RESAMPLED`` clusters the quantiles of t* are those of its Edgeworth expansion, with the
    skewness g of the sample: :math:`t_q = z_q - g (2 z_q^2 + 1) / (6 \\sqrt n)`.

    Args:
      values: [quantities, rows], finite.
      clusters: a label for each row, [rows]; default: every row by itself.
      seed: of the resampling.

    Returns:
      Lower and upper ends, [2, quantities].

    References:
      Efron (1979); Hall (1988). The standard error is the linearised one of Cochran, Sampling Techniques, ch. 6.

    >>> low, high = studentized_means(np.arange(100.0)[None])
    >>> np.round([low[0], high[0]], 0).tolist()
    [44.0, 55.0]
    """
    means, error, residuals, sizes = _by_cluster(values, clusters)
    low, high = (
        _resampled_t(residuals, sizes, error, seed)
        if sizes.size <= MOST_RESAMPLED
        else _expanded_t(residuals, sizes.size)
    )
    return np.stack([means - high * error, means - low * error])


def student_means(values: np.ndarray, *, clusters: np.ndarray | None = None) -> np.ndarray:
    r"""Student's t interval, at ``LEVEL``, of the mean of each row of [quantities, rows], over clusters of rows.

    .. math:: \bar x \pm t_{0.975,\, n-1}\, s

    with s as in :func:`studentized_means` and n clusters. It holds its level under heavy tails, where resamples too
    often lack the outliers, and not under skewness.

    Returns:
      Lower and upper ends, [2, quantities].

    >>> low, high = student_means(np.arange(4.0)[None])
    >>> np.round([low[0], high[0]], 3).tolist()
    [-0.554, 3.554]
    """
    from scipy.special import stdtrit

    means, error, _, sizes = _by_cluster(values, clusters)
    half = float(stdtrit(sizes.size - 1, (1 + LEVEL) / 2)) * error
    return np.stack([means - half, means + half])


def _by_cluster(
    values: np.ndarray, clusters: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Means and their standard errors, [quantities]; residuals of the clusters, [quantities, clusters]; their sizes."""
    labels = np.arange(values.shape[1]) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    sizes = np.bincount(labels).astype(float)
    sums = np.stack([np.bincount(labels, row, minlength=sizes.size) for row in values])
    count = sizes.size
    means = sums.sum(1) / sizes.sum()
    residuals = sums - means[:, None] * sizes
    error = np.sqrt((residuals**2).sum(1) * count / (count - 1)) / sizes.sum()
    return means, error, residuals, sizes


@lru_cache(maxsize=2)
def _resamples(count: int, seed: int) -> np.ndarray:
    """How often each of ``count`` clusters is in each resample, [RESAMPLES, count]."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), RESAMPLES).astype(float)


def _resampled_t(residuals: np.ndarray, sizes: np.ndarray, error: np.ndarray, seed: int) -> np.ndarray:
    """Quantiles of t* over resamples of clusters, [2, quantities]."""
    count = sizes.size
    weights = _resamples(count, seed)
    total = weights @ sizes  # [draws]
    shift = residuals @ weights.T / total  # [quantities, draws]
    squares = (
        (residuals**2) @ weights.T - 2 * shift * ((residuals * sizes) @ weights.T) + shift**2 * (weights @ sizes**2)
    )
    spread = np.sqrt(np.maximum(squares, 0) * count / (count - 1)) / total
    with np.errstate(invalid="ignore", divide="ignore"):
        t = np.nan_to_num(shift / np.maximum(spread, SMALLEST_SPREAD * error[:, None]))
    return np.quantile(t, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)


def _expanded_t(residuals: np.ndarray, count: int) -> np.ndarray:
    """The same from the Edgeworth expansion of a studentised mean (Hall 1988), [2, quantities]."""
    variance, third = (residuals**2).mean(1), (residuals**3).mean(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        skewness = np.nan_to_num(third / variance**1.5)
    z = 1.959963984540054  # of the normal distribution, at LEVEL
    shift = skewness * (2 * z**2 + 1) / (6 * np.sqrt(count))
    return np.stack([-z - shift, z - shift])


def bootstrap_spearman(
    a: np.ndarray, b: np.ndarray, *, draws: int = 1000, seed: int = 0, less: np.ndarray | None = None
) -> dict[str, float]:
    """Spearman's correlation of a with b, ``rho``, and its bootstrap interval over rows, ``low`` and ``high``.

    With ``less``: the correlation of a with b less the correlation of ``less`` with b, on the same resampled rows.
    """

    def value(rows: np.ndarray | slice) -> float:
        other = 0.0 if less is None else spearman(less[rows], b[rows])
        return spearman(a[rows], b[rows]) - other

    low, high = bootstrap(value, len(a), draws=draws, seed=seed)
    return {"rho": value(slice(None)), "low": float(low), "high": float(high)}
