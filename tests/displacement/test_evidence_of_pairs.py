"""What a diagnosis says of pairs beside the verdict: kinds of pairs, calibration, and the split of on-policy pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest

from ches_jax.displacement.breakdown import LENGTHS, breakdown
from ches_jax.displacement.calibration import calibration
from ches_jax.displacement.changes import Changes
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.displacement.intervals import Interval
from ches_jax.displacement.on_policy import split, write_sampled_pairs
from ches_jax.displacement.ranking import ranking, ranking_rates
from ches_jax.displacement.verdict import diagnose_changes
from ches_jax.errors import ChesError

RNG = np.random.default_rng(0)


def test_kinds_of_pairs_have_their_own_means_and_keep_prompts_together():
    category = np.array(["b"] * 40 + ["a"] * 20)
    chosen = np.where(category == "b", -2.0, 1.0) + RNG.normal(0, 0.1, 60)
    rows = {"category": category, "chosen_tokens": np.arange(60)}
    records = np.repeat(np.arange(30), 2)
    parts = breakdown(Changes(chosen, np.zeros(60), "test", records=records, rows=rows))
    assert [(p.by, p.name.partition(" (")[0], p.pairs) for p in parts] == [
        ("category", "b", 40),
        ("category", "a", 20),
        *(("length", name, 20) for name in LENGTHS),
    ]
    for part, inside in zip(parts, [category == "b", category == "a"], strict=False):
        assert part.chosen.mean == pytest.approx(chosen[inside].mean()) and part.margin.mean == part.chosen.mean
    assert [p.fell for p in parts] == [1, 0, 1, 1, 0]
    alone = breakdown(Changes(chosen, np.zeros(60), "test", rows=rows))
    assert alone[0].chosen.low != parts[0].chosen.low  # 20 prompts are not 40 pairs
    json.dumps([p.to_json() for p in parts])


def test_one_category_or_one_length_is_no_kind():
    rows = {"category": np.array(["a"] * 20), "chosen_tokens": np.full(20, 4)}
    assert breakdown(Changes(np.zeros(20), np.zeros(20), "test", rows=rows)) == ()


def test_confidence_is_compared_with_accuracy():
    """Margins of 30 nats at beta 0.1 are sure by 95 %; half of them are right."""
    margin = np.tile([30.0, -30.0], 100)
    found = calibration(Changes(margin, np.zeros(200), "test"), beta=0.1)
    assert found.accuracy.mean == 0.5 and found.confidence.mean == pytest.approx(1 / (1 + np.exp(-3)))
    assert (
        "over-confident" in found.line() and "accuracy 50%, confidence of the implied preferences 95%" in found.line()
    )
    # a policy that is exactly as sure as it is right
    sure = RNG.uniform(0.5, 1, 4000)
    signs = np.where(RNG.uniform(size=4000) < sure, 1.0, -1.0)
    right = calibration(Changes(signs * np.log(sure / (1 - sure)) / 0.1, np.zeros(4000), "test"), beta=0.1)
    assert abs(right.excess.mean) < 0.03 and right.excess.low <= 0 <= right.excess.high
    assert "not distinguished" in right.line()
    assert (
        calibration(Changes(np.zeros(20), np.zeros(20), "test"), beta=0.1).accuracy.mean == 0.5
    )  # ties are half right


def test_on_policy_pairs_lose_the_divergence_and_gain_half_the_margin():
    chosen, rejected = RNG.normal(-4, 1, 50), RNG.normal(-8, 1, 50)
    found = split(Changes(chosen, rejected, "test", records=np.repeat(np.arange(25), 2)))
    assert found.half_margin.mean - found.kl.mean == pytest.approx(chosen.mean())
    assert -found.half_margin.mean - found.kl.mean == pytest.approx(rejected.mean())
    assert "falls, since KL exceeds half the margin" in found.line(float(chosen.mean()))
    rose = split(Changes(chosen + 6, rejected + 3, "test"))
    assert rose.kl.mean < rose.half_margin.mean and "rises, since KL is below" in rose.line(2.0)
    answers = split(Changes(chosen, rejected, "test"), own=False)
    assert f"100 answers of the first model itself fell by KL(before || after) = {answers.kl}" in answers.line(-10.0)
    assert answers.line(-10.0).endswith(f"fell by {10 - answers.kl.mean:.3f} more")
    assert answers.line(-1.0).endswith("less")


def test_the_divergence_of_two_known_policies_is_recovered():
    """Responses of one token: the first policy is (p, 1 - p), the second (q, 1 - q)."""
    p, q, count = 0.7, 0.4, 20_000
    drawn = RNG.uniform(size=(2, count)) < p
    changes = np.where(drawn, np.log(q / p), np.log((1 - q) / (1 - p)))
    found = split(Changes(changes[0], changes[1], "test"))
    kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert found.kl.low <= kl <= found.kl.high and found.kl.mean == pytest.approx(kl, rel=0.1)


def test_two_samples_of_a_prompt_are_a_pair_of_token_ids(tmp_path):
    rows = [
        {"row_id": r, "sample": s, "prompt_ids": [1, 2], "token_ids": [5, s], "text": "x"}
        for r, samples in (("a", 2), ("b", 1), ("c", 3))
        for s in range(samples)
    ]
    (tmp_path / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = write_sampled_pairs(tmp_path, tmp_path / "pairs.jsonl").read_text().splitlines()
    assert [json.loads(p) for p in pairs] == [{"prompt_ids": [1, 2], "chosen_ids": [5, 0], "rejected_ids": [5, 1]}] * 2
    (tmp_path / "responses.jsonl").write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(ChesError, match="no prompt has two samples"):
        write_sampled_pairs(tmp_path, tmp_path / "pairs.jsonl")


def test_a_diagnosis_says_all_three(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 48
    columns = {
        "ref_chosen_logps": np.zeros(count),
        "ref_rejected_logps": np.zeros(count),
        "logp_chosen": RNG.normal(-4, 1, count),
        "logp_rejected": RNG.normal(-8, 1, count),
        "category": ["a", "b"] * (count // 2),
        "chosen_tokens": list(range(count)),
    }
    pq.write_table(pa.table(columns), tmp_path / "logps.parquet")
    logps = str(tmp_path / "logps.parquet")
    found = diagnose(DiagnoseConfig(logps=logps, on_policy=True, beta=0.1))
    answer = found.to_json()
    assert {part["by"] for part in answer["parts"]} == {"category", "length"}
    assert answer["calibration"]["accuracy"]["mean"] > 0.9 and answer["on_policy"]["of"] == "the pairs"
    for words in ("on policy: chosen = half the margin", "accuracy ", "category a: chosen -", "length shortest third"):
        assert words in found.text()
    plain = diagnose(DiagnoseConfig(logps=logps))
    assert plain.calibration is None and plain.on_policy is None  # no beta, and nobody said how they were drawn
    (tmp_path / "log.jsonl").write_text('{"step": 1, "rewards/chosen": 0.1, "rewards/rejected": 0.1}\n')
    with pytest.raises(ChesError, match="--on-policy needs pairs"):
        diagnose(DiagnoseConfig(path=str(tmp_path / "log.jsonl"), on_policy=True))


def test_pairs_that_each_model_ranks_rightly_and_what_it_would_cost():
    """Thirty prompts, a third of each kind: right before and after, put right, put wrong."""
    first = np.repeat([2.0, -1.0, 3.0], 10)
    second = np.repeat([5.0, 1.0, -1.0], 10)
    zeros = np.zeros(30)
    found = ranking((first, zeros), (second, zeros), 0.5, noise=0.2)
    n = {name: interval.mean for name, interval in found.numbers.items()}
    assert (n["reference"], n["policy"], n["to_right"], n["to_wrong"]) == pytest.approx((2 / 3, 2 / 3, 1 / 3, 1 / 3))
    assert n["flip_budget"] == pytest.approx(np.mean(np.log1p(np.exp(-0.5 * first))))
    assert n["idealised"] == 1.0  # -1 + ln 4 / 0.5 > 0
    low, high = ranking((first, zeros), (second, zeros), 0.5, noise=0.45).numbers["idealised"], 2 / 3
    assert low.mean == pytest.approx(high)  # -1 + ln(0.55 / 0.45) / 0.5 < 0
    p = 1 / (1 + np.exp(-0.5 * (second - first)))
    gaps = [abs(p[0] - 1), abs(p[10] - 1), abs((1 - p[20]) - 0)]  # of three bins: 0.82, 0.73 and, wrong, 0.88
    error = found.numbers["calibration_error"]
    assert error.mean == pytest.approx(np.mean(gaps)) and error.low < error.mean < error.high
    assert "became right 33%, wrong 33%" in found.line() and "20% wrong labels" in found.line()
    json.dumps(found.to_json())
    without = ranking((first, zeros), (second, zeros), None, records=np.repeat(np.arange(5), 6))
    assert without.numbers.keys() == {"reference", "policy", "to_right", "to_wrong"}
    assert not without.numbers["policy"].known
    few = ranking((first, zeros), (second, zeros), 0.5, records=np.repeat(np.arange(5), 6)).numbers
    assert few["calibration_error"].mean == pytest.approx(np.mean(gaps)) and not few["calibration_error"].known


def test_a_training_log_counts_pairs_and_no_single_responses():
    start = np.array([1.0, -1.0, np.nan, 1.0]), np.array([0.0, 0.0, 0.0, np.nan])
    now = np.array([-1.0, 1.0, 3.0, 1.0]), np.array([0.0, 0.0, 0.0, 2.0])
    rates = ranking_rates(start, now, 0.1)
    assert (rates["ranking/accuracy"], rates["ranking/accuracy_start"]) == (0.5, 0.5)
    assert (rates["ranking/flipped_to_right"], rates["ranking/flipped_to_wrong"]) == (0.5, 0.5)
    assert "ranking/calibration_error" in rates and "ranking/calibration_error" not in ranking_rates(start, now, None)
    assert ranking_rates((start[0][2:], start[1][2:]), (now[0][2:], now[1][2:]), 0.1) == {}


def test_the_three_properties_take_unseen_responses_or_own_answers():
    changes = Changes(np.full(10, -1.0), np.full(10, -3.0), "test")
    diagnosis = diagnose_changes(changes)
    assert diagnosis.three_properties is None
    own = split(Changes(np.full(10, -2.0), np.full(10, -4.0), "test"), own=False)
    answered = replace(diagnosis, on_policy=own)
    moved = answered.three_properties
    assert moved is not None
    assert {name: i.mean for name, i in moved.items()} == {"drop": -3.0, "degradation": -1.0, "dispersion": -3.0}
    given = replace(answered, unseen=Interval(-0.5, -0.6, -0.4)).three_properties
    assert given is not None and given["dispersion"].mean == -0.5
    assert "of unseen responses -3.000" in answered.text()
    assert answered.to_json()["three_properties"]["drop"]["mean"] == -3.0


def test_label_noise_is_a_share():
    with pytest.raises(ChesError, match="expected a share between 0 and 1"):
        diagnose(DiagnoseConfig(path="x", label_noise=1.0))
