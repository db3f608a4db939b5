"""What orders pairs by default, and that the reasons it gives are the numbers of the committed results."""

import json

import pytest

from ches_jax.scores.leading import ALONE, FILTERS, TOGETHER, leading_score, why_no_other_default
from experiments.framework.item import result_file


def result(item):
    return json.loads(result_file(item, "small").read_text(encoding="utf-8"))["result"]


def to_two_digits(values):
    return [f"{value:.2f}" for value in values]


@pytest.mark.parametrize("name", TOGETHER)
def test_correlations_in_runs_are_those_recorded(name):
    untuned = result("similarity")["objectives"]["dpo"]["random_pairs"]["spearman"][name]["rho"]
    sets = next(iter(result("forecast")["lrs"].values()))["sets"]
    column = name.removeprefix("minus_")  # its predictors have the sign of the theory: the fall
    tuned = [sets[which]["predictors"][column]["rho"] for which in ("train", "held_out")]
    assert to_two_digits(TOGETHER[name]) == to_two_digits([-untuned, *tuned])


def test_gains_of_filters_are_those_recorded():
    recorded = result("forecast")["filters"]
    assert to_two_digits(FILTERS.values()) == to_two_digits([recorded[n]["gain"]["mean"] for n in FILTERS])
    assert recorded["influence"]["gain"]["low"] > max(recorded[n]["gain"]["high"] for n in FILTERS if n != "influence")


def test_a_forecast_goes_first_then_influence_then_the_best_of_a_pair_alone():
    order = ["forecast_chosen", "influence", *ALONE]
    for k, name in enumerate(order):
        found = leading_score(order[k:][::-1])
        assert found is not None and found.name == name
    alone = leading_score(["ln_ches", "ches"])
    assert alone is not None and "after SFT no score of a pair alone predicted" in alone.why
    assert leading_score(["something"]) is None
    assert "influence +1.8" in why_no_other_default() and "ln_ches -0.5" in why_no_other_default()
