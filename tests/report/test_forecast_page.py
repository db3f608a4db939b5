"""Pages of forecasts and influences: from the files that those commands write."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.data.rollouts import ROLLOUTS, read_groups
from ches_jax.data.sources import open_rows, row_id
from ches_jax.errors import RunError
from ches_jax.report import report
from ches_jax.scores.table import write_part
from tests.helpers import write_lines
from tests.report.test_page import page_data, tags

PAIRS = [{"prompt": f"p{i}", "chosen": f"<b>c{i}</b>", "rejected": f"r{i}"} for i in range(6)]
IDS = [row_id(pair) for pair in PAIRS]


def record(folder, **more):
    config = {
        "model": "m",
        "pairs": write_lines(folder / "train.jsonl", PAIRS[:4]),
        "probes": write_lines(folder / "probes.jsonl", PAIRS[4:]),
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


def test_groups_have_a_page_that_leads_with_the_winners_that_fall(tmp_path):
    folder, answers = tmp_path / "g", ["yes", "no", "<b>maybe</b>", "never"]
    folder.mkdir()
    rollouts = tmp_path / "rollouts.jsonl"
    rollouts.write_text(json.dumps({"prompt": "Is it?", "responses": answers, "rewards": [1, 0, 1, 0]}) + "\n")
    every = [r.record.row_id for g in read_groups(open_rows(str(rollouts), None, None, ROLLOUTS)) for r in g.rollouts]
    columns = {
        "group": [0] * 4,
        "response": np.arange(4, dtype=np.int32),
        "row_id": every,
        "index": [0] * 4,
        "reward": [1.0, 0.0, 1.0, 0.0],
        "advantage": [1.0, -1.0, 1.0, -1.0],
        "coefficient": [0.5, -0.5, 0.5, -0.5],
        "tokens": np.full(4, 2, np.int32),
        "logp": [-3.0] * 4,
        "forecast": [0.5, -1.0, -0.25, -2.0],
        "rate": [3.0, -4.0, -1.5, -6.0],
        "rate_own": [4.0, -5.0, 2.0, -7.0],
        "rate_winners": [0.5, 0.5, -0.5, 0.5],
        "rate_losers": [-1.5, 0.5, -3.0, 0.5],
        "head_rate": [1.0, -1.0, 1.0, -1.0],
        "nthr": pa.array([None, 0.1, None, 0.2], pa.float64()),
        "falls": [False, False, True, False],
    }
    pq.write_table(pa.table(columns), folder / "groups.parquet")
    config = {"model": "bundled", "groups": str(rollouts), "columns": {}}
    summary = {"objective": "grpo", "optimizer": "sgd", "lr": 1e-3, "groups": 1, "winners_forecast_to_fall": 1}
    (folder / "run.json").write_text(json.dumps({"status": "done", "config": config, "summary": summary}))
    page = report(folder)
    tags(page)
    text = page.read_text(encoding="utf-8")
    assert (
        "1 of 2 winners would fall by the update of their own group" in text and "1 of 2 winners are forecast" in text
    )
    assert "own part is +2.00, other winners add -0.50 and losers -3.00: the losers take most" in text
    assert 'href="#row-0-2"' in text and 'href="#row-0-0"' not in text, "the winner that falls, and no other"
    meta, found, texts, _ = page_data(page)
    assert meta["sort"] == ["lead", 1] and np.nan_to_num(found["lead"], nan=9).tolist() == [3.0, 9, -1.5, 9]
    assert texts["response"] == answers and "<b>maybe" not in text


def test_a_table_without_rows_has_no_page(tmp_path):
    pq.write_table(pa.table({"row_id": pa.array([], pa.string())}), tmp_path / "forecast.parquet")
    with pytest.raises(RunError, match="has no rows; there is nothing to report"):
        report(tmp_path)
