"""Reference log-probabilities: computed once, found again, never another model's."""

import json
import shutil

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

from ches_jax import bundled
from ches_jax.errors import RunError
from ches_jax.models.checkpoint.load import load_model
from ches_jax.models.checkpoint.save import save_pretrained
from ches_jax.train import setup
from ches_jax.train.loop import train
from ches_jax.train.observe.pair_logprobs import PairLogps
from ches_jax.train.reference import cache_key, read_cache, reference_logps, write_cache
from ches_jax.types import Response, TokenPair
from tests.helpers import starts_at_the_reference

IDENTITY = {"model_fingerprint": "m", "dtype": "float32", "convention": {"eos": "include"}}


def pair(i):
    return TokenPair(row_id=f"row{i}", index=i, prompt=(1,), chosen=Response((2,), 3), rejected=Response((4,), 3))


class Model:
    """Gives -i and -2i, and counts."""

    def __init__(self, shift=0.0):
        self.shift = shift
        self.requested = []

    def __call__(self, pairs):
        self.requested += [p.index for p in pairs]
        values = np.array([float(p.index) for p in pairs])
        return PairLogps(-values - self.shift, -2 * values - self.shift)


def test_rows_are_computed_once_and_new_ones_added(tmp_path):
    first, second = Model(), Model()
    reference_logps([pair(i) for i in range(5)], first, IDENTITY, tmp_path)
    assert first.requested == list(range(5))
    logps = reference_logps([pair(i) for i in (6, 2, 6, 4)], second, IDENTITY, tmp_path)
    assert list(logps.rejected) == [-12, -4, -12, -8]
    assert second.requested.count(6) == 1 and set(second.requested) == {2, 4, 6}  # 2 and 4 to verify
    (file,) = tmp_path.glob("*.parquet")
    assert pq.read_table(file).column_names == ["row_id", "ref_chosen_logps", "ref_rejected_logps"]


def test_parts_of_a_killed_run_are_used(tmp_path):
    known = {f"row{i}": (-float(i), -2.0 * i) for i in range(3)}
    write_cache(tmp_path / f".reference-{cache_key(IDENTITY)}.parts" / "000000.parquet", known, IDENTITY)
    model = Model()
    reference_logps([pair(i) for i in range(5)], model, IDENTITY, tmp_path)
    assert [i for i in model.requested if i > 2] == [3, 4]
    assert not list(tmp_path.glob(".*.parts"))


@pytest.mark.parametrize("whole", [False, True])
def test_parts_that_hold_all_rows_become_the_whole_and_are_gone(tmp_path, whole):
    """Of a run that was killed between its last part and the file of all, or between that and the end of its parts."""
    rows, name = [pair(i) for i in range(5)], f"reference-{cache_key(IDENTITY)}"
    expected = reference_logps(rows, Model(), IDENTITY, tmp_path)
    before = (tmp_path / f"{name}.parquet").read_bytes()
    (tmp_path / f".{name}.parts").mkdir()
    (shutil.copy if whole else shutil.move)(
        tmp_path / f"{name}.parquet", tmp_path / f".{name}.parts" / "000000.parquet"
    )
    assert np.array_equal(reference_logps(rows, Model(), IDENTITY, tmp_path), expected)
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.parquet"]
    assert (tmp_path / f"{name}.parquet").read_bytes() == before


def test_a_cache_whose_rows_are_not_the_models_is_refused(tmp_path):
    reference_logps([pair(i) for i in range(5)], Model(), IDENTITY, tmp_path)
    with pytest.raises(RunError, match="the cache is of another model or damaged"):
        reference_logps([pair(i) for i in range(5)], Model(shift=0.1), IDENTITY, tmp_path)


def test_a_cache_of_another_identity_names_the_differences(tmp_path):
    write_cache(tmp_path / "a.parquet", {"row0": (-1.0, -2.0)}, IDENTITY)
    with pytest.raises(RunError, match=r"model_fingerprint: 'm' there, 'other' now"):
        read_cache(tmp_path / "a.parquet", {**IDENTITY, "model_fingerprint": "other"})


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    model = load_model(tiny_model)
    nnx.update(model, jax.tree.map(lambda w: w * 1.1, nnx.state(model)))
    out = tmp_path_factory.mktemp("models") / "other"
    save_pretrained(model, out, like=tiny_model)
    return out


