"""Places in stores: whole objects, folders with a marker, byte ranges, what is refused before anything is made."""

import http.server
import json
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ches_jax.errors import CheckpointError, ChesError, DataError, RunError
from ches_jax.hf.directory import resolve, weight_files
from ches_jax.hf.tensors import open_tensors
from ches_jax.runs import lock as locks
from ches_jax.runs import store
from ches_jax.runs.chunks import commit, done, join, make_folders, rows_done, write
from ches_jax.runs.directory import open_run
from ches_jax.runs.files import new_directory, read_json, replacing
from ches_jax.runs.lock import RunLock
from ches_jax.runs.workspace import Workspace


@pytest.fixture
def bucket(request):
    """An empty place in a store in memory."""
    found = store.place(f"memory://{request.node.name.partition('[')[0]}")
    yield found
    store.remove(found)


@pytest.mark.parametrize("spec", ["ftp://a/b", "oss://a/b", "S4://a/b"])
def test_a_scheme_that_is_not_supported_is_refused_by_name(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ChesError, match=f"'{spec[:-6].lower()}://' is not supported; expected a path, or gs://"):
        store.place(spec)
    assert not list(tmp_path.iterdir())


def test_an_extra_that_is_not_installed_is_named(monkeypatch):
    import fsspec

    def missing(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(
        ChesError, match=r"'gs://' needs gcsfs, which is not installed: pip install 'ches-jax\[remote\]"
    ):
        store.place("gs://bucket/run")


def test_what_is_only_read_is_no_output_and_a_lost_slash_is_reported():
    with pytest.raises(
        ChesError, match=r"--out https://h/run: 'https://' is only read; give a path, or gs:// or s3://"
    ):
        store.output_place("https://h/run")
    with pytest.raises(ChesError, match=r"two slashes behind its scheme \(gs://bucket/run\)"):
        store.place("gs:/bucket/run")
    with pytest.raises(ChesError, match="names no place"):
        store.place("s3://")
    assert store.place("file:///tmp/a") == Path("/tmp/a")


def test_a_file_is_seen_whole_or_as_it_was(bucket):
    target = bucket / "run" / "run.json"
    with replacing(target) as temporary:
        temporary.write_text('{"a": 1}')
        assert not target.exists()
    with pytest.raises(KeyError), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert read_json(target, RunError, "a run") == {"a": 1}
    with pytest.raises(RunError, match=r"memory://.*run: no none.json; expected a run"):
        read_json(target.with_name("none.json"), RunError, "a run")


def test_a_folder_gets_its_marker_last(bucket, monkeypatch):
    put, order = store.put, []
    monkeypatch.setattr(store, "put", lambda source, target: (order.append(target.name), put(source, target)))
    with new_directory(bucket / "kept", RunError, "b.json") as folder:
        for name in ("b.json", "a.txt", "c.txt"):
            (folder / name).write_text(name)
    assert order == ["a.txt", "c.txt", "b.json"]
    with (
        pytest.raises(RunError, match="exists and is not an empty directory"),
        new_directory(bucket / "kept", RunError),
    ):
        pass


def test_parts_of_a_run_resume_and_join(bucket):
    out = bucket / "run"
    open_run(out, "score", {"config": {}}, resume=False)
    with pytest.raises(RunError, match="holds this run already; add --resume"):
        open_run(out, "score", {"config": {}}, resume=False)
    make_folders(out)
    for number in range(2):
        write(out, number, [{"n": number}])
    assert len(done(out)) == 2 and rows_done(out, 2) is None
    (out / "parts" / "part-000001.jsonl").write_text("damaged")
    assert len(done(out)) == 1, "a part that is not as it was written is not done"
    write(out, 1, [{"n": 1}])
    (out / "parts" / "end.json").write_text('{"chunks": 2}')
    join(out, "all.jsonl")
    assert [json.loads(line)["n"] for line in (out / "all.jsonl").read_text().splitlines()] == [0, 1]
    commit(out, 2, 0, [out / "parts" / "part-000001.jsonl"])
    with pytest.raises(RunError, match="behind the end of the data"):
        join(out, "all.jsonl")


def test_the_lock_of_a_store_is_one_process_s_and_the_dead_lose_it(bucket, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "WATCH", 0.05)
    monkeypatch.setattr(locks, "DEAD", 0.5)
    out = bucket / "run"
    with RunLock(out) as first:
        first.take()
        with pytest.raises(RunError, match=r"another process works here \(process \d+ on .* since"):
            RunLock(out).take()
        with RunLock(out, shared=True, first=False) as other:
            other.take()  # the first process of its run holds the lock for it
    assert not (out / locks.NAME).exists()
    (out / locks.NAME).write_text(json.dumps({"machine": "elsewhere", "process": 1, "nonce": "n", "host": "h"}))
    began = time.monotonic()
    with RunLock(out) as heir:
        heir.take()
        assert time.monotonic() - began > locks.DEAD, "a host that is not this one is watched before it counts as dead"
        assert json.loads((out / locks.NAME).read_text())["machine"] != "elsewhere"


def test_a_lock_that_another_took_ends_its_holder(bucket, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.02)
    ended = threading.Event()
    monkeypatch.setattr(locks.os, "_exit", lambda code: ended.set())
    with RunLock(bucket / "run") as lock:
        lock.take()
        (bucket / "run" / locks.NAME).write_text(json.dumps({"nonce": "another"}))
        assert ended.wait(60)


def test_logs_that_grow_are_pushed_whole_and_pulled(bucket):
    run = bucket / "run"
    with Workspace(run, "run.json") as work:
        work.pull()
        (work.here / "parts").mkdir()
        (work.here / "metrics.jsonl").write_text("1\n")
        (work.here / "parts" / "one").write_text("1")
        work.push()
        (work.here / "metrics.jsonl").write_text("1\n2\n")
        (work.here / "parts" / "one").unlink()
        work.push()
        kept = work.here
    assert not kept.exists()
    with Workspace(run, "run.json") as work:
        work.pull()
        assert (work.here / "metrics.jsonl").read_text() == "1\n2\n"
        assert not (work.here / "parts" / "one").exists()


@pytest.fixture
def model_in_store(bucket, tiny_model):
    for path in tiny_model.iterdir():
        store.put(path, bucket / "model" / path.name)
    return bucket / "model"


def test_only_the_rows_that_are_asked_for_are_read(model_in_store, tiny_model, monkeypatch):
    here, there = open_tensors(tiny_model), open_tensors(resolve(str(model_in_store)))
    assert here.keys() == there.keys()
    asked: list[int] = []
    fs = type(model_in_store.fs)
    ask = fs.cat_file

    def counted(self, path, start, end, **more):
        asked.append(end - start)
        return ask(self, path, start=start, end=end, **more)

    monkeypatch.setattr(fs, "cat_file", counted)
    name = max(here, key=lambda n: np.prod(here[n].shape))
    rows, width = here[name].shape
    index = (slice(8, 24), slice(None))
    np.testing.assert_array_equal(there[name].read(index), here[name].read(index))
    assert sum(asked) == 16 * width * np.dtype(here[name].dtype).itemsize
    columns = (slice(None), slice(3, width, 2))
    np.testing.assert_array_equal(there[name].read(columns), here[name].read(columns))
    asked.clear()
    monkeypatch.setattr("ches_jax.hf.tensors.BLOCK", 5 * width * 4)
    strided = (slice(1, rows, 3), slice(0, width, 5))
    np.testing.assert_array_equal(there[name].read(strided), here[name].read(strided))
    assert max(asked) < 16 * width * 4, "a block at a time"


def _damaged(data: bytes, kind: str) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    first = min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    if kind == "short":
        return data[:-7]
    if kind == "long":
        return data + b"x"
    if kind == "length":
        return (2**40).to_bytes(8, "little") + data[8:]
    if kind == "empty":
        return b""
    if kind == "shape":
        header[first]["shape"][0] += 1
    if kind == "gap":
        header[first]["data_offsets"][1] -= 2
    if kind == "no place":
        del header[first]["data_offsets"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


@pytest.mark.parametrize("kind", ["short", "long", "length", "empty", "shape", "gap", "no place"])
def test_a_damaged_file_in_a_store_is_reported(model_in_store, tiny_model, kind):
    file = tiny_model / "model.safetensors"
    (model_in_store / "model.safetensors").write_bytes(_damaged(file.read_bytes(), kind))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a whole safetensors file"):
        open_tensors(resolve(str(model_in_store)))


def test_a_folder_without_a_model_says_so(bucket):
    (bucket / "no" / "readme.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"memory://.*/no: no config.json there"):
        resolve(str(bucket / "no"))
    with pytest.raises(DataError, match="no such file or folder"):
        store.fetched(bucket / "nothing", DataError)


class Web(http.server.ThreadingHTTPServer):
    """What a test asks of it, and how many bytes of ranges it has sent."""

    ranges, busy, sent = True, 0, 0


class Ranged(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with byte ranges; 503 for the first ``busy`` requests."""

    server: Web  # type: ignore[assignment]

    def do_GET(self):
        if self.server.busy > 0:
            self.server.busy -= 1
            self.send_error(503)
            return
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if not (wanted and self.server.ranges and path.is_file()):
            super().do_GET()
            return
        start, _, end = wanted.removeprefix("bytes=").partition("-")
        data = path.read_bytes()
        part = data[int(start) : int(end) + 1 if end else None]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.server.sent += len(part)  # before the bytes: who has read them reads this count
        self.wfile.write(part)

    def log_message(self, format, *args):
        pass


@pytest.fixture
def web(tiny_model, tmp_path):
    """A server on loopback with the tiny model in ``model``."""
    shutil.copytree(tiny_model, tmp_path / "model")
    server = Web(("127.0.0.1", 0), lambda *words: Ranged(*words, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_model_on_a_web_server_is_read_by_ranges_though_it_is_busy_for_a_while(web, tiny_model, monkeypatch):
    monkeypatch.setattr(store, "PAUSES", (0.01,) * 5)
    server, address = web
    server.busy = 4
    there = open_tensors(resolve(f"{address}/model"))
    here = open_tensors(tiny_model)
    server.sent, server.busy = 0, 3
    name = "model.norm.weight"
    np.testing.assert_array_equal(there[name].read(), here[name].read())
    assert server.sent == here[name].read().nbytes
    assert weight_files(resolve(f"{address}/model"))[0].name == "model.safetensors"


def test_a_server_without_byte_ranges_is_reported(web):
    server, address = web
    server.ranges = False
    with pytest.raises(CheckpointError, match="does not answer byte ranges"):
        open_tensors(resolve(f"{address}/model"))


def test_a_file_that_ends_early_is_reported(bucket):
    (bucket / "three.bin").write_bytes(b"abc")
    assert store.read_range(bucket / "three.bin", 1, 2) == b"bc"
    with pytest.raises(ChesError, match=r"three\.bin: ends early"):
        store.read_range(bucket / "three.bin", 1, 3)


def test_a_holder_misses_several_signs_of_life_before_it_counts_as_dead():
    assert locks.DEAD >= 4 * locks.BEAT
