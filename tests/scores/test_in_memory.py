"""Pairs scored in memory: the numbers of ``ches score``, whatever holds the rows."""

import json

import jax
import numpy as np
import pyarrow as pa
import pytest

from ches_jax import bundled
from ches_jax.errors import ChesError, DataError
from ches_jax.models.checkpoint.load import load_model
from ches_jax.scores import ScoreConfig, load_tokenizer, read_table, score, score_pairs
from ches_jax.scores.table import METADATA_KEY

ROWS = [json.loads(line) for line in bundled.pairs_file().read_text(encoding="utf-8").splitlines()][:12]


@pytest.fixture(scope="module")
def model():
    return load_model(bundled.model_dir())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(bundled.model_dir())


@pytest.fixture(scope="module")
def table(model, tokenizer):
    return score_pairs(model, tokenizer, ROWS, by="head_score", logps=True, mesh="data=1")


def test_a_run_has_the_same_numbers_to_the_bit(table, tmp_path):
    config = ScoreConfig(limit=len(ROWS), out=str(tmp_path / "run"), by="head_score", logps=True, mesh="data=1")
    assert read_table(score(config, quiet=True))[0].equals(table)


def test_arrow_tables_and_datasets_score_as_lists_do(model, tokenizer, table):
    import datasets

    some = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in ROWS]
    columns = [n for n in table.schema.names if n != "category"]
    for rows in (pa.Table.from_pylist(some), datasets.Dataset.from_list(some)):
        scored = score_pairs(model, tokenizer, rows, by="head_score", logps=True, mesh="data=1")
        assert scored.select(columns).equals(table.select(columns))


def test_flagged_rows_are_refused_dropped_or_kept(model, tokenizer):
    rows = [ROWS[0], {**ROWS[1], "rejected": ROWS[1]["chosen"]}]
    with pytest.raises(DataError, match="identical: 1 rows"):
        score_pairs(model, tokenizer, rows, mesh="data=1")
    dropped = score_pairs(model, tokenizer, rows, on_bad_row="drop", mesh="data=1")
    assert dropped["index"].to_pylist() == [0]
    (record,) = json.loads(dropped.schema.metadata[METADATA_KEY])["dropped"]
    assert record["index"] == 1 and record["reasons"] == ["identical"]
    kept = score_pairs(model, tokenizer, rows, on_bad_row="keep", mesh="data=1")
    assert kept["flags"].to_pylist() == [[], ["identical"]]


@pytest.mark.parametrize("bad", [{"rejected": None}, {"rejected": 3}, {"chosen": ["a", 1]}, {}])
def test_rows_that_cannot_be_read_obey_the_policy(model, tokenizer, table, bad):
    rows = [ROWS[0], {**ROWS[1], **bad} if bad else {"prompt": "no responses"}, ROWS[2]]
    with pytest.raises(DataError, match=r"unreadable: 1 rows"):
        score_pairs(model, tokenizer, rows, mesh="data=1")
    dropped = score_pairs(model, tokenizer, rows, on_bad_row="drop", mesh="data=1")
    assert dropped["index"].to_pylist() == [0, 2]
    (record,) = json.loads(dropped.schema.metadata[METADATA_KEY])["dropped"]
    assert record["index"] == 1 and record["reasons"] == ["unreadable"]
    kept = score_pairs(model, tokenizer, rows, on_bad_row="keep", mesh="data=1")
    assert kept["index"].to_pylist() == [0, 1, 2] and kept["ches"][1].as_py() is None
    assert kept["flags"].to_pylist() == [[], ["unreadable"], []]
    for scored in (dropped, kept):
        assert scored["ches"][0] == table["ches"][0]


