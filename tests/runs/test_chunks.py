"""Chunks of a run: whole or not there, in order, apart from what a killed run left."""

import json
import os

import pytest

from ches_jax.errors import RunError
from ches_jax.runs import chunks


def test_a_run_goes_on_where_chunks_are_missing(tmp_path):
    assert not chunks.done(tmp_path)
    for number in (0, 1, 3):
        chunks.write(tmp_path, number, [{"n": number}])
    assert list(chunks.done(tmp_path)) == ["0", "1", "3"]
    with pytest.raises(RunError, match=r"1 parts are missing \(2\)"):
        chunks.require_whole(tmp_path)


def test_parts_are_joined_in_order_with_what_was_dropped(tmp_path):
    chunks.write(tmp_path, 1, [{"n": 2}], [{"row": 5}])
    chunks.write(tmp_path, 0, [{"n": 0}, {"n": 1}], [{"row": 3}, {"row": 4}])
    chunks.end(tmp_path, 2)
    chunks.join(tmp_path, "rows.jsonl")
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
    assert not chunks.done(tmp_path) and not list((tmp_path / chunks.FOLDER).glob("part-*"))


def test_the_part_is_written_last(tmp_path, monkeypatch):
    """A kill between two files must not leave a chunk that counts as done and lacks its dropped rows."""
    order = []
    real = chunks.replacing
    monkeypatch.setattr(chunks, "replacing", lambda path: (order.append(path.name), real(path))[1])
    chunks.write(tmp_path, 7, [{"n": 0}], [{"row": 0}])
    assert order == ["dropped-000007.jsonl", "part-000007.jsonl", "done-000007.json"]


def whole(out):
    for number in range(3):
        chunks.write(out, number, [{"n": number}], [{"row": number}])
    chunks.end(out, 3)
    assert chunks.require_whole(out) == 3
    return out / chunks.FOLDER


def test_a_run_that_lost_its_tail_is_not_joined(tmp_path):
    parts = whole(tmp_path)
    (parts / "done-000002.json").unlink()
    with pytest.raises(RunError, match=r"1 parts are missing \(2\)"):
        chunks.join(tmp_path, "rows.jsonl")
    (parts / "end.json").unlink()
    with pytest.raises(RunError, match=r"not come to the end of its data \(2 chunks are done\)"):
        chunks.join(tmp_path, "rows.jsonl")
    assert not (tmp_path / "rows.jsonl").exists() and parts.is_dir()


@pytest.mark.parametrize("name", ["part-000001.jsonl", "dropped-000001.jsonl"])
@pytest.mark.parametrize("fault", ["a flipped bit", "no bytes", "gone"])
def test_a_chunk_that_is_not_as_it_was_written_is_reported_and_computed_again(tmp_path, name, fault):
    path = whole(tmp_path) / name
    before = path.read_bytes()
    path.write_bytes(bytes([before[0] ^ 1]) + before[1:] if fault == "a flipped bit" else b"")
    if fault == "gone":
        path.unlink()
    with pytest.raises(RunError, match=rf"(?s)--resume: {name} is (not as it was written|missing)"):
        chunks.require_whole(tmp_path)
    assert list(chunks.done(tmp_path)) == ["0", "2"]
    chunks.write(tmp_path, 1, [{"n": 1}], [{"row": 1}])
    assert chunks.require_whole(tmp_path) == 3 and path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 1}', "[" * 10_000, '{"rows": "1", "sha256": {"a": "b"}}'])
def test_a_damaged_record_of_a_chunk_is_a_chunk_that_is_not_done(tmp_path, text):
    (whole(tmp_path) / "done-000001.json").write_text(text)
    assert list(chunks.done(tmp_path)) == ["0", "2"]
    with pytest.raises(RunError, match="done-000001"):
        chunks.require_whole(tmp_path)


def test_a_part_of_another_run_is_named(tmp_path):
    whole(tmp_path)
    chunks.write(tmp_path, 3, [{"n": 3}])
    with pytest.raises(RunError, match="part 3 is behind the end of the data"):
        chunks.require_whole(tmp_path)


