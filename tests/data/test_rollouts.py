"""Rollouts as RL trainers write them: the same groups from each, and one message for what cannot be read."""

import json

import pytest

from ches_jax.data.rollouts import ROLLOUTS, read_groups, require_known
from ches_jax.data.sources import open_rows
from ches_jax.errors import DataError

TEXTS = [("1+1? ", " 2", 1.0), ("1+1? ", " 3", 0.0), ("2+2? ", " 4", 1.0), ("1+1? ", " 2", 1.0), ("2+2? ", " 5", 0.0)]
"""Prompt, response, reward: two groups whose rows do not follow one another, one of them with a response twice."""


def written(tmp_path, rows, name="rollouts.jsonl"):
    path = tmp_path / name
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


def groups_of(path, columns=None):
    return read_groups(open_rows(str(path), None, columns, ROLLOUTS).tolerant())


def listed(groups, name):
    return [None if (values := g.numbers(name)) is None else values.tolist() for g in groups]


def shown(groups):
    return [
        (g.index, [(r.record.content["prompt"], r.record.content["chosen"], r.reward) for r in g.rollouts])
        for g in groups
    ]


EXPECTED = [(0, [TEXTS[0], TEXTS[1], TEXTS[3]]), (2, [TEXTS[2], TEXTS[4]])]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("verl.jsonl", lambda p, r, s: {"input": p, "output": r, "gts": "x", "score": s, "step": 7, "acc": bool(s)}),
        ("openrlhf.jsonl", lambda p, r, s: {"input": p, "output": r, "reward": s}),
        ("nemo.jsonl", lambda p, r, s: {"content": [[p, r]], "rewards": [s], "input_lengths": [9], "idx": 0}),
        ("flat.jsonl", lambda p, r, s: {"content": [p, r], "rewards": s}),
        ("named.parquet", lambda p, r, s: {"prompt": p, "completion": r, "reward": s}),
        ("text_number.jsonl", lambda p, r, s: {"prompt": p, "response": r, "score": str(s)}),
    ],
)
def test_rows_of_every_trainer_become_the_same_groups(tmp_path, name, row):
    groups = groups_of(written(tmp_path, [row(*one) for one in TEXTS], name))
    assert shown(groups) == EXPECTED
    assert require_known(groups, "x") == "reward" and groups[0].numbers("reward") is not None
    # what identifies a response is its text, in whatever file it stands
    assert groups[0].rollouts[0].record.row_id == groups[0].rollouts[2].record.row_id


def test_trl_writes_advantages_beside_a_column_for_each_reward_function(tmp_path):
    rows = [
        {"step": "10", "prompt": p, "completion": r, "accuracy_reward": s, "format_reward": 0.5, "advantage": s - 0.5}
        for p, r, s in TEXTS
    ]
    groups = groups_of(written(tmp_path, rows, "completions_00010.parquet"))
    assert require_known(groups, "x") == "advantage"
    assert listed(groups, "advantage") == [[0.5, -0.5, 0.5], [0.5, -0.5]]


def test_rows_of_whole_groups_and_of_token_ids(tmp_path):
    whole = [{"prompt": "1+1? ", "responses": [" 2", " 3", " 2"], "rewards": [1, 0, 1]}]
    assert shown(groups_of(written(tmp_path, whole))) == EXPECTED[:1]
    ids = [{"prompt_ids": [1, 2], "response_ids": [3, i], "prompt": "a", "response": "b", "reward": i} for i in (4, 5)]
    (group,) = groups_of(written(tmp_path, ids))
    assert [r.record.content["chosen_ids"] for r in group.rollouts] == [[3, 4], [3, 5]]


def test_a_uid_and_a_step_part_equal_prompts(tmp_path):
    rows = [{"prompt": "p", "response": f"{i}", "reward": i, "uid": i % 2, "step": i // 4} for i in range(8)]
    assert listed(groups_of(written(tmp_path, rows)), "reward") == [
        [0, 2],
        [1, 3],
        [4, 6],
        [5, 7],
    ]
    named = [{"prompt": "p", "response": f"{i}", "reward": i, "batch": i // 2} for i in range(4)]
    assert len(groups_of(written(tmp_path, named), {"group": "batch"})) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "no response; found: prompt; expected one of response, output, completion"),
        ({"response": "r", "reward": 1}, "no prompt; found: response, reward; expected one of prompt, input"),
        (
            {"prompt": "p", "response": "r", "reward": 1, "score": 0},
            "--columns reward=reward or --columns reward=score",
        ),
        ({"prompt": "p", "response": "r", "reward": float("nan")}, "'reward' is float nan; expected a finite number"),
        ({"prompt": "p", "responses": ["r", "s"], "rewards": [1]}, "expected 2 numbers, one for each response"),
        ({"prompt": "p", "responses": ["r", "s"], "reward": 1}, "expected a list of 2 numbers"),
        ({"prompt": "p", "response": "r", "advantages": [0.1, 0.1]}, "expected one number, in column 'advantage'"),
        ({"prompt": "p", "response": "r", "responses": ["s"]}, "are both there"),
        ({"content": ["a", "b", "c", "d"], "rewards": [1]}, "'content' has 4 turns; expected two"),
    ],
)
def test_what_can_be_read_in_two_ways_or_not_at_all_is_refused(tmp_path, row, message):
    with pytest.raises(DataError, match="line 1: ") as error:
        groups_of(written(tmp_path, [row]))
    assert message in str(error.value)


def test_responses_without_rewards_are_refused_in_words(tmp_path):
    rows = [{"prompt": p, "response": r, "reward": s} for p, r, s in TEXTS[:2]] + [{"prompt": "q", "response": "r"}]
    with pytest.raises(DataError, match=r"x, line 3: .* not known which responses won.*--columns reward=NAME"):
        require_known(groups_of(written(tmp_path, rows)), "x")
    # a row that is not readable would change the advantages of its group: it is never left out
    with pytest.raises(DataError, match="line 2"):
        groups_of(written(tmp_path, [rows[0], {"prompt": "1+1? ", "response": 3, "reward": 0}]))
    with pytest.raises(DataError, match="no column 'nothing'"):
        groups_of(written(tmp_path, rows[:1]), {"reward": "nothing"})
