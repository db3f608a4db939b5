"""Advice follows from numbers: what is said, and what is not."""

import dataclasses

import numpy as np
import pytest

from ches_jax.displacement.advice import advice
from ches_jax.displacement.changes import Changes, Curve
from ches_jax.displacement.evidence import Criterion, Harm
from ches_jax.displacement.verdict import diagnose_changes

NOISE = np.random.default_rng(0).normal(size=(2, 100)) * 0.1


def diagnosed(chosen, rejected, **more):
    return diagnose_changes(Changes(chosen + NOISE[0], rejected + NOISE[1], "test", **more))


def said(diagnosis):
    return [line[0] for line in advice(diagnosis)]


@pytest.mark.parametrize(
    ("diagnosis", "words", "silent"),
    [
        (diagnosed(-3, -9), ["add a likelihood term", "it: ches influence"], ["nothing", "learning rate", "memorised"]),
        (diagnosed(3, -9), ["nothing"], ["likelihood", "influence"]),
        (diagnosed(-3, -1), ["lower the learning rate", "add a likelihood term"], ["nothing"]),
        (diagnose_changes(Changes(np.full(5, -3.0), np.full(5, -9.0), "x")), ["watch more held-out"], ["influence"]),
        (
            diagnose_changes(Changes(np.full(5, -3.0), np.full(5, -9.0), "x", unit="evaluations")),
            ["ches diagnose --before BASE --after TRAINED"],
            ["influence"],
        ),
        (diagnosed(-3, -9, beside=Changes(2 + NOISE[0], NOISE[1] - 2, "t")), ["fewer epochs"], []),
        (
            diagnosed(-3, -9, curve=Curve(np.arange(5), np.array([0, 1.5, 1, -1, -3.0]), np.zeros(5))),
            ["take the checkpoint near step 1"],
            ["fewer epochs"],
        ),
        *(
            (diagnosed(-3, -9, curve=Curve(np.arange(5), top, np.zeros(5))), ["likelihood"], ["take the checkpoint"])
            for top in (np.linspace(1, -3, 5), np.linspace(-3, 1, 5), np.array([0, 0.04, 0, -1, -3.0]))
        ),
        (dataclasses.replace(diagnosed(-3, -9), harm=Harm((Criterion("a", "met", "b"),))), ["do not use"], []),
        (
            dataclasses.replace(diagnosed(-3, -9), harm=Harm((Criterion("a", "not measured", "--judgments", True),))),
            ["find out where the mass went"],
            ["do not use"],
        ),
    ],
)
def test_advice_follows_from_what_was_measured(diagnosis, words, silent):
    lines = " | ".join(said(diagnosis))
    assert all(word in lines for word in words) and not any(word in lines for word in silent)
    assert all(all(part for part in line) for line in advice(diagnosis))


def test_what_a_pair_caused_comes_before_a_score():
    worst = ({"index": 4, "influence": 2.0}, {"index": 7, "influence": 5.0}, {"index": 9, "influence": -6.0})
    lines = advice(dataclasses.replace(diagnosed(-3, -9), worst=worst))
    # influence counts the nats that a pair takes from the probes, so the highest is to go
    assert any("row 7 moves the probes' chosen by -5 nats" in because for _, because, _ in lines)
    assert any("the highest influence" in what for what, _, _ in lines)
    scored = advice(dataclasses.replace(diagnosed(-3, -9), worst=({"index": 4, "head_score": 12.0},)))
    assert any(what.startswith("find the pairs that cause it: ches influence") for what, _, _ in scored)
