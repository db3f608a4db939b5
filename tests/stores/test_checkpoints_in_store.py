"""Checkpoints in a store in memory: what each process writes, what makes them whole, what a reader takes of them."""

import json
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ches_jax.distributed.processes import OtherProcessError, Process
from ches_jax.errors import ChesError, RunError
from ches_jax.hf.tensors import open_files
from ches_jax.runs import store
from ches_jax.train import saved_in_store
from ches_jax.train.best import Best
from ches_jax.train.checkpoints import Checkpoints, read_trained, saved_steps
from ches_jax.train.state import TrainState

ROWS, COLUMNS, WHOLE = PartitionSpec("a"), PartitionSpec(None, "b"), PartitionSpec()


@pytest.fixture
def run(request):
    """An empty place in a store in memory."""
    found = store.place(f"memory://{request.node.name.partition('[')[0]}")
    yield found
    store.remove(found)


def mesh(a: int, b: int) -> Mesh:
    if jax.device_count() < a * b:
        pytest.skip(f"needs {a * b} devices")
    return Mesh(np.array(jax.devices()[: a * b]).reshape(a, b), ("a", "b"))


def state_on(devices: Mesh, seed: int) -> TrainState:
    """Random numbers of several types; matrices by rows, by columns, by both and whole."""
    draw = np.random.default_rng(seed)

    def put(shape: tuple[int, ...], kind: type, spec: PartitionSpec) -> jax.Array:
        return jax.device_put(draw.normal(size=shape).astype(kind), NamedSharding(devices, spec))

    params = {
        "rows.weight": put((8, 4), np.float32, ROWS),
        "columns.weight": put((4, 8), jnp.bfloat16, COLUMNS),
        "both.weight": put((4, 8, 3), np.float32, PartitionSpec("a", "b")),
        "bias": put((5,), np.float32, WHOLE),
        "none": put((0, 3), np.float32, WHOLE),
    }
    moment = {"rows.weight": put((8, 4), np.float32, ROWS), "columns.weight": put((4, 8), np.float32, COLUMNS)}
    count = jax.device_put(np.uint32(seed), NamedSharding(devices, WHOLE))
    return TrainState(params, moment, {"seen": count}, jax.device_put(np.int32(seed), NamedSharding(devices, WHOLE)))


def bits(state: TrainState) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def small(value: float) -> TrainState:
    return TrainState({"a.weight": jnp.full((2,), value)}, {}, {}, jnp.int32(0))


@pytest.mark.parametrize("after", [(2, 2), (4, 1), (1, 2), (1, 1)])
def test_a_state_comes_back_bit_for_bit_on_another_mesh(run, monkeypatch, after):
    monkeypatch.setattr(saved_in_store, "FILE_BYTES", 300)  # several files
    written = state_on(mesh(2, 2), 3)
    saved = Checkpoints(run, 2)
    saved.save(4, written, {"epoch": 1})
    assert saved.latest() is None and saved_steps(run) == [], "not before it is whole"
    saved.wait()
    assert saved_steps(run) == [4] == [saved.latest()]
    assert len([n for n in store.names_in(run / "checkpoints" / "4") if n.endswith(".safetensors")]) > 2
    there = state_on(mesh(*after), 9)
    restored, step = Checkpoints(run, 2).resume(there, lambda step: {"epoch": 1})
    assert step == 4 and bits(restored) == bits(written)
    assert all(a.sharding == b.sharding for a, b in zip(*map(jax.tree.leaves, (restored, there)), strict=True))
    trained = read_trained(run, 4)
    assert {name: np.asarray(a).tobytes() for name, a in trained.items()} == {
        name: np.asarray(a).tobytes() for name, a in written.params.items()
    }


