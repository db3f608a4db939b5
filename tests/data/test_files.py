"""Files of every kind give the same rows; a damaged one is an error in words."""

import bz2
import gzip
import json
import lzma
import os
import random

import pytest

from ches_jax.data import files
from ches_jax.data.sources import open_pairs, open_prompts
from ches_jax.errors import DataError
from tests.helpers import write_lines

ROWS = [{"prompt": f"Which {i}?", "chosen": f" This – {i}", "rejected": " That\nor, so"} for i in range(5)]


def lines(rows=ROWS):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows).encode()


def ids(spec, **options):
    return [r.row_id for r in open_pairs(str(spec), **options)]


@pytest.fixture
def want(tmp_path):
    (tmp_path / "want.jsonl").write_bytes(lines())
    return ids(tmp_path / "want.jsonl")


def zstd(data):
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_files_are_read_and_a_cut_one_is_reported(tmp_path, want, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACKED[suffix](lines()))
    assert ids(path) == want
    (tmp_path / "b.jsonl").write_bytes(PACKED[suffix](lines()))  # by its bytes, whatever its name
    assert ids(tmp_path / "b.jsonl") == want
    array = tmp_path / f"c.json{suffix}"
    array.write_bytes(PACKED[suffix](json.dumps(ROWS).encode()))
    assert ids(array) == want
    many = lines([{"prompt": os.urandom(500).hex(), "chosen": "a", "rejected": "b"} for _ in range(300)])
    path.write_bytes(PACKED[suffix](many)[:-4000])
    with pytest.raises(DataError, match="cut off"):
        ids(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_tables_of_text_have_long_fields_and_line_ends(tmp_path, suffix):
    import csv

    rows = [*ROWS, {"prompt": "x" * 300_000, "chosen": "a\r\nb", "rejected": '"c", d\te'}]
    with (tmp_path / f"a{suffix}").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="," if suffix == ".csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
    assert [r.content for r in open_pairs(str(tmp_path / f"a{suffix}"))] == rows


DOCUMENTS = {
    "an array": ROWS,
    "under a key": {"data": ROWS, "version": 3},
    "of the viewer": {"features": [{"name": "prompt"}], "rows": [{"row_idx": i, "row": r} for i, r in enumerate(ROWS)]},
    "columns": {name: [r[name] for r in ROWS] for name in ROWS[0]},
    "columns by number": {name: {str(i): r[name] for i, r in enumerate(ROWS)} for name in ROWS[0]},
}


@pytest.mark.parametrize("document", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_holds_rows_under_a_key_or_as_columns(tmp_path, want, document, indent):
    (tmp_path / "a.json").write_text(json.dumps(document, indent=indent), "utf-8")
    assert ids(tmp_path / "a.json") == want


def test_json_of_one_row_and_of_splits(tmp_path, want):
    turns = [{"role": "user", "content": "hi"}]
    row = {"prompt": turns, "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"}
    row["rejected"] = [{"role": "assistant", "content": "b"}]
    (tmp_path / "one.json").write_text(json.dumps(row, indent=1))
    assert [r.content for r in open_pairs(str(tmp_path / "one.json"))] == [row]
    (tmp_path / "splits.json").write_text(json.dumps({"train": ROWS, "test": ROWS[:2]}))
    assert ids(tmp_path / "splits.json", split="test") == want[:2]
    with pytest.raises(DataError, match="rows under 'train' and 'test'; choose one with --split"):
        ids(tmp_path / "splits.json")


def test_several_files_are_read_in_order_and_rows_are_named_with_their_file(tmp_path, want):
    for i, part in enumerate((ROWS[:2], ROWS[2:])):
        (tmp_path / f"part{i}.jsonl").write_bytes(lines(part))
    both = f"{tmp_path}/part0.jsonl,{tmp_path}/part1.jsonl"
    assert ids(both) == ids(f"{tmp_path}/part*.jsonl") == want
    rows = list(open_pairs(both).iter_from(3))
    assert [(r.index, r.where) for r in rows] == [(3, "part1.jsonl, line 2"), (4, "part1.jsonl, line 3")]
    with pytest.raises(DataError, match=r"part7\.jsonl: no such file \(one of 2"):
        ids(f"{tmp_path}/part0.jsonl,{tmp_path}/part7.jsonl")
    with pytest.raises(DataError, match="no file fits this pattern"):
        ids(f"{tmp_path}/none*.jsonl")
    with pytest.raises(DataError, match="named twice"):
        ids(f"{tmp_path}/part0.jsonl,{tmp_path}/part0.jsonl")


def test_a_folder_as_the_hub_lays_it_out_is_read_by_split(tmp_path, want):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.parquet").write_bytes(b"")
    for i, part in enumerate((ROWS[:2], ROWS[2:])):
        pq.write_table(pa.Table.from_pylist(part), folder / f"data/train_prefs-0000{i}-of-00002.parquet")
    assert ids(folder) == want
    pq.write_table(pa.Table.from_pylist(ROWS[:1]), folder / "data/test_prefs-00000-of-00001.parquet")
    assert ids(folder, split="test_prefs") == want[:1]
    with pytest.raises(DataError, match="several splits; choose one with --split: test_prefs, train_prefs"):
        ids(folder)
    (folder / "data/train_prefs-00000-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="'train_prefs' lacks 1 of its 2 parts"):
        ids(folder, split="train_prefs")


@pytest.mark.parametrize("made_by", ["selection", "label", "gather"])
def test_the_folder_of_a_selection_stands_for_its_pairs(tmp_path, made_by):
    """What lies beside them (other rows, ids, the summary) is about them, and no split of them."""
    want = ids(write_lines(tmp_path / "pairs.jsonl", ROWS))
    write_lines(tmp_path / "dropped.jsonl", [{"row_id": "a", "reason": "no"}])
    with pytest.raises(DataError, match="several splits; choose one with --split: dropped, pairs"):
        ids(tmp_path)
    (tmp_path / f"{made_by}.json").write_text("{}")
    assert ids(tmp_path) == ids(tmp_path, split="train") == ids(tmp_path, split="pairs") == want
    (tmp_path / "pairs.jsonl").unlink()
    with pytest.raises(DataError, match="several splits"):
        ids(tmp_path)


def test_columns_that_folders_tell_are_columns_of_the_rows(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for i, row in enumerate(ROWS):
        folder = tmp_path / f"split={'test' if i == 3 else 'train'}" / f"category={i % 2}%2F"
        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row]), folder / f"{i}-a.parquet")
    rows = list(open_pairs(str(tmp_path), "train"))
    assert {(r.content["prompt"], r.category) for r in rows} == {
        (row["prompt"], f"{i % 2}/") for i, row in enumerate(ROWS) if i != 3
    }
    with pytest.raises(DataError, match="several splits; choose one with --split: test, train"):
        open_pairs(str(tmp_path))


def test_the_only_split_of_a_saved_dictionary_is_taken(tmp_path, want):
    import datasets

    datasets.DatasetDict({"train_prefs": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "d"))
    assert ids(tmp_path / "d") == ids(tmp_path / "d", split="train_prefs") == want


def test_archives_are_refused_by_what_they_are(tmp_path):
    """Also one that has the name of something else, compressed or not."""
    import tarfile
    import zipfile

    (tmp_path / "a.jsonl").write_bytes(lines(ROWS))
    for name in ("a.tar", "a.tgz", "b.jsonl.gz"):
        with tarfile.open(tmp_path / name, "w" if name == "a.tar" else "w:gz") as archive:
            archive.add(tmp_path / "a.jsonl", "a.jsonl")
    for name in ("a.zip", "b.jsonl"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(tmp_path / "a.jsonl", "a.jsonl")
    for name in ("a.tar", "a.tgz", "b.jsonl.gz", "a.zip", "b.jsonl"):
        with pytest.raises(DataError, match=f"{name}: an archive of other files; unpack it"):
            open_pairs(str(tmp_path / name))


def test_pages_are_read_as_what_they_show():
    hub, page = "https://huggingface.co/datasets/o/n", files.behind_page
    assert [page(hub + end) for end in ("", "/", "/tree/main", "/viewer/default/train")] == ["o/n"] * 4
    assert page(f"{hub}/blob/main/a.jsonl") == f"{hub}/resolve/main/a.jsonl" == page(f"{hub}/resolve/main/a.jsonl")
    assert page("https://github.com/o/r/blob/v1/d/a.csv") == "https://raw.githubusercontent.com/o/r/v1/d/a.csv"
    for same in ("https://github.com/o/r/releases/a.csv", "o/n", "a/blob/b.jsonl", "https://huggingface.co/o/n"):
        assert page(same) == same


def test_feather_is_read(tmp_path, want):
    import pyarrow as pa
    from pyarrow import feather

    feather.write_feather(pa.Table.from_pylist(ROWS), str(tmp_path / "a.feather"), compression="zstd")
    assert ids(tmp_path / "a.feather") == want


def test_addresses_are_copied_and_unknown_ones_refused(want):
    import fsspec

    fsspec.filesystem("memory").pipe("/sets/a.jsonl.gz", gzip.compress(lines()))
    assert ids("memory://sets/a.jsonl.gz") == ids("memory://sets/*.gz") == want
    with pytest.raises(DataError, match="'ftp://' is not supported; expected a path, or gs://"):
        ids("ftp://host/a.jsonl")
    with pytest.raises(DataError, match=r"memory://sets/none\.jsonl: no such file or folder"):
        ids("memory://sets/none.jsonl")


BAD = {
    "UTF-16": ("a.jsonl", lines().decode().encode("utf-16"), "the text is UTF-16"),
    "UTF-16 table": ("a.csv", "prompt\nx\n".encode("utf-16"), "the text is UTF-16"),
    "deep": ("a.jsonl", b'{"prompt":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    "deep document": ("a.json", b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
    "digits": ("a.jsonl", b'{"prompt":' + b"9" * 5000 + b"}", "not JSON"),
    "old feather": ("a.feather", b"FEA1 and so on", "Feather version 1"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD.values(), ids=BAD)
def test_what_is_no_data_is_an_error_in_words(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    for opened in (open_pairs, open_prompts):
        with pytest.raises(DataError, match=message) as caught:
            list(opened(str(tmp_path / name)))
        assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_damaged_tables_are_read_or_reported_in_words(tmp_path, form):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table, path = pa.Table.from_pylist(ROWS * 8), tmp_path / f"a.{form}"
    if form == "arrow":
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)
    whole, chance = path.read_bytes(), random.Random(5)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 2, 8])):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(bytes(damaged))
        try:
            ids(path)
        except DataError as error:
            assert str(error).startswith(str(path))


def test_rows_that_cannot_be_read_are_records_with_a_fault_for_who_tolerates_them(tmp_path):
    path = tmp_path / "a.jsonl"
    good = json.dumps(ROWS[0])
    path.write_text("\n".join([good, '{"prompt": "p", "chosen": "a", "rejected": null}', "{broken", "[1]", good]))
    rows = list(open_pairs(str(path)).tolerant())
    assert [bool(r.fault) for r in rows] == [False, True, True, True, False]
    assert [r.index for r in rows] == [0, 1, 2, 3, 4]
    assert "null here" in rows[1].fault and "not JSON" in rows[2].fault
    assert len({r.row_id for r in rows}) == 4
    with pytest.raises(DataError, match="line 2: no column 'rejected'"):
        list(open_pairs(str(path)))


def test_other_columns_can_always_be_written_again(tmp_path):
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {**ROWS[0], "when": datetime.datetime(2020, 1, 2), "raw": b"\x00", "nan": float("nan"), "category": "c"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (read,) = open_pairs(str(tmp_path / "a.parquet"))
    assert json.loads(json.dumps(dict(read.extra), allow_nan=False)) == {
        "when": "2020-01-02T00:00:00",
        "raw": "AA==",
        "nan": None,
    }
    (tmp_path / "b.jsonl").write_text(json.dumps({**ROWS[0], "category": "\ud800", "note": "\udcff"}))
    (read,) = open_pairs(str(tmp_path / "b.jsonl"))
    assert (read.category, read.extra) == ("\\ud800", {"note": "\\udcff"})


def test_rows_of_json_may_lie_deeper_or_have_names(tmp_path, want):
    documents = {
        "deeper": {"version": 1, "data": {"train": ROWS}},
        "named": {f"row-{i}": row for i, row in enumerate(ROWS)},
        "numbered": {str(i): row for i, row in enumerate(ROWS)},
    }
    for name, document in documents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(document), "utf-8")
        assert ids(tmp_path / f"{name}.json") == want
    (tmp_path / "two.json").write_text(json.dumps({"data": {"train": ROWS, "test": ROWS[:2]}}), "utf-8")
    assert ids(tmp_path / "two.json", split="data.test") == want[:2]
    with pytest.raises(DataError, match=r"rows under 'data.train' and 'data.test'; choose one with --split"):
        ids(tmp_path / "two.json")


def test_fields_of_csv_are_parted_as_its_first_line_is(tmp_path):
    row = ("p, with a comma", "a", "b")
    wanted = {"prompt": row[0], "chosen": "a", "rejected": "b"}
    for name, text in {
        "semicolons.csv": "prompt;chosen;rejected\n{};{};{}\n".format(*row),
        "tabs.csv": "prompt\tchosen\trejected\n{}\t{}\t{}\n".format(*row),
        "quoted.csv": '"prompt","chosen","rejected"\n"{}","{}","{}"\n'.format(*row),
    }.items():
        (tmp_path / name).write_text(text)
        assert [r.content for r in open_pairs(str(tmp_path / name))] == [wanted]


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.csv").write_text("prompt,chosen,chosen,rejected\np,a,b,c\n")
    table = pa.Table.from_arrays([pa.array([t]) for t in "pabc"], names=["prompt", "chosen", "chosen", "rejected"])
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(DataError, match="two columns are named 'chosen'"):
            ids(tmp_path / name)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.tsv"])
@pytest.mark.parametrize(
    "rows",
    [
        ['p1,"open,r1', 'p2,"x,r2'],  # what stands between the marks would be one field, and two rows one
        ['p1,"Yes" he said.,r1'],  # the marks would be taken away
        ["p1,a,r1", 'p2,"b,r2'],
    ],
)
def test_a_stray_quotation_mark_in_a_table_is_refused(tmp_path, name, rows):
    mark = "\t" if name.endswith("tsv") else ","
    path = tmp_path / name
    text = "\n".join(["prompt,chosen,rejected", *rows]) + "\n"
    path.write_text(text.replace(",", mark) if mark == "\t" else text)
    with pytest.raises(DataError, match=r"about line \d: not a readable CSV file .*those inside are doubled"):
        list(open_pairs(str(path)))


def test_quotation_marks_that_are_doubled_or_inside_a_field_are_its_own(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text('prompt,chosen,rejected\nsay "a",",""b"",\nc",d"\n')
    (row,) = open_pairs(str(path))
    assert row.content == {"prompt": 'say "a"', "chosen": ',"b",\nc', "rejected": 'd"'}


@pytest.mark.parametrize("text", ['{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}\n' * 2, None])
def test_a_key_that_every_row_has_twice_is_refused(tmp_path, text):
    """JSON keeps the last one, so that the other would be lost without a word."""
    path = tmp_path / ("pairs.jsonl" if text else "pairs.json")
    path.write_text(text or '[{"prompt": "p", "chosen": "a", "rejected": "b", "prompt": "q"}]')
    with pytest.raises(DataError, match=r"two columns are named '(chosen|prompt)'"):
        open_pairs(str(path))


@pytest.mark.parametrize("at", [0, 30, 300])
def test_a_key_that_some_row_has_twice_costs_that_row(tmp_path, at):
    whole, path = (
        '{"prompt": "p", "chosen": [{"content": "a", "role": "assistant"}], "rejected": "b"}',
        tmp_path / "p.jsonl",
    )
    whole = whole.replace('"b"', '[{"content": "b", "role": "assistant"}]')
    for fault in (whole.replace('"rejected"', '"chosen": 1, "rejected"'), whole.replace('"b"', '"b", "content": "c"')):
        rows = [whole] * 310
        rows[at] = "\ufeff" + fault if at == 30 else fault
        path.write_text("\n".join(rows))
        faults = {r.index: r.fault for r in open_pairs(str(path)).tolerant() if r.fault}
        assert list(faults) == [at] and faults[at].startswith("two columns are named 'c")
        with pytest.raises(DataError, match=rf"line {at + 1}: two columns are named 'c"):
            list(open_pairs(str(path)))
    (tmp_path / "p.json").write_text(f"[{','.join([*[whole] * 30, fault])}]")
    with pytest.raises(DataError, match=r"p\.json, two columns are named 'content'"):
        open_pairs(str(tmp_path / "p.json"))
