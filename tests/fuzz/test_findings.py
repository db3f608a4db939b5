"""What fuzzing has found, each as the smallest input that shows it; all ended in a traceback once."""

import json
import shutil
import struct
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax import bundled
from ches_jax.data.sources import open_pairs, rows_in_memory
from ches_jax.data.template import ChatTemplate
from ches_jax.data.tokenize import load_tokenizer
from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.displacement.readers.find import read_file
from ches_jax.displacement.readers.run_settings import find_settings
from ches_jax.errors import CheckpointError, ChesError, DataError, RunError
from ches_jax.hf.directory import weight_files
from ches_jax.report import report
from ches_jax.runs.directory import CONFIG, open_run
from ches_jax.select.config import SelectConfig
from ches_jax.select.expression import evaluated, parsed
from ches_jax.select.run import select
from tests.fuzz.material import write_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_runs(folder)
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """A copy of a run of some kind."""
    return lambda kind: shutil.copytree(runs / kind, tmp_path / kind)


def changed(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        ("judgments", "run.json", lambda v: v["summary"].update(by_category={"c": 1}), r"by_category\.c is a number"),
        ("judgments", "run.json", lambda v: v["summary"].update(refusal_rate="x"), "refusal_rate is text"),
        ("selection", "selection.json", lambda v: v["mean_lengths"].update(all="x"), r"mean_lengths\.all is text"),
        ("selection", "selection.json", lambda v: v["counts"].update(table=10**400), r"counts\.table is a number"),
        ("selection", "selection.json", lambda v: v.update(categories={"c": []}), r"categories\.c is a list"),
        ("diagnosis", "diagnosis.json", lambda v: v["criterion"].update(tolerance="pairs"), "tolerance is text"),
        ("diagnosis", "diagnosis.json", lambda v: v.pop("chosen"), "chosen is missing"),
        ("diagnosis", "diagnosis.json", lambda v: v["margin"].pop("mean"), r"margin\.mean is missing"),
        ("diagnosis", "diagnosis.json", lambda v: v["chosen"].pop("low"), r"chosen\.low is missing"),
        ("diagnosis", "diagnosis.json", lambda v: v["chosen"].update(mean=[]), r"chosen\.mean is a list"),
    ],
)
def test_a_page_refuses_an_answer_of_another_shape(run, kind, file, change, message):
    folder = run(kind)
    changed(folder / file, change)
    with pytest.raises(RunError, match=rf"{file}: is damaged, or not written by this program: .*{message}"):
        report(folder)


def test_a_margin_that_is_not_known_is_no_damage(run):
    folder = run("diagnosis")
    changed(folder / "diagnosis.json", lambda v: v.update(margin=dict.fromkeys(("mean", "low", "high"))))
    assert "margin not known" in report(folder).read_text(encoding="utf-8")


def test_a_page_leaves_out_what_a_selection_does_not_tell(run):
    folder = run("selection")
    changed(folder / "selection.json", lambda v: v["mean_lengths"]["kept"].pop("chosen_tokens"))
    assert report(folder).is_file()


@pytest.mark.parametrize("row", [{"token_ids": 1.5}, {"index": 10**30}, {"sample": "x"}])
def test_texts_of_another_shape_name_their_line(run, row):
    folder = run("responses")
    lines = (folder / "responses.jsonl").read_text().splitlines()
    (folder / "responses.jsonl").write_text("\n".join([*lines[:2], json.dumps({**json.loads(lines[2]), **row})]))
    with pytest.raises(RunError, match=r"responses.jsonl, line 3: (token_ids|index|sample) is"):
        report(folder)


