"""Forecasts, influences and groups by several processes: who writes, numbers of one, a killed one."""

import json
import socket
import time
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.distributed.lead import Followed
from ches_jax.distributed.processes import Process
from ches_jax.forecast import stages
from ches_jax.forecast.config import InfluenceConfig
from ches_jax.forecast.together import of_first
from tests.scores.test_score_processes import finish, start

heard: list = []
"""What the first process says next."""


class Other(Process):
    """The second of two processes, which hears ``words`` from the first one."""

    def __new__(cls, *words):
        return object.__new__(cls)

    def __init__(self, *words):
        super().__init__(1, 2)
        heard.clear()
        heard.extend(words)

    def exchange(self, value, error=None):
        """The word of the first process."""
        return [heard.pop(0), value]


def test_processes_are_no_part_of_what_a_run_is():
    assert [f.metadata["identity"] for f in fields(InfluenceConfig) if f.name == "distributed"] == [False]


def test_a_process_that_is_not_the_first_computes_what_that_one_lacks_and_writes_nothing(tmp_path):
    made = []

    def make():
        made.append(1)
        return pa.table({"n": [1]})

    stages.chunk(tmp_path, 0, make, stages.write_table, Other(False))
    assert not made
    stages.chunk(tmp_path, 0, make, stages.write_table, Other(True, None))
    assert made == [1] and stages.whole(tmp_path, 1, lambda: None, Other(None)) == []
    assert not list(tmp_path.iterdir())
    with pytest.raises(Followed, match="run"):
        of_first(tmp_path / "run", Other())


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def words(tiny_model):
    return [
        "--model", str(tiny_model), "--limit", "16", "--holdout", "4", "--batch-size", "4", "--lr", "1e-4",
        "--chunk-rows", "3", "--dtype", "float64",
    ]  # fmt: skip


def two(verb, words, cache, folders, mesh):
    """Two processes of two devices; each is given a folder of its own, for they need no disk in common."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    processes = []
    for i, folder in enumerate(folders):
        who = ["--mesh", mesh, "--out", str(folder), "--distributed", f"127.0.0.1:{port},2,{i}"]
        processes += start(verb, 1, 2, [*words, *who], cache)
    return processes


def same(verb, one, other):
    a, b = (pq.read_table(out / f"{verb}.parquet").to_pandas() for out in (one, other))
    assert a.row_id.tolist() == b.row_id.tolist() and len(a)
    for name in a.select_dtypes("float"):
        np.testing.assert_allclose(a[name], b[name], rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.fixture(scope="module")
def alone(words, cache, tmp_path_factory):
    """Verb to what one process finds."""
    folder = tmp_path_factory.mktemp("alone")
    for verb in ("influence", "forecast"):
        codes, said = finish(start(verb, 1, 1, [*words, "--out", str(folder / verb)], cache))
        assert codes == [0], said
    return lambda verb: folder / verb


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "mesh"), [("influence", "fsdp=4"), ("forecast", "data=2,fsdp=2")])
def test_two_processes_find_the_numbers_of_one_and_the_first_alone_writes(verb, mesh, words, cache, alone, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    codes, said = finish(two(verb, words, cache, folders, mesh))
    assert codes == [0, 0], said
    assert not folders[1].exists()
    same(verb, folders[0], alone(verb))
    assert json.loads((folders[0] / "run.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_killed_process_ends_both_and_another_number_of_them_goes_on(words, cache, alone, tmp_path):
    folders = [tmp_path / "run", tmp_path / "second"]
    processes = two("forecast", words, cache, folders, "data=2,fsdp=2")
    until = time.monotonic() + 240
    while not list(folders[0].glob("parts/part-000000*")) and time.monotonic() < until:
        time.sleep(0.02)
    processes[1].kill()
    codes, said = finish(processes)
    assert codes[0] == 2 and "has stopped" in said[0], said
    assert not (folders[0] / "run.json").exists()
    codes, said = finish(start("forecast", 1, 1, [*words, "--out", str(folders[0]), "--resume"], cache))
    assert codes == [0], said
    same("forecast", folders[0], alone("forecast"))


@pytest.mark.slow
def test_groups_by_two_processes(tiny_model, cache, tmp_path):
    rollouts = tmp_path / "1.jsonl"
    answers = [("1 + 1? ", a, float(a == " 2")) for a in (" 2", " 3", " 11")]
    answers += [("what is 3? ", a, float(a == " a number")) for a in (" a number", " a word of four letters")]
    rows = [{"input": prompt, "output": a, "score": score, "step": 1} for prompt, a, score in answers]
    rollouts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(tiny_model), "--groups", str(rollouts), "--lr", "1e-4", "--dtype", "float64"]
    codes, said = finish(two("groups", words, cache, [tmp_path / "first", tmp_path / "second"], "data=2,fsdp=2"))
    assert codes == [0, 0] and not (tmp_path / "second").exists(), said
    codes, said = finish(start("groups", 1, 1, [*words, "--out", str(tmp_path / "alone")], cache))
    assert codes == [0], said
    same("groups", tmp_path / "first", tmp_path / "alone")