def test_chunks_computed_from_data_that_changed_are_not_done(tmp_path):
    chunks.write(tmp_path, 0, [{"n": 0}])
    chunks.write(tmp_path, 1, [{"n": 1}])

    def changed():
        raise RunError("changed")

    with pytest.raises(RunError, match="changed"):
        chunks.end_of_data(tmp_path, 2, [1], changed)
    assert list(chunks.done(tmp_path)) == ["0"] and not (tmp_path / chunks.FOLDER / chunks.END).exists()


def test_a_chunk_that_drops_nothing_the_second_time_leaves_no_list_of_the_first(tmp_path):
    chunks.write(tmp_path, 0, [{"n": 0}], [{"row": 0}])
    chunks.write(tmp_path, 0, [{"n": 0}])
    chunks.end(tmp_path, 1)
    chunks.join(tmp_path, "rows.jsonl")
    assert not (tmp_path / chunks.DROPPED).exists()


def test_no_chunk_at_all_is_an_error(tmp_path):
    with pytest.raises(RunError, match="no parts to merge"):
        chunks.require_whole(tmp_path)


def test_lines_are_plain_json(tmp_path):
    chunks.write(tmp_path, 0, [{"text": "grün\n"}])
    assert chunks.path(tmp_path, 0).read_bytes() == '{"text": "grün\\n"}\n'.encode()
    assert json.loads(chunks.path(tmp_path, 0).read_text(encoding="utf-8")) == {"text": "grün\n"}


@pytest.mark.parametrize("name", ["done-x.json", "done-.json", "done-\u00b2.json", f"done-{'9' * 40}.json"])
def test_a_stranger_among_the_records_is_no_chunk(tmp_path, name):
    parts = whole(tmp_path)
    (parts / name).write_text("{}")
    assert chunks.require_whole(tmp_path) == 3 and chunks.done(tmp_path) == {"0": 1, "1": 1, "2": 1}


def test_a_number_of_chunks_that_nobody_has_is_told_without_counting_to_it(tmp_path):
    parts = whole(tmp_path)
    (parts / chunks.END).write_text(json.dumps({"chunks": 10**18}))
    with pytest.raises(RunError, match=f"{10**18 - 3} parts are missing \\(3, 4, 5, "):
        chunks.require_whole(tmp_path)
    (parts / f"done-{10**17}.json").write_text("{}")
    with pytest.raises(RunError, match=f"{10**17 - 3} parts are missing \\(3, 4, 5, "):
        chunks.require_whole(tmp_path)


def test_a_pipe_among_the_parts_holds_nobody(tmp_path):
    parts = whole(tmp_path)
    (parts / "part-000001.jsonl").unlink()
    os.mkfifo(parts / "part-000001.jsonl")
    os.mkfifo(tmp_path / chunks.DROPPED)
    assert list(chunks.done(tmp_path)) == ["0", "2"] and chunks.count_dropped(tmp_path) == 0
    chunks.write(tmp_path, 1, [{"n": 1}])
    chunks.join(tmp_path, "rows.jsonl")
    assert [r["n"] for r in chunks.read_lines(tmp_path / "rows.jsonl")] == [0, 1, 2]
    assert chunks.count_dropped(tmp_path) == 2


def test_a_line_that_is_longer_than_any_is_not_read_into_memory(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"n": 1}\n')
    os.truncate(tmp_path / "rows.jsonl", 10**11)  # without a byte on the disk
    rows = chunks.read_lines(tmp_path / "rows.jsonl")
    assert next(rows) == {"n": 1}
    with pytest.raises(RunError, match="line 2: not a JSON object"):
        next(rows)


def test_what_a_process_cost_adds_up_over_its_goes_and_over_processes(tmp_path):
    chunks.make_folders(tmp_path)
    assert chunks.work_of_all(tmp_path) == {}
    chunks.add_work(tmp_path, 0, {"programs": 1, "seconds": {"host": 0.5}})
    chunks.add_work(tmp_path, 1, {"programs": 2, "seconds": {"host": 1.0}})
    chunks.add_work(tmp_path, 1, {"programs": 4, "seconds": {"host": 2.0}})  # started again
    assert chunks.work_of_all(tmp_path) == {"programs": 7, "seconds": {"host": 3.5}}
    (tmp_path / chunks.FOLDER / "work-000000.json").write_text('{"programs": "x"}')
    with pytest.raises(RunError, match="is damaged"):
        chunks.work_of_all(tmp_path)