@pytest.mark.parametrize(
    ("kind", "file", "column", "values", "message"),
    [
        ("train", "displacement.parquet", "rejected_tokens", None, "no column rejected_tokens"),
        ("train", "displacement.parquet", "step", ["x"], "column step is string; expected int64"),
        ("train", "displacement.parquet", "set", [None], "column set lacks"),
        ("diagnosis", "pairs.parquet", "index", ["x"], "column index is string; expected int64"),
        ("diagnosis", "pairs.parquet", "dlogp_chosen", [[1.0]], "column dlogp_chosen is list"),
    ],
)
def test_tables_of_another_schema_name_the_column(run, kind, file, column, values, message):
    folder = run(kind)
    table = pq.read_table(folder / file)
    at = table.column_names.index(column)
    table = table.remove_column(at) if values is None else table.set_column(at, column, [pa.array(values * len(table))])
    pq.write_table(table, folder / file)
    with pytest.raises(RunError, match=rf"{file}: {message}"):
        report(folder)
    if kind == "train":
        with pytest.raises(RunError, match=message):
            diagnose(DiagnoseConfig(path=str(folder)))


def test_damaged_token_scores_are_named(run):
    folder = run("score")
    (folder / "token_scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(RunError, match=r"token_scores.parquet: cannot be read as Parquet"):
        report(folder)


def test_a_log_of_metrics_that_is_no_text_is_left_out(run):
    folder = run("train")
    (folder / "metrics.jsonl").write_bytes(b'\xe0\n[1]\n{"loss": 1}\n{"step": 1, "loss": "x"}\n' + b"[" * 99_999)
    assert report(folder).is_file()


@pytest.mark.parametrize("config", ["text", {"columns": "text"}, {"pairs": ["a"]}, {"limit": "all"}])
def test_options_of_another_shape_are_named(run, config):
    folder = run("score")
    changed(folder / "run.json", lambda value: value.update(config=config))
    choice = SelectConfig(scores=folder, by="ches", keep="lowest:0.5", out=folder / "kept")
    for read in (lambda: select(choice), lambda: report(folder)):
        with pytest.raises(RunError, match=r"run.json: is damaged.*config"):
            read()


@pytest.mark.parametrize("opened", ["text", {"model": "text"}, {"model": {"a.json": 3}}])
def test_an_identity_of_another_shape_is_named(tmp_path, opened):
    (tmp_path / CONFIG).write_text(json.dumps({"verb": "score", "config": {}, "opened": opened}))
    with pytest.raises(RunError, match=r"config.json: is damaged.*opened"):
        open_run(tmp_path, "score", {"config": {}}, resume=True)


def nested(depth, value="x"):
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("row", [{"note": nested(500)}, {"tools": json.dumps(nested(500))}, {"tools": "[" * 99_999}])
def test_a_row_nested_deeply_is_one_that_cannot_be_read(row):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    records = list(rows_in_memory([good, {**good, **row}]).tolerant())
    assert [bool(record.fault) for record in records] == [False, True]
    assert "nested more than 100 deep" in records[1].fault or "not JSON" in records[1].fault


def test_a_row_nested_deeply_in_a_file_alone_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "chosen": nested(300), "rejected": "b"}))
    with pytest.raises(DataError, match="nested more than 100 deep"):
        open_pairs(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200])
def test_a_shard_of_an_endless_name_is_missing(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="is missing"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"step,loss\n1,\r\r0.5\x00\n", "a.csv"),
        (b"[" * 99_999, "neither JSON"),
        (b'{"a": ' * 990 + b"1" + b"}" * 990, "nested too deeply|begins|log"),
        (b"{'loss': " + b"(" * 5000 + b"}", "neither JSON"),
    ],
)
def test_logs_that_are_none(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ChesError, match=message):
        diagnose(DiagnoseConfig(path=str(tmp_path / "a.csv")))


