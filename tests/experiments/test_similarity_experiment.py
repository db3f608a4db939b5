"""Section 5: windows, statistics and scales; coefficients against the theory's formula."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ches_jax.errors import DataError
from ches_jax.select.keep import keep_indices
from experiments import similarity
from experiments.framework.item import Work
from experiments.similarity import data, report
from experiments.similarity.config import MEASURES, QUANTILES, SCALES, Objective
from experiments.similarity.runs import PairCoefficients, loss_change, mean_coefficients
from experiments.similarity.summary import (
    by_pair,
    extremes,
    over_pairs,
    pair_correlations,
    ranks,
    spearman_interval,
    window,
)
from theory.statements.coefficients import pair_coefficient


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (5000, [(0, 512), (994, 1506), (2244, 2756), (3493, 4005), (4488, 5000)]),
        (9691, [(0, 512), (2166, 2678), (4589, 5101), (7012, 7524), (9179, 9691)]),
    ],
)
def test_windows_of_the_paper_scale_are_the_papers(pairs, expected):
    width = SCALES["paper"].window
    values = np.random.default_rng(0).permutation(pairs).astype(float)
    for q, (start, stop) in zip(QUANTILES, expected, strict=True):
        kept = keep_indices(values, f"window:{q:g},{width}")
        assert sorted(values[kept]) == list(range(start, stop))


def test_the_paper_scale_is_the_papers():
    c = SCALES["paper"]
    assert (c.sample, c.sample_seed, c.max_length, c.window, c.split) == (5000, 548, 512, 512, "train_prefs")
    assert (c.batch_size, c.accumulate, len(c.seeds)) == (32, 8, 3)
    assert c.window // c.batch_size == 16
    assert {k: (o.loss, dict(o.loss_args), o.lr) for k, o in c.objectives.items()} == {
        "dpo": ("dpo", {"beta": 0.1}, 1e-7),
        "ipo": ("ipo_sum", {"tau": 0.01}, 1e-7),
        "dpo-lower": ("dpo", {"beta": 0.1}, 5e-8),
        "dpo-higher": ("dpo", {"beta": 0.1}, 5e-7),
    }
    assert all(set(o.measures) <= set(MEASURES) for s in SCALES.values() for o in s.objectives.values())
    assert len([s for s in similarity.stages(c) if s.name.startswith("train/")]) == (6 + 6 + 1 + 1) * 5 * 3


def test_data_of_the_user_are_taken_whole():
    scale = SCALES["paper"].with_options(pairs="alpaca.jsonl", seeds=(1,))
    assert (scale.split, scale.sample, scale.pairs, scale.seeds) == (None, None, "alpaca.jsonl", (1,))
    assert SCALES["paper"].with_options(seeds=(1,)).sample == 5000
    # where the data are always the user's, the size of the draw is the scale's
    assert SCALES["small-short"].with_options(pairs="pairs.jsonl").sample == 320


def test_every_scale_makes_sixteen_updates_of_a_window():
    assert {name: c.window // c.batch_size for name, c in SCALES.items()} == dict.fromkeys(SCALES, 16)


@pytest.mark.parametrize(
    ("content", "dialogue", "expected"),
    [
        (
            ("\n\nHuman: Hi\n\nAssistant:", " a", "b"),
            "\n\nHuman: {prompt}\n\nAssistant:",
            ("\n\nHuman: Hi\n\nAssistant:", " a", " b"),
        ),
        (("Hi", "a", " b"), "\n\nHuman: {prompt}\n\nAssistant:", ("\n\nHuman: Hi\n\nAssistant:", " a", " b")),
        (("Hi", "a", "b"), "<|prompter|>{prompt}<|assistant|>", ("<|prompter|>Hi<|assistant|>", "a", "b")),
        (("Hi", "a", "b"), "{prompt}", ("Hi", "a", "b")),
        (("Hi", "a", "b"), "{prompt}\n", ("Hi\n", "a", "b")),
        (("Hi\n\n", "a", "b"), "{prompt}\n", ("Hi\n\n", "a", "b")),
        (
            ("\n\nHuman: Hi\n\nAssistant:  ", "a", "b"),
            "\n\nHuman: {prompt}\n\nAssistant:",
            ("\n\nHuman: Hi\n\nAssistant:  ", " a", " b"),
        ),
        (
            ([{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "a"}], "b"),
            "<{prompt}>",
            ("<Hi>", "a", "b"),
        ),
    ],
)
def test_rows_become_dialogues(content, dialogue, expected):
    row = data.as_text(dict(zip(("prompt", "chosen", "rejected"), content, strict=True)), dialogue)
    assert tuple(row.values()) == expected


def test_token_ids_cannot_be_put_into_a_dialogue():
    with pytest.raises(DataError, match="token ids"):
        data.as_text({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}, "{prompt}")


@pytest.mark.parametrize("objective", [Objective("dpo", {"beta": 0.3}, 1.0), Objective("ipo_sum", {"tau": 0.02}, 1.0)])
def test_the_change_of_the_loss_is_the_librarys(objective):
    from ches_jax.losses import LossInputs, get_loss, mean_loss

    margins = np.array([0.5, -2.0, 30.0])
    loss = get_loss(objective.loss, **objective.loss_args)

    def at(m):
        zero = jnp.zeros(3)
        inputs: Any = {
            "logp_chosen": jnp.asarray(m, jnp.float32),
            "logp_rejected": zero,
            "ref_logp_chosen": zero,
            "ref_logp_rejected": zero,
        }
        return float(mean_loss(loss, LossInputs(**{k: v for k, v in inputs.items() if k in loss.needs}))[0])

    assert loss_change(objective, margins) == pytest.approx(at(margins) - at(0 * margins), rel=1e-5)


def test_coefficients_are_the_theorys():
    rng = np.random.default_rng(0)
    v, sides = 7, []
    for n in (3, 4):
        logits = rng.normal(size=(n, v))
        pi = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        y = rng.integers(0, v, n)
        sides.append((rng.normal(size=(n, 5)), np.eye(v)[y] - pi, pi, y))
    (h, e, pi, y), (g, f, rho, z) = sides
    values = PairCoefficients.of(h, e, g, f)

    def alphas(a, b, p, q):
        pair = [
            [pair_coefficient(jnp.array(p[i]), a[i], jnp.array(q[j]), b[j]) for j in range(len(b))]
            for i in range(len(a))
        ]
        return np.array(pair)

    assert values.alpha_minus == (alphas(y, z, pi, rho) > 0).mean()
    plus = alphas(y, y, pi, pi) > 0
    assert values.alpha_plus == plus.mean() and np.diag(plus).all()
    assert values.alpha_plus_off == pytest.approx((plus.sum() - 3) / 6)
    assert values.inner == (h @ g.T > 0).mean()
    one = PairCoefficients.of(h[:1], e[:1], g, f)
    assert np.isnan(one.alpha_plus_off)
    both = mean_coefficients([values, one])
    assert both["alpha_plus_off"]["n"] == 1 and both["inner"]["n"] == 2 and both["pairs"] == 2


def some_run(change, tokens=4.0):
    keys = ("dlogp_chosen", "dlogp_rejected", "margin", "displaced", "loss_change")
    return {**dict.fromkeys(keys, change), "per_token": change / tokens}


def test_ranks_of_falling_windows_are_minus_one():
    windows = {q: [some_run(-q + 0.001 * s) for s in range(3)] for q in QUANTILES}
    values = ranks(windows)["spearman_dlogp_chosen"]
    assert values["of_means"] == pytest.approx(-1) and values["seeds"]["mean"] == pytest.approx(-1)
    windows[0.5] = [some_run(9.0), some_run(-0.5), some_run(-0.5)]
    values = ranks(windows)["spearman_dlogp_chosen"]
    assert values["of_means"] > -0.95 and values["seeds"]["min"] == pytest.approx(-1) and values["seeds"]["max"] > -0.95
    assert window(windows[0.0])["dlogp_chosen"]["n"] == 3


def test_pairs_of_several_runs_are_averaged_and_correlated_with_their_score():
    rng = np.random.default_rng(0)
    score = rng.normal(size=300)
    lengths = rng.integers(5, 50, (2, 300)).astype(float)
    change = -2 * score + rng.normal(size=300) * 0.1
    scores = {m: rng.normal(size=300) for m in MEASURES} | {
        "ches": score,
        "chosen_tokens": lengths[0],
        "rejected_tokens": lengths[1],
    }
    order = rng.permutation(300)[:120]
    runs_ = [{"row": order.tolist(), "dlogp_chosen": (change[order] + s).tolist()} for s in (-0.1, 0.1)]
    rows, values = by_pair(runs_)
    assert rows.tolist() == sorted(order.tolist())
    np.testing.assert_allclose(values, change[rows])
    correlations = pair_correlations(scores, rows, values)
    assert correlations["spearman"]["ches"]["rho"] < -0.98 and correlations["at_equal_lengths"]["ches"]["high"] < -0.97
    assert correlations["spearman"]["ln_ches"]["low"] < 0 < correlations["spearman"]["ln_ches"]["high"]
    assert spearman_interval(np.ones(4), np.arange(4.0)) is None


def test_extremes_are_named_by_row_and_length():
    scores = {
        "ches": np.array([3.0, np.nan, 1.0, 2.0, 5.0, 4.0, 6.0]),
        "row_id": np.array(list("abcdefg")),
        "chosen_tokens": np.arange(7.0),
        "rejected_tokens": np.arange(7.0) * 2,
    }
    values = extremes(scores, "ches")
    assert [p["row"] for p in values["lowest"]] == [2, 3, 0, 5, 4]
    assert [p["row"] for p in values["highest"]] == [6, 4, 5, 0, 3]
    assert values["highest"][0] == {"row": 6, "row_id": "g", "score": 6.0, "chosen_tokens": 6, "rejected_tokens": 12}


def spread_of(mean, half):
    return {"mean": mean, "low": mean - half, "high": mean + half, "min": mean - half, "max": mean + half, "n": 3}


def test_verdicts_follow_the_intervals():
    def v(low, high, rho):
        ends = {"0": {"dlogp_chosen": low}, "1": {"dlogp_chosen": high}}
        return {"windows": ends, "spearman_dlogp_chosen": {"of_means": rho}}

    up, down, none = spread_of(1, 0.5), spread_of(-1, 0.5), spread_of(0.1, 0.5)
    assert report.verdict("ches", v(up, down, -1.0)) == "strictly falling; falls at the top, rises at the bottom"
    assert report.verdict("ches", v(up, up, -0.5)).endswith("not the ranking of the paper; rises at both ends")
    assert "the paper's ends, not its strict order" in report.verdict("ches", v(up, down, -0.9))
    assert (
        report.verdict("ln_ches", v(none, down, 0.1)) == "rank correlation +0.10; an end is indistinguishable from zero"
    )


def test_pairs_of_the_bundled_world_are_written_and_windows_need_enough(tmp_path):
    work = Work("similarity", "tiny", SCALES["tiny"], tmp_path, quiet=True)
    assert data.write_pairs(work) == {"found": 810, "pairs": 810}
    first = json.loads(data.pairs_file(work).read_text().splitlines()[0])
    assert set(first) == {"prompt", "chosen", "rejected", "category"}


def test_a_window_is_judged_over_its_pairs_and_items_are_counted():
    """Seeds that order the same pairs agree to the last digit; other pairs would not."""
    rng = np.random.default_rng(0)
    changes = rng.normal(0.2, 3.0, 64).tolist()
    runs = [{"row": list(range(64)), "dlogp_chosen": changes} for _ in range(3)]
    found = over_pairs(runs)
    assert found["low"] < 0 < found["high"] and found["n"] == 64
    low, high = ({"mean": m, "low": m - 1, "high": m + 1, "n": 64} for m in (3.0, -3.0))
    paper = {"over_pairs": {"0": low, "1": high}, "spearman_dlogp_chosen": {"of_means": -1.0}}
    turned = {"over_pairs": {"0": high, "1": low}, "spearman_dlogp_chosen": {"of_means": 1.0}}
    unclear = {"over_pairs": {"0": low, "1": low}, "spearman_dlogp_chosen": {"of_means": -0.5}}
    assert [report.agreement("ches", v) for v in (paper, turned, unclear)] == ["agree", "opposite", "undecided"]
    assert [report.agreement("last_hidden_inner", v) for v in (paper, unclear)] == ["opposite", "agree"]
