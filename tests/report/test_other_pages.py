"""Pages of generated texts, of judgments and of selections: from the files that those commands write."""

import json

import numpy as np
import pytest

from ches_jax.errors import RunError
from ches_jax.report import report
from ches_jax.report.html import clean
from tests.helpers import write_lines
from tests.report.test_page import EVIL, page_data, tags

TEXT = EVIL.replace("\ud800", "")


def generated(n=4):
    return [
        {
            "row_id": f"r{i}",
            "index": i // 2,
            "sample": i % 2,
            "prompt": TEXT,
            "text": TEXT if i else "",
            "logp": -1.5 * i,
            "finish_reason": "length" if i == 1 else "stop",
            "token_ids": [1] * i,
            "category": "chore",
        }
        for i in range(n)
    ]


def test_generated_texts_have_a_page(tmp_path):
    write_lines(tmp_path / "responses.jsonl", generated())
    work = {"positions": 4096, "padding": 0.25, "shared_positions": 0, "programs": 3, "programs_from_cache": 2}
    (tmp_path / "run.json").write_text(json.dumps({"verb": "generate", "work": work}))
    page = report(tmp_path)
    tags(page)
    cost = "4,096 positions computed, 25.0 % of them padding; 0 more were shared; 3 programs, 2 of them from the cache."
    assert cost in page.read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert "<h1>4 texts of 2 prompts</h1>" in text and "1 of 4 were cut" in text and "1 empty texts" in text
    meta, found, texts, _ = page_data(page)
    assert meta["key"] == ["index", "sample"] and texts["response"] == ["", *[clean(TEXT)] * 3]
    assert found["tokens"].tolist() == [0, 1, 2, 3] and found["logp"].tolist() == [0.0, -1.5, -3.0, -4.5]


def test_judgments_have_a_page(tmp_path):
    rows = [{"row_id": "a", "index": 0, "refusal": r, "reason": None, "text": TEXT} for r in (True, False, None)]
    write_lines(tmp_path / "judgments.jsonl", rows)
    summary = {"refusal_rate": 0.5, "interval": [0.1, 0.9], "by_category": {}}
    (tmp_path / "run.json").write_text(json.dumps({"verb": "judge", "config": {"responses": "g"}, "summary": summary}))
    page = report(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "<h1>50 % of 3 responses refused</h1>" in text and "1 refused, 1 answered" in text and "1 undecided" in text
    meta, found, *_ = page_data(page)
    assert found["judgment"].tolist() == ["refused", "answered", "undecided"]
    assert meta["key"] == ["line"]  # three rows of one index


def test_a_selection_has_a_page(tmp_path):
    kept = [
        {"row_id": f"r{i}", "prompt": "p", "chosen": TEXT, "rejected": "no", "ches": float(i), "category": "c"}
        for i in range(3)
    ]
    write_lines(tmp_path / "pairs.jsonl", kept)
    write_lines(tmp_path / "dropped.jsonl", [{"row_id": "x", "index": 9, "reason": "not in lowest:0.5 of ches"}])
    described = {
        "rule": {"by": "ches", "keep": "lowest:3", "control": "none"},
        "counts": {"table": 4, "kept": 3},
        "mean_lengths": {
            "kept": dict.fromkeys(("chosen_tokens", "rejected_tokens"), 10.0),
            "all": dict.fromkeys(("chosen_tokens", "rejected_tokens"), 20.0),
        },
        "categories": {"c": {"scored": 4, "kept": 3}},
        "source": {"pairs": "my.jsonl"},
    }
    (tmp_path / "selection.json").write_text(json.dumps(described))
    page = report(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert "<h1>3 of 4 pairs kept, lowest:3 of CHES</h1>" in text
    assert "chosen tokens 20 → 10" in text and "75 %" in text and "not in lowest:0.5 of ches" in text
    meta, found, texts, _ = page_data(page)
    assert meta["sort"] == ["ches", -1] and found["ches"].tolist() == [0.0, 1.0, 2.0]
    assert texts["chosen"] == [clean(TEXT)] * 3


@pytest.mark.parametrize("content", ["", "[1]\n", "{\n"])
def test_files_that_are_not_what_they_should_be_are_reported(tmp_path, content):
    (tmp_path / "responses.jsonl").write_text(content)
    with pytest.raises(RunError, match=r"responses\.jsonl"):
        report(tmp_path)


def test_the_probes_of_a_run_tell_where_the_mass_went(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from ches_jax.report.probe_section import probe_section

    assert probe_section(tmp_path) == ""
    token = [{"token": 1, "text": "<b>", "before": 0.1, "now": 0.7}]
    rows = [
        {
            "step": step,
            "index": i,
            "prompt": f"prompt {i} <i>",
            "argmax_mass": 0.5,
            "total_variation": step * i / 100,
            "gaining": token,
            "losing": token,
        }
        for step in (0, 10)
        for i in range(3)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "probes.parquet")
    text = probe_section(tmp_path)
    assert "“&lt;b&gt;” 0.10 → 0.70" in text and "<b>" not in text
    assert text.index("prompt 2") < text.index("prompt 1") < text.index("prompt 0")
    assert f"At the end {100 * np.mean([0, 0.1, 0.2]):.0f} %" in text
