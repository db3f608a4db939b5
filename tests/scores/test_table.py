"""The score table: bytes, order, provenance and the errors a user can meet."""

import itertools
import os
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax.data.sources import Record
from ches_jax.errors import RunError
from ches_jax.runs import chunks
from ches_jax.runs.directory import open_run
from ches_jax.scores import parts
from ches_jax.scores import table as tables
from ches_jax.scores.formulas import numbers, score_column
from ches_jax.scores.run import merge as merge_run
from ches_jax.select.scored_rows import joined, keys

METADATA = {"model": {"sha256": "ab"}, "eos": "include"}


def rows(start, stop, **more):
    index = np.arange(start, stop)
    return {
        "row_id": [f"r{i}" for i in index],
        "index": index,
        "ches": np.sin(index),
        "chosen_tokens": index + 1,
        "flags": [["truncated"] if i % 3 == 0 else [] for i in index],
        **more,
    }


def test_round_trip_keeps_rows_types_and_provenance(tmp_path):
    tables.write_part(tmp_path / "scores.parquet", rows(0, 5), METADATA)
    table, metadata = tables.read_table(tmp_path)
    assert metadata == METADATA
    assert table["index"].to_pylist() == [0, 1, 2, 3, 4]
    assert table["ches"].to_pylist() == np.sin(np.arange(5)).tolist()
    assert table["flags"].to_pylist()[:2] == [["truncated"], []]
    assert all(tables.COLUMNS[f.name] == f.type for f in table.schema)
    assert table.equals(tables.read_table(tmp_path / "scores.parquet")[0])
    assert [p.name for p in tmp_path.iterdir()] == ["scores.parquet"]


def test_a_table_in_its_file_has_the_numbers_of_the_one_in_memory(tmp_path, monkeypatch):
    """Some rows at a time: numbers with their nulls, scores, words, single rows, keys of the source."""
    monkeypatch.setattr(tables, "BATCH", 3)
    sums = np.random.default_rng(0).normal(size=(3, 11))
    sums[2][4] = 0.0  # which leaves a cosine undefined
    more = {
        "ches": pa.array([None if i == 6 else float(i) for i in range(11)]),
        "cosine": sums[0],
        "inner": sums[1],
        "sqnorm_chosen": np.abs(sums[2]),
        "chosen_candidate": pa.array([None, *range(1, 11)], pa.int32()),
        "rejected_candidate": pa.array([None, *range(10)], pa.int32()),
        "category": pa.array([("b", None, "a", "c")[i % 4] for i in range(11)]),
    }
    tables.write_part(tmp_path / "scores.parquet", rows(0, 11, **more), METADATA)
    stored, (whole, metadata) = tables.open_table(tmp_path), tables.read_table(tmp_path)
    assert stored.metadata == metadata and len(stored) == len(whole) == 11
    for name in whole.column_names:
        assert stored[name].to_pylist() == whole[name].to_pylist()
    for name in ("ches", "chosen_tokens", "inner"):
        assert np.array_equal(numbers(stored, name), whole[name].cast(pa.float64()).to_numpy(), equal_nan=True)
    want = np.where(whole["ches"].is_null(), np.nan, sums[1] / np.where(sums[2] == 0, np.nan, np.abs(sums[2])) - 1)
    assert np.array_equal(score_column(stored, "projection"), want, equal_nan=True)
    assert np.array_equal(score_column(stored, "random", 3), score_column(whole, "random", 3), equal_nan=True)
    for table in (stored, whole):
        names, codes = tables.words(table, "category")
        assert names == ["", "a", "b", "c"] and [names[c] or None for c in codes] == whole["category"].to_pylist()
        names, codes = tables.words(table, "flags")
        assert [names[c].split() for c in codes] == whole["flags"].to_pylist()
        names, codes = tables.words(table, "chosen_candidate")
        assert [int(names[c] or -1) for c in codes] == whole["chosen_candidate"].fill_null(-1).to_pylist()
        some = tables.rows_at(table, [10, 2, 2, 7], ["row_id", "index"])
        assert some.to_pylist() == [{"row_id": f"r{i}", "index": i} for i in (10, 2, 2, 7)]
        source = [Record(i, f"r{i}", "", {}, candidates=cast(Any, c)) for i, c in keys(whole) if i != 5]
        found = [(row.index, position, row_id) for row, position, row_id in joined(source, table)]
        assert found == [(i, i, f"r{i}") for i in range(11) if i != 5]
        some = np.isin(np.arange(11), [0, 4, 5, 10])
        found = [(row.index, position, row_id) for row, position, row_id in joined(source, table, some)]
        assert found == [(i, i, f"r{i}") if some[i] else (i, None, "") for i in range(11) if i != 5]


def test_a_table_in_its_file_keeps_nothing_of_it_in_memory(tmp_path):
    tables.write_part(tmp_path / "scores.parquet", rows(0, 30_000), METADATA)
    before = pa.total_allocated_bytes()
    stored = tables.open_table(tmp_path)
    _ = numbers(stored, "ches"), tables.words(stored, "flags"), tables.rows_at(stored, [3], ["row_id"])
    assert pa.total_allocated_bytes() - before < 10_000
    whole = tables.read_table(tmp_path)[0]
    assert pa.total_allocated_bytes() - before > whole.nbytes / 2 > 500_000