def test_every_number_is_written_once_and_only_what_is_held_is_read(run, monkeypatch):
    written = state_on(mesh(2, 2), 3)
    saved = Checkpoints(run, 1)
    saved.save(1, written, {})
    saved.wait()
    folder = run / "checkpoints" / "1"
    (name,) = [n for n in store.names_in(folder) if n.endswith(".safetensors")]
    stored = open_files(folder, [folder / name], kinds=saved_in_store.STORED)
    held = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(written))
    assert sum(np.prod(t.shape, dtype=int) * np.dtype(t.dtype).itemsize for t in stored.values()) == held
    sizes: list[int] = []
    read = store.read_range
    monkeypatch.setattr(
        store, "read_range", lambda p, at, count, error: (sizes.append(count), read(p, at, count, error))[1]
    )
    rows = {"params.rows.weight": jax.ShapeDtypeStruct((8, 4), np.float32, sharding=NamedSharding(mesh(4, 1), ROWS))}
    found = saved_in_store.read_in(run / "checkpoints", 1, rows)["params.rows.weight"]
    np.testing.assert_array_equal(found, written.params["rows.weight"])
    assert sizes[1:] == [32] * 4, "after the marker, half a block for each device"


def test_the_last_and_the_best_stay(run):
    saved = Checkpoints(run, 2, Best("m", "min"))
    scores = [3.0, 1.0, float("nan"), 2.0, None, 5.0]
    for step, score in enumerate(scores, 1):
        saved.save(step, small(step), {"at": step}, None if score is None else {"m": score})
        saved.wait()
    assert saved_steps(run) == [2, 5, 6]
    assert {n.partition("/")[0] for n in store.files_below(run / "checkpoints")} == {"2", "5", "6"}
    assert saved.best() == {"metric": "m", "mode": "min", "step": 2, "value": 1.0}
    again = Checkpoints(run, 1, Best("m", "max"))
    assert again.best() == {"metric": "m", "mode": "max", "step": 6, "value": 5.0}
    restored, position = again.restore(2, small(0))
    assert position == {"at": 2} and float(restored.params["a.weight"][0]) == 2


def test_a_checkpoint_is_whole_as_soon_as_its_parts_are_there(run, monkeypatch):
    """Not only when the next one is due; and the update that follows does not wait for the upload."""
    put, free = store.put, threading.Event()
    monkeypatch.setattr(store, "put", lambda source, target: (free.wait(60), put(source, target)))
    saved = Checkpoints(run, 2)
    saved.save(1, small(1), {})
    assert saved.writing() and saved.latest() is None
    free.set()
    while saved.writing():
        time.sleep(0.01)
    saved.settle()
    assert saved_steps(run) == [1]


def test_what_makes_a_checkpoint_whole_is_written_last_and_removed_first(run, monkeypatch):
    order: list[str] = []

    def noting(act, at: int):
        def noted(*words):
            order.append(str(words[at]).partition("checkpoints/")[2])
            return act(*words)

        return noted

    for name, at in (("put", 1), ("write_text", 0), ("remove", 0)):
        monkeypatch.setattr(store, name, noting(getattr(store, name), at))
    saved = Checkpoints(run, 1)
    for step in (1, 2):
        saved.save(step, small(step), {})
        saved.wait()
    assert [n if n.count("-") == 0 else "part" for n in order] == [
        "part", "1/checkpoint.json", "part", "2/checkpoint.json", "1/checkpoint.json", "1",
    ]  # fmt: skip


def test_what_a_killed_start_has_left_is_no_checkpoint_and_goes(run):
    saved = Checkpoints(run, 3)
    for step in (1, 2, 3):
        saved.save(step, small(step), {})
        saved.wait()
    store.remove(run / "checkpoints" / "3" / saved_in_store.MARKER)  # as while an old one is removed, too
    assert saved_steps(run) == [1, 2]
    again = Checkpoints(run, 3)
    assert again.latest() == 2 and not store.names_in(run / "checkpoints" / "3")
    again.save(3, small(30), {})
    again.wait()
    assert float(again.restore(3, small(0))[0].params["a.weight"][0]) == 30


def test_checkpoints_of_an_older_version_are_neither_ignored_nor_removed(run):
    (run / "checkpoints" / "4" / saved_in_store.OF_ORBAX).write_text("")
    with pytest.raises(RunError, match="checkpoints of an older version"):
        Checkpoints(run, 3)
    assert store.is_there(run / "checkpoints" / "4" / saved_in_store.OF_ORBAX)


