"""Weights of unpaired BCO by the density ratio of prompts: the regression, known ratios, and the whole command."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
from ches_jax.data.unpaired import LABEL, ONE_RESPONSE
from ches_jax.errors import ChesError
from ches_jax.inputs import Opener
from ches_jax.label.config import LabelConfig
from ches_jax.label.density import density_ratio, fitted, weights_of
from ches_jax.label.run import headline, label, summary_text
from ches_jax.label.weights import rows_of_one_response
from ches_jax.models.checkpoint.load import load_model
from ches_jax.scores.prompt_states import prompt_states
from tests.helpers import one_sequence, write_lines


def newton(x, good, penalty):
    """The penalised balanced regression by Newton's steps, written with matrices."""
    n, whole = len(good), np.column_stack([x, np.ones(len(x))])
    weight = np.where(good, n / (2 * good.sum()), n / (2 * (~good).sum()))
    ridge, values = penalty * np.diag([1.0] * x.shape[1] + [0.0]), np.zeros(x.shape[1] + 1)
    for _ in range(50):
        p = 1 / (1 + np.exp(-whole @ values))
        gradient = whole.T @ (weight * (p - good)) + ridge @ values
        values -= np.linalg.solve(whole.T @ (whole * (weight * p * (1 - p))[:, None]) + ridge, gradient)
    return values


@pytest.mark.parametrize("penalty", [0.1, 30.0])
def test_the_regression_is_newtons(penalty):
    rng = np.random.default_rng(0)
    x, good = rng.normal(size=(60, 4)), rng.random(60) < 0.25
    coefficients, constant = fitted(x, good, penalty)
    np.testing.assert_allclose(np.append(coefficients, constant), newton(x, good, penalty), atol=1e-6)


def test_the_ratio_of_two_gaussians_is_found():
    """Prompts of good responses around +m, of bad ones around -m: the log-ratio is 2 <m, x>; a third are good."""
    rng = np.random.default_rng(1)
    m, good = np.array([0.5, -0.3, 0.0]), np.arange(6000) % 3 == 0
    x = rng.normal(size=(6000, 3)) + np.where(good[:, None], m, -m)
    found = density_ratio(x, good, range(6000))
    np.testing.assert_allclose(np.log(found.ratio), 2 * x @ m, atol=0.35)
    # the mean of a density ratio over what stands below is 1, and weighted bad rows look like good ones
    assert found.ratio[~good].mean() == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(np.average(x[~good], axis=0, weights=found.ratio[~good]), m, atol=0.1)
    assert 0.7 < found.held_out_auc < 0.85 and found.held_out_loss < np.log(2)


def test_no_prompt_is_judged_by_what_was_fitted_to_it():
    """Each prompt has a feature of its own and both kinds of responses: by heart its rows could be told, unseen not."""
    prompts = np.repeat(np.arange(30), 2)
    good = np.random.default_rng(0).random(60) < 0.5
    found = density_ratio(np.eye(30)[prompts], good, prompts.tolist(), penalty=0.01)
    assert found.held_out_auc < 0.7 and found.held_out_loss > np.log(2) - 0.01
    assert len({(int(p), round(float(r), 9)) for p, r in zip(prompts, found.ratio, strict=True)}) == 30
    nothing = density_ratio(np.zeros((60, 2)), good, prompts.tolist())
    assert nothing.penalty is None and (nothing.ratio == 1).all()


def test_rows_are_drawn_of_both_kinds_and_the_seed_decides():
    rng = np.random.default_rng(2)
    good = np.arange(400) % 40 == 0
    x = rng.normal(size=(400, 2)) + good[:, None]
    few, again, other = (density_ratio(x, good, range(400), most_rows=50, seed=s).ratio for s in (0, 0, 1))
    assert (few == again).all() and not np.allclose(few, other)
    assert (weights_of(few, good)[good] == 1).all() and weights_of(few, good)[~good].min() >= 0.5
    assert (density_ratio(x, good, ["one"] * 400).ratio == 1).all()  # good and bad answers to one prompt
    with pytest.raises(ChesError, match="states of a prompt are not finite; try --dtype float32"):
        density_ratio(x * np.nan, good, range(400))
    with pytest.raises(ChesError, match="1 rows of 400 have good responses"):
        density_ratio(x, np.arange(400) == 0, range(400))


