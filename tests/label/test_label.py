"""Labels in doubt: rewards, probabilities and what they say of a set; files of labels; rows made of pairs and texts."""

import json
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ches_jax.data.sources import pairs_of_run
from ches_jax.displacement.ranking import calibration_error, flip_budget, idealised_right, ranking_summary
from ches_jax.errors import ChesError
from ches_jax.label import gather as label_gather
from ches_jax.label import run as label_run
from ches_jax.label.config import GatherConfig, LabelConfig
from ches_jax.label.gather import gather, prompt_id
from ches_jax.label.rewards import (
    consistency,
    implicit_reward,
    label_probability,
)
from ches_jax.label.run import label, read_phrases
from tests.helpers import write_lines

PAIRS = [
    {
        "prompt": f"Q{i}?",
        "chosen": f" yes {i}",
        "rejected": f" no {i}",
        "chosen_reward": 2.0 - i,
        "rejected_reward": 0.5,
    }
    for i in range(3)
]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rewards_are_beta_times_log_ratios_and_probabilities_their_logistic_difference():
    policy, ref = np.array([-4.0, -9.0]), np.array([-6.0, -9.5])
    np.testing.assert_allclose(implicit_reward(policy, ref, 0.5), [1.0, 0.25])
    np.testing.assert_allclose(label_probability(np.array([1.0]), np.array([0.25])), [1 / (1 + exp(-0.75))])
    np.testing.assert_allclose(flip_budget(np.array([-4.0, 4.0]), 0.5), [log(1 + exp(2)), log(1 + exp(-2))])


def test_what_two_models_say_of_a_set():
    """Four pairs: right before and after, wrong then right, right then wrong, wrong before and after."""
    reference = np.array([-1.0, -3.0, -1.0, -3.0]), np.array([-2.0, -2.0, -2.0, -2.0])
    policy = np.array([-1.0, -1.0, -3.0, -3.0]), np.array([-4.0, -2.0, -2.0, -2.0])
    found = ranking_summary(policy, reference, beta=1.0)
    assert (found["ranking_accuracy_reference"], found["ranking_accuracy_policy"]) == (0.5, 0.5)
    assert (found["flipped_to_right"], found["flipped_to_wrong"]) == (0.25, 0.25)
    assert found["implicit_reward_accuracy"] == (1 + 1 + 0 + 0.5) / 4
    # at the optimum the margin is the reference's and ln(0.8 / 0.2) / beta; a tie is half right
    assert idealised_right(np.array([-3.0, -2.0, log(0.25) / 0.5, 1.0]), 0.5, 0.2).tolist() == [0, 1, 0.5, 1]
    assert consistency(np.array([1.0, -1.0, 2.0]), np.array([1.0, 1.0, 0.5])) == pytest.approx(2 / 3)


def test_calibration_error_is_the_gap_of_each_bin():
    sure = np.array([0.95] * 10)  # all right, said with 0.95
    assert calibration_error(sure) == pytest.approx(0.05)
    assert calibration_error(np.array([0.95, 0.05])) == pytest.approx(0.45)
    assert calibration_error(np.array([1.0, 1.0])) == 0.0


def test_labels_of_a_file_join_by_row(tmp_path):
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    ids = [group[0].row_id for group in pairs_of_run({"pairs": pairs})]
    labels = [
        {"row_id": ids[2], "chosen_reward": 0.0, "rejected_reward": 1.0},
        {"row_id": ids[0], "label_probability": 0.75},
    ]
    options = {"by": "file", "pairs": pairs, "beta": 1.0, "labels": write_lines(tmp_path / "labels.jsonl", labels)}
    record = label(LabelConfig(**options, out=str(tmp_path / "out"), relabel=True))
    assert record["counts"] == {"rows": 3, "labelled": 2, "unsure": 1} and record["relabelled"] == 1
    first, last = read(tmp_path / "out" / "pairs.jsonl")
    assert first["label_probability"] == 0.75 and first["chosen"] == " yes 0" and first["row_id"] == ids[0]
    assert last["chosen"] == " no 2" and last["rejected"] == " yes 2"
    assert last["label_probability"] == pytest.approx(1 / (1 + exp(-1))) and last["chosen_reward"] == 1.0


