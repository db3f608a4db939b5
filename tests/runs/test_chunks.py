"""Chunks of a run: whole or not there, in order, apart from what a killed run left."""

import json

import pytest

from ches_jax.errors import RunError
from ches_jax.runs import chunks


def test_a_run_goes_on_after_the_first_gap(tmp_path):
    assert chunks.finished(tmp_path) == 0
    for number in (0, 1, 3):
        chunks.write(tmp_path, number, [{"n": number}])
    assert chunks.finished(tmp_path) == 2
    with pytest.raises(RunError, match=r"1 parts are missing \(2\)"):
        chunks.require_whole(tmp_path)


def test_parts_are_joined_in_order_with_what_was_dropped(tmp_path):
    chunks.write(tmp_path, 1, [{"n": 2}], [{"row": 5}])
    chunks.write(tmp_path, 0, [{"n": 0}, {"n": 1}], [{"row": 3}, {"row": 4}])
    chunks.join(tmp_path, "rows.jsonl", chunks.require_whole(tmp_path))
    chunks.clear(tmp_path)
    assert [r["n"] for r in chunks.read_lines(tmp_path / "rows.jsonl")] == [0, 1, 2]
    assert [r["row"] for r in chunks.read_lines(tmp_path / chunks.DROPPED)] == [3, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == [chunks.DROPPED, "rows.jsonl"]


def test_a_chunk_that_died_while_it_was_written_is_not_there(tmp_path):
    def rows():
        yield {"n": 0}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chunks.write(tmp_path, 0, rows(), [{"row": 0}])
    assert chunks.finished(tmp_path) == 0 and not list((tmp_path / chunks.FOLDER).glob("part-*"))


def test_the_part_is_written_last(tmp_path, monkeypatch):
    """A kill between the two files must not leave a chunk that counts as done and lacks its dropped rows."""
    order = []
    real = chunks.write_lines
    monkeypatch.setattr(chunks, "write_lines", lambda path, rows: (order.append(path.name), real(path, rows)))
    chunks.write(tmp_path, 7, [{"n": 0}], [{"row": 0}])
    assert order == ["dropped-000007.jsonl", "part-000007.jsonl"]


def test_no_chunk_at_all_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no parts to merge"):
        chunks.require_whole(tmp_path, ".parquet")


def test_lines_are_plain_json(tmp_path):
    chunks.write(tmp_path, 0, [{"text": "grün\n"}])
    assert chunks.path(tmp_path, 0).read_bytes() == '{"text": "grün\\n"}\n'.encode()
    assert json.loads(chunks.path(tmp_path, 0).read_text(encoding="utf-8")) == {"text": "grün\n"}
