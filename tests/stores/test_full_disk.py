"""Several processes whose disk is full: one message that names the place, nothing half written, a later run completes.

The disk is one in memory that a file of zeros fills up to a few kilobytes; slow.
"""

import contextlib
from pathlib import Path

import pytest

from ches_jax.runs import chunks, store
from tests.helpers import finish
from tests.stores.commands import TRAIN, ches, require_same_scores, table, together
from tests.train.test_processes import lines, same_to_rounding

pytestmark = pytest.mark.slow
SCORE = ("score", "--quiet", "--limit", "12", "--chunk-rows", "1", "--logps")
FULL = "No space left on device"


def fill(disk: Path, free: int) -> Path:
    """A file that leaves so many bytes of a disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(file.tell() - free)
    return filler


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("scored") / "run"
    ches(*SCORE, "--out", str(out))
    return table(out / "scores.parquet")


@pytest.mark.parametrize("mesh", ["data=1", "fsdp=2"])
@pytest.mark.parametrize("free", [0, 40_000])
def test_scores_of_two_processes(small_disk, scored, mesh, free):
    """In turns each says where it could not write; together, the one that does not write tells of the other."""
    out = small_disk / "run"
    words = (*SCORE, "--mesh", mesh, "--out", str(out))
    filler = fill(small_disk, free)
    codes, said = finish(together(2, 1, *words), 600)
    assert codes == [2, 2], said
    assert all(text.startswith("ches: ") and text.count("\n") == 1 for text in said), said
    assert f"{out}/" in said[0] and FULL in said[0], said
    assert free or FULL in said[1], said
    assert not list(small_disk.rglob("*.tmp"))
    done = chunks.done(out) if out.exists() else {}
    assert len(done) < 12 and all(rows == 1 for rows in done.values())
    filler.unlink()
    codes, said = finish(together(2, 1, *words, "--resume"), 600)
    assert codes == [0, 0], said
    if mesh == "data=1":
        ches("merge", str(out))
    require_same_scores(table(out / "scores.parquet"), scored)
    assert {p.name for p in out.iterdir()} == {"config.json", "run.json", "scores.parquet"}


def test_scores_in_a_store_where_the_temporary_folder_of_one_machine_is_full(s3, small_disk, scored):
    """The other one does its own chunks."""
    out = store.place("s3://pod/runs/full")
    words = (*SCORE, "--out", "s3://pod/runs/full")
    filler = fill(small_disk, 4096)  # of a folder without any room Python takes another
    codes, said = finish(together(2, 1, *words, of_last={"TMPDIR": str(small_disk)}), 600)
    assert codes == [0, 2], said
    assert said[1].startswith(f"ches: {small_disk}/") and said[1].count("\n") == 1 and FULL in said[1], said
    done = {int(p[5:11]) for p in store.names_in(out / "parts") if p.startswith("done-")}
    assert done == {0, 2, 4, 6, 8, 10}
    filler.unlink()
    codes, said = finish(together(2, 1, *words, "--resume", of_last={"TMPDIR": str(small_disk)}), 600)
    assert codes == [0, 0], said
    ches("merge", "s3://pod/runs/full")
    require_same_scores(table(out / "scores.parquet"), scored)


@pytest.mark.parametrize("free", [0, 300_000, 600_000])
def test_training_of_two_processes(small_disk, tiny_model, undisturbed, free):
    """Nothing, the first checkpoint (410 kB with all before it), or the second one (790 kB) fits no more."""
    out = small_disk / "run"
    words = (*TRAIN, "--model", str(tiny_model), "--out", str(out))
    filler = fill(small_disk, free)
    codes, said = finish(together(2, 2, *words), 600)
    assert codes == [2, 2], said
    assert all(text.startswith("ches: ") and text.count("\n") == 1 for text in said), said
    # the disk is one: who meets its end first may end before the other has, which then says that somebody stopped, in
    # the words of the exchange or, where it was computing, of the computation
    assert any(FULL in text for text in said), said
    somebody = ("see the output of the others", "most likely one of them has stopped")
    assert all(FULL in text or any(words in text for words in somebody) for text in said), said
    assert not (out / "run.json").exists()
    filler.unlink()
    codes, said = finish(together(2, 2, *words, "--resume"), 600)
    assert codes == [0, 0], said
    assert [e["step"] for e in lines(out)] == [e["step"] for e in lines(undisturbed)]
    same_to_rounding(out, undisturbed)
