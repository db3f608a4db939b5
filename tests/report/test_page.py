"""The page: complete without network, safe whatever the data says, and its numbers are those of the table."""

import base64
import hashlib
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from ches_jax.data.messages import as_text
from ches_jax.data.sources import Record, open_pairs
from ches_jax.errors import RunError
from ches_jax.report import report
from ches_jax.report.html import clean, escape
from ches_jax.report.pair_table import SEPARATOR, Column, PairTable, Texts, packed, unpacked
from ches_jax.report.render import json_for_script
from ches_jax.report.score_page import score_page
from ches_jax.report.terminal import pair_text
from ches_jax.scores.table import write_part

EVIL = "</div></details></script><script>alert('x')</script><img src=x onerror=alert(1)>\x00\ud800\u202e\x1b[31m"
VOID = {"meta", "img", "br", "input"}
KINDS = {"f4": np.float32, "i4": np.int32, "u1": np.uint8, "u2": np.uint16}


class Tags(HTMLParser):
    """Collects elements and checks that they nest."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("script", "style"):
            self.scripts.append("")

    def handle_startendtag(self, tag, attrs):  # SVG
        self.seen.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts[-1] += data


def parsed(path):
    parser = Tags()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def tags(path):
    return parsed(path).seen


def page_data(path):
    """What describes the table, its columns as arrays, its texts and its tokens."""
    parser = parsed(path)
    blocks = [a for t, a in parser.seen if t in ("script", "style")]
    by_id = {a.get("id"): text for a, text in zip(blocks, parser.scripts, strict=True)}
    meta = json.loads(by_id["page-data"])
    numbers = unpacked(by_id["block-numbers"])
    columns = {}
    for c in meta["columns"]:
        values = np.frombuffer(numbers, KINDS[c["type"]], meta["rows"], c["offset"])
        columns[c["name"]] = np.array(c["values"])[values.astype(int)] if c["kind"] == "word" else values
    tokens = json.loads(unpacked(by_id["block-tokens"])) if "block-tokens" in by_id else None
    texts = json.loads(unpacked(by_id["block-texts"]))
    return meta, columns, {name: whole.split(SEPARATOR) for name, whole in texts.items()}, tokens


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
    found = tags(page)
    assert [a.get("type") for t, a in found if t == "script"] == [
        "application/json",
        *["application/octet-stream"] * 2,
        None,
    ]
    assert not any(name.startswith("on") for _, attributes in found for name in attributes)
    text = page.read_text(encoding="utf-8")
    assert "<script>alert" not in text and "onerror=alert(1)>" not in text
    assert not any(c in text for c in "\x00\x1b")


def test_the_content_policy_allows_the_pages_own_script_and_style_and_nothing_else(page):
    parser = parsed(page)
    (policy,) = (a["content"] for t, a in parser.seen if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    style, script = parser.scripts[0], parser.scripts[-1]
    for rule, text in (("style-src", style), ("script-src", script)):
        assert rules[rule] == f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    assert not any("style" in attributes for _, attributes in parser.seen)


def test_nothing_is_loaded_from_outside_the_page(page):
    for tag, attributes in tags(page):
        assert tag not in {"link", "iframe", "object", "form", "base"}
        assert "src" not in attributes
        if tag == "a":
            assert attributes["href"].startswith("#")
        if tag == "svg":
            assert len(attributes["aria-label"]) > 20
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://(?!www\.w3\.org/2000/svg)", text)


def test_the_page_tells_what_a_reader_needs(page):
    text = page.read_text(encoding="utf-8")
    for words in (
        "What stands out?",
        "Which score sorts the pairs?",
        "debated",
        "sha256:12",
        "was cut to --max-length",
        "AUC of|AUC:",
    ):
        assert re.search(words, text)
    assert 'name="viewport"' in text and '<html lang="en">' in text
    assert text.index("What stands out?") < text.index("<figure") < text.index("Provenance</h2>")


def test_the_numbers_of_the_page_are_those_of_the_table(page):
    meta, found, texts, _ = page_data(page)
    wanted = columns(30)
    for name in ("ches", "ln_ches"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=2**-23)
    np.testing.assert_array_equal(found["index"], np.arange(30))
    np.testing.assert_array_equal(found["rejected_minus_chosen"], wanted["rejected_tokens"] - wanted["chosen_tokens"])
    assert found["category"].tolist() == [clean(n) for n in ["$x_{", "日本", EVIL[:60]] * 10]
    assert texts["chosen"] == [clean(EVIL)] * 30 and texts["id"] == [f"r{i}" for i in range(30)]
    assert meta["sort"] == ["ches", -1] and meta["show"].startswith("ches show ")


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


def test_what_cannot_be_drawn_is_refused_with_what_is_there(tmp_path):
    with pytest.raises(RunError, match="does not exist"):
        report(tmp_path / "nowhere")
    with pytest.raises(RunError, match="is empty"):
        report(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(RunError, match=r"nothing in it can be drawn: it has notes\.txt"):
        report(tmp_path)
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(RunError, match="ches diagnose"):
        report(tmp_path)


def test_a_forecast_goes_before_the_scores_of_pairs_alone(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_part(tmp_path / "scores.parquet", columns(3, head_score=[1.0, 2.0, 3.0]), {})
    assert page_data(report(tmp_path, rows=source(3)))[0]["sort"] == ["head_score", -1]
    forecast = {
        "row_id": ["r2", "r0"],
        "set": ["train"] * 2,
        "forecast_chosen": [-3.0, 0.5],
        "forecast_rejected": [-1.0, 0.0],
    }
    pq.write_table(pa.table(forecast), tmp_path / "forecast.parquet")
    meta, found, *_ = page_data(report(tmp_path, rows=source(3)))
    assert meta["sort"] == ["forecast_chosen", 1]
    np.testing.assert_array_equal(found["forecast_chosen"], np.array([0.5, np.nan, -3.0], np.float32))


def test_many_pairs_keep_short_texts_and_the_ends_of_the_order_keep_theirs_whole():
    n, long = 5000, "word " * 500
    scores = np.arange(n, dtype=float)
    table = PairTable(
        name="x",
        rows=n,
        columns=[Column(name="score", label="score", values=scores)],
        key=["score"],
        sort=("score", -1),
        texts={"chosen": [long] * n, "rejected": [long] * n},
    )
    meta, blocks = table.encoded()
    texts = {name: whole.split(SEPARATOR) for name, whole in json.loads(unpacked("".join(blocks["texts"]))).items()}
    assert texts["chosen"][-1] == long and texts["chosen"][0] == long
    assert len(texts["chosen"][2500]) < 410
    cut = next(c for c in meta["columns"] if c["name"] == "_cut")
    assert cut["offset"] % 4 == 0
    flags = np.frombuffer(unpacked("".join(blocks["numbers"])), np.int32, n, cut["offset"])
    assert flags[2500] == 1 and flags[-1] == 0
    assert sum(map(len, texts["chosen"])) + sum(map(len, texts["rejected"])) < 7_000_000


def test_a_block_is_written_as_it_is_read_with_the_bytes_of_one_piece(monkeypatch):
    """However the bytes come, and for blocks on either side of those that are compressed for speed."""
    monkeypatch.setattr("ches_jax.report.pair_table.LARGE", 5000)
    data = np.random.default_rng(0).integers(0, 9, 9000).astype(np.uint8).tobytes()
    for size, level in ((4999, 6), (5000, 3), (9000, 3), (0, 6)):
        want = base64.b64encode(zlib.compress(data[:size], level, wbits=31)).decode()
        for step in (1, 700, 9000):
            assert "".join(packed(data[i : min(i + step, size)] for i in range(0, size, step))) == want
        assert unpacked(want) == data[:size]


@pytest.mark.parametrize("budget", [1500, 10**6])
def test_texts_that_are_cut_as_they_are_read_are_those_of_a_page_that_had_them_whole(tmp_path, monkeypatch, budget):
    for module in ("pair_table", "texts"):
        monkeypatch.setattr(f"ches_jax.report.{module}.CHARACTERS", budget)
        monkeypatch.setattr(f"ches_jax.report.{module}.LONGEST", 300)
    for module in ("pair_table", "score_page"):
        monkeypatch.setattr(f"ches_jax.report.{module}.WHOLE", 2)
    monkeypatch.setattr("ches_jax.report.score_page.TOKENS_OF", 1)
    monkeypatch.setattr("ches_jax.report.score_page.MOST_TEXTS", 15)
    monkeypatch.setattr("ches_jax.report.pair_table._AT_ONCE", 3)
    write_part(tmp_path / "scores.parquet", columns(20), {})
    rng = np.random.default_rng(1)
    sides = ("prompt", "chosen", "rejected")
    whole = {side: ["".join(rng.choice([*"abc é"], rng.integers(0, 350))) for _ in range(20)] for side in sides}
    rows = [Record(i, f"r{i}", "", {side: whole[side][i] for side in sides}) for i in range(20)]
    pairs = score_page(tmp_path, rows).pairs
    assert pairs is not None and pairs.left_out is not None
    left_out = pairs.left_out
    texts = {s: ["" if out else t for t, out in zip(whole[s], left_out, strict=True)] for s in sides}
    (meta, blocks), (want_meta, want_blocks) = pairs.encoded(), replace(pairs, texts=texts).encoded()
    assert meta == want_meta and left_out.sum() == 5
    assert {name: "".join(text) for name, text in blocks.items()} == {n: "".join(t) for n, t in want_blocks.items()}
    kept = sum(len(pairs.texts[side][i]) for side in sides for i in range(20))
    total = sum(len(text) for of_side in texts.values() for text in of_side)
    assert kept < total / 2 if budget == 1500 else kept == total


def test_of_too_many_pairs_those_that_lead_have_their_texts_and_show_prints_any(tmp_path, monkeypatch):
    scores = np.array([0.0, 9.0, 4.0, 5.0, 1.0])
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"ask {i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(5)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ids = [record.row_id for record in open_pairs(str(pairs))]
    run = tmp_path / "run"
    run.mkdir()
    write_part(run / "scores.parquet", columns(5, row_id=ids, ches=scores), {})
    (run / "run.json").write_text(json.dumps({"config": {"pairs": str(pairs)}}))
    monkeypatch.setattr("ches_jax.report.score_page.MOST_TEXTS", 3)
    meta, numbers, texts, _ = page_data(report(run))
    leading = numbers[meta["sort"][0]]
    assert [text != "…" for text in texts["prompt"]] == [bool(flag == 0) for flag in numbers["_cut"]]
    order = np.argsort(-meta["sort"][1] * -leading)
    shown = {int(i) for i in (*order[:2], *order[-1:])}
    assert {i for i, text in enumerate(texts["chosen"]) if text == f"yes {i}"} == shown
    assert "Of 5 pairs the 3 at both ends" in (run / "report.html").read_text(encoding="utf-8")
    read = []
    keep = Texts.set
    monkeypatch.setattr(
        Texts, "set", lambda of, places, texts, whole: read.extend(texts) or keep(of, places, texts, whole)
    )
    for i in range(5):
        read.clear()
        assert f"yes {i}" in pair_text(run, str(i)) and read == [f"ask {i}", f"yes {i}", "no"]  # of one pair


def test_a_clean_text_has_no_control_characters_and_all_others():
    controls = {*range(9), *range(0xB, 0x20), *range(0x7F, 0xA0), 0xFFFE, 0xFFFF}
    for i in range(0x20000):
        want = "?" if 0xD800 <= i < 0xE000 else "\N{REPLACEMENT CHARACTER}" if i in controls else chr(i)
        assert clean(chr(i)) == want and clean(f"a{chr(i)}é\n") == f"a{want}é\n"


def test_json_for_a_script_and_escaped_text():
    assert json.loads(json_for_script({"a": EVIL})) == {"a": EVIL}
    assert "<" not in json_for_script({"a": EVIL})
    assert escape("\x00\ud800<\u2028") == "\N{REPLACEMENT CHARACTER}?&lt;\u2028"


def test_conversations_and_token_ids_become_text():
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": None}]
    assert as_text(talk) == "[user] hi\n[assistant] "
    assert as_text([1, 2]) == as_text(np.array([1, 2])) == "token ids 1 2"
    assert as_text({"a": 1}) == '{"a": 1}'
