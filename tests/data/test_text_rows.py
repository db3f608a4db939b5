"""Rows of texts from the bytes of their lines: the same ids and the same values as by reading each line."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ches_jax.data import formats, text_rows
from ches_jax.data.sources import Record, open_pairs
from ches_jax.data.text_rows import TextRows
from ches_jax.errors import DataError
from ches_jax.runs.json_text import PLAIN_TEXT, json_bytes, quoted

PIECES = [
    *("a", "Human:", " ", "\n", "\t", "\r", "\x0b", "\x1c", "\x85", "\xa0", "\u2028", "\u3000", '"', "\\", "\\\\", "/"),
    *(
        "{",
        "}",
        "[",
        "]",
        "array([{'role':",
        "{'role': ",
        '[{"role": "user", "content": "x"}]',
        "é",
        "😀",
        "\x00",
        "\x7f",
    ),
    *('", "chosen": "', "name three fruits", "\\n", "\\u0041", ", ", ": ", "null"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=5).map("".join)
LONG = "Please name three fruits that grow in Norway, and say why:"
RESPONSES = st.one_of(TEXTS, TEXTS.map(LONG.__add__), TEXTS.map(lambda t: f"\n {LONG}{t}"))
PROMPTS = st.one_of(TEXTS, st.just(LONG), st.just(f" {LONG}\n"))
EXTRAS = st.one_of(
    TEXTS, st.integers(-(10**25), 10**25), st.floats(), st.booleans(), st.none(), st.just([1]), st.just({"a": [2]})
)
NAMES = ["category", "row_id", "weight", "a%b", "é", 'q"', "tools", "scores", "prompt_ids", "ches", "chosen.x"]
SIDES = {"prompt": PROMPTS, "chosen": RESPONSES, "rejected": RESPONSES}
ROWS = st.lists(st.sampled_from(NAMES), max_size=2, unique=True).flatmap(
    lambda names: st.lists(st.fixed_dictionaries(dict.fromkeys(names, EXTRAS) | SIDES), min_size=1, max_size=6)
)
"""Some rows with the same columns."""


def line(row, style):
    """A row as one of the ways in which programs write JSON."""
    ascii_only, separators, end = style
    return json.dumps(row, ensure_ascii=ascii_only, separators=separators) + end


STYLES = st.tuples(
    st.sampled_from([False, False, True]),
    st.sampled_from([(", ", ": "), (",", ":"), (" , ", " : ")]),
    st.sampled_from(["\n", "\n", "\r\n", "\n\n"]),
)
BROKEN = [
    *(
        '{"prompt": "a\n',
        '", "chosen": "b", "rejected": "c"}\n',
        "[]\n",
        "null\n",
        '{"prompt": 1, "chosen": [], "x": 2}\n',
    ),
    '{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}\n',
    '{"prompt": "p", "chosen": "a", "rejected": "tab\there"}\n',
    '{"prompt": "p", "chosen": "a", "rejected": "\\ud800"}\n',
    '{"prompt": "p", "chosen": "a", "rejected": "c", "n": 1.50}\n',
    '{"prompt": "p", "chosen": "a", "rejected": "c", "n": -0}\n',
    '{"prompt": "p", "chosen": "a", "rejected": "c", "n": 1e400}\n',
    '{"prompt": "p", "chosen": "a", "rejected": "c", "n": 01}\n',
    '{"prompt": "p", "chosen": "a", "rejected": "c"} x\n',
    '{"prompt": "p\\", "chosen": "a", "rejected": "c"}\n',
    '{"prompt": "p\\\\", "chosen": "a\\\\\\"", "rejected": "c\\/"}\n',
    '{"chosen": "\\n\\nHuman: a\\n\\nAssistant: b", "rejected": "\\n\\nHuman: a\\n\\nAssistant: c"}\n',
]
GOOD = '{"prompt": "Which?", "chosen": "b", "rejected": "c"}\n'


def records_of(rows):
    """Of each row what there is to compare: index, id, line of its values, category, candidates."""
    if isinstance(rows, TextRows):
        for index, row_id, values in zip(rows.index.tolist(), rows.ids, rows.values, strict=True):
            row = dict(zip(rows.names, values, strict=True))
            category = json.loads(row.pop("category", b"null"))
            last = [row.pop(name) for name in ("prompt", "chosen", "rejected")]
            members = [*row.items(), *zip(("prompt", "chosen", "rejected"), last, strict=True)]
            text = b", ".join(json_bytes({name: 0})[1:-3] + value for name, value in members)
            yield index, row_id, b"{" + text + b"}\n", category, None
    else:
        for record in rows:
            yield of_record(record)


def of_record(record: Record):
    line = json_bytes({**record.extra, **record.content})
    return record.index, record.row_id, line, record.category, record.candidates


def same(path: Path, **options):
    source = open_pairs(str(path), **options).tolerant()
    blocks = list(source.blocks())
    assert [row for rows in blocks for row in records_of(rows)] == [of_record(record) for record in source]
    wanted = bytes([i % 3 == 0 for i in range(sum(map(len, source.rows_from(0))))])
    some = [row for rows in source.blocks(wanted) for row in records_of(rows)]
    assert some == [of_record(record) for records in source.rows_at(wanted) for record in records]
    return blocks


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(ROWS, STYLES), min_size=1, max_size=3), st.lists(st.sampled_from(BROKEN), max_size=3), st.data()
)
def test_values_and_ids_are_those_of_reading_each_line(tmp_path, alike, broken, data):
    lines = [line(row, style) for rows, style in alike for row in rows]
    for one in broken:
        lines.insert(data.draw(st.integers(0, len(lines))), one)
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(("".join([GOOD, *lines])).encode("utf-8", "surrogatepass"))
    same(path)


def test_a_conversation_as_text_is_found_beside_a_line_without_a_brace(tmp_path):
    path = tmp_path / "pairs.jsonl"
    talk = json.dumps({"prompt": '[{"role": "user", "content": "hi"}]', "chosen": "b", "rejected": "c"})
    path.write_text(f"{GOOD * 2}[]\n{GOOD}{talk}\n")
    assert [type(rows) for rows in same(path)] == [TextRows, list, TextRows, list]


@pytest.mark.parametrize("number", ["0.10", "1e2", "1E3", "10e-1"])
def test_a_number_that_we_would_not_write_is_written_as_ours(tmp_path, number):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(GOOD.replace("{", '{"margin": ' + n + ", ", 1) for n in ("0.5", "2", number, "0.5")))
    same(path)


@pytest.mark.parametrize("text", ["a\\/b", "\\u0041", "\\u00e9", "a\\\\", "\\u000b", "\\ud83d\\ude00"])
def test_an_escape_that_we_would_not_write_is_written_as_ours(tmp_path, text):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f"{GOOD * 2}{GOOD.replace('Which', text)}{GOOD}")
    (rows,) = same(path)
    assert isinstance(rows, TextRows) and rows.column("prompt")[2] == quoted(json.loads(f'"{text}?"'))


def test_a_text_does_not_end_in_another_line(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(f'{GOOD * 2}{{"prompt": "a\n", "chosen": "b", "rejected": "c"}}\n{GOOD}')
    blocks = same(path)
    assert [type(rows) for rows in blocks] == [TextRows, list, TextRows]
    assert [len(rows) for rows in blocks] == [2, 2, 1]
    assert isinstance(blocks[1], list) and all(record.fault for record in blocks[1])


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_of_texts_are_not_decoded_and_those_in_doubt_are(tmp_path, monkeypatch, end):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{i}\n", "chosen": "é", "rejected": '"', "category": "c", "n": 0.5} for i in range(50)]
    rows[20]["prompt"] = '[{"role": "user", "content": "hi"}]'  # still one pair, and of messages
    rows[30] |= {"chosen": f"{LONG} a", "rejected": f"{LONG} b", "prompt": LONG}
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode())
    blocks = same(path)
    assert [type(rows) for rows in blocks] == [TextRows, list, TextRows]
    assert isinstance(blocks[2], TextRows) and blocks[2].values[9][:3] == (json.dumps(LONG).encode(), b'" a"', b'" b"')
    source, read, parse = open_pairs(str(path)).tolerant(), [], formats._parsed
    monkeypatch.setattr(formats, "_parsed", lambda line, whole=False: read.append(line) or parse(line, whole))
    assert sum(map(len, source.blocks())) == 50
    assert {json.loads(line)["prompt"][:3] for line in read} == {"0\n", '[{"', "21\n", "Ple"}


def test_blocks_of_any_size_have_the_same_rows(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n \n" + f"{GOOD}\n{BROKEN[5]}" * 9 + GOOD.rstrip())
    want = [row for rows in same(path) for row in records_of(rows)]
    for size in (1, 50, 100, 130):
        monkeypatch.setattr(formats, "LINES", size)
        assert [row for rows in same(path) for row in records_of(rows)] == want


def test_a_line_without_end_is_refused_wherever_a_block_ends(tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    monkeypatch.setattr(formats, "LONGEST_LINE", 100)
    just, beyond = (json.dumps({"prompt": "p" * n, "chosen": "a", "rejected": "b"}) for n in (53, 54))
    assert len(just) == 99
    for size in (10, 130, 1000):
        monkeypatch.setattr(formats, "LINES", size)
        for text in (just, f"{just}\n", f"{GOOD}{just}\n{GOOD}"):
            path.write_text(text)
            assert sum(map(len, open_pairs(str(path)).blocks())) == text.count("prompt")
        for text in (beyond, f"{beyond}\n", f"{GOOD}{beyond}\n{GOOD}"):
            path.write_text(text)
            line = text.split("\n").index(beyond) + 1
            with pytest.raises(DataError, match=f"pairs.jsonl, line {line}: longer than"):
                list(open_pairs(str(path)).blocks())


def test_white_space_is_what_python_strips():
    spaces = [chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace()]
    for space in spaces:
        written = quoted(space)
        if re.fullmatch(PLAIN_TEXT, written):
            assert text_rows._begin(quoted(f"{space}{space}ab")) == b"ab"
            assert written[1] in text_rows._MAY_BE_SPACE
    others = {i for i in range(sys.maxunicode + 1) if not 0xD800 <= i < 0xE000} - set(map(ord, spaces))
    starts = (quoted(chr(i)) for i in others)
    assert all(map(text_rows._begin, starts))
