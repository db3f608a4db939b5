"""Pages of forecasts and influences: from the files that those commands write."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.data.sources import row_id
from ches_jax.errors import RunError
from ches_jax.report import report
from ches_jax.scores.table import write_part
from tests.report.test_page import page_data, tags

PAIRS = [{"prompt": f"p{i}", "chosen": f"<b>c{i}</b>", "rejected": f"r{i}"} for i in range(6)]
IDS = [row_id(pair) for pair in PAIRS]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def record(folder, **more):
    config = {
        "model": "m",
        "pairs": lines(folder / "train.jsonl", PAIRS[:4]),
        "probes": lines(folder / "probes.jsonl", PAIRS[4:]),
        "columns": {},
        "loss": "dpo",
        "optimizer": "rmsprop",
        "lr": 3e-5,
    }
    (folder / "run.json").write_text(json.dumps({"status": "done", "config": config, **more}))


def test_a_forecast_has_a_page_with_both_sets(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    chosen = np.array([1.0, 2.0, -1.0, 0.5, -4.0, -6.0])
    columns = {
        "row_id": IDS,
        "index": [0, 1, 2, 3, 0, 1],
        "chosen_tokens": [4] * 6,
        "rejected_tokens": [5] * 6,
        "set": ["train"] * 4 + ["probe"] * 2,
        "forecast_chosen": chosen,
        "forecast_rejected": chosen - 3,
        "second_chosen": pa.nulls(6, pa.float64()),
        "logp_chosen": chosen - 20,
        "logp_rejected": chosen - 30,
    }
    pq.write_table(pa.table(columns), folder / "forecast.parquet")
    one = {"pairs": 2, "forecast_chosen": -5.0, "forecast_rejected": -8.0, "forecast_margin": 3.0, "chosen_falls": 1.0}
    record(folder, summary={"sets": {"probe": one}, "reason": "because of <i>it</i>", "warnings": ["leaves the range"]})
    page = report(folder)
    tags(page)
    text = page.read_text(encoding="utf-8")
    assert "This run would lower the chosen responses of 2 held-out pairs by 5.00 nats in the mean; 100% would" in text
    assert "Because of &lt;i&gt;it&lt;/i&gt;." in text and "Leaves the range." in text
    meta, found, texts, _ = page_data(page)
    assert meta["key"] == ["set", "index"] and meta["sort"] == ["forecast_chosen", 1]
    assert found["forecast_chosen"].tolist() == chosen.tolist() and texts["chosen"] == [p["chosen"] for p in PAIRS]
    assert 'href="#row-held-out-1"' in text and "second_chosen" not in found


def test_influences_have_a_page_with_the_command_that_follows(tmp_path):
    folder = tmp_path / "i"
    folder.mkdir()
    values = [0.5, -0.25, 2.0, 0.75]
    columns = {
        "row_id": IDS[:4],
        "index": range(4),
        "influence": values,
        "from_chosen": [0.0] * 4,
        "from_rejected": values,
        "chosen_tokens": np.full(4, 4, np.int32),
        "rejected_tokens": np.full(4, 5, np.int32),
    }
    write_part(folder / "influence.parquet", columns, {"verb": "influence"})
    record(folder, counts={"probes": 2}, concentration={"share_of_fall": {"10%": 0.6, "25%": None}})
    page = report(folder)
    tags(page)
    text = page.read_text(encoding="utf-8")
    assert (
        "75% of 4 training pairs push the probes&#39; chosen responses down; all together they lower them by 3.00"
        in text
    )
    assert "the worst 10% of the pairs hold 60 %. The more even" in text and "--keep lowest:0.75 --out kept" in text
    meta, found, *_ = page_data(page)
    assert meta["sort"] == ["influence", -1] and meta["showKey"] == "index" and found["influence"].tolist() == values
    assert text.index('href="#row-2"') < text.index('href="#row-3"') < text.index('href="#row-0"')


def test_a_table_without_rows_has_no_page(tmp_path):
    pq.write_table(pa.table({"row_id": pa.array([], pa.string())}), tmp_path / "forecast.parquet")
    with pytest.raises(RunError, match="has no rows; there is nothing to report"):
        report(tmp_path)
