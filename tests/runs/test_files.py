"""Readers of JSON and Parquet: whatever is wrong with a file is one message that names it."""

import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.errors import ChesError, RunError, os_error_text
from ches_jax.runs import files
from ches_jax.runs.files import new_directory, read_object, read_parquet, replacing


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"x": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object, found list"),
    ],
)
def test_json_that_is_none(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(RunError, match=rf"config.json: .*{message}"):
        read_object(path, RunError, "a run")


def test_no_regular_file_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "device.json").symlink_to("/dev/zero")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    for name in ("pipe", "folder", "device", "loop"):
        with pytest.raises(RunError, match=f"{name}.json: (not a regular file|cannot be read)"):
            read_object(tmp_path / f"{name}.json", RunError, "a run")
    with pytest.raises(RunError, match="cannot be read"):
        read_object(tmp_path / ("x" * 300), RunError, "a run")


def test_json_of_any_size_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "JSON_BYTES", 10)
    (tmp_path / "a.json").write_text('{"abcdefghijkl": 1}')
    with pytest.raises(RunError, match="19 bytes; expected at most 10 of JSON"):
        read_object(tmp_path / "a.json", RunError, "a run")


def test_a_folder_that_holds_the_folder_that_is_meant_names_it(tmp_path):
    for name in ("fp32", "bf16"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    expected = f"no config.json; expected a model; did you mean {tmp_path / 'bf16'} or {tmp_path / 'fp32'}?"
    with pytest.raises(ChesError, match=re.escape(expected)):
        read_object(tmp_path / "config.json", ChesError, "a model")


def test_damaged_parquet_is_one_message(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"text": ["a", "b"], "x": [1.0, 2.0]}), path)
    whole = path.read_bytes()
    assert read_parquet(path, RunError, "a table").num_rows == 2
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], whole[:4] + b"\xff" * 20 + whole[24:], b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(RunError, match=r"t.parquet: cannot be read as Parquet .*; expected a table"):
            read_parquet(path, RunError, "a table")
    with pytest.raises(RunError, match=r"none.parquet: no such file"):
        read_parquet(tmp_path / "none.parquet", RunError, "a table")


def test_a_file_is_whole_or_as_before_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "a.json"
    with replacing(path) as temporary:
        temporary.write_text("first")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError("Detail: [errno 28] No space left")])
def test_a_disk_that_is_full_is_told_with_the_file_that_has_no_room(tmp_path, error):
    """Neither the system nor Arrow names the file when the bytes of one that is open have no room."""
    path = tmp_path / "part.parquet"
    with pytest.raises(OSError) as raised, replacing(path):
        raise error
    assert os_error_text(raised.value).startswith(f"{path}: ") and "No space left" in os_error_text(raised.value)


@pytest.mark.parametrize(
    "failure",
    [
        OSError(28, "No space left on device"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_new_directory_on_a_full_disk_is_named(tmp_path, failure):
    """What Python writes to a file names none; what Rust writes raises a type of its own."""
    out = tmp_path / "kept"
    with pytest.raises(OSError) as caught, new_directory(out, RunError):
        raise failure
    assert os_error_text(caught.value) == f"{out}: No space left on device" and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "failure", [RuntimeError("no such file (os error 2)"), FileNotFoundError(2, "no", "x"), KeyError("a")]
)
def test_what_is_no_full_disk_keeps_its_words_in_a_new_directory(tmp_path, failure):
    with pytest.raises(type(failure)) as caught, new_directory(tmp_path / "kept", RunError):
        raise failure
    assert caught.value is failure