def first_loss(out):
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[1])["loss"]


@pytest.mark.slow
def test_every_source_of_a_reference(small, tiny_model, other_model, tmp_path):
    """A directory, its cache as a file, columns of the rows: the same loss; the cache of another model: refused."""
    options = {"steps": 1, "export": False, "holdout": 0, "limit": 4}
    by_directory = train(small(tmp_path / "a", reference=str(other_model), **options), quiet=True)
    assert abs(first_loss(by_directory) - np.log(2)) > 1e-3
    (cache,) = by_directory.glob("reference-*.parquet")

    with pytest.raises(RunError, match="model_fingerprint"):
        train(small(tmp_path / "b", reference=str(cache), **options), quiet=True)
    by_initial = train(small(tmp_path / "c", **options), quiet=True)
    (own,) = by_initial.glob("reference-*.parquet")
    by_file = train(small(tmp_path / "d", reference=str(own), **options), quiet=True)
    assert first_loss(by_file) == first_loss(by_initial)
    assert starts_at_the_reference(json.loads((by_initial / "metrics.jsonl").read_text().splitlines()[1]))

    values = pq.read_table(cache).to_pylist()
    rows = [json.loads(line) for line in bundled.pairs_file().read_text().splitlines()[:4]]
    known = {v["row_id"]: v for v in values}
    table = pq.read_table(by_directory / "displacement.parquet").to_pylist()
    for row in table:
        if row["step"] == 0:
            cached = known[row["row_id"]]
            rows[row["index"]] |= {k: cached[k] for k in ("ref_chosen_logps", "ref_rejected_logps")}
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    by_columns = train(small(tmp_path / "e", pairs=str(path), reference="columns", **options), quiet=True)
    assert first_loss(by_columns) == pytest.approx(first_loss(by_directory), rel=1e-6)


def test_a_reference_that_is_not_the_policys_is_noticed(small, tmp_path, monkeypatch):
    real = setup.reference_logps

    def shifted(*args, **options):
        logps = real(*args, **options)
        return PairLogps(np.asarray(logps.chosen) + 1.0, np.asarray(logps.rejected))

    monkeypatch.setattr(setup, "reference_logps", shifted)
    with pytest.raises(Exception, match="before the first update the policy gives the responses"):
        train(small(tmp_path / "run", steps=1, export=False, holdout=0, limit=4), quiet=True)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array(["a", "b"]), "column ref_chosen_logps is string; expected double"),
        (pa.array([1.0, None]), "column ref_chosen_logps lacks 1 of 2 values"),
        (pa.array([[1.0], [2.0]]), "column ref_chosen_logps is list"),
    ],
)
def test_a_cache_of_other_values_is_refused(tmp_path, column, message):
    write_cache(tmp_path / "c.parquet", {"a": (-1.0, -2.0), "b": (-1.0, -2.0)}, IDENTITY)
    table = pq.read_table(tmp_path / "c.parquet")
    pq.write_table(table.set_column(1, "ref_chosen_logps", column), tmp_path / "c.parquet")
    with pytest.raises(RunError, match=message):
        read_cache(tmp_path / "c.parquet", IDENTITY)


@pytest.mark.parametrize(
    "metadata", [b"", b"{", b"[" * 100_000, b"[1]", b'{"config": 3}', b'{"opened": {"a": [1]}}', b"\xff"]
)
def test_a_cache_that_tells_no_identity_is_none(tmp_path, metadata):
    write_cache(tmp_path / "c.parquet", {"a": (-1.0, -2.0)}, IDENTITY)
    table = pq.read_table(tmp_path / "c.parquet").replace_schema_metadata({b"ches_jax": metadata})
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(RunError, match="not a reference cache"):
        read_cache(tmp_path / "c.parquet", IDENTITY)