def test_posteriors_of_a_run_label_its_pairs(tmp_path):
    """Of the last evaluation that has one; pairs that were not watched have none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    ids = [group[0].row_id for group in pairs_of_run({"pairs": pairs})]
    run = tmp_path / "run"
    run.mkdir()

    def log(posteriors):
        rows = [(4, ids[0]), (2, ids[0]), (0, ids[1]), (4, "x")]
        columns = {"step": [s for s, _ in rows], "row_id": [i for _, i in rows], "set": ["train"] * 4}
        columns |= {"index": [0] * 4, "regime": ["flat"] * 4, "label_posterior": pa.array(posteriors, pa.float64())}
        columns |= {name: [1] * 4 for name in ("chosen_tokens", "rejected_tokens")}
        columns |= {f"{d}logp_{side}": [0.0] * 4 for d in ("", "d") for side in ("chosen", "rejected")}
        pq.write_table(pa.table(columns), run / "displacement.parquet")

    options: Any = {"by": "file", "pairs": pairs, "labels": str(run)}
    log([0.25, 0.75, None, 0.5])
    record = label(LabelConfig(**options, out=str(tmp_path / "out")))
    (row,) = read(tmp_path / "out" / "pairs.jsonl")
    assert (row["row_id"], row["label_probability"]) == (ids[0], 0.25) and record["counts"]["unsure"] == 1
    for posteriors, message in (
        ([None] * 4, "without posteriors of labels"),
        ([None, None, None, 1], "of other pairs"),
    ):
        log(posteriors)
        with pytest.raises(ChesError, match=message):
            label(LabelConfig(**options, out=str(tmp_path / "b")))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"row_id": "x", "label_probability": 0.5}, "row_id 'x' is none of the pairs'"),
        ({"label_probability": 1.5}, "expected label_probability from 0 to 1"),
        ({"chosen_reward": "a", "rejected_reward": 1}, "expected label_probability from 0 to 1"),
    ],
)
def test_labels_that_do_not_fit_are_named(tmp_path, row, message):
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    row = {"row_id": next(iter(pairs_of_run({"pairs": pairs})))[0].row_id} | row
    labels = write_lines(tmp_path / "labels.jsonl", [row])
    with pytest.raises(ChesError, match=message):
        label(LabelConfig(by="file", pairs=pairs, labels=labels, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "implicit-reward"}, "--by implicit-reward needs --reference"),
        ({"by": "follow-up"}, "--by follow-up needs --phrases"),
        ({"by": "file", "labels": "x", "reference": "m"}, "--reference is for --by implicit-reward"),
        ({"by": "file", "labels": "x", "beta": 0.0}, "--beta 0.0: expected a positive number"),
    ],
)
def test_options_that_do_not_go_together(tmp_path, options, message):
    with pytest.raises(ChesError, match=message):
        label(LabelConfig(**options, out=str(tmp_path / "out")))


def test_phrases_are_good_and_bad_ones_in_equal_numbers(tmp_path):
    file = tmp_path / "phrases.txt"
    file.write_text("+ Thank you.\n\n- That is wrong.\n", encoding="utf-8")
    assert read_phrases(file) == (["Thank you."], ["That is wrong."])
    for text, message in (("+ a\n+ b\n- c\n", "2 good and 1 bad"), ("a\n", "line 1: expected . or -"), ("", "0 good")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ChesError, match=message):
            read_phrases(file)


def test_follow_ups_reward_the_response_after_which_the_good_one_is_likelier(tmp_path, monkeypatch):
    """One row for each pair, side and phrase; rewards are mean differences of their log-probabilities."""
    import pyarrow as pa

    from ches_jax.label import run as module
    from ches_jax.scores import run as scores

    seen = []

    def scored(config, **how):
        seen.extend(read(tmp_path.__class__(config.pairs)))
        return config.out

    def table(directory):
        good = [-1.0 if row["side"] == "chosen" else -3.0 for row in seen]
        columns = {"index": list(range(len(seen))), "logp_chosen": good, "logp_rejected": [-2.0] * len(seen)}
        return pa.table(columns), {}

    monkeypatch.setattr(scores, "score", scored)
    monkeypatch.setattr(module, "read_table", table)
    phrases = tmp_path / "phrases.txt"
    phrases.write_text("+ Good.\n- Bad.\n+ Right.\n- Wrong.\n", encoding="utf-8")
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    label(LabelConfig(by="follow-up", pairs=pairs, phrases=str(phrases), beta=0.5, out=str(tmp_path / "out")))
    assert len(seen) == 3 * 2 * 2 and seen[0]["prompt"] == "Q0? yes 0\n" and seen[0]["rejected"] == "Bad."
    row = read(tmp_path / "out" / "pairs.jsonl")[0]
    assert (row["chosen_reward"], row["rejected_reward"]) == (1.0, -1.0)
    assert row["label_probability"] == pytest.approx(1 / (1 + exp(-1)))


@pytest.fixture
def generated(tmp_path):
    """Pairs, and two texts of each prompt; those of the first are the same."""
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    rows = []
    for number, group in enumerate(pairs_of_run({"pairs": pairs})):
        for sample in (1, 0):
            text = " same" if number == 0 else f" text {number} {sample}"
            rows.append({"row_id": prompt_id(group[0]), "sample": sample, "text": text, "reward": number + sample / 2})
    return pairs, write_lines(tmp_path / "responses.jsonl", rows)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"text": " another"}, r"line 7: another text of the same prompt and sample 1 stands before it"),
        ({"sample": "one"}, r"sample is 'one'; expected a number from 0"),
    ],
)
def test_two_texts_of_one_sample_are_not_one(tmp_path, generated, second, message):
    """Of two runs of generate in one file each has samples from 0; the later text took the place of the earlier one."""
    pairs, texts = generated
    rows = read(tmp_path / "responses.jsonl")
    both = write_lines(tmp_path / "both.jsonl", [*rows, rows[0] | {"sample": "1"}, *rows[:1]])
    gather(GatherConfig(pairs=pairs, make="samples", responses=both, out=str(tmp_path / "same")))
    gather(GatherConfig(pairs=pairs, make="samples", responses=texts, out=str(tmp_path / "once")))
    assert read(tmp_path / "same/pairs.jsonl") == read(tmp_path / "once/pairs.jsonl")
    other = write_lines(tmp_path / "other.jsonl", [*rows, rows[0] | second])
    with pytest.raises(ChesError, match=message):
        gather(GatherConfig(pairs=pairs, make="samples", responses=other, out=str(tmp_path / "a")))


def test_a_reward_that_is_no_number_decides_nothing(tmp_path, generated):
    """Every comparison with NaN is false: such a text beat no response, and such a response was beaten by none."""
    pairs, _ = generated
    rows = read(tmp_path / "responses.jsonl")
    texts = write_lines(tmp_path / "nan.jsonl", [rows[0] | {"reward": float("nan")}, *rows[1:]])
    with pytest.raises(ChesError, match=r"line 1: 'reward' is nan; expected a number"):
        gather(GatherConfig(pairs=pairs, make="filtered", rewards=texts, out=str(tmp_path / "a")))
    own = write_lines(tmp_path / "own.jsonl", [row | {"chosen_reward": float("nan")} for row in PAIRS])
    with pytest.raises(ChesError, match=r"needs numbers in chosen_reward and rejected_reward"):
        gather(GatherConfig(pairs=own, make="goals", out=str(tmp_path / "b")))


def test_texts_that_were_cut_are_counted(tmp_path, generated, caplog):
    pairs, texts = generated
    cut = [row | {"finish_reason": "length" if row["sample"] else "stop"} for row in read(Path(texts))]
    for rows, words in ((cut, "3 of 6 texts were cut"), (read(Path(texts)), None)):
        caplog.clear()
        some = write_lines(tmp_path / f"{words}.jsonl", rows)
        gather(GatherConfig(pairs=pairs, make="samples", responses=some, out=str(tmp_path / f"out {words}")))
        assert words in caplog.text if words else not caplog.text


def test_samples_and_contests_are_texts_of_the_pairs_own_prompts(tmp_path, generated):
    pairs, texts = generated
    gather(GatherConfig(pairs=pairs, make="samples", responses=texts, out=str(tmp_path / "a")))
    assert read(tmp_path / "a" / "pairs.jsonl")[1] == {
        "prompt": "Q1?",
        "rejected": " no 1",
        "responses": [" text 1 0", " text 1 1"],
    }
    record = gather(GatherConfig(pairs=pairs, make="contests", responses=texts, out=str(tmp_path / "b")))
    assert record["counts"] == {"pairs": 3, "rows": 2}
    assert read(tmp_path / "b" / "pairs.jsonl")[0] == {"prompt": "Q1?", "chosen": " text 1 0", "rejected": " text 1 1"}


def test_filtered_pairs_are_those_that_no_text_beats(tmp_path, generated):
    pairs, texts = generated
    gather(GatherConfig(pairs=pairs, make="filtered", rewards=texts, out=str(tmp_path / "a")))
    # chosen rewards 2, 1, 0 against best texts of 0.5, 1.5, 2.5
    assert [row["prompt"] for row in read(tmp_path / "a" / "pairs.jsonl")] == ["Q0?"]
    with pytest.raises(ChesError, match="'score' is None; expected a number"):
        gather(
            GatherConfig(pairs=pairs, make="filtered", rewards=texts, reward_column="score", out=str(tmp_path / "b"))
        )


def test_pairs_that_a_text_beats_in_the_same_unit_go(tmp_path, generated):
    """Each chosen response is set against its prompt's texts; one that loses once is out, one that ties stays."""
    pairs, texts = generated
    gather(GatherConfig(pairs=pairs, make="against", responses=texts, out=str(tmp_path / "a")))
    against = read(tmp_path / "a" / "pairs.jsonl")
    assert [(r["chosen"], r["rejected"]) for r in against[:3]] == [
        (" yes 0", " same"),
        (" yes 1", " text 1 0"),
        (" yes 1", " text 1 1"),
    ]
    ids = [group[0].row_id for group in pairs_of_run({"pairs": pairs})]
    assert [r["pair"] for r in against] == [ids[0], ids[1], ids[1], ids[2], ids[2]]
    for row, reward in zip(against, (1.0, 0.5, 2.0, 0.0, 1.0), strict=True):
        row |= {"chosen_reward": 1.0, "rejected_reward": reward}
    labelled = write_lines(tmp_path / "labelled.jsonl", against)
    gather(GatherConfig(pairs=pairs, make="filtered", rewards=labelled, out=str(tmp_path / "b")))
    assert [row["prompt"] for row in read(tmp_path / "b" / "pairs.jsonl")] == ["Q0?", "Q2?"]
    for damage in ({"pair": "x"}, {"chosen_reward": None}):
        other = write_lines(tmp_path / "other.jsonl", [against[0] | damage])
        with pytest.raises(ChesError, match="line 1: expected the id of one of the pairs in 'pair' and numbers"):
            gather(GatherConfig(pairs=pairs, make="filtered", rewards=other, out=str(tmp_path / "c")))


