"""The page: complete without network and scripts, and safe whatever the data says."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from ches_jax.data.sources import Record
from ches_jax.errors import RunError
from ches_jax.report import report
from ches_jax.report.html import escape, text_block
from ches_jax.report.pairs import plain_text
from ches_jax.scores.table import write_part

EVIL = "</div></details><script>alert('x')</script><img src=x onerror=alert(1)>\x00\ud800"
VOID = {"meta", "img", "br"}


class Tags(HTMLParser):
    """Collects elements and checks that they nest."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def tags(path):
    parser = Tags()
    parser.feed(path.read_text(encoding="utf-8"))
    assert parser.open == []
    return parser.seen


def columns(n, **more):
    rng = np.random.default_rng(0)
    return {
        "row_id": [f"r{i}" for i in range(n)],
        "index": np.arange(n),
        "ches": rng.normal(size=n),
        "ln_ches": rng.normal(size=n),
        "edit_distance": rng.uniform(size=n),
        "chosen_tokens": rng.integers(1, 9, n),
        "rejected_tokens": rng.integers(1, 9, n),
        "flags": [["truncated_chosen"]] * n,
    } | more


def source(n, text="fine"):
    content = {"prompt": [{"role": "user", "content": text}], "chosen": text, "rejected": text * 60}
    return [Record(i, f"r{i}", "", content) for i in range(n)]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    metadata = {"model": {"fingerprint": "sha256:12"}, "note": EVIL[:20]}
    names = ["$x_{", "日本", EVIL[:60]] * 10
    write_part(run / "scores.parquet", columns(30, category=names), metadata)
    (run / "run.json").write_text(json.dumps({"config": {"pairs": EVIL}, "command": "ches score <b>"}))
    dropped = {"row_id": "x", "index": 30, "reasons": [EVIL[:40]], "detail": {}}
    (run / "dropped.jsonl").write_text(json.dumps(dropped) + "\n")
    return report(run, rows=source(30, EVIL))


def test_markup_in_the_data_stays_text(page):
    used = {tag for tag, _ in tags(page)}
    assert "script" not in used
    assert not any(name.startswith("on") for _, attributes in tags(page) for name in attributes)
    text = page.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert" in text and "\x00" not in text


def test_nothing_is_loaded_from_outside_the_page(page):
    for tag, attributes in tags(page):
        assert tag not in {"link", "iframe", "object", "form", "base"}
        if tag == "img":
            assert attributes["src"].startswith("data:image/png;base64,")
            assert len(attributes["alt"]) > 20
        if tag == "a":
            assert attributes["href"].startswith("#")
    assert not re.search(r"url\(|@import", page.read_text(encoding="utf-8"))


def test_the_page_tells_what_a_reader_needs(page):
    text = page.read_text(encoding="utf-8")
    for words in ("What CHES is", "debated", "sha256:12", "was cut to --max-length", "AUC of ln_ches"):
        assert words in text
    assert 'name="viewport"' in text and '<html lang="en">' in text


def test_figures_are_files_too(page):
    figures = sorted((page.parent / "figures").iterdir())
    assert {"histogram_ches.png", "ches_length_difference.png"} <= {f.name for f in figures}
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in figures)
    assert len([1 for tag, _ in tags(page) if tag == "img"]) == len(figures)


def test_a_report_is_the_same_twice(page, tmp_path):
    again = report(page.parent, tmp_path, rows=source(30, EVIL))
    assert again == tmp_path / "report.html"
    assert again.read_bytes() == page.read_bytes()


@pytest.mark.parametrize(
    "more",
    [
        {"ches": [1.0], "ln_ches": [1.0]},
        {"ches": [None], "ln_ches": [None], "edit_distance": [None]},
        {"ches": [1e17], "ln_ches": [-0.0]},
    ],
)
def test_one_row_whatever_its_scores(tmp_path, more):
    write_part(tmp_path / "scores.parquet", columns(1, **more), {})
    tags(report(tmp_path, rows=source(1)))


def test_constant_scores(tmp_path):
    same = {name: [2.0] * 5 for name in ("ches", "ln_ches", "edit_distance")}
    lengths = {name: [3] * 5 for name in ("chosen_tokens", "rejected_tokens")}
    write_part(tmp_path / "scores.parquet", columns(5, **same, **lengths), {})
    tags(report(tmp_path, rows=source(5)))


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (None, "no run.json names the pairs"),
        ([Record(0, "other", "", {})], "changed since"),
        ([], "2 of the rows are not in the pairs file any more"),
    ],
)
def test_texts_that_cannot_be_had_are_a_note(tmp_path, rows, note):
    write_part(tmp_path / "scores.parquet", columns(2), {})
    assert note in report(tmp_path / "scores.parquet", rows=rows).read_text(encoding="utf-8")


def test_a_table_without_rows_is_refused(tmp_path):
    write_part(tmp_path / "scores.parquet", columns(0), {})
    with pytest.raises(RunError, match="no rows"):
        report(tmp_path)


def test_long_texts_fold_and_very_long_ones_are_cut():
    assert "<details>" not in text_block("chosen", "a" * 400)
    assert "<details>" in text_block("chosen", "a" * 600)
    assert "5000 more characters" in text_block("chosen", "a" * 25_000)
    assert "(empty)" in text_block("chosen", "")
    assert escape("\x00\ud800<\u2028") == "\N{REPLACEMENT CHARACTER}?&lt;\u2028"


def test_conversations_and_token_ids_become_text():
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
    assert plain_text(talk) == "[user] hi\n[assistant] "
    assert plain_text([1, 2]) == plain_text(np.array([1, 2])) == "token ids 1 2"
    assert plain_text({"a": 1}) == '{"a": 1}'


def test_many_points_become_hexagons():
    from ches_jax.report.figures import scatter

    x = np.random.default_rng(0).normal(size=(2, 4001))
    assert scatter(x[0], x[1], "x", "y").startswith(b"\x89PNG")
