"""Preference rows: the same pairs from every format, and one clear message for every mistake."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from huggingface_hub import HfApi, constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ches_jax.data import formats
from ches_jax.data.sources import open_pairs, open_prompts, row_id, rows_in_memory
from ches_jax.errors import DataError
from tests.helpers import write_lines

SHARED = Path(__file__).parents[2] / "../shared/data"

TEXT = [
    {"prompt": "Which?", "chosen": " This – one", "rejected": " That", "category": "a"},
    {"prompt": "Who?", "chosen": " She", "rejected": " Nobody\nat all", "category": "b"},
    {"prompt": "", "chosen": "x", "rejected": "", "category": None},
]


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


CONVERSATION = [
    {"prompt": turns("hi"), "chosen": turns("", "hello")[1:], "rejected": turns("", "no")[1:]},
    {"prompt": turns("a", "b", "c"), "chosen": turns("", "d")[1:], "rejected": turns("", "e")[1:]},
]
IDS = [{"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": []}]


def as_jsonl(tmp, rows):
    return write_lines(tmp / "pairs.jsonl", rows)


def as_json_lines_in_json(tmp, rows):
    return write_lines(tmp / "lines.json", rows)


def as_json_array(tmp, rows):
    (tmp / "array.json").write_text(json.dumps(rows, indent=1), "utf-8")
    return tmp / "array.json"


def as_parquet(tmp, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp / "pairs.parquet", row_group_size=2)
    return tmp / "pairs.parquet"


def as_arrow_file(tmp, rows):
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(str(tmp / "file.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return tmp / "file.arrow"


def as_arrow_stream(tmp, rows):
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(tmp / "stream.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return tmp / "stream.arrow"


def as_folder(tmp, rows):
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(str(tmp / "folder"))
    return tmp / "folder"


FORMATS = [
    as_jsonl,
    as_json_lines_in_json,
    as_json_array,
    as_parquet,
    as_arrow_file,
    as_arrow_stream,
    as_folder,
]


def summary(source, start=0):
    return [(r.index, r.row_id, r.content, r.category) for r in source.iter_from(start)]


@pytest.mark.parametrize("rows", [TEXT, CONVERSATION, IDS], ids=["text", "conversation", "ids"])
@pytest.mark.parametrize("write", FORMATS)
def test_every_format_gives_the_same_rows_again_and_from_any_position(tmp_path, write, rows):
    want = summary(open_pairs(str(as_jsonl(tmp_path, rows))))
    source = open_pairs(str(write(tmp_path, rows)))
    assert summary(source) == summary(source) == want
    assert [w[2] for w in want] == [{k: v for k, v in r.items() if k != "category"} for r in rows]
    for start in range(len(rows) + 2):
        assert summary(source, start) == want[start:]


def test_category_travels_and_does_not_change_identity(tmp_path):
    rows = list(open_pairs(str(as_jsonl(tmp_path, TEXT))))
    assert [r.category for r in rows] == ["a", "b", None]
    assert rows[0].row_id == row_id({k: TEXT[0][k] for k in ("prompt", "chosen", "rejected")})


def test_rows_at_positions_are_those_of_all(tmp_path):
    rows = list(open_pairs(str(as_jsonl(tmp_path, TEXT))))
    source = open_pairs(str(as_jsonl(tmp_path, TEXT)))
    for wanted in (b"", bytes([1]), bytes([0, 1]), bytes([1, 0, 1, 1, 1])):
        assert [r for some in source.rows_at(wanted) for r in some] == [
            r for r in rows if r.index < len(wanted) and wanted[r.index]
        ]


def test_lines_that_are_not_wanted_are_not_read(tmp_path, monkeypatch):
    """Nor are those behind the last; a broken one that is wanted says so, one that is nested too deeply too."""
    path = Path(as_jsonl(tmp_path, TEXT * 4))
    deep = {**TEXT[0], "more": json.loads("[" * 200 + "]" * 200)}
    lines = [*path.read_text().splitlines()[:9], "{broken", "", json.dumps(deep), json.dumps(TEXT[0])]
    path.write_text("\n".join(lines))
    source = open_pairs(str(path)).tolerant()
    want = {r.index: r for r in source}
    parsed, read = [], formats._parsed
    monkeypatch.setattr(formats, "_parsed", lambda line, whole=False: parsed.append(line) or read(line, whole))
    wanted = bytes([0, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1])
    assert [r for some in source.rows_at(wanted) for r in some] == [want[1], want[9], want[10]]
    assert "not JSON" in want[9].fault
    assert "nested more than" in want[10].fault and len(parsed) == 3


def test_many_batches_of_a_table_keep_their_order(tmp_path):
    rows = [{"prompt": "p", "chosen": f"{i}", "rejected": "r"} for i in range(700)]
    for write in (as_arrow_file, as_folder):
        source = open_pairs(str(write(tmp_path, rows)))
        assert [int(r.content["chosen"]) for r in source.iter_from(300)] == list(range(300, 700))


def test_blank_lines_count_as_lines_but_not_as_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{json.dumps(TEXT[0])}\n  \n{json.dumps(TEXT[1])}", "utf-8-sig")
    assert [(r.index, r.where) for r in open_pairs(str(path))] == [(0, "line 2"), (1, "line 4")]


def test_columns_are_renamed(tmp_path):
    path = as_jsonl(tmp_path, [{"q": "p", "good": "a", "rejected": "b", "kind": 3}])
    source = open_pairs(str(path), columns={"prompt": "q", "chosen": "good", "category": "kind"})
    (row,) = source
    assert row.content == {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert row.category == "3"
    assert "prompt=q" in source.describe()


def test_fingerprint_follows_the_bytes(tmp_path):
    first = open_pairs(str(as_jsonl(tmp_path, TEXT))).fingerprint()
    assert first == open_pairs(str(as_jsonl(tmp_path, TEXT))).fingerprint()
    assert first != open_pairs(str(as_jsonl(tmp_path, TEXT[:2]))).fingerprint()
    folder = open_pairs(str(as_folder(tmp_path, TEXT)))
    assert len(folder.fingerprint()) == len(first) == 64


def test_a_split_of_a_dataset_dict_is_chosen_by_name(tmp_path):
    import datasets

    parts = {"train": datasets.Dataset.from_list(TEXT), "test": datasets.Dataset.from_list(TEXT[:1])}
    datasets.DatasetDict(**parts).save_to_disk(str(tmp_path / "d"))
    assert len(list(open_pairs(str(tmp_path / "d"), split="test"))) == 1
    with pytest.raises(DataError, match="several splits; choose one with --split: train, test"):
        open_pairs(str(tmp_path / "d"))
    with pytest.raises(DataError, match="no split 'dev'; choose one with --split: train, test"):
        open_pairs(str(tmp_path / "d"), split="dev")


def test_a_hub_name_is_loaded_through_datasets(monkeypatch):
    import datasets

    names = []

    def load_dataset(name, split):
        names.append((name, split))
        return datasets.Dataset.from_list(TEXT)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *args, **options: None)
    source = open_pairs("owner/name")
    assert next(iter(source)).content["chosen"] == TEXT[0]["chosen"]
    assert len(source.fingerprint()) == 64
    open_pairs("owner/name", split="test_prefs")
    assert names == [("owner/name", "train"), ("owner/name", "test_prefs")]


def test_an_unreachable_hub_says_to_use_a_local_path(monkeypatch):
    import datasets
    from datasets import config

    offline = []

    def load_dataset(*args, **options):
        offline.append((constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE))
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(HfApi, "dataset_info", load_dataset)
    with pytest.raises(DataError, match=r"could not be loaded \(ConnectionError: no route\); check"):
        open_pairs("owner/name")
    assert offline == [(False, False), (True, True)], "asked once; then the clients read their caches"
    assert not constants.HF_HUB_OFFLINE


GOOD = json.dumps(TEXT[0]).encode() + b"\n"
BROKEN = {
    "empty": ("a.jsonl", b"", "the file is empty"),
    "only blank lines": ("a.jsonl", b"\n\n", "no rows"),
    "empty array": ("a.json", b"[]", "no rows"),
    "unknown format": ("a.xls", b"x", "unknown format '.xls'; expected .jsonl"),
    "not UTF-8": ("a.jsonl", GOOD + b'{"prompt": "\xff"}', "line 2: byte 13 is not UTF-8"),
    "broken JSON": ("a.jsonl", GOOD + b'{"prompt": \n', r"line 2: not JSON \(Expecting value\)"),
    "broken array": ("a.json", b'[\n{"a": 1},\n{"b" 2}]', "line 3: not JSON"),
    "not an object": ("a.jsonl", GOOD + b"\n[1]\n", "line 3: a list instead of an object"),
    "not a table": ("a.parquet", b"PAR1 nothing", "not a readable Parquet file"),
    "not Arrow": ("a.arrow", b"ARROW1 nothing", "not a readable Arrow file"),
    "surrogate": (
        "a.jsonl",
        b'{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}',
        "line 1: a text holds half a surrogate",
    ),
    "missing columns": (
        "a.jsonl",
        b'{"question": "q", "good": "g"}',
        "line 1: no column 'chosen' or 'rejected'; found: question, good; expected prompt, chosen, "
        "rejected or .* --columns chosen=NAME rejected=NAME",
    ),
    "null": (
        "a.jsonl",
        b'{"prompt": "p", "chosen": "a", "rejected": null}',
        r"no column 'rejected' \(it is null here\)",
    ),
    "no prompt": (
        "a.jsonl",
        b'{"chosen": "a", "rejected": "b"}',
        "no column 'prompt'; found: chosen, rejected",
    ),
    "missing ids": ("a.jsonl", b'{"prompt_ids": [1]}', "no column 'chosen_ids' or 'rejected_ids'"),
    "wrong type": (
        "a.jsonl",
        b'{"prompt": 3, "chosen": "a", "rejected": "b"}',
        "'prompt' is int 3; expected text or a list of messages",
    ),
    "wrong message": (
        "a.jsonl",
        b'{"prompt": "p", "chosen": [{"from": "x"}], "rejected": "b"}',
        "'chosen' is list .* 'role' and 'content'",
    ),
    "text beside conversation": (
        "a.jsonl",
        b'{"prompt": "p", "chosen": "a", "rejected": [{"role": "assistant", "content": "b"}]}',
        "one of 'chosen' and 'rejected' is text",
    ),
    "ids that are not ids": (
        "a.jsonl",
        b'{"prompt_ids": [1], "chosen_ids": [true], "rejected_ids": [2]}',
        r"'chosen_ids' is list \[True\]; expected a list of token ids",
    ),
    "tools": (
        "a.jsonl",
        b'{"prompt": "p", "chosen": "a", "rejected": "b", "tools": "{"}',
        "'tools' is text that is not JSON; expected a list",
    ),
}


@pytest.mark.parametrize(("name", "data", "message"), BROKEN.values(), ids=BROKEN)
def test_a_mistake_gets_one_message_that_names_the_file(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        list(open_pairs(str(path)))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_wrong_path_or_option_gets_one_message(tmp_path):
    path = str(as_jsonl(tmp_path, TEXT))
    with pytest.raises(DataError, match=r"no such file or folder; expected \.jsonl"):
        open_pairs(str(tmp_path / "none.jsonl"))
    with pytest.raises(DataError, match="no such file or folder"):
        open_pairs("data/none.jsonl")  # a file name, though it looks like owner/name
    with pytest.raises(DataError, match="a single file has no splits"):
        open_pairs(path, split="train")
    with pytest.raises(DataError, match="'promt' is not a column this tool reads"):
        open_pairs(path, columns={"promt": "x"})
    with pytest.raises(DataError, match="no column 'x'; found: prompt, chosen, rejected, category"):
        open_pairs(path, columns={"prompt": "x"})
    with pytest.raises(DataError, match="expected one written by datasets' save_to_disk"):
        (tmp_path / "nothing").mkdir()
        open_pairs(str(tmp_path / "nothing"))
    with pytest.raises(DataError, match="the folder holds one split"):
        open_pairs(str(as_folder(tmp_path, TEXT)), split="train")


JSON_VALUES = st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected"]), st.text())


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a machine with other work is slow
@given(content=JSON_VALUES)
def test_row_id_does_not_depend_on_the_order_of_columns(content):
    try:
        identity = row_id(content)
    except UnicodeEncodeError:
        return
    assert identity == row_id(dict(reversed(content.items())))
    assert identity != row_id({**content, "prompt": content.get("prompt", "") + "x"})


@pytest.mark.skipif(not SHARED.exists(), reason="shared data sets are not beside this checkout")
@pytest.mark.parametrize("name", ["hh_harmless_base_test", "ultrafeedback_eval", "truthfulqa_pairs"])
def test_real_files_are_read(name):
    path = SHARED / f"{name}.jsonl"
    rows = list(open_pairs(str(path)))
    assert [r.content for r in rows] == [json.loads(x) for x in path.read_bytes().splitlines()]


@pytest.mark.skipif(not SHARED.exists(), reason="shared data sets are not beside this checkout")
def test_whole_hh_dialogues_are_cut_where_the_published_prompts_end(tmp_path):
    lines = (SHARED / "hh_harmless_base_test.jsonl").read_bytes().splitlines()
    rows = [json.loads(x) for x in lines]
    whole = [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in rows]
    read = list(open_pairs(str(as_jsonl(tmp_path, whole))))
    assert [r.content for r in read] == rows


def prompts_of(path, **options):
    return [(r.content, dict(r.extra)) for r in open_prompts(str(path), **options)]


def test_prompts_come_alone_or_from_pairs_as_text_conversation_or_ids(tmp_path):
    rows = [{"prompt": "p", "label": 3}, {"prompt": turns("hi")}, {"prompt_ids": [1, 2], "prompt": "beside"}]
    assert prompts_of(as_jsonl(tmp_path, rows)) == [
        ({"prompt": "p"}, {"label": 3}),
        ({"prompt": turns("hi")}, {}),
        ({"prompt_ids": [1, 2]}, {}),
    ]
    whole = {side: turns("hi", "yes", "and?", side) for side in ("chosen", "rejected")}
    assert prompts_of(as_jsonl(tmp_path, [whole]))[0][0] == {"prompt": turns("hi", "yes", "and?")}
    assert prompts_of(as_jsonl(tmp_path, [{"q": "x"}]), columns={"prompt": "q"}) == [({"prompt": "x"}, {})]
    with pytest.raises(DataError, match=r"no column 'prompt'; found: q; say which column holds the prompt"):
        prompts_of(as_jsonl(tmp_path, [{"q": "x"}]))
    with pytest.raises(DataError, match="'chosen' is not a column this tool reads"):
        prompts_of(as_jsonl(tmp_path, [{"q": "x"}]), columns={"chosen": "q"})


def test_prompts_are_lines_of_text_or_a_csv_table(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf one\r\n\ntwo \n")
    assert [c["prompt"] for c, _ in prompts_of(tmp_path / "a.txt")] == [" one", "two "]
    source = open_prompts(str(tmp_path / "a.txt"))
    assert [r.where for r in source.iter_from(1)] == ["line 3"]
    (tmp_path / "a.csv").write_text('id,prompt\n1,"a, ""b""\nc"\n2,d\n', "utf-8")
    assert prompts_of(tmp_path / "a.csv") == [({"prompt": 'a, "b"\nc'}, {"id": "1"}), ({"prompt": "d"}, {"id": "2"})]
    (tmp_path / "b.csv").write_text("prompt\nx,y\n", "utf-8")
    with pytest.raises(DataError, match="row 0: more fields than the first line names"):
        prompts_of(tmp_path / "b.csv")
    (tmp_path / "b.txt").write_bytes(b"a\n\xff\n")
    with pytest.raises(DataError, match="line 2: byte 1 is not UTF-8"):
        prompts_of(tmp_path / "b.txt")


def test_rows_of_other_libraries_are_rows_of_python():
    """Tuples, arrays and numbers of numpy, and data frames: what is missing there is null."""
    array = np.array([{"role": "user", "content": "q"}], dtype=object)
    row = {"prompt": array, "chosen": ({"role": "assistant", "content": "c"},), "rejected": np.str_("r")}
    row["rejected"] = [{"role": "assistant", "content": row["rejected"]}]
    (record,) = rows_in_memory([row])
    assert record.content == {
        "prompt": [{"role": "user", "content": "q"}],
        "chosen": [{"role": "assistant", "content": "c"}],
        "rejected": [{"role": "assistant", "content": "r"}],
    }
    scored = {"prompt": "p", "responses": ("a", "b"), "scores": np.array([1.0, 2.0], np.float32)}
    (pair,) = rows_in_memory([scored])
    assert (pair.content["chosen"], pair.content["rejected"]) == ("b", "a")
    ids = {"prompt_ids": np.array([1, 2]), "chosen_ids": [np.int64(3)], "rejected_ids": (4,)}
    (given,) = rows_in_memory([ids])
    assert given.content == {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4]}


def test_a_data_frame_is_its_rows():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([*TEXT[:2], {**TEXT[0], "rejected": None}])
    assert [r.content for r in rows_in_memory(frame[:2])] == [r.content for r in rows_in_memory(TEXT[:2])]
    *_, last = rows_in_memory(frame).tolerant()
    assert "no column 'rejected' (it is null here)" in last.fault
    with pytest.raises(DataError, match="two columns are named 'chosen'"):
        rows_in_memory(frame.rename(columns={"rejected": "chosen"}))


def test_what_a_data_frame_lacks_is_null_whatever_its_columns_are_made_of():
    pandas = pytest.importorskip("pandas")
    rows = [*TEXT[:2], {**TEXT[0], "rejected": pandas.NA}]
    for dtype in ("string", object):
        frame = pandas.DataFrame(rows, dtype=dtype).assign(
            votes=pandas.array([1, None, 3], dtype="Int64"), when=pandas.to_datetime(["2020-01-01", None, None])
        )
        first, second, last = rows_in_memory(frame).tolerant()
        assert "no column 'rejected' (it is null here)" in last.fault
        assert first.extra["votes"] == 1 and (second.extra["votes"], second.extra["when"]) == (None, None)


def test_what_holds_rows_in_memory_is_read():
    import datasets

    table, whole = pa.Table.from_pylist(TEXT[:2]), datasets.Dataset.from_list(TEXT[:2])

    class Frame:
        """As polars: what it iterates over are columns, and Arrow reads it."""

        columns = table.column_names

        def __iter__(self):
            return iter(table.columns)

        def __arrow_c_stream__(self, schema=None):
            return table.__arrow_c_stream__(schema)

    expected = [r.content for r in rows_in_memory(TEXT[:2])]
    for rows in (
        pa.RecordBatch.from_pylist(TEXT[:2]),
        table.to_reader(),
        Frame(),
        datasets.DatasetDict({"train": whole}),
        whole.to_iterable_dataset(),
        whole.with_format("numpy"),
    ):
        assert [r.content for r in rows_in_memory(rows)] == expected, rows
    with pytest.raises(DataError, match="a DatasetDict of several splits; give one of them: train, test"):
        rows_in_memory(datasets.DatasetDict({"train": whole, "test": whole}))
    for one in (TEXT[0], {name: [row[name] for row in TEXT] for name in TEXT[0]}, {}):
        with pytest.raises(DataError, match=r"a dict; .* a single row is \[row\], a dict of columns is pandas"):
            rows_in_memory(one)
    with pytest.raises(DataError, match="a Int64Array that is no table"):
        rows_in_memory(pa.array([1, 2]))


@pytest.mark.parametrize("make", ["numpy", "torch", "jax", "arrow"])
def test_token_ids_in_arrays_are_lists(make):
    import datasets
    import jax.numpy as jnp

    ids = {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}
    array = {"numpy": np.array, "jax": jnp.array, "arrow": pa.array}.get(make) or pytest.importorskip("torch").tensor
    (one,) = rows_in_memory([{name: array(value) for name, value in ids.items()}])
    assert one.content == ids
    if make != "arrow":  # of which rows are tables
        more = datasets.Dataset.from_list([{**ids, "other": 1}]).with_format(make, columns=list(ids))
        (one,) = rows_in_memory(more)
        assert one.content == ids and not one.extra


def test_columns_of_a_tsv_file_are_parted_by_tabs_whatever_their_names_hold(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("prompt\tchosen\trejected\twho, when\np, q\ta\tb; c\tme\n")
    (row,) = open_pairs(str(path))
    assert row.content == {"prompt": "p, q", "chosen": "a", "rejected": "b; c"}


def test_messages_of_others_inside_a_response_are_counted_in_a_note(tmp_path):
    asked = turns("hi")
    of_user = {"chosen": [*asked, *turns("", "a", "why?", "so")[1:]], "rejected": [*asked, *turns("", "b")[1:]]}
    called = [*turns("", "d")[1:], {"role": "tool", "content": "7"}, *turns("", "e")[1:]]
    of_tool = {"prompt": asked, "chosen": turns("", "c")[1:], "rejected": called}
    several = {"prompt": asked, "chosen": turns("", "c")[1:], "rejected": turns("", "x")[1:] + turns("", "y")[1:]}
    source = open_pairs(str(as_jsonl(tmp_path, [*CONVERSATION, of_user, of_tool, several])))
    (note,) = source.notes
    assert note.startswith("2 of the first 5 pairs have messages of the user or of a tool inside a response")
    assert len(list(source)[2].content["chosen"]) == 3  # which is what TRL trains on
    assert not open_pairs(str(as_jsonl(tmp_path, CONVERSATION))).notes
    assert not open_pairs(str(as_jsonl(tmp_path, TEXT[:2]))).notes