@pytest.mark.parametrize("goal", ["score", "{rewards}", "{reward:zz}", "{0}", "{", "{reward.x}"])
def test_a_goal_in_which_no_reward_can_stand_is_refused(tmp_path, generated, goal):
    with pytest.raises(ChesError, match=r"expected \{reward"):
        gather(GatherConfig(pairs=generated[0], make="goals", goal=goal, out=str(tmp_path / "a")))


def test_goals_that_read_alike_make_no_rows(tmp_path):
    """They would ask the same thing of two opposite answers."""
    pairs = write_lines(tmp_path / "pairs.jsonl", [{**PAIRS[0], "rejected_reward": 2.0}])
    with pytest.raises(ChesError, match=r"none of 1 pairs makes a row .the rewards of each one's responses are"):
        gather(GatherConfig(pairs=pairs, make="goals", out=str(tmp_path / "a")))


def test_goals_ask_for_either_response(tmp_path, generated):
    gather(GatherConfig(pairs=generated[0], make="goals", limit=1, out=str(tmp_path / "a")))
    one, other = read(tmp_path / "a" / "pairs.jsonl")
    assert one == {"prompt": "(score: 2) Q0?", "chosen": " yes 0", "rejected": " no 0"}
    assert other == {"prompt": "(score: 0.5) Q0?", "chosen": " no 0", "rejected": " yes 0"}


