"""Regimes of pairs and the summary of a log, on numbers whose answer is known."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from ches_jax.displacement.changes import REGIMES, SUMMARY, direction, displacement_summary, regimes
from ches_jax.errors import DataError


def test_every_pair_has_exactly_one_regime():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, 2000)) * 0.3
    names = regimes(chosen, rejected, 0.05)
    assert set(names) == set(REGIMES)
    for c, r, name in zip(chosen, rejected, names, strict=True):
        assert (name == "flat") == (abs(c) <= 0.05 and abs(r) <= 0.05)
        if name == "wanted":
            assert c >= 0 >= r and c - r > 0.05
        if name == "both_up":
            assert c - r > 0.05 and r > 0
        if name == "both_down_margin_up":
            assert c - r > 0.05 and c < 0
        assert name in ("inverted", "flat") or c - r >= -0.05
        if name == "inverted":
            assert c - r < -0.05
        if name == "together":
            assert abs(c - r) <= 0.05 and max(abs(c), abs(r)) > 0.05


def test_single_responses_are_counted_on_their_side_only():
    none = np.nan
    chosen, rejected = np.array([-1.0, none, -3.0]), np.array([-2.0, -1.0, none])
    out = displacement_summary(chosen, rejected)
    assert out["displacement/dlogp_chosen"] == -2 and out["displacement/dlogp_rejected"] == -1.5
    assert out["displacement/margin"] == 1 and out["displacement/both_down_margin_up_rate"] == 1
    assert regimes(chosen, rejected).tolist() == ["both_down_margin_up", "", ""]
    assert displacement_summary(chosen[1:2], rejected[1:2]).keys() == {
        "displacement/dlogp_rejected",
        "displacement/dlogp_rejected_median",
    }


def test_shares_of_the_margin_sum_to_one():
    out = displacement_summary(np.array([-2.0, -4.0]), np.array([-6.0, -9.0]))
    assert out["displacement/dlogp_chosen"] == -3 and out["displacement/margin"] == 4.5
    assert out["displacement/chosen_share"] + out["displacement/rejected_share"] == pytest.approx(1)
    assert out["displacement/chosen_share"] == pytest.approx(-3 / 4.5)
    assert out["displacement/lld_rate"] == 1 == out["displacement/both_down_margin_up_rate"]
    assert "displacement/chosen_share" not in displacement_summary(np.zeros(2), np.zeros(2))


def test_lists_are_read_as_arrays():
    assert displacement_summary([-2, -4], [-6.0, -9.0]) == displacement_summary(
        np.array([-2.0, -4.0]), np.array([-6.0, -9.0])
    )


def test_every_number_of_a_summary_has_a_listed_name():
    out = displacement_summary(np.array([-2.0, -4.0]), np.array([-6.0, -9.0]))
    assert [f"displacement/{name}" for name in SUMMARY] == sorted(out, key=[*out].index)


@pytest.mark.parametrize(("change", "rate"), [(-0.07, 1.0), (-0.05, 0.0), (-0.03, 0.0), (0.07, 0.0)])
def test_a_chosen_response_fell_when_it_lost_more_than_the_tolerance(change, rate):
    assert displacement_summary(np.array([change]), np.array([-1.0]), 0.05)["displacement/lld_rate"] == rate


@pytest.mark.parametrize(("low", "high"), [*itertools.combinations_with_replacement([-0.2, -0.05, 0, 0.05, 0.2], 2)])
def test_an_interval_goes_one_way_or_is_undecided(low, high):
    expected = {
        "up": low > 0.05,
        "down": high < -0.05,
        "level": low >= -0.05 and high <= 0.05,
    }
    assert sum(expected.values()) <= 1
    assert direction(low, high, 0.05) == next((word for word, true in expected.items() if true), "undecided")


def test_the_summary_and_the_options_need_numpy_alone():
    heavy = "('jax', 'flax', 'orbax', 'pyarrow', 'scipy', 'transformers')"
    code = (
        "import sys, ches_jax.displacement.changes, ches_jax.displacement.config, ches_jax.displacement.verdict\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_changes_of_other_pairs_or_of_no_numbers_are_refused():
    """They would broadcast: three changes against three by one are nine."""
    with pytest.raises(DataError, match=r"chosen \[3\] and rejected \[2\]; expected a change of each response"):
        displacement_summary([1.0, 2.0, 3.0], [1.0, 2.0])
    column = displacement_summary(np.array([[1.0], [2.0]]), [0.0, 1.0])
    assert column == displacement_summary([1.0, 2.0], [0.0, 1.0])
    with pytest.raises(DataError, match="rejected is no array of numbers"):
        displacement_summary([1.0], ["a"])  # type: ignore[list-item]
