"""Runs of ours and tables of log-probabilities: what is taken from them, and what is refused."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import csv

from ches_jax.displacement.config import DiagnoseConfig
from ches_jax.displacement.diagnose import diagnose
from ches_jax.displacement.readers.logp_tables import HELD_OUT, read_logps, read_score_tables
from ches_jax.displacement.readers.training_run import read_run
from ches_jax.errors import ChesError, RunError
from ches_jax.scores.table import write_part


def test_the_last_evaluation_of_the_held_out_pairs_is_read(tmp_path):
    sets, steps = ["train", "held_out"] * 3, [0, 0, 2, 2, 4, 4]
    columns = {
        "step": steps,
        "set": sets,
        "dlogp_chosen": [0.0, 0.0, -1.0, -2.0, -3.0, -4.0],
        "dlogp_rejected": [0.0, 0.0, -5.0, -6.0, -7.0, -8.0],
        "chosen_tokens": [4] * 6,
        "rejected_tokens": [4] * 6,
        "index": [0, 1] * 3,
    }
    pq.write_table(pa.table(columns), tmp_path / "displacement.parquet")
    changes = read_run(tmp_path)
    assert changes.chosen.tolist() == [-4] and changes.rejected.tolist() == [-8] and changes.records is not None
    assert "held-out pairs, update 4 against 0" in changes.source and not changes.caveats and changes.held_out
    assert changes.beside is not None and changes.beside.chosen.tolist() == [-3] and not changes.beside.held_out
    assert changes.curve is not None and changes.curve.steps.tolist() == [0, 2, 4]
    assert changes.curve.chosen.tolist() == [0, -2, -4] and changes.curve.rejected.tolist() == [0, -6, -8]
    (tmp_path / "displacement").mkdir()
    (tmp_path / "displacement.parquet").rename(tmp_path / "displacement/step-00000004.parquet")
    assert read_run(tmp_path).chosen.tolist() == [-4]


def test_single_responses_of_a_run_are_left_out(tmp_path):
    n = 3
    columns = {
        "step": [2] * n,
        "set": ["train"] * n,
        "dlogp_chosen": [-1.0, -1.0, -5.0],
        "dlogp_rejected": [-2.0, -2.0, np.nan],
        "chosen_tokens": [4] * n,
        "rejected_tokens": [4, 4, 0],
    }
    pq.write_table(pa.table(columns), tmp_path / "displacement.parquet")
    diagnosis = diagnose(DiagnoseConfig(path=str(tmp_path)))
    assert (
        diagnosis.pairs == 2
        and diagnosis.chosen.mean == -1
        and "1 single responses are not counted" in diagnosis.caveats
    )


def test_a_directory_without_a_log_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"no displacement.parquet; expected a directory of `ches train`"):
        read_run(tmp_path)


METADATA = {
    "model": "m",
    "tokenizer_fingerprint": "t",
    "dtype": "float32",
    "convention": {"eos": "include", "max_length": None, "template": "auto"},
}


def score_table(folder, ids, chosen, rejected, tokens=None, **changed):
    folder.mkdir()
    count = len(ids)
    columns = {
        "row_id": ids,
        "index": list(range(count)),
        "ches": [0.0] * count,
        "chosen_tokens": tokens or [5] * count,
        "rejected_tokens": [6] * count,
        "logp_chosen": chosen,
        "logp_rejected": rejected,
    }
    convention = {**METADATA["convention"], **{k: v for k, v in changed.items() if k in METADATA["convention"]}}
    rest = {k: v for k, v in changed.items() if k not in convention}
    write_part(folder / "scores.parquet", columns, {**METADATA, **rest, "convention": convention})
    return folder


def test_two_score_tables_are_matched_by_row(tmp_path):
    before = score_table(tmp_path / "a", ["x", "y", "z"], [-10.0, -20.0, -30.0], [-11.0, -21.0, -31.0])
    after = score_table(tmp_path / "b", ["z", "x", "w"], [-31.0, -12.0, -1.0], [-34.0, -15.0, -1.0], model="other")
    changes = read_score_tables(before, after)
    assert changes.chosen.tolist() == [-2, -1] and changes.rejected.tolist() == [-4, -3]
    assert changes.caveats == ("2 rows are in one table only", HELD_OUT) and changes.held_out


def test_before_and_after_are_not_swapped_on_the_way(tmp_path):
    ids = [f"r{i}" for i in range(10)]
    before = score_table(tmp_path / "a", ids, [-10.0] * 10, [-11.0] * 10)
    after = score_table(tmp_path / "b", ids[::-1], [-12.0] * 10, [-17.0] * 10, model="other")
    diagnosis = diagnose(DiagnoseConfig(before=str(before), after=str(after)))
    assert (diagnosis.chosen.mean, diagnosis.rejected.mean, diagnosis.margin.mean) == (-2, -6, 4)


def test_copies_of_a_row_are_matched_in_order(tmp_path):
    before = score_table(tmp_path / "a", ["x", "x"], [-10.0, -10.0], [-11.0, -11.0])
    after = score_table(tmp_path / "b", ["x"], [-12.0], [-15.0])
    changes = read_score_tables(before, after)
    assert changes.chosen.tolist() == [-2] and changes.caveats == ("1 rows are in one table only", HELD_OUT)


def test_pairs_that_were_kept_and_not_scored_are_left_out(tmp_path):
    before = score_table(tmp_path / "a", ["x", "y"], [-10.0, None], [-11.0, None])
    after = score_table(tmp_path / "b", ["x", "y"], [-11.0, None], [-14.0, None])
    changes = read_score_tables(before, after)
    assert changes.chosen.tolist() == [-1] and "1 pairs were not scored" in changes.caveats[0]
    assert changes.rows is not None and changes.rows["row_id"].tolist() == ["x"]


@pytest.mark.parametrize(
    "changed", [{"eos": "exclude"}, {"max_length": 64}, {"template": "none"}, {"dtype": "bfloat16"}]
)
def test_tables_scored_by_different_rules_are_refused(tmp_path, changed):
    before = score_table(tmp_path / "a", ["x"], [-10.0], [-11.0])
    after = score_table(tmp_path / "b", ["x"], [-10.0], [-11.0], **changed)
    (name, value), *_ = changed.items()
    with pytest.raises(RunError, match=f"different rules .*{name.replace('_', '-')} is .* and {value}"):
        read_score_tables(before, after)


def test_tables_that_count_other_tokens_are_refused(tmp_path):
    before = score_table(tmp_path / "a", ["x", "y"], [-10.0, -1.0], [-11.0, -1.0])
    after = score_table(tmp_path / "b", ["x", "y"], [-10.0, -1.0], [-11.0, -1.0], tokens=[5, 4])
    with pytest.raises(RunError, match=r"different tokens \(chosen_tokens\) in 1 of 2 pairs, first in row_id y"):
        read_score_tables(before, after)


def test_tables_of_two_tokenizers_are_refused_unless_their_tokens_were_compared(tmp_path):
    before = score_table(tmp_path / "a", ["x"], [-10.0], [-11.0])
    after = score_table(tmp_path / "b", ["x"], [-10.0], [-11.0], tokenizer_fingerprint="u")
    with pytest.raises(RunError, match="the tokenizers differ"):
        read_score_tables(before, after)
    assert read_score_tables(before, after, same_tokens=True).chosen.tolist() == [0]


def test_a_table_of_one_model_is_not_asked_to_be_scored_with_what_it_was_scored_with(tmp_path):
    pq.write_table(logps().drop(["ref_chosen_logps", "ref_rejected_logps"]), tmp_path / "scores.parquet")
    with pytest.raises(
        ChesError, match=r"of one model; changes take two: ches diagnose --before \S+ --after THE_SAME_P"
    ):
        diagnose(DiagnoseConfig(logps=str(tmp_path)))


def test_tables_without_log_probabilities_or_a_common_pair_are_refused(tmp_path):
    before = score_table(tmp_path / "a", ["x"], [-10.0], [-11.0])
    after = score_table(tmp_path / "b", ["y"], [-10.0], [-11.0])
    with pytest.raises(RunError, match="no pair in common"):
        read_score_tables(before, after)
    (tmp_path / "c").mkdir()
    write_part(tmp_path / "c/scores.parquet", {"row_id": ["x"], "index": [0]}, METADATA)
    with pytest.raises(RunError, match="no column logp_chosen, logp_rejected; score with --logps"):
        read_score_tables(before, tmp_path / "c")


def test_a_table_of_log_probabilities(tmp_path):
    n = 50
    table = pa.table(
        {
            "ref_chosen_logps": np.full(n, -10.0),
            "ref_rejected_logps": np.full(n, -12.0),
            "logp_chosen": np.full(n, -13.0),
            "logp_rejected": np.full(n, -20.0),
        }
    )
    pq.write_table(table, tmp_path / "logps.parquet")
    diagnosis = diagnose(DiagnoseConfig(logps=str(tmp_path / "logps.parquet")))
    assert diagnosis.verdict == "displaced" and diagnosis.chosen.mean == -3 and diagnosis.rejected.mean == -8
    assert list(diagnosis.directions.values()) == ["down", "down", "up"]
    holes = table.set_column(0, table.column_names[0], pa.array([None, *table[0].to_pylist()[1:]], pa.float64()))
    pq.write_table(holes, tmp_path / "holes.parquet")
    found = read_logps(tmp_path / "holes.parquet")
    assert len(found.chosen) == len(table) - 1 and found.start is not None and len(found.start[1]) == len(table) - 1
    assert found.caveats == (f"1 of {len(table)} pairs lack a log-probability and are left out", HELD_OUT)
    pq.write_table(table.drop_columns(["logp_chosen"]), tmp_path / "less.parquet")
    with pytest.raises(ChesError, match="no column logp_chosen"):
        read_logps(tmp_path / "less.parquet")


def logps(**changed):
    n = 10
    columns = {"ref_chosen_logps": -10.0, "ref_rejected_logps": -12.0, "logp_chosen": -13.0, "logp_rejected": -20.0}
    return pa.table({name: changed.get(name, [value] * n) for name, value in columns.items()} | changed)


def test_log_probabilities_may_be_csv_or_lines_of_json(tmp_path):
    table = logps()
    csv.write_csv(table, tmp_path / "t.csv")
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    for name in ("t.csv", "t.jsonl"):
        assert read_logps(tmp_path / name).chosen.tolist() == [-3.0] * 10
    (tmp_path / "t.csv").write_text("a,b\n1\n")
    with pytest.raises(ChesError, match=r"t\.csv: cannot be read"):
        read_logps(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logp_chosen": [13.0] * 10}, "logp_chosen is 13 in row 0 and above 0 in 10 of 10; no log-probability"),
        ({"ref_rejected_logps": [-1.0] * 9 + [0.5]}, "ref_rejected_logps is 0.5 in row 9 and above 0 in 1 of 10"),
        ({"logp_chosen": ["-13.0"] * 10}, "column logp_chosen is string; expected numbers"),
        ({"index": ["a"] * 10}, "column index is string; expected the row"),
        ({"index": [None, *range(9)]}, "column index is int64; expected the row"),
    ],
)
def test_what_is_no_log_probability_is_refused(tmp_path, changed, message):
    pq.write_table(logps(**changed), tmp_path / "t.parquet")
    with pytest.raises(ChesError, match=message):
        read_logps(tmp_path / "t.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "--tolerance -0.1: expected nats, 0 or more"),
        ({"tolerance": float("nan")}, "--tolerance nan"),
        ({"beta": 0.0}, "--beta 0.0: expected a positive number"),
        ({"beta": float("inf")}, "--beta inf"),
    ],
)
def test_options_without_a_meaning_are_refused_whatever_the_source(tmp_path, options, message):
    pq.write_table(logps(), tmp_path / "t.parquet")
    with pytest.raises(ChesError, match=message):
        diagnose(DiagnoseConfig(logps=str(tmp_path / "t.parquet"), **options))


def test_a_diagnosis_takes_no_directory_of_a_run(tmp_path):
    pq.write_table(logps(), tmp_path / "t.parquet")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ChesError, match="holds a run, whose page this diagnosis would replace"):
        diagnose(DiagnoseConfig(logps=str(tmp_path / "t.parquet"), out=str(tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "t.parquet"]


def test_a_displacement_log_holds_each_sides_change_since_its_own_start(tmp_path):
    from ches_jax.train.observe.displacement_log import block
    from ches_jax.train.observe.pair_logprobs import PairLogps, PairStatistics
    from ches_jax.types import Response, TokenPair

    pair = TokenPair(row_id="x", index=4, prompt=(1,), chosen=Response((5, 6), 2), rejected=Response((7,), 2))
    start = PairLogps(np.array([-10.0]), np.array([-30.0]))
    now = PairLogps(np.array([-11.0]), np.array([-37.0]))
    still = PairLogps(np.array([0.5]), np.array([0.25]))
    (row,) = block(6, "held_out", [pair], start, PairStatistics(now, still, still), "include", 0.05).to_pylist()
    assert (row["dlogp_chosen"], row["dlogp_rejected"], row["margin"]) == (-1, -7, 6)
    assert (row["logp_chosen"], row["regime"], row["step"]) == (-11, "both_down_margin_up", 6)
    assert (row["chosen_tokens"], row["rejected_tokens"], row["entropy_rejected"]) == (3, 2, 0.25)
