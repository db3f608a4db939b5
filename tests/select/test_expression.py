"""``--by column:EXPRESSION`` against Python's own arithmetic, what it refuses, and ``--dedup``."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ches_jax.errors import RunError
from ches_jax.scores.formulas import soft_label
from ches_jax.scores.table import write_part
from ches_jax.select.config import SelectConfig
from ches_jax.select.expression import as_numbers, evaluated, names, parsed
from ches_jax.select.run import select
from tests.select.test_select import columns, lines, source

A, B = np.array([1.5, -2.0, 0.0, np.nan]), np.array([2.0, 4.0, 0.0, 1.0])


@pytest.mark.parametrize(
    "text",
    [
        "a + b * 2 - 3 / 4",
        "(a + b) * 2",
        "-a",
        "abs(a - b)",
        "log(b + 1)",
        "min(a, b, 1)",
        "max(a, -b)",
        "a < b",
        "a >= b",
        "0 < b <= 2",
        "a == 1.5",
        "a != 1.5",
        "min(a, b) > -1",
        "2e1 - a",
        "- -a + +b",
    ],
)
def test_an_expression_means_what_python_means(text: str):
    scope: dict[str, Any] = {"abs": abs, "log": math.log, "min": min, "max": max}
    expected = [float(eval(text, {}, scope | {"a": x, "b": y})) for x, y in zip(A[:3], B[:3], strict=True)]
    actual = evaluated(parsed(text), {"a": A, "b": B})
    np.testing.assert_array_equal(actual[:3], expected)
    assert np.isnan(actual[3]) == ("a" in names(parsed(text)))


def test_what_has_no_value_is_nan():
    np.testing.assert_array_equal(evaluated(parsed("1 / b"), {"b": B}), [0.5, 0.25, np.nan, 1.0])
    np.testing.assert_array_equal(evaluated(parsed("log(b)"), {"b": np.array([1.0, 0.0, -1.0])}), [0, np.nan, np.nan])
    np.testing.assert_array_equal(evaluated(parsed("3"), {"b": B[:2]}), [3, 3])


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('x')",
        "a.__class__.__mro__[0]",
        "a[0]",
        "[a]",
        "lambda: a",
        "a if b else a",
        "'x'",
        "a @ b",
        "a ** b",
        "a and b",
        "not a",
        "f(a)",
        "abs(a, b)",
        "min(a)",
        "max(*a)",
        "log(x=a)",
        "a := 1",
        "",
        "a b",
        "True",
        "1j",
        "(" * 300 + "a" + ")" * 300,
        "-" * 990 + "a",
        "a+" * 600 + "a",
        "a\x00",
        "a // b",
        "a in b",
        "a is b",
    ],
)
def test_anything_else_is_refused_in_one_message(text: str):
    with pytest.raises(RunError, match="--by column"):
        parsed(text)


def test_a_column_of_numbers():
    values = as_numbers("s", [1, "2.5", None, True, ""], ["s"])
    np.testing.assert_array_equal(values, [1, 2.5, np.nan, 1, np.nan])
    with pytest.raises(RunError, match=r"'s' holds 'good' in row 1; expected a column of numbers"):
        as_numbers("s", [1, "good"], ["s"])
    with pytest.raises(RunError, match=r"no column 'scor'; did you mean score\? \(there are a, score\)"):
        as_numbers("scor", [None], ["score", "a"])


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    write_part(folder / "scores.parquet", columns(), {})
    return folder


def test_rows_are_kept_by_columns_of_the_table_and_of_the_data(run, tmp_path):
    rows = source()
    for i, row in enumerate(rows):
        row.extra = {"meta": {"judge": i % 5}, "flag": i > 3}
    by = "column:meta.judge * 100 + chosen_tokens"
    summary = select(SelectConfig(scores=run, out=tmp_path / "kept", by=by, keep="highest:4"), iter(rows))
    table = columns()
    value = {i: i % 5 * 100 + int(table["chosen_tokens"][i]) for i in range(20) if table["ches"][i] is not None}
    kept = lines(tmp_path / "kept" / "pairs.jsonl")
    assert sorted(r[by] for r in kept) == sorted(value.values())[-4:]
    assert all(r[by] == value[int(r["row_id"][1:])] for r in kept)
    assert summary["rule"]["by"] == by
    out = tmp_path / "flags"
    select(SelectConfig(scores=run, out=out, by="column:flag", keep="above:0.5"), iter(rows))
    assert [r["row_id"] for r in lines(out / "pairs.jsonl")] == [f"r{i}" for i in range(4, 20) if i in value]


def test_soft_ches_weighs_both_orders_by_the_probability_of_the_label(tmp_path):
    rng = np.random.default_rng(0)
    numbers = {name: rng.normal(size=20) for name in ("inner", "sqnorm_chosen", "sqnorm_rejected")}
    table = columns(20, **numbers)
    run, rows = tmp_path / "run", source()
    write_part(run / "scores.parquet", table, {})
    probability = [i % 5 / 4 for i in range(20)]
    for row, p in zip(rows, probability, strict=True):
        row.extra = {"label_probability": p}
    select(SelectConfig(scores=run, out=tmp_path / "kept", by="soft_ches", keep="lowest:1.0"), iter(rows))
    kept = lines(tmp_path / "kept" / "pairs.jsonl")
    assert len(kept) == sum(v is not None for v in table["ches"])
    for row in kept:
        i = int(row["row_id"][1:])
        sums = (float(table[name][i]) for name in ("inner", "sqnorm_chosen", "sqnorm_rejected"))
        assert row["soft_ches"] == pytest.approx(soft_label(probability[i], *sums), rel=1e-12)
    rows[7].extra["label_probability"] = 75
    with pytest.raises(RunError, match="--by soft_ches: row 7 has the label_probability 75; expected 0 to 1"):
        select(SelectConfig(scores=run, out=tmp_path / "percent", by="soft_ches", keep="lowest:0.5"), iter(rows))
    with pytest.raises(RunError, match="no column 'label_probability'"):
        select(SelectConfig(scores=run, out=tmp_path / "none", by="soft_ches", keep="lowest:0.5"), iter(source()))


@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("column:nothing + 1", "no column 'nothing'"),
        ("column:row_id", "'row_id' of the score table holds no numbers"),
        ("column:chosen", "'chosen' holds 'yes 0 é' in row 0"),
        ("column:3", "names no column"),
        ("column:os.system(1)", "is not allowed"),
    ],
)
def test_a_column_that_cannot_be_is_named_and_nothing_is_written(run, tmp_path, by, words):
    with pytest.raises(RunError, match=words):
        select(SelectConfig(scores=run, out=tmp_path / "kept", by=by), source())
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize(("how", "gone"), [("none", []), ("exact", [4]), ("near", [4, 6])])
def test_rows_that_repeat_earlier_ones_go_before_the_rule(run, tmp_path, how, gone):
    words = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    texts = [f"text {i} of many" for i in range(20)]
    texts[2], texts[4], texts[6] = words, f"  {words.upper()}! ", words + " more"
    rows: list[Any] = [
        SimpleNamespace(
            index=i,
            row_id=f"r{i}",
            content={"prompt": t, "chosen": t + " yes", "rejected": t + " no"},
            category=None,
            extra={},
            candidates=None,
        )
        for i, t in enumerate(texts)
    ]
    out = tmp_path / "kept"
    summary = select(SelectConfig(scores=run, by="ln_ches", out=out, keep="lowest:1.0", dedup=how), rows)
    kept = [int(r["row_id"][1:]) for r in lines(out / "pairs.jsonl")]
    assert kept == [i for i in range(20) if i != 7 and i not in gone]
    reasons = {"exact": {"repeats an earlier row": 1}, "none": {}}
    reasons["near"] = reasons["exact"] | {"nearly repeats an earlier row": 1}
    assert summary["source"]["dropped"] == {"unscored": 1, **reasons[how]}
    assert summary["rule"]["dedup"] == how and summary["counts"]["scored"] == 19 - len(gone)