def test_numbers_beyond_all_are_read_as_such(tmp_path):
    rows = [{"step": 10**400, "loss": 10**400}, {"step": "9" * 5000 + "/1", "rewards/chosen": 1}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    series = read_file(tmp_path / "log.jsonl").get("train", "chosen")
    assert series is not None and series.steps.tolist() == [2] and series.values.tolist() == [1.0]


def test_a_damaged_record_of_an_event_file_is_named(tmp_path):
    from tensorboardX.proto import event_pb2

    first = event_pb2.Event(file_version="brain.Event:2").SerializeToString()  # pyright: ignore
    records = [first, b"\xff" * 20]
    data = b"".join(struct.pack("<QI", len(r), 0) + r + b"\x00" * 4 for r in records)
    (tmp_path / "events.out.tfevents.1").write_bytes(data)
    with pytest.raises(ChesError, match="a record of it is damaged"):
        read_file(tmp_path / "events.out.tfevents.1")


def test_settings_that_cannot_be_read_tell_nothing(tmp_path):
    bomb = "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {{" + ", ".join(f"k{j}: *a{i - 1}" for j in range(9)) + "}\n" for i in range(1, 9)
    )
    with zipfile.ZipFile(tmp_path / "training_args.bin", "w") as archive:
        archive.writestr("other", b"x")
    for name, content in (("config.yaml", bomb), ("args.json", "[" * 99_999), ("hparams.yaml", "beta: " + "9" * 400)):
        (tmp_path / name).write_text(content)
    assert find_settings([tmp_path], {}).beta is None


@pytest.mark.parametrize("text", ["a + " + "9" * 400, "-" + "9" * 400])
def test_a_number_beyond_all_scores_is_no_number(text):
    with pytest.raises(RunError, match="a number beyond all scores"):
        parsed(text)
    assert evaluated(parsed("a + 1e300 * 1e300"), {"a": np.zeros(1)}).tolist()[0] != 0


@pytest.mark.parametrize("content", [["a"], "ab", None, ["a", "b", "c"]])
def test_an_object_of_lists_needs_as_many_of_each(content):
    row = {"prompt": "p", "chosen": {"role": ["user", "assistant"], "content": content}, "rejected": "b"}
    with pytest.raises(DataError, match="'content' is no list of as many values as 'role' has"):
        list(rows_in_memory([row]))


def test_a_column_of_one_message_is_looked_for_in_the_prompt():
    turn = {"role": "user", "content": "p"}
    rows = [{"question": "p", "note": turn, "a": "x", "b": "y"}] * 2
    source = rows_in_memory(rows, columns={"prompt": "question", "chosen": "a", "rejected": "b", "system": "none"})
    assert len(list(source)) == 2


def test_a_tokenizer_that_cannot_encode_is_refused_where_it_is_opened(tmp_path):
    shutil.copytree(bundled.model_dir(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": "long"}))
    with pytest.raises(DataError, match="cannot encode a letter"):
        load_tokenizer(tmp_path / "model")


def test_half_a_surrogate_pair_that_a_template_writes_is_refused_in_words():
    template = ChatTemplate(load_tokenizer("bundled"))
    with pytest.raises(DataError, match="letters that the tokenizer cannot encode"):
        template.encode("a\ud800")


@pytest.mark.parametrize("largest", [2**31, 2**63, 10**60])
def test_a_token_id_that_no_array_holds_is_reported_with_its_row(tmp_path, largest):
    rows = [{"prompt_ids": [5], "chosen_ids": [6, 2], "rejected_ids": [7]}] * 2
    rows[1] = rows[1] | {"chosen_ids": [6, largest]}
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"line 2: 'chosen_ids' holds the token id .*; ids are at most 2147483647"):
        list(open_pairs(str(tmp_path / "ids.jsonl")))


def test_a_score_table_without_lengths_is_reported_by_its_column(run, tmp_path):
    path = run("score") / "scores.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["rejected_tokens"]), path)
    with pytest.raises(RunError, match="no column rejected_tokens"):
        report(path.parent, tmp_path / "page")


def test_a_token_id_beyond_all_vocabularies_is_refused_before_memory_is_taken_for_those_below(tmp_path):
    shutil.copytree(bundled.model_dir(), tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"]["qq"] = 2**32 - 2
    path.write_text(json.dumps(state))
    with pytest.raises(DataError, match="has the id 4294967294"):
        load_tokenizer(tmp_path / "model")
