"""The claims about a real model hold on a tiny one; on the trained ones with ``-m slow``."""

import json

import numpy as np
import pytest

from ches_jax import bundled
from ches_jax.scores.formulas import SCORES, score_column
from ches_jax.scores.run import ScoreConfig, score
from ches_jax.scores.table import FILE_NAME
from ches_jax.stats import bootstrap_spearman, spearman
from theory.models.real import open_real_model
from theory.verify import verify


@pytest.fixture(scope="module")
def measured(tiny_model):
    import jax

    with jax.enable_x64(True):
        model = open_real_model(tiny_model, limit=4)
        model.scores  # noqa: B018
        return model


def test_its_scores_are_those_of_ches_score(measured, tiny_model, tmp_path):
    import pyarrow.parquet as pq

    score(ScoreConfig(model=str(tiny_model), dtype="float64", limit=40, out=str(tmp_path / "s")), quiet=True)
    table = pq.read_table(tmp_path / "s" / FILE_NAME)
    row = {r: i for i, r in enumerate(table["row_id"].to_pylist())}
    at = [row[p.row_id] for p in measured.pairs]
    assert len(at) == 4
    for name in ("ches", "ln_ches", "last_hidden_inner", "cosine", "swapped", "minus_edit_distance", "projection"):
        expected = score_column(table, name)[at]
        np.testing.assert_allclose(measured.scores[name], expected, rtol=1e-9, atol=1e-9, err_msg=name)


def test_every_score_of_the_library_is_there(measured):
    of_pairs = {name: score.columns for name, score in SCORES.items() if score.columns and name != "influence"}
    computed = {name for name, columns in of_pairs.items() if not any(c.startswith("grad_") for c in columns)}
    assert computed < set(measured.scores)
    assert all(values.shape == (4,) and np.isfinite(values).all() for values in measured.scores.values())


@pytest.mark.slow
def test_exact_claims_hold_on_a_tiny_model(tiny_model):
    results = verify(["F1", "F6"], model=tiny_model, limit=3, quiet=True)
    assert {r.id: r.value for r in results if not r.passed} == {}


def test_an_interval_lies_about_its_correlation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    b = a + 0.5 * rng.normal(size=40)
    seen = bootstrap_spearman(a, b)
    assert seen["low"] < seen["rho"] == spearman(a, b) < seen["high"]
    less = bootstrap_spearman(a, b, less=-a)
    assert less["rho"] == 2 * seen["rho"] and less["low"] > 0


@pytest.mark.slow
def test_all_claims_hold_on_the_bundled_model():
    results = verify(model=bundled.model_dir(), limit=24, quiet=True)
    assert {r.id: r.value for r in results if not r.passed} == {}


SAME_INDEX = 1220
"""Rows of the file that are the same lines of its source: five later lines of it are missing, so that indices shift."""


@pytest.fixture
def unseen(shared, tmp_path):
    """Human pairs that the tied model has not been trained on."""
    split = json.loads((shared / "models" / "hh-tiny" / "hh_split.json").read_text())
    rows = (shared / "data" / "hh_harmless_base_test.jsonl").read_text().splitlines()
    out = tmp_path / "unseen.jsonl"
    out.write_text("\n".join(rows[i] for i in split["heldout_rows"] if i < SAME_INDEX) + "\n")
    return out


def test_the_split_and_the_file_agree_up_to_the_first_missing_line(shared):
    """Lines that are in neither list open like a held-out dialogue; with shifted indices they would not."""
    split = json.loads((shared / "models" / "hh-tiny" / "hh_split.json").read_text())
    lines = (shared / "data" / "hh_harmless_base_test.jsonl").read_text().splitlines()
    opening = [json.loads(line)["prompt"].split("\n\nAssistant")[0].strip() for line in lines]
    held, train = set(split["heldout_rows"]), set(split["train_rows"])
    left_out = [i for i in range(SAME_INDEX) if i not in held | train]

    def disagreements(shift):
        row_of = {i + shift: opening[i] for i in range(SAME_INDEX - 1)}
        of_held = {row_of[i] for i in held if i in row_of}
        leaked = sum(row_of[i] in of_held for i in train if i in row_of)
        # the partner of a line that was left out may lie in the rows beyond
        partners = of_held | {opening[i] for i in range(SAME_INDEX - 1, len(opening))}
        return leaked + sum(row_of[i] not in partners for i in left_out if i in row_of)

    assert disagreements(0) == 0
    assert min(disagreements(shift) for shift in (1, 2, 5)) > 5


@pytest.mark.slow
def test_all_claims_hold_on_a_tied_model_with_human_pairs(shared, unseen):
    results = verify(model=shared / "models" / "hh-tiny" / "fp32", pairs=unseen, limit=16, quiet=True)
    assert {r.id: r.value for r in results if not r.passed} == {}