def test_texts_of_other_prompts_are_refused(tmp_path, generated):
    other = write_lines(tmp_path / "other.jsonl", [{"row_id": "x", "sample": 0, "text": "a"}])
    with pytest.raises(ChesError, match="its texts are of other prompts"):
        gather(GatherConfig(pairs=generated[0], make="samples", responses=other, out=str(tmp_path / "a")))
    with pytest.raises(ChesError, match="--make samples needs --responses"):
        gather(GatherConfig(pairs=generated[0], make="samples", out=str(tmp_path / "a")))


def test_flips_are_counted_each_way():
    """Three of four pairs change their order: two to the label's, one away from it."""
    reference = np.array([-1.0, -2.0, 3.0, 4.0]), np.zeros(4)
    policy = np.array([1.0, 1.0, -1.0, 5.0]), np.zeros(4)
    summary = ranking_summary(policy, reference, beta=1.0)
    assert (summary["flipped_to_right"], summary["flipped_to_wrong"]) == (0.5, 0.25)


def test_confidence_is_binned_from_a_half_to_one():
    """Ten bins of width 0.05: those of 0.52 and of 0.58 are two, and one where bins begin at zero."""
    probability = np.array([0.52, 0.48, 0.58, 0.58])
    # bins [0.50, 0.55) and [0.55, 0.60): |0.52 - 1/2| and |0.58 - 1|, each of half of the pairs
    assert calibration_error(probability) == pytest.approx(0.5 * 0.02 + 0.5 * 0.42, rel=1e-12)


