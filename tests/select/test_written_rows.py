"""Selections of files whose lines are taken apart: the bytes that reading row by row gives, and the same refusals."""

import json
from pathlib import Path

import numpy as np
import pytest

from ches_jax.data import formats, sources
from ches_jax.data.sources import Record, open_pairs
from ches_jax.errors import ChesError
from ches_jax.scores.table import write_part
from ches_jax.select.config import SelectConfig
from ches_jax.select.run import select
from tests.helpers import write_lines

RNG = np.random.default_rng(3)
LONG = "Please name three fruits that grow in Norway."
N = 60


def row(i):
    """Mostly three texts and two columns; some are written otherwise, or are something else."""
    made = {
        "prompt": f"ask {i}?\n",
        "chosen": f"yes {i} é\\",
        "rejected": f'no "{i}"',
        "category": "abc"[i % 3],
        "n": i / 4,
    }
    match i:
        case 7:
            made |= {"prompt": LONG, "chosen": f"{LONG} Apples.", "rejected": f"{LONG} Pears."}
        case 11:
            made["category"] = None
        case 13:
            made = {"prompt": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"}
        case 20 | 21:
            made = {"prompt": f"p{i}", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}
        case 30:
            made["chosen"] = 5
        case 41:
            made["n"] = [1, {"a": None}]
    return made


@pytest.fixture(params=["one line at a time", "many"])
def folder(tmp_path, monkeypatch, request):
    """A run with rows of all kinds, whose first and last have no score and whose 30th was dropped."""
    if request.param != "many":
        monkeypatch.setattr(formats, "LINES", 1)
    path = Path(write_lines(tmp_path / "pairs.jsonl", [row(i) for i in range(N)]))
    path.write_text(path.read_text() + '{"prompt": "\\u0041", "chosen": "b\\/", "rejected": "c", "n": 1.0}\n')
    made = [record for record in open_pairs(str(path)).tolerant() if not record.fault]
    values = RNG.normal(size=len(made)).tolist()
    values[0] = values[-1] = None
    numbers = [record.candidates or (None, None) for record in made]
    columns = {
        "row_id": [record.row_id for record in made],
        "index": [record.index for record in made],
        "chosen_candidate": [one for one, _ in numbers],
        "rejected_candidate": [other for _, other in numbers],
        "ches": values,
        "chosen_tokens": RNG.integers(1, 50, len(made)),
        "rejected_tokens": RNG.integers(1, 50, len(made)),
    }
    write_part(tmp_path / "run" / "scores.parquet", columns, {})
    write_lines(tmp_path / "run" / "dropped.jsonl", [{"row_id": "x", "index": 30, "reasons": ["unreadable"]}])
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": {"pairs": str(path)}}))
    return tmp_path


def rows_of(folder):
    return list(open_pairs(str(folder / "pairs.jsonl")).tolerant())


def expected(rows: list[Record], kept: dict, by: str) -> tuple[str, str]:
    """Lines of rows that are kept, by id and candidates with what is added, and ids of the others: written anew."""
    lines, others = [], []
    for record in rows:
        if (added := kept.get((record.row_id, record.candidates))) is None:
            others.append(record.row_id)
            continue
        numbers = zip(("chosen_candidate", "rejected_candidate"), record.candidates or (), strict=False)
        category = {} if record.category is None else {"category": record.category}
        ours = {"row_id": record.row_id, by: added.pop(by), **dict(numbers), **category, **added}
        lines.append(json.dumps({**record.extra, **record.content, **ours}, ensure_ascii=False) + "\n")
    return "".join(lines), "".join(f"{row_id}\n" for row_id in others)


RULES = [
    {"keep": "lowest:0.5"},
    {"keep": "highest:9", "control": "random"},
    {"keep": "window:0.5,20", "control": "length"},
    {"keep": "quantile:0.1,0.9", "dedup": "near"},
    {"keep": "soft:0.5"},
    {"keep": "above:0", "by": "column:n+1"},
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["keep"])
def test_a_selection_of_a_file_is_that_of_its_rows(folder, rule):
    config = {"scores": folder / "run", "by": "ches", **rule}
    if rule.get("by"):  # a column that does not hold numbers everywhere is refused, wherever the rows come from
        lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        write_lines(
            folder / "pairs.jsonl",
            [{**line, "n": 1.5} if line.get("n") == [1, {"a": None}] else line for line in lines],
        )
    rows = rows_of(folder)
    result = select(SelectConfig(out=folder / "a", **config))
    assert result == select(SelectConfig(out=folder / "b", **config), rows)
    for path in (folder / "a").iterdir():
        assert path.read_bytes() == (folder / "b" / path.name).read_bytes(), path.name
    kept = {}
    for line in (folder / "a" / "pairs.jsonl").read_text().splitlines():
        made = json.loads(line)
        numbers = tuple(made[n] for n in ("chosen_candidate", "rejected_candidate") if n in made) or None
        kept[made["row_id"], numbers] = {n: made[n] for n in (config["by"], "weight") if n in made}
    lines, others = expected(rows, kept, config["by"])
    assert (folder / "a" / "pairs.jsonl").read_text() == lines and len(kept) == result["counts"]["kept"]
    dropped = [json.loads(line) for line in (folder / "a" / "dropped.jsonl").read_text().splitlines()]
    assert "".join(f"{one['row_id']}\n" for one in dropped) == others
    assert "dropped when scored: unreadable" in [one["reason"] for one in dropped]


def test_columns_of_the_data_that_have_a_name_of_ours_give_way(folder):
    lines = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    write_lines(folder / "pairs.jsonl", [{"ches": "old", "weight": 1, **line, "row_id": 5} for line in lines])
    for keep, replaced in (("lowest:0.5", ["ches", "row_id"]), ("soft:0.5", ["ches", "row_id", "weight"])):
        config = {"scores": folder / "run", "by": "ches", "keep": keep}
        result = select(SelectConfig(out=folder / keep, **config))
        assert result["source"]["replaced_columns"] == replaced
        assert result == select(SelectConfig(out=folder / f"{keep}2", **config), rows_of(folder))
        assert (folder / keep / "pairs.jsonl").read_bytes() == (folder / f"{keep}2" / "pairs.jsonl").read_bytes()
        first = json.loads((folder / keep / "pairs.jsonl").read_text().splitlines()[0])
        assert [*first][:2] == ["ches", "weight"] and first["ches"] != "old" and first["row_id"] != 5


CHANGES = {
    "another text": lambda lines: [*lines[:17], lines[17].replace("yes", "yet"), *lines[18:]],
    "another text and a row more": lambda lines: [*lines[:5], lines[5].replace("no", "on"), *lines[6:], lines[2]],
    "a row more": lambda lines: [*lines, lines[2]],
    "a row less": lambda lines: lines[:-2],
    "a row in another place": lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
    "a row where none was": lambda lines: [*lines[:30], *lines[31:]],
    "a row that cannot be read": lambda lines: [*lines[:9], "{broken\n", *lines[10:]],
    "one pair in place of candidates": lambda lines: [*lines[:20], lines[19], *lines[21:]],
    "none left": lambda lines: lines[:1],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_pairs_that_changed_are_refused_as_row_by_row(folder, change):
    path = folder / "pairs.jsonl"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    refusals = []
    for rows in (None, rows_of(folder)):
        with pytest.raises(ChesError, match="changed since it was scored") as caught:
            select(SelectConfig(scores=folder / "run", by="ches", keep="lowest:0.5", out=folder / "kept"), rows)
        refusals.append(str(caught.value))
        assert not (folder / "kept").exists()
    assert refusals[0] == refusals[1]


def test_a_limit_of_the_run_is_kept(folder):
    config = {"pairs": str(folder / "pairs.jsonl"), "limit": 20}
    (folder / "run" / "run.json").write_text(json.dumps({"config": config}))
    with pytest.raises(ChesError, match=r"scored rows are not in it any more, the first is row 20 "):
        select(SelectConfig(scores=folder / "run", by="ches", out=folder / "kept"))


def test_lines_of_texts_are_not_decoded(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i}", "chosen": f"\n{i}", "rejected": 'a "b"', "category": "c"} for i in range(300)]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    ids = [record.row_id for record in open_pairs(path)]
    scores = {"row_id": ids, "index": np.arange(300), "ches": RNG.normal(size=300)}
    lengths = {"chosen_tokens": np.ones(300, int), "rejected_tokens": np.ones(300, int)}
    write_part(tmp_path / "run" / "scores.parquet", scores | lengths, {})
    read, parse = [], formats._parsed
    monkeypatch.setattr(formats, "_parsed", lambda line, whole=False: read.append(line) or parse(line, whole))
    monkeypatch.setattr(sources, "_LOOKED_AT", 2)
    select(SelectConfig(scores=tmp_path / "run", pairs=path, by="ches", keep="lowest:0.5", out=tmp_path / "kept"))
    assert len(read) < 10
