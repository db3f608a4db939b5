"""The claims about a real model hold on a tiny one; on the trained ones when asked for (``-m slow``)."""

import numpy as np
import pytest

from ches_jax import embedded
from ches_jax.scores.derive import spearman
from ches_jax.scores.pipeline import ScoreConfig, score
from ches_jax.scores.table import FILE_NAME
from theory.real import bootstrap_spearman, open_real_model
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

    score(ScoreConfig(model=str(tiny_model), dtype="float64", limit=12, out=str(tmp_path / "s")), quiet=True)
    table = pq.read_table(tmp_path / "s" / FILE_NAME).to_pydict()
    row = {r: i for i, r in enumerate(table["row_id"])}
    for name, column in (("ches", "ches"), ("ln_ches", "ln_ches"), ("last_hidden", "last_hidden_inner")):
        expected = [table[column][row[p.row_id]] for p in measured.pairs if p.row_id in row]
        np.testing.assert_allclose(measured.scores[name][: len(expected)], expected, rtol=1e-9, atol=1e-9)
        assert expected


def test_exact_claims_hold_on_a_tiny_model(tiny_model):
    results = verify(["F1", "F6"], model=tiny_model, limit=3, quiet=True)
    assert {r.id: r.value for r in results if not r.passed} == {}


def test_an_interval_lies_about_its_correlation():
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    b = a + 0.5 * rng.normal(size=40)
    seen = bootstrap_spearman(a, b, rng)
    assert seen["low"] < seen["rho"] == spearman(a, b) < seen["high"]


@pytest.mark.slow
def test_all_claims_hold_on_the_embedded_model():
    results = verify(model=embedded.model_dir(), limit=24, quiet=True)
    assert {r.id: r.value for r in results if not r.passed} == {}


@pytest.mark.slow
def test_all_claims_hold_on_a_tied_model_with_human_pairs(shared):
    pairs = shared / "data" / "hh_harmless_base_test.jsonl"
    results = verify(model=shared / "models" / "hh-tiny" / "fp32", pairs=pairs, limit=16, quiet=True)
    assert {r.id: r.value for r in results if not r.passed} == {}
