"""Verdicts and intervals on simulated runs whose truth is known: a few draws of each kind."""

import json
from pathlib import Path

import pytest

from experiments.benchmarks import simulated_verdicts as simulated

COMMITTED = Path(simulated.__file__).parent / "results" / "simulated_verdicts.json"


@pytest.mark.parametrize(
    "regime", [("pairs", "four of a prompt", 40), ("pairs", "heavy tails", 2000), ("steps", "", 50)]
)
def test_verdicts_are_right_on_a_few_draws(regime):
    source, shape, count = regime
    results = [simulated.simulate(source, shape, count, truth, draws=12) for truth in simulated.TRUTHS]
    assert sum(r.right for r in results) >= 3.8  # of 4: two wrong in 48 draws


def test_few_prompts_are_undecided():
    result = simulated.simulate("pairs", "four of a prompt", 20, "displaced", draws=3)
    assert result.right == 1  # five prompts


def test_the_committed_numbers_keep_what_the_documentation_says():
    results = [simulated.Result(**r) for r in json.loads(COMMITTED.read_text())]
    assert len(results) == len(list(simulated.regimes())) * len(simulated.TRUTHS)
    assert all(r.draws >= 1000 and r.right >= 0.95 for r in results)
    assert all(r.covered is None or r.covered >= 0.93 for r in results)
    page = (Path(__file__).parents[2] / "docs" / "diagnose.md").read_text()
    assert simulated.table(results) in page
