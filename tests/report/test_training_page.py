"""The page of a training run: its curves, its verdict, and runs that are not whole."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.errors import RunError
from ches_jax.report import report
from tests.report.test_page import EVIL, tags

STEPS = (0, 5, 10)


def log_of(step, pairs=40, name="held_out"):
    rng = np.random.default_rng(step)
    chosen, rejected = (-k * step / 10 + 0.1 * (step > 0) * rng.normal(size=pairs) for k in (2.0, 5.0))
    return pa.table({
        "step": pa.array([step] * pairs, pa.int32()), "set": [name] * pairs,
        "row_id": [EVIL.replace("\ud800", "") if i == 0 else f"row{i}" for i in range(pairs)], "index": [*range(pairs)],
        "dlogp_chosen": chosen, "dlogp_rejected": rejected, "margin": chosen - rejected,
        "regime": ["both_down_margin_up" if step else "flat"] * pairs,
        "chosen_tokens": [4] * pairs, "rejected_tokens": [5] * pairs,
    })  # fmt: skip


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
    assert "Verdict: displaced, from 40 pairs" in text and "held-out pairs, update 10 against 0" in text
    assert "both_down_margin_up 100%" in text and "Did the chosen responses fall? yes." in text
    assert "loss from 0.7 to 0.5" in text
    images = [attributes for tag, attributes in tags(page) if tag == "img"]
    assert len(images) == 3 and all(len(a["alt"]) > 20 for a in images)
    assert {f.name for f in (run / "figures").iterdir()} == {"changes.png", "regimes.png", "loss.png"}
    assert "<script>" not in text and "&lt;script&gt;" in text


def test_a_run_that_goes_on_has_a_page(tmp_path):
    (tmp_path / "displacement").mkdir()
    pq.write_table(log_of(0, name="train"), tmp_path / "displacement/step-00000000.parquet")
    text = report(tmp_path, tmp_path / "out").read_text(encoding="utf-8")
    assert "No verdict." in text and "holds step 0 only" in text
    assert "None of the training pairs lost probability" in text


def test_single_responses_have_a_page_without_a_verdict(tmp_path):
    table = log_of(5, name="train")
    nothing, none = pa.array([np.nan] * len(table)), pa.array([0] * len(table))
    for name, column in (("dlogp_rejected", nothing), ("margin", nothing), ("rejected_tokens", none)):
        table = table.set_column(table.column_names.index(name), name, column)
    regimes = pa.array([""] * len(table))
    pq.write_table(table.set_column(table.column_names.index("regime"), "regime", regimes),
                   tmp_path / "displacement.parquet")  # fmt: skip
    text = report(tmp_path).read_text(encoding="utf-8")
    assert "No verdict." in text and "single responses" in text


def test_a_log_without_pairs_is_refused(tmp_path):
    pq.write_table(log_of(0).slice(0, 0), tmp_path / "displacement.parquet")
    with pytest.raises(RunError, match="no pairs; there is nothing to report"):
        report(tmp_path)
