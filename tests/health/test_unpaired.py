"""Rows of KTO without a model: each check on rows made for it, what a label may be, and the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ches_jax.cli import main
from ches_jax.data.sources import open_pairs, open_rows
from ches_jax.data.unpaired import LABELLED, is_good, labelled
from ches_jax.errors import DataError
from ches_jax.health import checks, unpaired
from ches_jax.health.unpaired import Single
from tests.helpers import write_lines

RNG = np.random.default_rng(1)


def text(n: int = 20) -> str:
    return " ".join(f"w{i}" for i in RNG.integers(1, 200, n))


def singles(n: int, **parts: Any) -> list[Single]:
    rows = [
        {"name": f"line {i}", "prompt": text(12), "response": text(), "good": i % 2 == 0, **parts} for i in range(n)
    ]
    return [Single(**row) for row in rows]


def test_labels_are_counted_and_one_label_alone_is_a_finding():
    check = unpaired.labels(singles(7))
    assert (check.numbers["good"], check.numbers["bad"], check.finding) == (4, 3, False)
    assert unpaired.labels(singles(7, good=True)).finding and unpaired.labels(singles(7, good=False)).finding


def test_a_response_by_another_name_is_read_and_a_missing_one_is_refused_in_words_of_its_kind():
    turns = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
    plain = labelled({"prompt": "p", "completion": "a", "label": 1}, {})
    assert labelled({"prompt": "p", "response": "a", "label": 1}, {}) == plain
    asked = labelled({"prompt": turns[:1], "completion": turns[1:], "label": 1}, {})
    assert labelled({"messages": turns, "label": 1}, {}) == asked
    assert labelled({"conversations": {"messages": turns}, "label": 1}, {}) == asked
    for pair in ({"chosen": "a"}, {"rejected_response": "b"}):  # what a pair has beside its responses is none of them
        with pytest.raises(DataError, match="no column 'completion'"):
            labelled({"messages": turns, "label": 1, **pair}, {})
    with pytest.raises(DataError, match=r"no column 'completion' .* found: prompt, text, .* --columns completion="):
        labelled({"prompt": "p", "text": "a", "label": 1}, {})


@pytest.mark.parametrize("longer", [True, False])
def test_length_is_an_effect_between_the_labels(longer: bool):
    texts = [text() for _ in range(30)]  # each is a good and a bad response: no difference at all
    rows = [Single(r.name, r.prompt, texts[i // 2], r.good) for i, r in enumerate(singles(60))]
    assert not unpaired.length(rows).finding
    changed = [Single(r.name, r.prompt, r.response + " " + text(20) * (r.good == longer), r.good) for r in rows]
    check = unpaired.length(changed)
    sizes = [np.array([len(r.response) for r in changed if r.good == side]) for side in (True, False)]
    assert check.finding and check.numbers["cohens_d"] == checks.cohens_d(*sizes)
    low, high = check.numbers["interval"]
    assert (0 < low < high) if longer else (low < high < 0)


def test_sides_of_one_length_each_differ_whatever_the_spread():
    rows = [Single(f"{i}", text(3), "yes" if i % 2 else "never ever", i % 2 == 0) for i in range(12)]
    check = unpaired.length(rows)
    assert check.finding and check.numbers["cohens_d"] == np.inf
    assert not unpaired.length(rows[:10]).finding  # five of each label may be chance
    same = [Single(r.name, r.prompt, "yes", r.good) for r in rows]
    assert not unpaired.length(same).finding
    assert not unpaired.length(singles(5, good=True)).finding


def test_refusals_of_good_responses_are_examples():
    no = "I'm sorry, but I can't help with that."
    rows = [Single(r.name, r.prompt, no if r.good else r.response, r.good) for r in singles(40)]
    check = unpaired.refusals(rows)
    assert check.finding and (check.numbers["good"], check.numbers["bad"]) == (1.0, 0.0)
    assert len(check.examples) == 20 and check.examples[0] == "line 0"
    assert not unpaired.refusals(singles(40, response=no)).finding


def test_contradictions_and_duplicates_look_at_the_label():
    base = singles(150)
    r, s = base[4], base[5]
    turned = Single("turned", r.prompt.upper(), r.response + ".", not r.good)
    again = Single("again", s.prompt, s.response.title(), s.good)
    near = Single("near", s.prompt, s.response + " today", s.good)
    assert unpaired.contradictions([*base, turned]).examples == [f"turned (bad) against {r.name}"]
    assert not unpaired.contradictions([*base, again, near]).finding
    check = unpaired.duplicates([*base, again, near])
    assert check.finding and list(check.examples) == [f"again repeats {s.name}", f"near is nearly {s.name}"]
    assert unpaired.duplicates([*base, turned]).rows == 0


def test_empty_long_and_leaked_rows():
    base = singles(4)
    assert unpaired.empty([*base, Single("e", "p", "  ", True)]).examples == ["e (response)"]
    assert unpaired.too_long([*base, Single("l", "p", "x" * checks.LONGEST, True)]).examples == [
        "l (100,001 characters)"
    ]
    assert checks.leaks(base, [base[2].prompt.upper()], "test.jsonl").examples == ["line 2 is row 0 of test.jsonl"]


@pytest.mark.parametrize(
    ("value", "good"),
    [(True, True), (False, False), (1, True), (0, False), (-1, False), (1.0, True), ("True", True), (" false ", False)],
)
def test_a_label_says_good_or_bad(value: Any, good: bool):
    assert is_good("label", value) is good


@pytest.mark.parametrize("value", [None, 0.5, 2, 5, "maybe", [True], "", float("nan")])
def test_a_rating_is_no_label(value: Any):
    with pytest.raises(DataError, match=r"'label' is .*; expected whether the response is good"):
        is_good("label", value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "completion": "c"},
        {"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "c"}]},
        {"prompt": [{"from": "human", "value": "p"}], "completion": [{"from": "gpt", "value": "c"}]},
        {"prompt": '[{"role": "user", "content": "p"}]', "completion": '[{"role": "assistant", "content": "c"}]'},
    ],
)
def test_texts_and_messages_are_read(tmp_path: Path, row: dict[str, Any]):
    (record,) = open_rows(write_lines(tmp_path / "a.jsonl", [{**row, "label": True}]), None, None, LABELLED)
    assert Single.of(record) == Single("line 1", "p", "c", True)


def test_the_command_examines_rows_of_kto(tmp_path: Path, capsys: Any):
    rows = [{"prompt": r.prompt, "completion": r.response, "label": r.good} for r in singles(20)]
    good = write_lines(tmp_path / "good.jsonl", rows)
    assert main(["doctor", "--pairs", good]) == 0
    assert "10 good and 10 bad responses" in capsys.readouterr().out
    bad = [*rows, {**rows[0], "label": False}, {**rows[1], "label": 3}, {**rows[2], "completion": None}]
    assert main(["doctor", "--pairs", write_lines(tmp_path / "bad.jsonl", bad), "--against", good, "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    findings = {name: check["rows"] for name, check in record["checks"].items() if check["finding"]}
    assert findings == {"unreadable": 2, "contradictions": 1, "leaked prompts": 21}
    # other names, and a file that is neither pairs nor labelled responses
    other = write_lines(tmp_path / "other.jsonl", [{"q": "p", "output": "o", "thumbs": True}] * 2)
    words = ["prompt=q", "completion=output", "label=thumbs"]
    assert main(["doctor", "--pairs", other, "--columns", *words]) == 1
    assert "2 good and 0 bad" in capsys.readouterr().out
    assert main(["doctor", "--pairs", other]) == 2
    assert "'chosen'" in capsys.readouterr().err


def test_what_reads_pairs_names_what_reads_such_rows(tmp_path: Path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "label": True}] * 2)
    with pytest.raises(DataError, match=r"ches train --loss kto, and ches doctor without a model"):
        open_pairs(path)


def test_a_system_text_beside_a_prompt_is_read_where_some_row_has_one(tmp_path):
    """In front of the prompt, as beside a pair; then the prompt of every row is a conversation."""
    rows = [{"system": s, "prompt": "p", "completion": "a", "label": True} for s in ("Be brief.", "", None)]
    read = [r.content["prompt"] for r in open_rows(write_lines(tmp_path / "some.jsonl", rows), None, None, LABELLED)]
    asked = [{"role": "user", "content": "p"}]
    assert read == [[{"role": "system", "content": "Be brief."}, *asked], asked, asked]
    turns = [*asked, {"role": "assistant", "content": "a"}]
    whole = write_lines(tmp_path / "whole.jsonl", [{"system": "S", "messages": turns, "label": 1}])
    (row,) = open_rows(whole, None, None, LABELLED)
    assert row.content["prompt"] == [{"role": "system", "content": "S"}, *asked]
    without = write_lines(tmp_path / "none.jsonl", rows[1:])
    assert [r.content["prompt"] for r in open_rows(without, None, None, LABELLED)] == ["p", "p"]
    hidden = open_rows(str(tmp_path / "some.jsonl"), None, {"system": ""}, LABELLED)
    assert [r.content["prompt"] for r in hidden] == ["p"] * 3
    two = write_lines(tmp_path / "two.jsonl", [{**rows[0], "system_prompt": "Be long."}])
    with pytest.raises(DataError, match="two readings: the system text is in 'system', or it is in 'system_prompt'"):
        open_rows(two, None, None, LABELLED)


def test_a_missing_label_is_named():
    with pytest.raises(DataError, match=r"no column 'label' .* found: prompt, completion, kto_tag; .*--columns label="):
        labelled({"prompt": "p", "completion": "a", "kto_tag": True}, {})


def test_single_responses_that_show_something_are_refused_until_the_texts_alone_are_meant(tmp_path):
    row = {"prompt": "p", "completion": "c", "label": True, "images": ["a.jpg"]}
    path = str(write_lines(tmp_path / "a.jsonl", [row, {**row, "images": []}]))
    with pytest.raises(
        DataError, match=r"'images' looks like what a prompt shows .*: --columns completion=completion$"
    ):
        open_rows(path, None, None, LABELLED)
    assert [r.fault for r in open_rows(path, None, {"completion": "completion"}, LABELLED).tolerant()] == ["", ""]