def test_a_table_stays_that_which_was_opened(tmp_path):
    tables.write_part(tmp_path / "scores.parquet", rows(0, 5), METADATA)
    stored = tables.open_table(tmp_path)
    tables.write_part(tmp_path / "scores.parquet", rows(3, 6), METADATA)
    assert stored["index"].to_pylist() == [0, 1, 2, 3, 4]


def test_the_bytes_do_not_depend_on_how_the_rows_were_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROW_GROUP", 4)
    tables.write_part(tmp_path / "whole", rows(0, 11), METADATA)
    for name, cuts in {"x": [0, 3, 4, 11], "y": [0, 6, 11]}.items():
        parts = []
        for start, stop in itertools.pairwise(cuts):
            parts.append(tmp_path / f"{name}-{start}")
            tables.write_part(parts[-1], rows(start, stop), METADATA)
        assert tables.merge_parts(parts, tmp_path / name) == 11
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole").read_bytes()
    assert pq.ParquetFile(tmp_path / "whole").metadata.num_row_groups == 3


def test_nulls_and_arrow_arrays_are_kept(tmp_path):
    scores = pa.chunked_array([pa.array([1.0, None, 3.0])])
    tables.write_part(tmp_path / "t", rows(0, 3, ches=scores), METADATA)
    assert tables.read_table(tmp_path / "t")[0]["ches"].to_pylist() == [1.0, None, 3.0]


def test_an_empty_part_and_an_all_null_column(tmp_path):
    tables.write_part(tmp_path / "a", rows(0, 0), METADATA)
    tables.write_part(tmp_path / "b", rows(0, 2, ches=[None, None]), METADATA)
    assert tables.merge_parts([tmp_path / "a", tmp_path / "b"], tmp_path / "t") == 2
    assert tables.read_table(tmp_path / "t")[0]["ches"].null_count == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_names_its_row_and_leaves_no_file(tmp_path, bad):
    with pytest.raises(RunError, match=r"row index 1 \(row_id r1\): ches is"):
        tables.write_part(tmp_path / "t", rows(0, 3, ches=[0.0, bad, 1.0]), METADATA)
    assert list(tmp_path.iterdir()) == []


def test_rows_twice_or_out_of_order_are_refused(tmp_path):
    tables.write_part(tmp_path / "a", rows(0, 3), METADATA)
    tables.write_part(tmp_path / "b", rows(2, 4), METADATA)
    for names in (["a", "b"], ["b", "a"], ["a", "a"]):
        with pytest.raises(RunError, match="every row must occur once"):
            tables.merge_parts([tmp_path / p for p in names], tmp_path / "t")
    with pytest.raises(RunError, match="row index 4 comes after 4"):
        tables.write_part(tmp_path / "t", rows(0, 2, index=[4, 4]), METADATA)
    assert not (tmp_path / "t").exists()


def test_the_pairs_of_one_row_are_told_apart_by_their_candidates(tmp_path):
    pairs = {"chosen_candidate": [0, 0, 1], "rejected_candidate": [1, 2, 0]}
    tables.write_part(tmp_path / "a", rows(0, 2), METADATA)
    tables.write_part(tmp_path / "b", rows(0, 3, index=[2, 2, 2], **pairs), METADATA)
    tables.write_part(tmp_path / "c", rows(3, 5), METADATA)
    # whichever part has the columns, the table has them, null where a row of the data is one pair
    assert tables.merge_parts([tmp_path / p for p in "abc"], tmp_path / "t") == 7
    table, _ = tables.read_table(tmp_path / "t")
    assert table["index"].to_pylist() == [0, 1, 2, 2, 2, 3, 4]
    assert table["chosen_candidate"].to_pylist() == [None, None, 0, 0, 1, None, None]
    assert tables.merge_parts([tmp_path / p for p in "ac"], tmp_path / "u") == 4
    assert "chosen_candidate" not in tables.read_table(tmp_path / "u")[0].schema.names
    with pytest.raises(RunError, match=r"row index 2 \(responses 0 and 1\) comes after 2 \(responses 1 and 0\)"):
        tables.merge_parts([tmp_path / "b", tmp_path / "b"], tmp_path / "x")
    with pytest.raises(RunError, match=r"row index 2 \(responses 0 and 2\) comes after 2 \(responses 0 and 2\)"):
        tables.write_part(
            tmp_path / "x",
            rows(0, 3, index=[2] * 3, **pairs | {"chosen_candidate": [0] * 3, "rejected_candidate": [1, 2, 2]}),
            METADATA,
        )


def test_parts_of_different_runs_are_refused(tmp_path):
    tables.write_part(tmp_path / "a", rows(0, 3), METADATA)
    tables.write_part(tmp_path / "b", rows(3, 4), METADATA | {"eos": "exclude"})
    with pytest.raises(RunError, match="eos: 'exclude' and 'include'"):
        tables.merge_parts([tmp_path / "a", tmp_path / "b"], tmp_path / "t")
    tables.write_part(tmp_path / "c", rows(3, 4, ln_ches=[1.0]), METADATA)
    with pytest.raises(RunError, match="has columns"):
        tables.merge_parts([tmp_path / "a", tmp_path / "c"], tmp_path / "t")
    with pytest.raises(RunError, match="no parts"):
        tables.merge_parts([], tmp_path / "t")


