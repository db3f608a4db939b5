"""The pairs of a diagnosis: their order, what is joined, their texts, the file."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.data.sources import row_id
from ches_jax.displacement.changes import Changes
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.displacement.pair_table import pair_table, worst_rows
from ches_jax.errors import ChesError


def changes(count=12, **more):
    rows = {"row_id": np.array([f"r{i}" for i in range(count)]), "index": np.arange(count)}
    return Changes(-np.arange(count, dtype=float), np.zeros(count), "test", rows=rows, **more)


def test_the_pairs_that_fell_most_come_first():
    table = pair_table(changes(), 0.05, texts={"r11": {"prompt": "p", "chosen": "c\n", "rejected": "r"}})
    assert table["row_id"].to_pylist()[:2] == ["r11", "r10"] and table["regime"][0].as_py() == "inverted"
    worst = worst_rows(table)
    assert len(worst) == 10 and worst[0]["text"] == '"c "' and worst[0]["chosen"] == -11 and worst[1]["text"] == ""


def test_held_out_pairs_are_listed_before_training_ones():
    both = changes(held_out=True)
    both = Changes(**{**vars(both), "beside": changes(3)})
    table = pair_table(both, 0.05)
    assert len(table) == 15 and {row["set"] for row in worst_rows(table)} == {"held_out"}


def test_scores_forecasts_and_influences_are_joined_by_row(tmp_path):
    scores = pa.table({"row_id": ["r11", "r3"], "head_score": [5.0, 3.0], "logp_chosen": [0.0, 0.0]})
    pq.write_table(scores, tmp_path / "scores.parquet")
    influence = pa.table({"row_id": ["r3"], "influence": [-1.0], "from_chosen": [0.5], "from_rejected": [-1.5]})
    pq.write_table(influence, tmp_path / "influence.parquet")
    table = pair_table(changes(), 0.05, [tmp_path, tmp_path / "influence.parquet"])
    rows = {row["row_id"]: row for row in table.to_pylist()}
    assert rows["r11"]["head_score"] == 5 and rows["r3"]["influence"] == -1 and rows["r0"]["head_score"] is None
    assert "logp_chosen" not in table.column_names and worst_rows(table)[0]["head_score"] == 5
    pq.write_table(pa.table({"row_id": ["other"], "influence": [1.0]}), tmp_path / "influence.parquet")
    with pytest.raises(ChesError, match="no pair in common"):
        pair_table(changes(), 0.05, [tmp_path / "influence.parquet"])
    with pytest.raises(ChesError, match=r"none of scores.parquet"):
        pair_table(changes(), 0.05, [tmp_path / ".."])


def run(folder, count=16):
    """A run of `ches train` with its displacement log, and the pairs it trained on."""
    pairs = [{"prompt": f"p{i // 2}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(count)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    (folder / "config.json").write_text(json.dumps({"config": {"pairs": str(folder / "pairs.jsonl"), "columns": {}}}))
    columns = {
        "step": [5] * count,
        "set": ["held_out"] * count,
        "row_id": [row_id(p) for p in pairs],
        "index": list(range(count)),
        "dlogp_chosen": [-1.0 - i for i in range(count)],
        "dlogp_rejected": [-30.0] * count,
        "chosen_tokens": [4] * count,
        "rejected_tokens": [4] * count,
    }
    pq.write_table(pa.table(columns), folder / "displacement.parquet")
    return folder


def test_a_diagnosis_writes_its_pairs_with_their_texts(tmp_path):
    found = diagnose(DiagnoseConfig(path=str(run(tmp_path)), out=str(tmp_path / "d")))
    rows = pq.read_table(tmp_path / "d/pairs.parquet").to_pylist()
    assert (
        len(rows) == 16 and rows[0]["chosen"] == "c15" and rows[0]["prompt"] == "p7" and rows[0]["dlogp_chosen"] == -16
    )
    assert json.loads((tmp_path / "d/diagnosis.json").read_text())["verdict"] == found.verdict == "displaced"
    assert found.worst[0]["text"] == '"c15"' and "worst: row 15 -16.00 nats" in found.text()


def test_pairs_of_one_prompt_are_resampled_together(tmp_path):
    found = diagnose(DiagnoseConfig(path=str(run(tmp_path))))
    assert found.pairs == 16 and found.records == 8
    (tmp_path / "pairs.jsonl").unlink()
    assert diagnose(DiagnoseConfig(path=str(tmp_path))).records == 16
