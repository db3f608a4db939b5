"""The page of a training run: its curves, its verdict, and runs that are not whole."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.errors import RunError
from ches_jax.report import report
from tests.report.test_page import EVIL, page_data, tags

STEPS = (0, 5, 10)


def log_of(step, pairs=40, name="held_out"):
    rng = np.random.default_rng(step)
    chosen, rejected = (-k * step / 10 + 0.1 * (step > 0) * rng.normal(size=pairs) for k in (2.0, 5.0))
    return pa.table(
        {
            "step": pa.array([step] * pairs, pa.int32()),
            "set": [name] * pairs,
            "row_id": [EVIL.replace("\ud800", "") if i == 0 else f"row{i}" for i in range(pairs)],
            "index": [*range(pairs)],
            "dlogp_chosen": chosen,
            "dlogp_rejected": rejected,
            "margin": chosen - rejected,
            "regime": ["both_down_margin_up" if step else "flat"] * pairs,
            "chosen_tokens": [4] * pairs,
            "rejected_tokens": [5] * pairs,
        }
    )


@pytest.fixture
def run(tmp_path):
    tables = [log_of(step, name=name) for step in STEPS for name in ("train", "held_out")]
    pq.write_table(pa.concat_tables(tables), tmp_path / "displacement.parquet")
    lines = [{"step": s, "loss": 0.7 - s / 50, **({"eval_loss": 0.69} if s else {})} for s in STEPS]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 11, "lo')
    (tmp_path / "run.json").write_text(json.dumps({"verb": "train", "config": {"pairs": EVIL}}))
    return tmp_path


def test_a_training_run_has_a_page(run):
    page = report(run)
    text = page.read_text(encoding="utf-8")
    (headline,) = re.findall("<h1>(.*)</h1>", text)
    mean = log_of(10)["dlogp_chosen"].to_numpy().mean()
    assert headline == f"The chosen responses fell on held-out pairs: {mean:+.2f} nats after 10 updates"
    assert "both down, margin up 100 %" in text and "training from 0.700 to 0.500" in text
    drawn = [attributes for tag, attributes in tags(page) if tag == "svg"]
    assert len(drawn) == 8 and all(len(a["aria-label"]) > 20 for a in drawn)
    assert "<script>alert" not in text


def test_the_table_has_the_last_evaluation_of_every_set(run):
    meta, found, texts, _ = page_data(report(run))
    wanted = {name: log_of(10, name=name) for name in ("train", "held_out")}
    assert meta["rows"] == 80 and meta["key"] == ["set", "index"] and meta["sort"] == ["chosen_change", 1]
    for name, word in (("train", "training"), ("held_out", "held out")):
        inside = found["set"] == word
        for column, of in (
            ("chosen_change", "dlogp_chosen"),
            ("rejected_change", "dlogp_rejected"),
            ("margin_change", "margin"),
        ):
            np.testing.assert_allclose(found[column][inside], wanted[name][of].to_numpy(), rtol=2**-23)
    np.testing.assert_allclose(found["chosen_per_token"], found["chosen_change"] / 4, rtol=1e-6)
    assert set(found["regime"]) == {"both down, margin up"}
    assert texts.keys() == {"id"}


def test_points_beyond_the_frame_are_on_the_axis_of_the_others(tmp_path):
    table = log_of(10)
    far = table["dlogp_chosen"].to_numpy().copy()
    far[0] = -500.0
    position = table.column_names.index("dlogp_chosen")
    pq.write_table(table.set_column(position, "dlogp_chosen", pa.array(far)), tmp_path / "displacement.parquet")
    meta, *_ = page_data(report(tmp_path))
    axis = next(c for c in meta["columns"] if c["name"] == "chosen_change")["axis"]
    assert axis["range"][0] > -10 and axis["range"][1] >= 0


def test_a_run_that_goes_on_has_a_page(tmp_path):
    (tmp_path / "displacement").mkdir()
    pq.write_table(log_of(0, name="train"), tmp_path / "displacement/step-00000000.parquet")
    text = report(tmp_path, tmp_path / "out").read_text(encoding="utf-8")
    assert "No verdict" in text and "holds step 0 only" in text


def test_single_responses_have_a_page_without_a_verdict(tmp_path):
    table = log_of(5, name="train")
    nothing, none = pa.array([np.nan] * len(table)), pa.array([0] * len(table))
    for name, column in (("dlogp_rejected", nothing), ("margin", nothing), ("rejected_tokens", none)):
        table = table.set_column(table.column_names.index(name), name, column)
    regimes = pa.array([""] * len(table))
    pq.write_table(
        table.set_column(table.column_names.index("regime"), "regime", regimes), tmp_path / "displacement.parquet"
    )
    page = report(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "No verdict" in text and "single responses" in text
    _, found, *_ = page_data(page)
    assert np.isnan(found["margin_change"]).all() and set(found["regime"]) == {"single response"}


def test_a_log_without_pairs_is_refused(tmp_path):
    pq.write_table(log_of(0).slice(0, 0), tmp_path / "displacement.parquet")
    with pytest.raises(RunError, match="no pairs; there is nothing to report"):
        report(tmp_path)
