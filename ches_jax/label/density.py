r"""How much more often good responses stand behind a prompt than bad ones: weights of single responses for BCO.

.. math:: w(x) = \frac{p(x|\text{good})}{p(x|\text{bad})} = \frac{s(x)}{1 - s(x)}

where s(x) is the probability that a classifier of prompts gives the good responses, both kinds counting equally: a
logistic regression on a vector of each prompt, with a penalty on its coefficients. The ratio of a row comes from a
classifier that has not seen its prompt: prompts are dealt into folds, and each fold is judged by what the others teach.
The penalty is the one whose ratios predict the unseen labels best; where none beats a coin, every ratio is 1.

Pure functions of numpy arrays, float64.

References:
  Jung et al., Binary Classifier Optimization (https://arxiv.org/abs/2404.04656), underlying distribution matching.
  TRL's ``experimental.bco`` fits one classifier with a fixed penalty and judges by it the prompts that it was fitted
  on; with many features of few prompts it knows rows by heart, and the ratios lie at their bounds.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from ches_jax.errors import ChesError
from ches_jax.stats import auc

PENALTIES = tuple(10.0**power for power in range(-2, 5))
"""What is tried, strengths of the penalty on coefficients of features of variance 1, whose loss is summed over rows."""
LARGEST = 700.0
"""A log-ratio whose exponential is still a number."""


class DensityRatio(NamedTuple):
    """Of N rows."""

    ratio: np.ndarray
    """Estimated ratio of each row's prompt, not clipped."""
    penalty: float | None
    """None: no classifier tells prompts of good responses from those of bad ones."""
    held_out_loss: float
    """Mean cross-entropy of the labels of unseen prompts, both kinds counting equally, nats; ln 2 is a coin."""
    held_out_auc: float
    """Share of pairs of a good and a bad row that the classifier ranks rightly."""


def density_ratio(
    features: np.ndarray,
    good: np.ndarray,
    prompts: Sequence[Hashable],
    *,
    folds: int = 5,
    seed: int = 0,
    most_rows: int = 8192,
    penalty: float | None = None,
) -> DensityRatio:
    """The ratio of each row's prompt by a classifier that was fitted on other prompts.

    Args:
      features: [N, D] a vector of each row's prompt.
      good: [N] whether the row's response is a good one.
      prompts: [N] what is equal for equal prompts, whose rows stay together.
      folds: parts that the prompts are dealt into.
      seed: of the dealing, and of which rows are taken where there are more than ``most_rows``.
      most_rows: rows that a classifier is fitted on, at most.
      penalty: strength of the penalty; default: by the loss on unseen prompts.

    Raises:
      ChesError: features that are not finite; so few rows of one kind that some classifier would see none.

    >>> sort = np.repeat([0.0, 1.0], 200)  # of three good responses in four, and of one
    >>> good = np.arange(400) % 4 < np.where(sort == 0, 3, 1)
    >>> found = density_ratio(sort[:, None], good, range(400))
    >>> bool(2 < found.ratio[0] < 4 and 1 / 4 < found.ratio[-1] < 1 / 2)
    True
    """
    best = DensityRatio(np.ones(len(good)), None, float(np.log(2)), 0.5)
    if not np.isfinite(features).all():
        raise ChesError("the model's states of a prompt are not finite; try --dtype float32")
    if len(set(prompts)) == 1:
        return best
    rng = np.random.default_rng(seed)
    strengths = PENALTIES if penalty is None else (penalty,)
    weights = balanced(good)
    for strength, logits in zip(
        strengths, _unseen_logits(features, good, _dealt(prompts, folds, rng), strengths, most_rows, rng), strict=True
    ):
        loss = float(np.average(np.logaddexp(0.0, np.where(good, -logits, logits)), weights=weights))
        if penalty is not None or loss < best.held_out_loss:
            best = DensityRatio(np.exp(np.clip(logits, -LARGEST, LARGEST)), strength, loss, auc(logits, good))
    return best