def test_columns_are_checked(tmp_path):
    with pytest.raises(RunError, match="unknown column 'chess'"):
        tables.schema(["row_id", "index", "chess"], {})
    with pytest.raises(RunError, match="'row_id' is missing"):
        tables.schema(["index"], {})
    with (
        pytest.raises(RunError, match="expected"),
        tables.TableWriter(tmp_path / "t", ["row_id", "index", "ches"], {}) as writer,
    ):
        writer.write({"row_id": ["a"], "index": [0]})
    with pytest.raises(RunError, match="column 'index'"):
        tables.write_part(tmp_path / "t", {"row_id": ["a"], "index": ["zero"]}, {})
    with pytest.raises(RunError, match="column 'category'"):
        tables.write_part(tmp_path / "t", rows(0, 1, category=["\ud800"]), {})


def test_a_forecast_is_no_table_of_scores_and_says_what_is(tmp_path):
    (tmp_path / "forecast.parquet").touch()
    with pytest.raises(RunError, match=r"a forecast, of what happens to each pair; .* is of `ches influence`"):
        tables.read_table(tmp_path)


def test_what_is_not_a_score_table_says_so(tmp_path):
    with pytest.raises(RunError, match="no such file or directory"):
        tables.read_table(tmp_path / "nowhere")
    with pytest.raises(RunError, match=r"no scores\.parquet"):
        tables.read_table(tmp_path)
    (tmp_path / "scores.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(RunError, match="cannot be read as Parquet"):
        tables.read_table(tmp_path)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "scores.parquet")
    with pytest.raises(RunError, match=r"not a score table .*put columns of your own into the data"):
        tables.read_table(tmp_path)


def test_a_damaged_table_is_an_error_of_the_user(tmp_path):
    path = tmp_path / "scores.parquet"
    tables.write_part(path, rows(0, 2000), METADATA)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match="cannot be read as Parquet"):
        tables.read_table(path)
    data[4:400] = b"\x00" * 396
    path.write_bytes(data)
    with pytest.raises(RunError, match="is damaged"):
        tables.read_table(path)


def test_tables_join_by_id_and_copies_in_order():
    left = pa.table({"row_id": ["a", "b", "a", "c"]})
    right = pa.table({"row_id": ["c", "a", "x", "a"]})
    first, second = tables.align(left, right)
    assert first.tolist() == [0, 2, 3]
    assert second.tolist() == [1, 3, 0]
    chunks = pa.chunked_array([["a"], ["b", "a", "c"]])
    assert [of.tolist() for of in tables.align(left, pa.table({"row_id": chunks}))] == [[0, 1, 2, 3]] * 2
    assert tables.align(left, pa.table({"row_id": pa.array([], pa.string())}))[0].size == 0


def unfinished(out):
    """A run of one chunk that was killed before its summary."""
    open_run(out, "score", {"config": {}}, resume=False)
    tables.write_part(parts.part(out, 0), rows(0, 2), METADATA)
    chunks.commit(out, 0, 2, [parts.part(out, 0)])
    chunks.end(out, 1)
    return out


@pytest.mark.parametrize(
    "left",
    [lambda path: path.write_bytes(b""), lambda path: path.symlink_to("/dev/zero"), lambda path: None, os.mkfifo],
)
def test_until_a_run_has_its_summary_its_table_is_made_again(tmp_path, left):
    out = unfinished(tmp_path / "run")
    left(out / tables.FILE_NAME)
    merge_run(out)
    assert tables.read_table(out)[0]["row_id"].to_pylist() == ["r0", "r1"]
    assert sorted(p.name for p in out.iterdir()) == ["config.json", "run.json", tables.FILE_NAME]


def test_parts_that_outlived_the_summary_go_and_the_table_stays(tmp_path):
    out = unfinished(tmp_path / "run")
    merge_run(out)
    table = (out / tables.FILE_NAME).read_bytes()
    (out / "parts").mkdir()
    merge_run(out)
    assert not (out / "parts").exists() and (out / tables.FILE_NAME).read_bytes() == table


@pytest.mark.parametrize("fails", ["write_table", "close"])
def test_a_table_whose_end_cannot_be_written_leaves_nothing(tmp_path, monkeypatch, fails):
    """A full disk is met by the rows, or by the end of the file."""

    def full(*_, **__):
        raise OSError("Error writing bytes to file")

    with (
        pytest.raises(OSError, match=f"Error writing bytes to file: '{tmp_path}/t'"),
        tables.TableWriter(tmp_path / "t", ["row_id", "index", "ches"], {}) as writer,
    ):
        writer.write({"row_id": ["a"], "index": [0], "ches": [1.0]})
        monkeypatch.setattr(pq.ParquetWriter, fails, full)
    assert not list(tmp_path.iterdir())
