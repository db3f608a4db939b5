"""Scores against their definitions on hidden states small enough to add up by hand."""

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

from ches_jax.errors import RunError
from ches_jax.scores import formulas
from ches_jax.stats import spearman


def stats(chosen, rejected):
    """Sufficient statistics of two lists of hidden states."""
    plus, minus = np.sum(chosen, axis=0), np.sum(rejected, axis=0)
    return plus @ minus, plus @ plus, minus @ minus, len(chosen), len(rejected)


HIDDEN = np.random.default_rng(0).normal(size=(7, 4))


def make_table(**columns):
    n = len(next(iter(columns.values())))
    base = {"row_id": [f"r{i}" for i in range(n)], "index": list(range(n))}
    return pa.table(base | columns)


def test_the_toy_value_of_the_definition():
    inner, plus, minus, n_plus, n_minus = stats([[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0]])
    assert formulas.ches(inner, plus) == (1 * 2 + 1 * 0) - (1 + 1)
    assert formulas.ln_ches(inner, plus, n_plus, n_minus) == 2 / (2 * 1) - 2 / (2 * 2)
    assert formulas.swapped(inner, minus) == 2 - 4
    assert formulas.projection(inner, plus) == 0.0
    assert formulas.cosine(inner, plus, minus) == pytest.approx(2 / (2**0.5 * 2))


def test_identical_responses_score_zero_and_swapping_roles_swaps_the_score():
    inner, plus, minus, n_plus, n_minus = stats(HIDDEN, HIDDEN)
    assert formulas.ches(inner, plus) == 0.0
    assert formulas.ln_ches(inner, plus, n_plus, n_minus) == 0.0
    inner, plus, minus, *_ = stats(HIDDEN[:3], HIDDEN[3:])
    assert formulas.swapped(inner, minus) == formulas.ches(*stats(HIDDEN[3:], HIDDEN[:3])[:2])


def test_ln_ches_is_ches_of_the_means():
    inner, plus, _, n_plus, n_minus = stats(HIDDEN[:3], HIDDEN[3:])
    means = stats([HIDDEN[:3].mean(0)], [HIDDEN[3:].mean(0)])
    assert formulas.ln_ches(inner, plus, n_plus, n_minus) == pytest.approx(formulas.ches(*means[:2]))


def test_ln_ches_survives_lengths_whose_product_overflows_int32():
    long = np.array([60_000], dtype=np.int32)
    assert formulas.ln_ches(np.array([3.6e9]), np.array([3.6e9]), long, long)[0] == 0.0


def test_soft_label_moves_between_the_two_orientations():
    inner, plus, minus, *_ = stats(HIDDEN[:3], HIDDEN[3:])
    ends = formulas.ches(inner, plus), formulas.swapped(inner, minus)
    assert formulas.soft_label(1.0, inner, plus, minus) == ends[0]
    assert formulas.soft_label(0.0, inner, plus, minus) == ends[1]
    assert formulas.soft_label(0.5, inner, plus, minus) == pytest.approx(sum(ends) / 2)


def test_jax_arrays_pass_through():
    score = formulas.ches(jnp.array([2.0, 3.0]), jnp.array([1.0, 1.0]))
    assert isinstance(score, jnp.ndarray)
    assert score.tolist() == [1.0, 2.0]


def test_score_column_reads_and_derives():
    table = make_table(
        ches=[1.0, None],
        inner=[3.0, 5.0],
        sqnorm_chosen=[2.0, 0.0],
        sqnorm_rejected=[4.0, 1.0],
        edit_distance=[0.25, 0.5],
    )
    assert formulas.score_column(table, "ches")[0] == 1.0
    assert formulas.score_column(table, "swapped")[0] == 3.0 - 4.0
    assert formulas.score_column(table, "minus_edit_distance")[0] == -0.25
    assert formulas.score_column(table, "projection")[0] == 0.5
    for name in formulas.available(table):
        assert np.isnan(formulas.score_column(table, name)[1]), f"{name} of an unscored row"


def test_a_vanishing_sum_has_no_cosine_and_no_warning():
    table = make_table(ches=[0.0], inner=[0.0], sqnorm_chosen=[0.0], sqnorm_rejected=[1.0], cosine=[None])
    table = table.set_column(6, "cosine", pa.array([None], pa.float64()))
    assert np.isnan(formulas.score_column(table, "projection")[0])
    assert np.isnan(formulas.score_column(table, "cosine")[0])


def test_random_is_seeded():
    table = make_table(ches=[1.0, 2.0, 3.0])
    first, again = (formulas.score_column(table, "random", seed=3) for _ in range(2))
    assert (first == again).all()
    assert (first != formulas.score_column(table, "random", seed=4)).any()


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("chess", "this table has ches, random"),
        ("edit_distance", "minus_edit_distance"),
        ("head_score", "--by head_score"),
        ("logp_margin", "columns logp_chosen, logp_rejected: score again with --logps"),
        ("swapped", "inner, sqnorm_rejected"),
    ],
)
def test_a_score_that_is_not_there_says_what_is(by, message):
    with pytest.raises(RunError, match=message):
        formulas.score_column(make_table(ches=[1.0]), by)


def test_spearman_knows_ties_gaps_and_constants():
    a = np.array([1.0, 2.0, 2.0, np.nan, 5.0])
    assert spearman(a, a**3) == pytest.approx(1.0)
    assert spearman(a, -a) == pytest.approx(-1.0)
    assert np.isnan(spearman(a, np.ones(5)))
    assert np.isnan(spearman(a[:1], a[:1]))
