"""The page of a diagnosis: made from its JSON answer and its table of pairs, or from the answer of a log alone."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.errors import RunError
from ches_jax.report import answers, report
from tests.report.test_page import EVIL, page_data, tags

TEXT = EVIL.replace("\ud800", "")


def part(name, mean, verdict, **more):
    interval = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "direction": "down"}
    return {
        "verdict": verdict,
        "pairs": 30,
        "records": 30,
        "unit": "pairs",
        "set": name,
        "source": "a run",
        "criterion": {"tolerance": 0.05},
        "chosen": interval,
        "rejected": interval | {"mean": mean - 2},
        "margin": interval | {"mean": 2.0, "low": 1.5, "high": 2.5},
        "displacement/lld_rate": 0.66,
        "caveats": [],
        **more,
    }


def written(folder, answer):
    (folder / "diagnosis.json").write_text(json.dumps(answer))
    return folder


@pytest.fixture
def run(tmp_path):
    criteria = [
        {"name": "the texts repeat themselves", "outcome": "met", "evidence": "+0.4 <i>", "of_texts": True},
        {"name": "fewer refuse", "outcome": "not measured", "evidence": "--judgments", "of_texts": True},
    ]
    advice = [{"do": "take the checkpoint near step 5", "because": "chosen was highest", "price": "a smaller margin"}]
    curve = {"steps": [0, 5, 10], "chosen": [0.0, 0.3, -0.4], "rejected": [0.0, -1.0, -2.4]}
    harm = {"answer": "harmful", "criteria": criteria}
    beside = part("train", 0.9, "not_displaced")
    answer = part("held_out", -0.4, "displaced", harm=harm, advice=advice, curve=curve, beside=beside)
    rows = {
        "row_id": [f"r{i}" for i in range(40)],
        "index": [*range(20)] * 2,
        "set": ["held_out"] * 20 + ["train"] * 20,
        "dlogp_chosen": np.linspace(-2, 1, 40),
        "dlogp_rejected": np.linspace(-5, 0, 40),
        "dmargin": [1.0] * 40,
        "regime": ["flat"] * 40,
        "head_score": np.linspace(3, -3, 40),
        "chosen_tokens": [4] * 40,
        "prompt": ["p"] * 40,
        "chosen": [TEXT] * 40,
        "rejected": ["no", None] * 20,
    }
    pq.write_table(pa.table(rows), tmp_path / "pairs.parquet")
    return written(tmp_path, answer)


def test_the_first_screen_answers_the_questions(run):
    page = report(run)
    tags(page)
    text = page.read_text(encoding="utf-8")
    (headline,) = re.findall("<h1>(.*)</h1>", text)
    assert (
        headline == "The chosen responses fell on held-out pairs: -0.40 nats; on training pairs +0.90; it was harmful"
    )
    assert "-0.40 <small>[-0.50, -0.30]</small> nats, 66 % of 30 pairs" in text
    assert "take the checkpoint near step 5 (chosen was highest; costs a smaller margin)" in text.replace(
        "Take", "take"
    )
    assert "+0.4 &lt;i&gt;" in text and "<i>" not in text
    assert "-0.40 from chosen, +2.40 from rejected" in text
    assert "chosen, held out -0.40 at step 10" in text


def test_the_pairs_of_the_diagnosis_are_in_the_table(run):
    meta, found, texts, _ = page_data(report(run))
    np.testing.assert_array_equal(found["chosen_change"], np.linspace(-2, 1, 40).astype(np.float32))
    np.testing.assert_allclose(found["margin_change"], np.linspace(3, 1, 40), rtol=1e-6)
    assert meta["key"] == ["set", "index"] and meta["sort"] == ["chosen_change", 1]
    assert texts["rejected"][:2] == ["no", ""] and found["head_score"][0] == 3
    text = report(run).read_text(encoding="utf-8")
    assert 'href="#row-held_out-0"' in text and "-1.00" in text  # head score and change: opposite ranks


def test_a_log_alone_has_a_page(tmp_path):
    nothing = {"mean": None, "low": None, "high": None, "direction": "down"}
    answer = part("held_out", 0.0, "undecided", unit="evaluations", pairs=3) | dict.fromkeys(
        ("chosen", "rejected", "margin"), nothing
    )
    page = report(written(tmp_path, answer))
    text = page.read_text(encoding="utf-8")
    assert "<h1>Whether the chosen responses fell is undecided in the held-out log</h1>" in text and "--beta" in text
    assert "box" not in re.sub("<script>.*", "", re.sub("<style>.*?</style>", "", text, flags=re.S), flags=re.S)


@pytest.mark.parametrize("answer", [{}, {"verdict": "displaced"}, {"verdict": "displaced", "chosen": 3}])
def test_a_damaged_answer_is_reported(tmp_path, answer):
    with pytest.raises(RunError, match=r"diagnosis\.json: is damaged"):
        report(written(tmp_path, answer))


def test_pairs_that_cannot_be_read_are_reported(run):
    (run / "pairs.parquet").write_bytes(b"no")
    with pytest.raises(RunError, match=r"pairs\.parquet: cannot be read"):
        report(run)


def test_advice_begins_as_a_sentence_and_a_command_as_it_is_typed():
    def first(do):
        lines = [{"do": do, "because": "b", "price": "p"}]
        return answers.advice({"held_out": {"verdict": "undecided", "advice": lines}}, [])

    assert first("add a term").startswith("Add a term (b; costs p)")
    assert first("ches diagnose PATH").startswith("ches diagnose PATH (")
