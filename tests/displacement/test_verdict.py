"""The verdict on a run: what the intervals say, and when they say nothing."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from ches_jax.displacement.changes import Changes
from ches_jax.displacement.evidence import Criterion, Harm
from ches_jax.displacement.intervals import Interval
from ches_jax.displacement.verdict import (
    FEWEST,
    VERDICTS,
    Diagnosis,
    diagnose_changes,
    rule_holds,
    verdict,
)
from ches_jax.errors import ChesError

INTERVALS = {
    "up": Interval(1.0, 0.5, 1.5),
    "down": Interval(-1.0, -1.5, -0.5),
    "level": Interval(0.0, -0.01, 0.01),
    "undecided": Interval(-0.5, -1.5, 0.5),
}


def test_a_run_is_not_called_by_the_name_of_a_regime_that_it_is_not():
    """Chosen fell, rejected and margin are unclear, most pairs are inverted: once called both_down_margin_up."""
    rng = np.random.default_rng(0)
    chosen, rejected = -1 + 0.1 * rng.normal(size=60), -0.65 + 2.9 * rng.normal(size=60)
    diagnosed = diagnose_changes(Changes(chosen, rejected, "test"))
    assert diagnosed.margin.mean < -0.3 and diagnosed.summary["displacement/inverted_rate"] > 0.5
    assert diagnosed.verdict == "chosen_down"
    assert diagnosed.directions == {"chosen": "down", "rejected": "undecided", "margin": "undecided"}
    assert any("margin did not clearly rise" in caveat for caveat in diagnosed.caveats)
    assert "margin change:" not in diagnosed.text()  # shares of a margin whose sign is unknown


@pytest.mark.parametrize(
    ("chosen", "rejected", "word", "directions"),
    [
        (-3, -9, "displaced", ("down", "down", "up")),
        (-4, -1, "chosen_down", ("down", "down", "down")),
        (-3, 1, "chosen_down", ("down", "up", "down")),
        (-3, -3, "chosen_down", ("down", "down", "level")),
        (2, -2, "not_displaced", ("up", "down", "up")),
        (5, 2, "not_displaced", ("up", "up", "up")),
        (1, 3, "not_displaced", ("up", "up", "down")),
        (0, -4, "not_displaced", ("level", "down", "up")),
        (0, 0, "not_displaced", ("level", "level", "level")),
        (0, 3, "not_displaced", ("level", "up", "down")),
    ],
)
def test_the_verdict_follows_the_chosen_responses_and_tells_the_others(chosen, rejected, word, directions):
    noise = np.random.default_rng(1).normal(size=(2, 200)) * 0.01
    diagnosed = diagnose_changes(Changes(chosen + noise[0], rejected + noise[1], "test"))
    assert diagnosed.verdict == word and tuple(diagnosed.directions.values()) == directions
    assert diagnosed.text().startswith(f"verdict: {word} ")
    for name, direction in diagnosed.directions.items():
        interval = getattr(diagnosed, name)
        assert interval.low <= interval.mean <= interval.high
        assert diagnosed.to_json()[name] == {**vars(interval), "direction": direction}
    assert any("displacement is defined while the loss falls" in c for c in diagnosed.caveats) == (
        word == "chosen_down"
    )
    json.dumps(diagnosed.to_json())


def diagnosis(chosen: str, rejected: str, margin: str) -> Diagnosis:
    c, r, m = (INTERVALS[word] for word in (chosen, rejected, margin))
    return Diagnosis(
        verdict=verdict(c, m, 0.05),
        pairs=50,
        records=50,
        unit="pairs",
        source="test",
        chosen=c,
        rejected=r,
        margin=m,
        summary={},
        tolerance=0.05,
        caveats=(),
    )


@pytest.mark.parametrize(("chosen", "rejected", "margin"), [*itertools.product(INTERVALS, repeat=3)])
def test_every_combination_of_directions_has_the_verdict_that_its_words_mean(chosen, rejected, margin):
    result = diagnosis(chosen, rejected, margin)
    assert result.directions == {"chosen": chosen, "rejected": rejected, "margin": margin}
    expected = {
        "down": "displaced" if margin == "up" else "chosen_down",
        "up": "not_displaced",
        "level": "not_displaced",
        "undecided": "undecided",
    }
    assert result.verdict == expected[chosen] and result.verdict in VERDICTS
    fell = {"down": "yes", "up": "no", "level": "no", "undecided": "unclear"}[chosen]
    assert result.questions["did the chosen responses fall?"] == fell


@pytest.mark.parametrize(("low", "high", "word"), [(-0.04, 3.0, "not_displaced"), (-3.0, 0.04, "undecided")])
def test_an_interval_that_excludes_a_fall_is_enough(low, high, word):
    assert verdict(Interval(0.0, low, high), INTERVALS["up"], 0.05) == word


def test_noise_around_zero_is_undecided():
    noise = np.random.default_rng(1).normal(size=(2, 40)) * 5
    assert diagnose_changes(Changes(noise[0], noise[1], "test")).verdict == "undecided"


@pytest.mark.parametrize("pairs", [1, 2, FEWEST - 1])
def test_few_pairs_have_no_verdict(pairs):
    diagnosed = diagnose_changes(Changes(np.full(pairs, -3.0), np.full(pairs, -5.0), "test"))
    assert diagnosed.verdict == "undecided" and set(diagnosed.directions.values()) == {"undecided"}
    assert diagnosed.chosen.mean == -3 and any(f"{pairs} pairs are too few" in c for c in diagnosed.caveats)
    assert diagnosed.to_json()["chosen"] == {"mean": -3, "low": None, "high": None, "direction": "undecided"}
    enough = diagnose_changes(Changes(np.full(FEWEST, -3.0), np.full(FEWEST, -5.0), "test"))
    assert enough.verdict == "displaced" and any("intervals are rough" in c for c in enough.caveats)


@pytest.mark.parametrize(("pairs", "rough"), [(29, True), (30, False)])
def test_fewer_than_thirty_pairs_are_called_few(pairs, rough):
    diagnosed = diagnose_changes(Changes(np.full(pairs, -3.0), np.full(pairs, -5.0), "test"))
    assert any("are few" in c for c in diagnosed.caveats) == rough


def test_sides_are_resampled_together():
    chosen = np.random.default_rng(4).normal(size=50)
    margin = diagnose_changes(Changes(chosen, chosen - 1.0, "test")).margin
    assert margin.low == pytest.approx(1) == margin.high


def test_pairs_of_one_record_are_resampled_together():
    """Twenty records of ten equal pairs: the interval is that of twenty numbers, not of two hundred."""
    values = np.random.default_rng(5).normal(size=20)
    repeated = Changes(np.repeat(values, 10), np.zeros(200), "test", records=np.repeat(np.arange(20), 10))
    many, alone = diagnose_changes(repeated), diagnose_changes(Changes(values, np.zeros(20), "test"))
    assert (many.chosen.low, many.chosen.high) == pytest.approx((alone.chosen.low, alone.chosen.high))
    assert many.pairs == 200 and many.records == 20 and "200 pairs of 20 records" in many.text()
    few = Changes(np.full(40, -3.0), np.full(40, -5.0), "test", records=np.repeat(np.arange(4), 10))
    assert diagnose_changes(few).verdict == "undecided"


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(ChesError, match=r"1 of 3 pairs have log-probabilities that are NaN or infinite"):
        diagnose_changes(Changes(np.array([1.0, np.nan, 2.0]), np.zeros(3), "test"))
    with pytest.raises(ChesError, match="no pairs"):
        diagnose_changes(Changes(np.zeros(0), np.zeros(0), "test"))


@pytest.fixture(scope="module")
def fallen():
    return diagnose_changes(Changes(np.full(50, -3.0), np.full(50, -8.0), "test"))


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        (None, False),
        ("lld_rate>0.5", True),
        ("lld_rate<0.5", False),
        ("lld_rate >= 1", True),
        ("lld_rate<=1", True),
        ("lld_rate>1", False),
        ("margin<1e-3", False),
        ("dlogp_chosen<-1e0", True),
        ("margin > .5", True),
        ("displaced", True),
        ("undecided", False),
        ("harmful", False),
        ("chosen_down", False),
    ],
)
def test_a_rule_compares_a_number_or_a_verdict(fallen, rule, holds):
    assert rule_holds(fallen, rule) is holds


def test_a_rule_on_a_number_that_is_not_defined_holds():
    still = diagnose_changes(Changes(np.zeros(50), np.zeros(50), "test"))
    assert rule_holds(still, "chosen_share<-5") and not rule_holds(still, "margin<-5")


def test_a_rule_asks_for_harm(fallen):
    harm = Harm((Criterion("the held-out margin fell", "met", "margin -1"),))
    assert rule_holds(dataclasses.replace(fallen, harm=harm), "harmful")
    assert rule_holds(dataclasses.replace(fallen, summary={}), "margin<-5")  # nats are not known: the gate stays shut


@pytest.mark.parametrize(
    ("rule", "answer"),
    [
        ("lld_rate", "expected NAME>NUMBER"),
        ("lldrate>0.1", "Did you mean lld_rate?"),
        ("lld_rate>much", "expected"),
        ("both_down_margin_up", "displaced is the nearest, both_down_margin_up_rate>0.5"),
        ("inverted", "margin<0 is the nearest"),
        ("displacd", "Did you mean displaced?"),
    ],
)
def test_a_rule_that_cannot_be_read_is_answered_with_the_nearest(fallen, rule, answer):
    with pytest.raises(ChesError, match=answer.replace("?", r"\?")):
        rule_holds(fallen, rule)
