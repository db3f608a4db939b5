r"""Every score of a pair, derived from its sufficient statistics.

With the sums :math:`S^\pm = \sum_{k=1}^{|y^\pm|} h_{x, y^\pm_{<k}}` of the hidden embeddings that
predict each response's tokens, the model pass stores ``inner`` :math:`= \langle S^+, S^- \rangle`,
``sqnorm_chosen`` :math:`= \|S^+\|^2`, ``sqnorm_rejected`` :math:`= \|S^-\|^2` and the lengths
``n_chosen``, ``n_rejected``. The functions here are plain arithmetic on those: they broadcast, and
take float64 numpy or JAX arrays alike.

For every similarity score higher means more similar, and hence, by the theory, more at risk of
displacement.

Source of the definitions: Razin et al., Unintentional Unalignment
(https://arxiv.org/abs/2410.08847).

>>> inner, sq_chosen, sq_rejected = 2.0, 2.0, 4.0  # the sums (1, 1) and (2, 0)
>>> ches(inner, sq_chosen), ln_ches(inner, sq_chosen, 2, 1), swapped(inner, sq_rejected)
(0.0, 0.5, -2.0)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from ches_jax.errors import RunError, did_you_mean
from ches_jax.scores.leading import why_no_other_default
from ches_jax.scores.table import Scores, blocks

Numbers: TypeAlias = Any
"""A float, a numpy array or a JAX array."""


def ches(inner: Numbers, sqnorm_chosen: Numbers) -> Numbers:
    r"""Centered hidden embedding similarity.

    .. math:: \mathrm{CHES}_x(y^+, y^-) = \langle S^+, S^- \rangle - \|S^+\|^2

    Returns:
      The score, in squared hidden units; 0 when the responses are identical.

    References:
      Definition 2.
    """
    return inner - sqnorm_chosen


def ln_ches(inner: Numbers, sqnorm_chosen: Numbers, n_chosen: Numbers, n_rejected: Numbers) -> Numbers:
    r"""Length-normalised CHES: the means of the hidden embeddings stand where the sums stood.

    .. math::
      \frac{\langle S^+, S^- \rangle}{|y^+| |y^-|} - \frac{\|S^+\|^2}{|y^+|^2}

    Returns:
      The score, in squared hidden units of a single token.

    References:
      Definition 3 (Appendix A).
    """
    # Divided one length at a time: the product of two int32 lengths can overflow.
    return inner / n_chosen / n_rejected - sqnorm_chosen / n_chosen / n_chosen


def cosine(inner: Numbers, sqnorm_chosen: Numbers, sqnorm_rejected: Numbers) -> Numbers:
    r"""Cosine of the two sums, in [-1, 1]; undefined (0 / 0) when a sum vanishes.

    .. math:: \langle S^+, S^- \rangle / (\|S^+\| \|S^-\|)
    """
    return inner / (sqnorm_chosen**0.5 * sqnorm_rejected**0.5)


def swapped(inner: Numbers, sqnorm_rejected: Numbers) -> Numbers:
    r"""CHES of the pair with its roles exchanged, squared hidden units.

    .. math:: \mathrm{CHES}_x(y^-, y^+) = \langle S^+, S^- \rangle - \|S^-\|^2

    References:
      Definition 2, at :math:`(y^-, y^+)`.
    """
    return ches(inner, sqnorm_rejected)


def projection(inner: Numbers, sqnorm_chosen: Numbers) -> Numbers:
    r"""CHES in units of the chosen sum: how far :math:`S^-` reaches along :math:`S^+`, less one.

    .. math:: \langle S^+, S^- \rangle / \|S^+\|^2 - 1 = \mathrm{CHES} / \|S^+\|^2

    Has the sign of CHES and no unit, so that it compares across models and response lengths.
    """
    return inner / sqnorm_chosen - 1.0


def soft_label(p: Numbers, inner: Numbers, sqnorm_chosen: Numbers, sqnorm_rejected: Numbers) -> Numbers:
    r"""Expected CHES when the label is right with probability ``p``, squared hidden units.

    .. math:: p\, \mathrm{CHES}_x(y^+, y^-) + (1 - p)\, \mathrm{CHES}_x(y^-, y^+)
    """
    return p * ches(inner, sqnorm_chosen) + (1.0 - p) * swapped(inner, sqnorm_rejected)


def gradient_score(inner: Any, norm_chosen: Any) -> Any:
    r"""How far a step of a loss with equal incentives lowers the chosen response.

    .. math:: \langle g_+, g_- \rangle - \|g_+\|^2

    >>> float(gradient_score(3.0, 2.0))
    -1.0

    References:
      Yuan et al. (https://arxiv.org/abs/2410.13828), the condition under which ln pi(chosen) falls.
    """
    return np.asarray(inner) - np.square(norm_chosen)


@dataclass(frozen=True, slots=True)
class Score:
    """A number of a pair that ``--by`` can name."""

    columns: tuple[str, ...]
    """The columns of the table it is computed from."""
    compute: Callable[..., Any]
    meaning: str
    similarity: bool = True
    """Whether higher means more similar; the others are controls."""


def _same(values: np.ndarray) -> np.ndarray:
    return values


SCORES: dict[str, Score] = {
    "ches": Score(("ches",), _same, "CHES (Definition 2), squared hidden units"),
    "ln_ches": Score(("ln_ches",), _same, "length-normalised CHES (Definition 3)"),
    "head_score": Score(("head_score",), _same, "exact score of the unembedding's gradient"),
    "last_hidden_inner": Score(("last_hidden_inner",), _same, "inner product of the last hidden states"),
    "cosine": Score(("cosine",), _same, "cosine of the summed hidden states"),
    "swapped": Score(("inner", "sqnorm_rejected"), swapped, "CHES with the roles exchanged"),
    "minus_edit_distance": Score(("edit_distance",), np.negative, "minus the normalised token edit distance"),
    "projection": Score(("inner", "sqnorm_chosen"), projection, "CHES over the chosen sum's squared norm"),
    "logp_margin": Score(
        ("logp_chosen", "logp_rejected"),
        np.subtract,
        "log-probability of chosen less rejected, nats",
        similarity=False,
    ),
    "grad_cosine": Score(("grad_cosine",), _same, "cosine of the gradients of both log-probabilities"),
    "gradient_score": Score(
        ("grad_inner", "grad_norm_chosen"), gradient_score, "how far a step of DPO lowers the chosen response"
    ),
    "influence": Score(
        ("influence",),
        _same,
        "nats by which training on the pair lowers the probes' chosen responses",
        similarity=False,
    ),
    "chosen_tokens": Score(("chosen_tokens",), _same, "length of the chosen response, tokens", similarity=False),
    "random": Score((), _same, "seeded uniform numbers", similarity=False),
}
"""The scores by name. For those with ``similarity`` higher means more similar, also where the
table's column says the opposite: the column ``edit_distance`` grows with difference, the score
``minus_edit_distance`` with similarity."""

_FLAG_OF = {
    "head_score": "--by head_score",
    "logp_chosen": "--logps",
    "logp_rejected": "--logps",
    "grad_cosine": "--gradients head",
    "grad_inner": "--gradients head",
    "grad_norm_chosen": "--gradients head",
}


def numbers(table: Scores, column: str) -> np.ndarray:
    """A numeric column as float64; NaN where the table has null.

    Raises:
      RunError: there is no such column.
    """
    if column not in table.schema.names:
        raise RunError(f"the score table has no column {column}; is it one of `ches score`, whole?")
    return _filled(len(table), (_float64(block, column) for block in blocks(table, [column])))


def _float64(block: pa.Table, column: str) -> np.ndarray:
    return block[column].cast(pa.float64()).to_numpy()


def _filled(rows: int, parts: Iterable[np.ndarray]) -> np.ndarray:
    """Parts one after another, [rows]: no second copy is made of a column."""
    out, at = np.empty(rows), 0
    for part in parts:
        out[at : at + len(part)] = part
        at += len(part)
    return out


def available(table: Scores) -> list[str]:
    """The names of the scores that ``table`` has the columns for."""
    return [name for name, s in SCORES.items() if set(s.columns) <= set(table.schema.names)]


def score_column(table: Scores, by: str, seed: int = 0) -> np.ndarray:
    """The score ``by`` of every row, float64; NaN where the row has none.

    A row that the model pass could not score (its ``ches`` is null) has no score of any name, so
    that every score and every control chooses among the same rows.

    Raises:
      RunError: an unknown name, or a score whose columns this table was not given.
    """
    if by not in SCORES:
        names = available(table)
        raise RunError(f"unknown score {by!r}: this table has {', '.join(names)}{did_you_mean(by, tuple(SCORES))}")
    missing = [name for name in SCORES[by].columns if name not in table.schema.names]
    if missing:
        flags = sorted({_FLAG_OF[name] for name in missing if name in _FLAG_OF})
        how = f"score again with {' '.join(flags)}" if flags else "it lacks the sums it is made of"
        if by == "influence":
            how = f"run `ches influence` and name its directory, or choose a score with --by: {why_no_other_default()}"
        raise RunError(
            f"score {by!r} needs the column{'s' * (len(missing) > 1)} {', '.join(missing)}: {how}. "
            f"This table has {', '.join(available(table))}"
        )
    if by == "random":
        values = np.random.default_rng(seed).random(len(table))
        return np.where(np.isnan(numbers(table, "ches")), np.nan, values) if "ches" in table.schema.names else values
    read = dict.fromkeys([*SCORES[by].columns, *(n for n in ("ches",) if n in table.schema.names)])
    return _filled(len(table), (_of_block(block, SCORES[by]) for block in blocks(table, [*read])))


def _of_block(block: pa.Table, score: Score) -> np.ndarray:
    """A score of some rows."""
    # A vanishing sum leaves cosine and projection undefined: NaN, hence not selectable.
    with np.errstate(divide="ignore", invalid="ignore"):
        values = score.compute(*(_float64(block, name) for name in score.columns))
    unscored = ~np.isfinite(values)
    if "ches" in block.schema.names:
        unscored |= np.isnan(_float64(block, "ches"))
    return np.where(unscored, np.nan, values)