@pytest.fixture
def feedback(tmp_path):
    """Three good responses in four to sums, one in four to letters; each prompt once."""
    rows = []
    for i in range(96):
        for kind, prompt in ((0, f"{i}+{i}?"), (1, f"Write letter {i}")):
            rows.append({"prompt": prompt, "completion": " yes", "label": (i % 4 == 0) == bool(kind), "from": "a"})
    rows.append({**rows[0], "label": not rows[0]["label"]})
    return write_lines(tmp_path / "rows.jsonl", rows), rows


def test_the_command_weighs_rows_by_states_of_their_prompts(tmp_path, tiny_model, feedback):
    file, rows = feedback
    options = {"by": "density-ratio", "model": str(tiny_model), "pairs": file, "min_ratio": 0.1}
    record = label(LabelConfig(**options, out=str(tmp_path / "out")), quiet=True)
    written = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    assert [{name: new[name] for name in row} for row, new in zip(rows, written, strict=True)] == rows
    by_kind = {True: [], False: []}
    for new in written:
        assert new["density_weight"] == (1.0 if new["label"] else max(0.1, min(10.0, new["density_ratio"])))
        by_kind["+" in new["prompt"]].append(new["density_ratio"])
    # 3 and 1/3 where the states tell the kinds apart, drawn a little towards 1 by the penalty
    assert 2 < np.median(by_kind[True]) < 4 and 0.25 < np.median(by_kind[False]) < 0.5
    density = record["density"]
    assert (density["good"], density["bad"], density["prompts"]) == (97, 96, 192) and density["held_out_auc"] > 0.65
    assert headline(record) == "193 of 193 rows have a weight" and "96 bad rows of 192 prompts" in summary_text(record)


def test_the_file_is_read_once_for_its_labels_and_its_texts(feedback, monkeypatch):
    opener, starts = Opener(), []
    source = opener.rows(feedback[0], None, {}, ONE_RESPONSE, "pairs")

    def read(start):
        starts.append(start)
        return source.read(start)

    monkeypatch.setattr(opener, "rows", lambda *_: replace(source, read=read))
    rows = rows_of_one_response(LabelConfig(by="density-ratio", pairs=feedback[0], limit=5), opener)
    assert starts == [0] and len(rows) == 5 and all(LABEL in row.extra for row in rows)


def test_states_of_prompts_are_those_of_each_alone(tiny_model):
    tokenizer = PairTokenizer(load_tokenizer("bundled"), max_length=512)
    prompts = [tuple(tokenizer.tokenizer(text)["input_ids"]) for text in ("1+1?", "Write a long letter to me", "1+1?")]
    model = Opener().model(str(tiny_model))
    with jax.enable_x64(True):
        decoder = load_model(tiny_model, dtype="float64", param_dtype="float64")
        alone = [np.asarray(one_sequence(decoder, list(p))[0], np.float64) for p in prompts]
    mean, last = (prompt_states(model.directory, model.decoder, prompts, s, "float64") for s in ("mean", "last"))
    for i, states in enumerate(alone):
        np.testing.assert_allclose(mean[i], states.mean(0), atol=1e-10)
        np.testing.assert_allclose(last[i], states[-1], atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 1}, "--folds 1: expected 2 or more"),
        ({"min_ratio": 0.0}, "--min-ratio 0.0: expected a positive number"),
        ({"min_ratio": 3.0, "max_ratio": 2.0}, "--max-ratio 2.0: expected a number, --min-ratio 3.0 or more"),
        ({"penalty": -1.0}, "--penalty -1.0: expected a positive number"),
        ({"seed": -1}, "--seed -1: expected 0 or more"),
        ({"relabel": True}, "gives weights and no probability"),
        ({"candidates": "all-pairs"}, "reads rows of one response"),
        ({"by": "implicit-reward", "reference": "m", "fit_rows": 9}, "--fit-rows is for --by density-ratio"),
        (
            {"pairs": "bundled"},
            "no column 'completion' with the response; found: prompt, chosen",
        ),
    ],
)
def test_what_is_refused(tmp_path, options, message):
    with pytest.raises(ChesError, match=message):
        label(LabelConfig(**{"by": "density-ratio", "out": str(tmp_path / "out"), **options}))
    assert not (tmp_path / "out").exists()