LABELS = {"responses": ["answer_a", "answer_b"], "winner": "label", "order": ["A", "B"]}


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (("question", "chosen", "rejected"), {"columns": {"prompt": "question"}}),
        (("question", "answer_b", "answer_a"), {"columns": {"prompt": "question", **LABELS}}),
        (("question", "answer_b", "answer_a"), {"schema": "own.toml"}),
        (("question", "answer_b", "answer_a"), {}),  # recognised
        (("history", "human_ref_A", "human_ref_B"), {"schema": "shp"}),
    ],
)
def test_other_columns_are_read_as_the_command_reads_them(
    model, tokenizer, table, tmp_path, monkeypatch, names, options
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.toml").write_text(
        'prompt = "question"\nresponses = ["answer_a", "answer_b"]\nwinner = "label"\norder = ["A", "B"]\n'
    )
    own = [dict(zip(names, (r["prompt"], r["chosen"], r["rejected"]), strict=True)) for r in ROWS]
    own = [{**r, **({"labels": 1} if "history" in names else {"label": "B"})} for r in own]
    scored = score_pairs(model, tokenizer, own, mesh="data=1", **options)
    assert scored["row_id"].equals(table["row_id"]) and scored["ches"].equals(table["ches"])
    assert json.loads(scored.schema.metadata[METADATA_KEY])["schema"]["words"]["prompt"] == names[0]


def test_two_sayings_of_what_columns_mean_are_refused(model, tokenizer):
    with pytest.raises(DataError, match="--schema shp and --columns both say"):
        score_pairs(model, tokenizer, ROWS, schema="shp", columns={"prompt": "prompt"})


def test_a_name_in_the_place_of_a_model_is_answered_with_how_to_load_it(model):
    with pytest.raises(ChesError, match=r"score_pairs: model='bundled'; load it first: load_model\(...\)"):
        score_pairs("bundled", None, [])  # type: ignore[arg-type]
    with pytest.raises(ChesError, match=r"score_pairs: tokenizer=None; load it first: load_tokenizer\(...\)"):
        score_pairs(model, None, [])  # type: ignore[arg-type]


def test_models_and_tokenizers_of_others_are_named(model, tokenizer):
    with pytest.raises(ChesError, match=r"model is a FileTokenizer; expected one of load_model\(\.\.\.\)"):
        score_pairs(tokenizer, model, ROWS)
    with pytest.raises(ChesError, match="tokenizer is a function; expected"):
        score_pairs(model, lambda text: [1], ROWS)  # type: ignore[arg-type]
    for load in (load_model, load_tokenizer):
        with pytest.raises(ChesError, match="a Decoder"):
            load(model)
        with pytest.raises(ChesError, match="a NoneType"):
            load(None)  # type: ignore[arg-type]


def test_options_of_another_kind_are_named(model, tokenizer, table):
    scored = score_pairs(model, tokenizer, ROWS, by="head_score", max_length=np.int64(512), mesh="data=1")  # type: ignore[arg-type]
    assert scored["ches"].equals(table["ches"])
    with pytest.raises(ChesError, match="columns=\\['prompt'\\]; expected a dict"):
        score_pairs(model, tokenizer, ROWS, columns=["prompt"])  # type: ignore[arg-type]
    with pytest.raises(ChesError, match="a mesh with axes shards, without data, fsdp, tensor"):
        score_pairs(model, tokenizer, ROWS, mesh=jax.make_mesh((1,), ("shards",)))


@pytest.mark.parametrize(
    ("rows", "message"), [([], "no rows"), (3, "a int; expected a list"), ([{"prompt": "x"}], "row 0")]
)
def test_what_is_no_pairs_is_named(model, tokenizer, rows, message):
    with pytest.raises(DataError, match=message):
        score_pairs(model, tokenizer, rows)


@pytest.mark.parametrize(
    "option", [{"by": "head"}, {"eos": "drop"}, {"on_bad_row": "skip"}], ids=lambda o: next(iter(o))
)
def test_a_word_that_no_option_knows_is_refused(model, tokenizer, option):
    """It would be taken for the other word of the list."""
    (name,) = option
    with pytest.raises(ChesError, match=f"{name} is one of .*, not '{option[name]}'"):
        score_pairs(model, tokenizer, [{"prompt": "a", "chosen": " b", "rejected": " c"}], **option)