def test_a_file_that_is_gone_or_cut_is_reported(run):
    saved = Checkpoints(run, 3)
    for step in (1, 2):
        saved.save(step, small(step), {})
        saved.wait()
    folder = run / "checkpoints" / "2"
    (name,) = [n for n in store.names_in(folder) if n.endswith(".safetensors")]
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-11])
    again = Checkpoints(run, 3)
    for read in (lambda: again.resume(small(0), lambda step: {}), lambda: read_trained(run, 2)):
        with pytest.raises(RunError, match=r"checkpoints/2: the checkpoint cannot be read .*ends early"):
            read()
    (folder / name).write_bytes(data)
    marker = json.loads((folder / saved_in_store.MARKER).read_text())
    marker["blocks"]["params.a.weight"] = []
    (folder / saved_in_store.MARKER).write_text(json.dumps(marker))
    with pytest.raises(RunError, match="do not fill"):
        read_trained(run, 2)
    del marker["blocks"]["params.a.weight"]
    (folder / saved_in_store.MARKER).write_text(json.dumps(marker))
    for read in (lambda: Checkpoints(run, 3).restore(2, small(0)), lambda: read_trained(run, 2)):
        with pytest.raises(RunError, match=r"lacks arrays that it names.*a\.weight"):
            read()


class Exchange:
    """What several processes tell each other, here in threads of one."""

    def __init__(self, count: int):
        self._barrier = threading.Barrier(count, timeout=60)
        self._told: list = [None] * count

    def of(self, number: int) -> Process:
        exchange = self

        class Told(Process):
            def exchange(self, value, error=None):
                exchange._told[number] = (value, error)
                exchange._barrier.wait()
                told = list(exchange._told)
                exchange._barrier.wait()
                failed = [(i, e) for i, (_, e) in enumerate(told) if e is not None]
                if failed and error is None:
                    raise OtherProcessError(f"process {failed[0][0]} of {self.count}: {failed[0][1]}")
                return json.loads(json.dumps([v for v, _ in told]))

        return Told(number, len(self._told))


def in_two_processes(run: Path, state: TrainState, monkeypatch) -> list[BaseException | None]:
    """Each writes every other block of the state; what each of them ends with."""
    two, every = Exchange(2), saved_in_store.held
    mine = threading.local()
    monkeypatch.setattr(saved_in_store, "held", lambda leaves: every(leaves)[mine.number :: 2])
    ends: list[BaseException | None] = [None, None]

    def one(number: int) -> None:
        mine.number = number
        try:
            saved = Checkpoints(run, 2, process=two.of(number))
            saved.save(2, state, {})
            saved.wait()
        except ChesError as error:
            ends[number] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    return ends


def test_the_parts_of_two_processes_are_one_checkpoint(run, monkeypatch):
    written = state_on(mesh(2, 2), 5)
    assert in_two_processes(run, written, monkeypatch) == [None, None]
    writers = {n.split("-")[1] for n in store.names_in(run / "checkpoints" / "2") if n.endswith(".safetensors")}
    assert writers == {"00000", "00001"}
    restored, _ = Checkpoints(run, 2).restore(2, state_on(mesh(1, 2), 0))
    assert bits(restored) == bits(written)


@pytest.mark.parametrize("refused", ["-00000-", "-00001-", saved_in_store.MARKER])
def test_a_part_that_cannot_be_written_is_told_by_all_and_leaves_no_checkpoint(run, monkeypatch, refused):
    before = Checkpoints(run, 2)
    before.save(1, small(1), {})
    before.wait()

    def refusing(write):
        def written(*words):
            if any(refused in str(word) for word in words):
                raise PermissionError("Forbidden")
            return write(*words)

        return written

    for name in ("put", "write_text"):
        monkeypatch.setattr(store, name, refusing(getattr(store, name)))
    ends = in_two_processes(run, small(2), monkeypatch)
    for end in ends:
        assert "checkpoint of step 2 could not be written (Forbidden); whole ones: steps 1;" in str(end), end
    assert sorted(type(end).__name__ for end in ends) == ["OtherProcessError", "RunError"]
    assert saved_steps(run) == [1]