def _unseen_logits(
    features: np.ndarray,
    good: np.ndarray,
    fold: np.ndarray,
    strengths: Sequence[float],
    most_rows: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """[strengths, N] log-odds of each row by classifiers of the other folds."""
    logits = np.zeros((len(strengths), len(good)))
    for number in range(fold.max() + 1):
        held_out, others = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        if good[others].all() or not good[others].any():
            raise ChesError(
                f"{int(good.sum())} rows of {len(good)} have good responses: in some of {fold.max() + 1} folds a "
                "classifier of prompts would see rows of one kind only; give more rows, or fewer --folds"
            )
        if len(others) > most_rows:
            others = _drawn(others, good, most_rows, rng)
        mean, scale = features[others].mean(0), features[others].std(0)
        scale = np.where(scale > 0, scale, 1.0)
        x = (features[others] - mean) / scale
        for of_strength, strength in zip(logits, strengths, strict=True):
            coefficients, constant = fitted(x, good[others], strength)
            by_feature = coefficients / scale
            of_strength[held_out] = features[held_out] @ by_feature + constant - mean @ by_feature
    return logits


def weights_of(ratio: np.ndarray, good: np.ndarray, low: float = 0.5, high: float = 10.0) -> np.ndarray:
    """What each row counts in the loss: a good one 1, a bad one the ratio of its prompt within bounds.

    >>> weights_of(np.array([3.0, 3.0, 0.1, 99.0]), np.array([True, False, False, False])).tolist()
    [1.0, 3.0, 0.5, 10.0]
    """
    return np.where(good, 1.0, np.clip(ratio, low, high))


def fitted(x: np.ndarray, good: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    r"""Coefficients and constant of the penalised logistic regression in which both kinds count equally.

    .. math:: \min_{\beta, b} \sum_i u_i \ln(1 + e^{-t_i (\langle \beta, x_i \rangle + b)})
      + \frac{\lambda}{2} \|\beta\|^2

    t is 1 for good and -1 for bad rows, and u as ``balanced`` has it.
    """
    sign, weight = np.where(good, 1.0, -1.0), balanced(good)

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (x @ values[:-1] + values[-1])
        pull = -weight * sign * expit(-margin)
        value = weight @ np.logaddexp(0.0, -margin) + 0.5 * penalty * values[:-1] @ values[:-1]
        return value, np.append(x.T @ pull + penalty * values[:-1], pull.sum())

    def curvature(values: np.ndarray, along: np.ndarray) -> np.ndarray:
        p = expit(x @ values[:-1] + values[-1])
        bent = weight * p * (1 - p) * (x @ along[:-1] + along[-1])
        return np.append(x.T @ bent + penalty * along[:-1], bent.sum())

    start = np.zeros(x.shape[1] + 1)
    options = {"maxiter": 1000, "gtol": 1e-9 * len(good)}
    found = minimize(loss, start, jac=True, hessp=curvature, method="trust-ncg", options=options).x
    return found[:-1], float(found[-1])


def balanced(good: np.ndarray) -> np.ndarray:
    """Weights of rows that sum to their number and give either kind half of it.

    >>> balanced(np.array([True, False, False, False])).round(3).tolist()
    [2.0, 0.667, 0.667, 0.667]
    """
    return np.where(good, len(good) / (2 * good.sum()), len(good) / (2 * (~good).sum()))


def _dealt(prompts: Sequence[Hashable], folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold of each row: equal prompts in one, folds of nearly as many prompts."""
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    of_prompt = rng.permutation(len(number)) % folds
    return of_prompt[[number[prompt] for prompt in prompts]]


def _drawn(rows: np.ndarray, good: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` of the rows, of each kind as large a share as it has."""
    kinds = [rows[good[rows]], rows[~good[rows]]]
    first = min(max(1, round(count * len(kinds[0]) / len(rows))), count - 1)
    return np.sort(np.concatenate([rng.permutation(kinds[0])[:first], rng.permutation(kinds[1])[: count - first]]))
