"""What a stopped forecast leaves is used again where it is as it was written, and computed again where it is not."""

import os
import weakref
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.distributed.mesh import make_mesh
from ches_jax.distributed.processes import Process
from ches_jax.errors import RunError
from ches_jax.forecast import stages
from ches_jax.runs import chunks
from ches_jax.runs.lock import RunLock


def counted(values):
    """A function that gives values in turn and keeps count."""
    calls = []

    def act(*_):
        calls.append(1)
        return values[len(calls) - 1]

    return act, calls


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def broken(path):
    path.write_text('{"sha256": ')


DAMAGE = [
    (stages.DIRECTION, flip), (stages.START, flip), (stages.START, broken),
    (stages.DIRECTION, lambda path: path.unlink()), (stages.START, lambda path: path.unlink()),
    (stages.DIRECTION, lambda path: path.write_bytes(b"")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
def test_a_direction_is_found_again_or_computed_again(tmp_path, name, damage):
    mesh = make_mesh("data=1")
    compute, calls = counted([({"norm.scale": np.arange(3.0, dtype=np.float32)}, {"slopes": [n]}) for n in (1, 2)])
    for _ in range(2):
        direction, found = stages.kept(tmp_path, mesh, compute)
        assert np.array_equal(direction["norm.scale"], [0, 1, 2]) and found == {"slopes": [1]} and len(calls) == 1
    damage(tmp_path / chunks.FOLDER / name)
    assert stages.kept(tmp_path, mesh, compute)[1] == {"slopes": [2]}


def test_a_part_that_is_damaged_is_written_again_and_one_that_is_whole_is_not(tmp_path):
    table = pa.table({"n": [1, 2]})
    written = []

    def write(path, made):
        written.append(path.name)
        return stages.write_table(path, made)

    for _ in range(2):
        for number in range(2):
            stages.chunk(tmp_path, number, lambda: table, write)
    assert written == ["part-000000.parquet", "part-000001.parquet"]
    flip(tmp_path / chunks.FOLDER / "part-000001.parquet")
    with pytest.raises(RunError, match=r"part-000001.parquet is not as it was written"):
        stages.whole(tmp_path, 2, lambda: None)
    stages.chunk(tmp_path, 1, lambda: table, write)
    parts = stages.whole(tmp_path, 2, lambda: None)
    assert len(written) == 3 and all(pq.read_table(part).equals(table) for part in parts)


def test_of_data_that_changed_nothing_stays(tmp_path):
    stages.chunk(tmp_path, 0, lambda: pa.table({"n": [1]}), stages.write_table)

    def changed():
        raise RunError("--pairs p.jsonl changed")

    with pytest.raises(RunError, match="changed"):
        stages.whole(tmp_path, 1, changed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["forecast", "influence", "groups"])
def test_two_at_once_are_not_let_in(verb, tmp_path):
    from ches_jax.forecast import config as configs
    from ches_jax.forecast import group_run, run

    module = group_run if verb == "groups" else run
    more = {"groups": {"groups": "none.jsonl"}, "influence": {"holdout": 4}}.get(verb, {})
    with RunLock(tmp_path) as lock:
        lock.take()
        with pytest.raises(RunError, match="another process works here"):
            getattr(module, verb)(getattr(configs, f"{verb.title()}Config")(out=str(tmp_path), **more))


def test_a_digit_of_what_is_known_of_a_direction_does_not_flip_unseen(tmp_path):
    compute, calls = counted([({"norm.scale": np.ones(2, np.float32)}, {"slopes": [0.25]}) for _ in range(2)])
    stages.kept(tmp_path, make_mesh("data=1"), compute)
    record = tmp_path / chunks.FOLDER / stages.START
    assert record.read_text().count("0.25") == 1
    record.write_text(record.read_text().replace("0.25", "0.35"))
    assert stages.kept(tmp_path, make_mesh("data=1"), compute)[1] == {"slopes": [0.25]} and len(calls) == 2


def test_a_pipe_in_place_of_a_direction_holds_nobody(tmp_path):
    compute, calls = counted([({"norm.scale": np.ones(2, np.float32)}, {}) for _ in range(2)])
    stages.kept(tmp_path, make_mesh("data=1"), compute)
    (tmp_path / chunks.FOLDER / stages.DIRECTION).unlink()
    os.mkfifo(tmp_path / chunks.FOLDER / stages.DIRECTION)
    stages.kept(tmp_path, make_mesh("data=1"), compute)
    assert len(calls) == 2


@dataclass(frozen=True)
class OneAtATime(Process):
    """The first of two processes; what passes through its memory must be gone when the next parameter comes."""

    count: int = 2
    passed: list = field(default_factory=list)

    def exchange(self, value, error=None):
        return [value] * 2

    def on_host(self, tree):
        return self._noted({name: np.array(values) for name, values in tree.items()})

    def from_first(self, tree):
        assert tree is not None
        return self._noted(tree)

    def _noted(self, tree):
        assert len(tree) == 1 and not any(gone() is not None for gone in self.passed)
        self.passed.extend(weakref.ref(values) for values in tree.values())
        return tree


def test_the_first_process_has_one_parameter_in_its_memory(tmp_path, monkeypatch):
    direction = {f"layer{i}.weight": jnp.arange(6.0).reshape(2, 3) + i for i in range(5)}
    direction["norm.scale"] = jnp.ones(4, jnp.bfloat16)
    mesh = make_mesh("data=1")
    place = stages.on_mesh
    monkeypatch.setattr(
        stages, "on_mesh", lambda tree, mesh: place({k: jax.device_put(np.array(v)) for k, v in tree.items()}, mesh)
    )
    process = OneAtATime()
    for turn in range(2):  # written, then read
        found, record = stages.kept(tmp_path, mesh, lambda: (direction, {"n": 1}), process)
        assert record == {"n": 1} and found.keys() == direction.keys()
        assert all(np.array_equal(found[k], v) and found[k].dtype == v.dtype for k, v in direction.items())
        assert len(process.passed) == len(direction) * (turn + 1)


def test_a_disk_that_is_full_in_the_middle_of_a_direction_is_told_before_the_next_parameter(tmp_path, monkeypatch):
    told = []

    class First(OneAtATime):
        def exchange(self, value, error=None):
            told.append(error)
            return [value] * 2

    def full(self, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stages.Writer, "write", full)
    process = First()
    with pytest.raises(OSError, match="No space left"):
        stages.kept(
            tmp_path, make_mesh("data=1"), lambda: ({"a.scale": jnp.ones(2), "b.scale": jnp.ones(2)}, {}), process
        )
    assert len(process.passed) == 1 and told[-1] is not None and sum(e is not None for e in told) == 1
    assert not list((tmp_path / chunks.FOLDER).iterdir())
