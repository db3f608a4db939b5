"""The experiment on forecasts: its arithmetic, its plan, and (slow) a whole run of the tiny scale."""

import json

import numpy as np
import pytest

from experiments.forecast import SCALES, figures, rows, stages, tables
from experiments.forecast.data import pairs_file, write_pool
from experiments.forecast.report import _filter_verdict, _verdict
from experiments.forecast.summary import _filter, _predictor, calibration
from experiments.framework.intervals import crossed, holm
from experiments.framework.item import Work, configure, execute
from experiments.framework.training import write_rows


def test_a_predictor_that_is_the_change_is_perfect_and_noise_is_not():
    rng = np.random.default_rng(0)
    x, lengths = rng.normal(size=80), [rng.normal(size=80), rng.normal(size=80)]
    perfect = _predictor(x, [2 * x - 1, x], lengths, True)
    assert perfect["rho"] == pytest.approx(1) and perfect["equal_lengths"]["rho"] == pytest.approx(1)
    assert perfect["calibration"]["slope"] == pytest.approx(2) and perfect["calibration"]["r2"] == pytest.approx(1)
    # a change that follows length alone is nothing at equal lengths
    length = _predictor(lengths[0] + 0.05 * x, [lengths[0] + 0.05 * rng.normal(size=80)], lengths, False)
    assert length["rho"] > 0.95 and abs(length["equal_lengths"]["rho"]) < 0.4
    assert _predictor(lengths[0], [x], lengths, False)["equal_lengths"] == {"rho": None, "low": None, "high": None}
    noise = _predictor(rng.normal(size=80), [x], lengths, False)
    assert noise["low"] < 0 < noise["high"] and "calibration" not in noise


def test_calibration_tells_overstated_sizes():
    found = calibration(np.array([-4.0, -8.0, -12.0]), np.array([-3.0, -5.0, -7.0]))
    assert (found["slope"], found["intercept"], found["r2"]) == pytest.approx((0.5, -1.0, 1.0))


def test_a_filter_is_paired_with_all_over_pairs_and_orders():
    rng = np.random.default_rng(0)
    everything = rng.normal(-9, 5, (3, 50))
    chosen = {"all": everything, "good": everything + 1.0, "none": everything + rng.normal(0, 0.1, (3, 50))}
    rejected = {name: values - 2.0 for name, values in chosen.items()}
    good, none = (_filter(chosen, rejected, name) for name in ("good", "none"))
    assert good["both"]["mean"] == pytest.approx(1.0) and good["both"]["p"] == 0.0
    assert _filter_verdict({**good, "p_holm": 0.01}) == "held-out chosen fall less"
    assert _filter_verdict({**good, "p_holm": 0.06}) == "not distinguished from all pairs"
    assert none["both"]["low"] < 0 < none["both"]["high"] and none["both"]["p"] > 0.05
    assert good["accuracy"] == 1.0 and good["less_fall"] == pytest.approx(-1 / everything.mean())
    assert abs(none["gain"]["mean"]) < 0.1


def test_an_interval_over_draws_and_prompts_covers_both():
    """Simulated data with an effect of each."""
    rng, covered, alone = np.random.default_rng(1), [], []
    for _ in range(400):
        values = 1.0 + rng.normal(0, 0.3, (5, 1)) + rng.normal(0, 3.0, (1, 100)) + rng.normal(0, 1.0, (5, 100))
        found = crossed(values)
        covered.append(found["low"] < 1.0 < found["high"])
        error = values.mean(0).std(ddof=1) / 10
        alone.append(abs(values.mean() - 1.0) < 1.96 * error)
    assert 0.93 <= np.mean(covered) <= 0.99 and np.mean(alone) < np.mean(covered)
    assert holm([0.5, 0.001]) == [0.5, 0.002]


def test_the_verdict_compares_with_goal_and_pilot():
    def one(rho, low, high, equal):
        return {"rho": rho, "low": low, "high": high, "equal_lengths": {"rho": equal}}

    assert _verdict(one(0.92, 0.9, 0.95, 0.86), one(0.8, 0.7, 0.89, 0.8)).endswith("met; better than the pilot")
    assert "not met; the pilot is better" in _verdict(one(0.8, 0.75, 0.84, 0.86), one(0.9, 0.85, 0.95, 0.8))


def test_filters_train_for_as_many_updates_as_all():
    scale = SCALES["small"]
    assert scale.steps == 16 and {"all", "influence", "random"} <= set(scale.filters)
    names = [s.name for s in stages(scale)]
    assert [n for n in names if n.startswith("filter/")] == [
        f"filter/{n}/{s}" for s in scale.seeds for n in scale.filters
    ]
    # every seed draws its pool before its filters choose from it
    assert all(names.index(f"pool/{s}") < names.index(f"filter/all/{s}") for s in scale.seeds)
    assert scale.test >= 300 and len(scale.seeds) >= 5


def test_a_pool_is_a_draw_of_its_seed(tmp_path):
    work = Work("forecast", "small", SCALES["small"], tmp_path, quiet=True)
    rows = [{"prompt": str(i)} for i in range(SCALES["small"].tuned_on)]
    write_rows(pairs_file(work, "sft"), rows)
    pools = [[json.loads(line)["prompt"] for line in write_pool(work, s).read_text().splitlines()] for s in (0, 1, 0)]
    assert pools[0] == pools[2] != pools[1] and [len(set(p)) for p in pools] == [SCALES["small"].train] * 3


@pytest.mark.slow
def test_a_tiny_run_ends_in_a_report(tmp_path):
    config = configure("forecast", "tiny", {"mesh": "data=1"})
    result = json.loads(execute("forecast", "tiny", config, tmp_path / "run", resume=False, quiet=True).read_text())
    found = result["result"]["lrs"]["3e-05"]["sets"]["held_out"]["predictors"]
    assert {"first order", "second order", "pilot", "ches"} <= found.keys()
    assert len(rows(result)) == 13 and "at equal lengths" in tables(result)
    assert tables(result).count("| IPO |") == 2, "held-out and training pairs"
    drawn = figures(result, "tiny", tmp_path)
    assert len(drawn) == 2 and all(path.exists() for path in drawn)