@pytest.mark.parametrize("changed", ["pairs.jsonl", "labels.jsonl"])
def test_a_file_that_changes_while_it_is_read_makes_no_labels(tmp_path, monkeypatch, changed):
    """Also where it is as long as before, and its rows have the same ids."""
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    row = {"row_id": next(iter(pairs_of_run({"pairs": pairs})))[0].row_id, "label_probability": 0.5}
    options: Any = {"by": "file", "pairs": pairs, "labels": write_lines(tmp_path / "labels.jsonl", [row])}
    real = label_run.BY["file"]

    def meanwhile(*args):
        found = real(*args)
        text = (tmp_path / changed).read_text()
        (tmp_path / changed).write_text(text.replace("0.5", "0.6").replace(": ", ":  ", 1))
        return found

    monkeypatch.setitem(label_run.BY, "file", meanwhile)
    with pytest.raises(ChesError, match=f"changed while the run read it.*{changed}"):
        label(LabelConfig(**options, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    label(LabelConfig(**options, out=str(tmp_path / "out")))
    assert json.loads((tmp_path / "out" / "label.json").read_text())["opened"].keys() == {"pairs", "labels"}


def test_pairs_that_change_while_rows_are_gathered_make_none(tmp_path, monkeypatch):
    pairs = write_lines(tmp_path / "pairs.jsonl", PAIRS)

    def meanwhile(config, opener, rows):
        write_lines(tmp_path / "pairs.jsonl", PAIRS[:1])
        return iter([{"prompt": "p"}])

    monkeypatch.setitem(label_gather.MAKE, "pairs", meanwhile)
    with pytest.raises(ChesError, match=r"changed while the run read it.*pairs\.jsonl"):
        gather(GatherConfig(make="pairs", pairs=pairs, out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("by", "needs"), [("file", {"labels": "labels.jsonl"}), ("density-ratio", {})])
@pytest.mark.parametrize("where", [{"mesh": "data=2"}, {"distributed": "auto"}])
def test_ways_that_run_no_large_model_take_no_mesh_and_no_processes(tmp_path, by, needs, where):
    with pytest.raises(ChesError, match=f"--by {by} .*: leave --mesh and --distributed out"):
        label(LabelConfig(by=by, out=str(tmp_path / "out"), **needs, **where))
