"""Regimes, summaries and verdicts on numbers whose answer is known."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.displacement.changes import REGIMES, displacement_summary, regimes
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import Changes, diagnose, failed, judge
from ches_jax.errors import ChesError


def test_every_pair_has_exactly_one_regime():
    rng = np.random.default_rng(0)
    chosen, rejected = rng.normal(size=(2, 2000)) * 0.3
    names = regimes(chosen, rejected, 0.05)
    assert set(names) == set(REGIMES)
    for c, r, name in zip(chosen, rejected, names, strict=True):
        assert (name == "flat") == (abs(c) <= 0.05 and abs(r) <= 0.05)
        if name == "wanted":
            assert c >= 0 >= r
        if name == "both_up":
            assert c >= r > 0
        if name == "both_down_margin_up":
            assert r <= c < 0
        if name == "inverted":
            assert c < r


def test_single_responses_are_counted_on_their_side_only():
    none = np.nan
    chosen, rejected = np.array([-1.0, none, -3.0]), np.array([-2.0, -1.0, none])
    out = displacement_summary(chosen, rejected)
    assert out["displacement/dlogp_chosen"] == -2 and out["displacement/dlogp_rejected"] == -1.5
    assert out["displacement/margin"] == 1 and out["displacement/both_down_margin_up_rate"] == 1
    assert regimes(chosen, rejected).tolist() == ["both_down_margin_up", "", ""]
    assert displacement_summary(chosen[1:2], rejected[1:2]).keys() == {
        "displacement/dlogp_rejected", "displacement/dlogp_rejected_median"
    }  # fmt: skip


def test_a_verdict_leaves_single_responses_out(tmp_path):
    n = 3
    columns = {
        "step": [2] * n, "set": ["train"] * n, "dlogp_chosen": [-1.0, -1.0, -5.0],
        "dlogp_rejected": [-2.0, -2.0, np.nan], "chosen_tokens": [4] * n, "rejected_tokens": [4, 4, 0],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "displacement.parquet")
    found = diagnose(DiagnoseConfig(run_dir=str(tmp_path)))
    assert found.pairs == 2 and found.chosen.mean == -1 and "1 single responses are not counted" in found.caveats


def test_shares_of_the_margin_sum_to_one():
    out = displacement_summary(np.array([-2.0, -4.0]), np.array([-6.0, -9.0]))
    assert out["displacement/dlogp_chosen"] == -3 and out["displacement/margin"] == 4.5
    assert out["displacement/chosen_share"] + out["displacement/rejected_share"] == pytest.approx(1)
    assert out["displacement/chosen_share"] == pytest.approx(-3 / 4.5)
    assert out["displacement/lld_rate"] == 1 == out["displacement/both_down_margin_up_rate"]
    assert "displacement/chosen_share" not in displacement_summary(np.zeros(2), np.zeros(2))


@pytest.mark.parametrize(
    ("chosen", "rejected", "verdict"),
    [
        (-3, -9, "both_down_margin_up"), (2, -2, "wanted"), (5, 2, "both_up"), (-4, -1, "inverted"),
        (0, 0, "flat"), (0, -4, "wanted"),
    ],
)  # fmt: skip
def test_the_verdict_follows_the_means(chosen, rejected, verdict):
    noise = np.random.default_rng(1).normal(size=(2, 200)) * (0.01 if verdict == "flat" else 0.2)
    found = judge(Changes(chosen + noise[0], rejected + noise[1], "test"))
    assert found.verdict == verdict and verdict in found.text()
    assert found.chosen.low <= found.chosen.mean <= found.chosen.high
    json.dumps(found.to_json())


def test_noise_around_zero_is_undecided():
    noise = np.random.default_rng(1).normal(size=(2, 40)) * 5
    assert judge(Changes(noise[0], noise[1], "test")).verdict == "undecided"


def test_the_interval_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(60):
        found = judge(Changes(rng.normal(size=80), rng.normal(size=80), "test")).chosen
        hits += found.low <= 0 <= found.high
    assert hits >= 51  # 57 expected; 50 or fewer has probability below 0.5%


def test_a_table_of_log_probabilities(tmp_path):
    n = 50
    table = pa.table(
        {"ref_chosen_logps": np.full(n, -10.0), "ref_rejected_logps": np.full(n, -12.0),
         "logp_chosen": np.full(n, -13.0), "logp_rejected": np.full(n, -20.0)}
    )  # fmt: skip
    pq.write_table(table, tmp_path / "logps.parquet")
    found = diagnose(DiagnoseConfig(logps=str(tmp_path / "logps.parquet")))
    assert found.verdict == "both_down_margin_up" and found.chosen.mean == -3
    assert failed(found, "lld_rate>0.5") and not failed(found, "lld_rate<0.5") and not failed(found, None)
    with pytest.raises(ChesError, match="expected NAME>NUMBER"):
        failed(found, "lld_rate")
    pq.write_table(table.drop_columns(["logp_chosen"]), tmp_path / "less.parquet")
    with pytest.raises(ChesError, match="no column logp_chosen"):
        diagnose(DiagnoseConfig(logps=str(tmp_path / "less.parquet")))


def test_a_trl_log(tmp_path):
    history = [{"step": i, "rewards/chosen": -0.02 * i, "rewards/rejected": -0.05 * i} for i in range(100)]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": [*history, {"train_loss": 0.1}]}))
    found = diagnose(DiagnoseConfig(trl_log=str(path), beta=0.1))
    assert found.verdict == "both_down_margin_up" and found.pairs == 10
    assert found.chosen.mean == pytest.approx(-0.2 * 94.5)
    assert any("means of training batches" in c for c in found.caveats)
    path.write_text("[]")
    with pytest.raises(ChesError, match="not a trainer_state"):
        diagnose(DiagnoseConfig(trl_log=str(path)))


def test_one_source_is_asked_for():
    with pytest.raises(ChesError, match="give one of"):
        diagnose(DiagnoseConfig())
    with pytest.raises(ChesError, match="give one of"):
        diagnose(DiagnoseConfig(before="a"))
