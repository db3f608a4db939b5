"""``influence`` by several processes: who writes, numbers of one."""

import json
import socket
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


@pytest.mark.slow
def test_two_processes_find_the_numbers_of_one_and_the_first_alone_writes(words, cache, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    codes, said = finish(two("influence", words, cache, folders, "fsdp=4"))
    assert codes == [0, 0], said
    assert not folders[1].exists()
    codes, said = finish(start("influence", 1, 1, [*words, "--out", str(tmp_path / "alone")], cache))
    assert codes == [0], said
    same("influence", folders[0], tmp_path / "alone")
    assert json.loads((folders[0] / "run.json").read_text())["processes"] == 2
