"""Rules against counts worked by hand, controls, and the directory that a selection leaves."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ches_jax import bundled
from ches_jax.errors import RunError
from ches_jax.scores.table import write_part
from ches_jax.select import keep as selection
from ches_jax.select.config import SelectConfig
from ches_jax.select.run import keep_indices, select

N = 20
RNG = np.random.default_rng(1)
SCORES = RNG.normal(size=N).round(3)
SCORES[7] = np.nan
LENGTHS = {"chosen_tokens": RNG.integers(1, 30, N), "rejected_tokens": RNG.integers(1, 30, N)}


def source(n=N, **changes):
    rows = []
    for i in range(n):
        content = {"prompt": f"p{i}", "chosen": f"yes {i} é", "rejected": "no"}
        extra = {"extra": i / 4}
        rows.append(
            SimpleNamespace(index=i, row_id=f"r{i}", content=content, category=None, extra=extra, candidates=None)
        )
    for key, value in changes.items():
        setattr(rows[3], key, value)
    return rows


def columns(n=N, **more):
    scores = [None if np.isnan(s) else float(s) for s in SCORES[:n]]
    return {
        "row_id": [f"r{i}" for i in range(n)],
        "index": np.arange(n),
        "ches": scores,
        "ln_ches": scores,
        **{k: v[:n] for k, v in LENGTHS.items()},
        **more,
    }


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    write_part(folder / "scores.parquet", columns(), {"model": "m|odel", "eos": "include"})
    return folder


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the rules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "ranges"),
    [
        (5000, [(0, 512), (994, 1506), (2244, 2756), (3493, 4005), (4488, 5000)]),
        (9691, [(0, 512), (2166, 2678), (4589, 5101), (7012, 7524), (9179, 9691)]),
        (300, [(0, 300)] * 5),
    ],
)
def test_windows_are_those_of_the_paper(n, ranges):
    quantiles = [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [selection.window_range(n, q, 512) for q in quantiles] == ranges
    values = np.random.default_rng(0).permutation(n).astype(float)
    for q, (start, stop) in zip(quantiles, ranges, strict=True):
        kept = keep_indices(values, f"window:{q},512")
        assert sorted(values[kept]) == list(range(start, stop))
        assert (np.diff(kept) > 0).all()


def test_a_window_of_odd_width_has_as_many_rows_on_both_sides_of_its_middle():
    assert selection.window_range(11, 0.5, 5) == (3, 8)
    assert selection.window_range(11, 0.5, 4) == (3, 7)


def test_a_share_rounds_half_up_in_decimals_and_keeps_at_least_one():
    kept = {
        (share, n): len(keep_indices(np.arange(n), f"lowest:{share}"))
        for share, n in [("0.05", 370), ("5%", 370), ("0.145", 100), ("1e-3", 10), ("1.0", 9)]
    }
    assert list(kept.values()) == [19, 19, 15, 1, 9]


def test_an_integer_counts_rows_and_a_point_makes_it_a_share():
    values = np.array([3.0, 1.0, 2.0, 0.0])
    assert keep_indices(values, "lowest:1").tolist() == [3]
    assert keep_indices(values, "lowest:1.0").tolist() == [0, 1, 2, 3]
    assert keep_indices(values, "highest:2").tolist() == [0, 2]
    with pytest.raises(RunError, match="asks for 5 rows, 4 have a score"):
        keep_indices(values, "lowest:5")


def test_ties_keep_the_order_of_the_input():
    assert keep_indices(np.zeros(5), "lowest:2").tolist() == [0, 1]
    assert keep_indices(np.zeros(5), "highest:2").tolist() == [3, 4]
    assert keep_indices(np.zeros(5), "quantile:0.2,0.3").tolist() == [0, 1, 2, 3, 4]


def test_quantiles_and_thresholds():
    values = np.arange(9.0)
    assert keep_indices(values, "quantile:0,0.25").tolist() == [0, 1, 2]
    assert keep_indices(values, "quantile:0.5,1").tolist() == [4, 5, 6, 7, 8]
    assert keep_indices(values, "below:2").tolist() == [0, 1]
    assert keep_indices(values - 4, "above:-1e0").tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("rule", ["lowest:1.0", "highest:1.0", "window:0.5,99", "quantile:0,1", "below:9", "soft:0.5"])
def test_a_row_without_a_score_is_never_kept(rule):
    assert keep_indices(np.array([np.nan, 1.0, np.nan, 2.0]), rule).tolist() == [1, 3]
    assert keep_indices(np.array([np.nan]), rule).size == 0
    assert keep_indices(np.array([]), rule).size == 0
    assert keep_indices(np.array([4.0]), rule).tolist() == [0]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("lowest", "is not a rule; expected one of: lowest:0.05"),
        ("smallest:3", "is not a rule"),
        ("lowest:abc", "is not a rule"),
        ("lowest:nan", "is not a rule"),
        ("window:0.5", "is not a rule"),
        ("window:0.5,2.5", "is not a rule"),
        ("quantile:0.5%,1", "is not a rule"),
        ("lowest:0", "at least 1"),
        ("lowest:-3", "at least 1"),
        ("lowest:0.0", "above 0 and at most 1"),
        ("highest:1.5", "above 0 and at most 1"),
        ("highest:101%", "above 0 and at most 1"),
        ("window:1.5,10", r"quantile must be in \[0, 1\]"),
        ("window:0.5,0", "width at least 1"),
        ("quantile:0.5,0.25", "the lower first"),
        ("soft:1", r"must be in \[0, 1\)"),
    ],
)
def test_a_bad_rule_says_what_is_wrong(rule, message):
    with pytest.raises(RunError, match=message):
        selection.parse_rule(rule)


def test_soft_weights_hit_their_target_at_the_95th_percentile():
    values = np.append(np.arange(-50.0, 51.0), np.nan)  # 95th percentile: 45
    weights, slope = selection.soft_weights(values, 0.1)
    assert slope == pytest.approx((1 - 0.1) / 45)
    assert weights[values == 45] == pytest.approx(0.1)
    assert (weights[values <= 0] == 1).all()
    assert weights[values == 50] == pytest.approx(1 - slope * 50)
    assert np.isnan(weights[-1])
    with pytest.raises(RunError, match="95th percentile of the score is -1"):
        selection.soft_weights(np.full(5, -1.0), 0.5)


# --- controls ------------------------------------------------------------------------------------


def test_the_random_control_is_a_seeded_shuffle_of_the_scored_rows():
    values = np.append(np.arange(30.0), np.nan)
    places = selection.matched_control(values, "random", np.zeros(31), seed=1)
    assert sorted(places[:30]) == list(range(30))
    assert places[30] == -1
    assert (places == selection.matched_control(values, "random", np.zeros(31), seed=1)).all()
    assert (places != selection.matched_control(values, "random", np.zeros(31), seed=2)).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_length_control_keeps_the_same_rows_when_the_score_is_length(sign):
    longer = np.random.default_rng(0).permutation(40).astype(float)
    places = selection.matched_control(sign * longer**3, "length", longer, seed=0)
    assert (places == np.arange(40)).all()


def test_the_length_control_of_a_constant_score_goes_by_length_with_ties_shuffled():
    longer = np.array([5.0, 1.0, 1.0, 1.0, 9.0])
    firsts = {int(selection.matched_control(np.zeros(5), "length", longer, seed)[0]) for seed in range(20)}
    assert firsts == {1, 2, 3}


# --- the directory -------------------------------------------------------------------------------


def test_the_directory_holds_a_dataset_that_tells_how_it_was_chosen(run, tmp_path):
    out = tmp_path / "kept"
    summary = select(SelectConfig(scores=run, by="ln_ches", out=out, keep="lowest:5"), source())
    names = {"pairs.jsonl", "kept_ids.txt", "dropped.jsonl", "selection.json", "README.md"}
    assert {p.name for p in out.iterdir()} == names
    assert {p.name for p in tmp_path.iterdir()} == {"run", "kept"}

    want = np.sort(np.argsort(np.where(np.isnan(SCORES), np.inf, SCORES))[:5]).tolist()
    kept = lines(out / "pairs.jsonl")
    rows = source()
    assert kept == [rows[i].content | rows[i].extra | {"row_id": f"r{i}", "ln_ches": SCORES[i]} for i in want]
    assert (out / "kept_ids.txt").read_text().split() == [f"r{i}" for i in want]

    dropped = lines(out / "dropped.jsonl")
    assert [d["index"] for d in dropped] == [i for i in range(N) if i not in want]
    assert dropped[6 - sum(w < 7 for w in want) + 1]["reason"] == "unscored"
    assert json.loads((out / "selection.json").read_text()) == summary
    assert summary["counts"] == {"table": N, "scored": N - 1, "kept": 5}
    assert summary["source"]["dropped"] == {"not in lowest:5 of ln_ches": 14, "unscored": 1}
    mean = LENGTHS["chosen_tokens"][want].mean()
    assert summary["mean_lengths"]["kept"]["chosen_tokens"] == pytest.approx(mean)
    card = (out / "README.md").read_text()
    assert "5 of 19 scored rows (26.32%)" in card
    assert "m\\|odel" in card and "debated" in card


def test_datasets_loads_the_directory(run, tmp_path):
    import datasets

    out = tmp_path / "kept"
    select(SelectConfig(scores=run, by="ln_ches", out=out, keep="lowest:5"), source())
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / "cache"), split="train")
    assert list(loaded["row_id"]) == (out / "kept_ids.txt").read_text().split()


def test_the_rows_come_from_the_run_and_keep_their_identity(tmp_path):
    from ches_jax.data.sources import open_pairs

    data = tmp_path / "data.jsonl"
    contents = [row.content | row.extra | {"category": "c"} for row in source()]
    data.write_text("".join(json.dumps(c) + "\n" for c in contents))
    rows = list(open_pairs(str(data)))
    run = tmp_path / "run"
    write_part(run / "scores.parquet", columns(row_id=[r.row_id for r in rows]), {})
    (run / "run.json").write_text(json.dumps({"config": {"pairs": str(data)}}))
    select(SelectConfig(scores=run, by="ln_ches", out=tmp_path / "kept", keep="lowest:3"))
    again = list(open_pairs(str(tmp_path / "kept" / "pairs.jsonl")))
    ids = (tmp_path / "kept" / "kept_ids.txt").read_text().split()
    assert [row.row_id for row in again] == ids
    assert {row.category for row in again} == {"c"}


def test_the_bundled_pairs_are_found_by_their_word(tmp_path):
    from ches_jax.bundled import BUNDLED
    from ches_jax.data.sources import open_pairs

    ids = [row.row_id for row in open_pairs(str(bundled.pairs_file()))][:N]
    run = tmp_path / "run"
    write_part(run / "scores.parquet", columns(row_id=ids), {})
    record = {"config": {"pairs": BUNDLED, "limit": N, "columns": {}}}
    (run / "run.json").write_text(json.dumps(record))
    select(SelectConfig(scores=run, by="ln_ches", out=tmp_path / "kept", keep="lowest:3"))
    assert set((tmp_path / "kept" / "kept_ids.txt").read_text().split()) <= set(ids)


@pytest.mark.parametrize("control", ["none", "random", "length"])
def test_controls_keep_as_many_and_the_same_seed_the_same_bytes(run, tmp_path, control):
    config = {"scores": run, "by": "ln_ches", "keep": "quantile:0,0.3", "control": control, "seed": 5}
    one = select(SelectConfig(out=tmp_path / "1", **config), source())
    select(SelectConfig(out=tmp_path / "2", **config), source())
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes(), path.name
    assert one["counts"]["kept"] == len(keep_indices(SCORES, "quantile:0,0.3"))
    ids = [row["row_id"] for row in lines(tmp_path / "1" / "pairs.jsonl")]
    assert "r7" not in ids and len(set(ids)) == one["counts"]["kept"]


def test_soft_keeps_all_rows_and_a_control_moves_the_same_weights(run, tmp_path):
    config = {"scores": run, "keep": "soft:0.5", "by": "ches"}
    plain = select(SelectConfig(out=tmp_path / "1", **config), source())
    moved = select(SelectConfig(out=tmp_path / "2", control="length", **config), source())
    weights = [[r["weight"] for r in lines(tmp_path / n / "pairs.jsonl")] for n in "12"]
    assert len(weights[0]) == N - 1
    assert sorted(weights[0]) == sorted(weights[1]) and weights[0] != weights[1]
    assert plain["soft"]["effective_mass"] == pytest.approx(np.mean(weights[0]))
    assert moved["soft"]["effective_mass"] == pytest.approx(np.mean(weights[0]))
    assert "effective mass" in (tmp_path / "1" / "README.md").read_text()


def test_categories_are_counted(tmp_path):
    names = ["a|b", None] * (N // 2)
    write_part(tmp_path / "run" / "scores.parquet", columns(category=names), {})
    out = tmp_path / "kept"
    summary = select(SelectConfig(scores=tmp_path / "run", by="ln_ches", out=out, keep="lowest:1.0"), source())
    assert summary["categories"] == {
        "": {"scored": 9, "kept": 9},
        "a|b": {"scored": 10, "kept": 10},
    }
    assert "| a\\|b | 10 | 10 |" in (out / "README.md").read_text()


def test_rows_dropped_when_scored_are_reported_again(tmp_path):
    short = {k: np.delete(np.asarray(v, dtype=object), 4) for k, v in columns().items()}
    run = tmp_path / "run"
    write_part(run / "scores.parquet", short, {})
    with pytest.raises(RunError, match=r"changed since it was scored: row 4 \(row_id r4\) .*from the whole one"):
        select(SelectConfig(scores=run, by="ln_ches", out=tmp_path / "kept"), source())
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    note = {"row_id": "r4", "index": 4, "reasons": ["empty_chosen", "x"], "detail": {}}
    (run / "dropped.jsonl").write_text(json.dumps(note) + "\n")
    summary = select(SelectConfig(scores=run, by="ln_ches", out=tmp_path / "kept"), source())
    assert summary["source"]["dropped"]["dropped when scored"] == 1
    dropped = lines(tmp_path / "kept" / "dropped.jsonl")
    assert {"row_id": "r4", "index": 4, "reason": "dropped when scored: empty_chosen, x"} in dropped


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (source(row_id="other"), "changed since it was scored: row 3 is other, the table has r3"),
        (source(N + 1), "row 20 .* was not in it"),
        (source(N - 2), "2 scored rows are not in it any more, the first is row 18"),
        ([], "20 scored rows are not in it"),
    ],
)
def test_other_rows_than_those_scored_are_refused(run, tmp_path, rows, message):
    with pytest.raises(RunError, match=message):
        select(SelectConfig(scores=run, by="ln_ches", out=tmp_path / "kept"), rows)
    assert not (tmp_path / "kept").exists()


def test_an_existing_directory_is_refused_unless_empty(run, tmp_path):
    out = tmp_path / "kept"
    out.mkdir()
    select(SelectConfig(scores=run, by="ln_ches", out=out), source())
    before = (out / "pairs.jsonl").read_bytes()
    with pytest.raises(RunError, match="not an empty directory"):
        select(SelectConfig(scores=run, by="ln_ches", out=out, keep="highest:3"), source())
    assert (out / "pairs.jsonl").read_bytes() == before


def test_nothing_to_keep_is_an_error(run, tmp_path):
    out = tmp_path / "kept"
    with pytest.raises(RunError, match="keeps none of 19 rows: ln_ches runs from"):
        select(SelectConfig(scores=run, by="ln_ches", out=out, keep="below:-99"), source())
    write_part(tmp_path / "null", columns(3, ln_ches=[None] * 3, ches=[None] * 3), {})
    with pytest.raises(RunError, match="none of its 3 rows has the score"):
        select(SelectConfig(scores=tmp_path / "null", by="ln_ches", out=out), source(3))
    write_part(tmp_path / "empty", columns(0), {})
    with pytest.raises(RunError, match="none of its 0 rows"):
        select(SelectConfig(scores=tmp_path / "empty", by="ln_ches", out=out), [])
    with pytest.raises(RunError, match="pass --pairs"):
        select(SelectConfig(scores=run, by="ln_ches", out=out))
    with pytest.raises(RunError, match="--seed -1: expected 0 or more"):
        select(SelectConfig(scores=run, by="ln_ches", out=out, control="random", seed=-1), source())
    assert not out.exists()


def test_one_row_and_constant_scores(tmp_path):
    write_part(tmp_path / "one", columns(1), {})
    for keep in ("lowest:0.05", "window:0.5,512", "quantile:0.2,0.8"):
        config = SelectConfig(scores=tmp_path / "one", by="ln_ches", out=tmp_path / keep, keep=keep)
        assert select(config, source(1))["counts"]["kept"] == 1
    write_part(tmp_path / "same", columns(ln_ches=[2.0] * N), {})
    for control in ("none", "random", "length"):
        config = SelectConfig(
            scores=tmp_path / "same", by="ln_ches", out=tmp_path / control, keep="lowest:4", control=control
        )
        assert select(config, source())["counts"]["kept"] == 4


@dataclass
class Odd:
    index: int = 0
    row_id: str = "r0"
    category: None = None
    candidates: None = None
    extra: dict[str, Any] = field(default_factory=dict)
    content: dict[str, Any] = field(
        default_factory=lambda: {
            "prompt": "line\u2028separator \x00 \ud800",
            "chosen": [{"role": "user", "content": "<script>"}],
            "rejected": np.array([1, 2]),
            "score": float("nan"),
            "count": np.int64(3),
            "ln_ches": "was here before",
        }
    )


def test_odd_contents_become_json(tmp_path):
    write_part(tmp_path / "one", columns(1), {})
    summary = select(SelectConfig(scores=tmp_path / "one", by="ln_ches", out=tmp_path / "kept"), [Odd()])
    (line,) = (tmp_path / "kept" / "pairs.jsonl").read_bytes().splitlines()
    kept = json.loads(line)
    assert kept["rejected"] == [1, 2] and kept["score"] is None and kept["count"] == 3
    assert kept["prompt"] == "line\u2028separator \x00 \ud800"
    assert summary["source"]["replaced_columns"] == ["ln_ches"]


# --- the default -----------------------------------------------------------------------------------


def test_without_influences_no_score_stands_in_for_them(run, tmp_path):
    with pytest.raises(RunError, match=r"needs the column influence.*--by: of the filters.*influence \+1\.8.*ches"):
        select(SelectConfig(scores=run, out=tmp_path / "kept"), source())
    assert not (tmp_path / "kept").exists()


def test_influences_beside_scores_are_the_default(run, tmp_path):
    values = {**columns(), "influence": [float(-i) for i in range(N)]}
    write_part(run / "influence.parquet", {n: v for n, v in values.items() if "ches" not in n}, {})
    summary = select(SelectConfig(scores=run, out=tmp_path / "kept", keep="lowest:3"), source())
    assert [row["row_id"] for row in lines(tmp_path / "kept" / "pairs.jsonl")] == ["r17", "r18", "r19"]
    assert summary["rule"]["by"] == "influence"
    # and a score that is named is read where it is
    assert select(SelectConfig(scores=run, out=tmp_path / "by", by="ches"), source())["rule"]["by"] == "ches"
