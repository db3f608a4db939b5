"""Which response is better, and what belongs to the prompt: every way in which people write it, and what is refused.

Rows are tiny: prompt p, and the responses a and b (and c); a pair is written as "a>b".
"""

import json
from typing import Any

import pytest

from ches_jax.data.sources import open_pairs, rows_in_memory
from ches_jax.errors import DataError

P = {"prompt": "p"}
AB = {**P, "response_a": "a", "response_b": "b"}
R01 = {**P, "response_0": "a", "response_1": "b"}
R12 = {**P, "response_1": "a", "response_2": "b"}
ABC = {**AB, "response_c": "c"}
Z012 = {**P, "answer_0": "a", "answer_1": "b", "answer_2": "c"}
LIST = {**P, "answers": ["a", "b", "c"]}
PAIR = {**P, "chosen": "a", "rejected": "b"}
U = {"role": "user", "content": "p"}
OTHERS = ("b", {"role": "assistant", "content": "b"})


def text(value: Any) -> str:
    return value if isinstance(value, str) else value[-1]["content"]


def read(rows: list[dict[str, Any]], **options: Any) -> list[str]:
    """Each row's pair; "tie" of a row that makes none, "unreadable" of one that cannot be read."""
    records = rows_in_memory(rows, **options).tolerant()
    return [
        "unreadable"
        if r.fault
        else "tie"
        if r.candidates == ()
        else f"{text(r.content['chosen'])}>{text(r.content['rejected'])}"
        for r in records
    ]


def labelled(responses: dict[str, Any], name: str, *values: Any) -> list[dict[str, Any]]:
    return [{**responses, name: value} for value in values]


READ = {
    "0 and 1": (labelled(AB, "winner", 0, 1), "a>b b>a"),
    "0 and 1 as numbers of columns": (labelled(R01, "winner", 1, 0), "b>a a>b"),
    "1 and 2": (labelled(AB, "winner", 1, 2), "a>b b>a"),
    "1 alone where columns count from 1": (labelled(R12, "winner", 1), "a>b"),
    "1 alone where columns count from 0": (labelled(R01, "winner", 1), "b>a"),
    "text and decimal numbers": (labelled(AB, "better", "1", 2.0, "1.0"), "a>b b>a a>b"),
    "A and B": (labelled(AB, "label", "A", "B"), "a>b b>a"),
    "B alone": (labelled(AB, "label", "B"), "b>a"),
    "names of models": (labelled(AB, "winner", "model_a", "model_b", "tie"), "a>b b>a tie"),
    "ways to tie": (labelled(AB, "winner", "model_a", "tie (bothbad)", "both", "neither"), "a>b tie tie tie"),
    "names of columns": (labelled(AB, "preference", "response_b", "response_a"), "b>a a>b"),
    "one row that says nothing": (labelled(AB, "winner", "A", "B", None, "", "C"), "unreadable"),
    "a column for each": (
        [{**AB, "winner_a": 1, "winner_b": 0}, {**AB, "winner_a": 0, "winner_b": 1}],
        "a>b b>a",
    ),
    "and one for ties": (
        [{**AB, "winner_a": 1, "winner_b": 0, "winner_tie": 0}, {**AB, "winner_a": 0, "winner_b": 0, "winner_tie": 1}],
        "a>b tie",
    ),
    "two winners, and none": (
        [{**AB, "winner_a": a, "winner_b": b} for a, b in ((True, False), (False, True), (1, 1), (0, 0))],
        "a>b b>a unreadable unreadable",
    ),
    "scores": ([{**AB, "score_a": a, "score_b": b} for a, b in ((1, 2), ("2.5", "-1"), (3, 3))], "b>a a>b tie"),
    "a score that is none": (
        [{**AB, "score_a": a, "score_b": 2} for a in (1, 3, 4, "n/a", None, float("nan"))],
        "b>a a>b a>b unreadable unreadable unreadable",
    ),
    "ranks": ([{**AB, "rank_a": a, "rank_b": b} for a, b in ((1, 2), (2, 1), (1, 1))], "a>b b>a tie"),
    "a label and scores that agree": ([{**AB, "winner": "A", "score_a": 2, "score_b": 1}], "a>b"),
    "two labels that agree": ([{**AB, "winner": "B", "better": "B"}], "b>a"),
    "ranks and scores that agree": ([{**AB, "rank_a": 1, "rank_b": 2, "score_a": 5, "score_b": 3}], "a>b"),
    "scores of a list": ([{**LIST, "scores": [1, 3, 2]}], "b>a b>c"),
    "ranks of a list": ([{**LIST, "ranks": [2, 1, 3]}], "b>a b>c"),
    "a list and its scores as JSON text": ([{**P, "answers": '["a", "b"]', "scores": "[1, 2]"}], "b>a"),
    "objects with ranks": ([{**P, "answers": [{"text": "a", "rank": 1}, {"text": "b", "rank": 0}]}], "b>a"),
    "objects with scores": ([{**P, "answers": [{"text": "a", "score": 1}, {"text": "b", "score": 0}]}], "a>b"),
    "ranks of a list in canonical columns": ([{**P, "responses": ["a", "b"], "rank": [2, 1]}], "b>a"),
    "the best of a list in canonical columns": ([{**P, "responses": ["a", "b"], "best": i} for i in (1, 0)], "b>a a>b"),
    "a list of two in an order of its own": ([{**P, "responses": ["a", "b"], "ordering": [1, 0]}], "b>a"),
    "a row of a list without its scores": (
        [{**P, "responses": ["a", "b"], **more} for more in (*[{"scores": [0, 1]}] * 2, {"scores": None}, {})],
        "b>a b>a unreadable unreadable",
    ),
    "a row of a list without its label": (
        [{**P, "responses": ["a", "b"], "best": i} for i in (0, None)],
        "a>b unreadable",
    ),
    "degrees": (
        labelled(AB, "preference", "A is much better", "B is better", "A is better", "about the same"),
        "a>b b>a a>b tie",
    ),
    "names of models that stand in columns": (
        [
            {**AB, "model_a": "x", "model_b": "y", "winner": "x"},
            {**AB, "model_a": "y", "model_b": "x", "winner": "x"},
            {**AB, "model_a": "y", "model_b": "x", "winner": "tie"},
        ],
        "a>b b>a tie",
    ),
    "the better text itself": (labelled(AB, "preferred", "b", "a"), "b>a a>b"),
    "chosen that names a column": (
        [{**AB, "chosen": "b", "rejected": "a"}, {**AB, "chosen": "a", "rejected": "b"}],
        "b>a a>b",
    ),
    "chosen that names a column whole": ([{**R12, "chosen": "response_2"}, {**R12, "chosen": "tie"}], "b>a tie"),
    "lists of right and wrong answers": ([{**P, "correct_answers": ["a"], "incorrect_answers": ["b", "c"]}], "a>b a>c"),
    "the best, counted from 0": ([{**LIST, "best": 0}], "a>b a>c"),
    "the best, counted from 1": ([{**LIST, "best": 3}], "c>a c>b"),
    "two rows of one prompt": (
        [
            {"prompt": q, "response": r, "score": s}
            for q, r, s in (("p", "a", 1), ("p", "b", 2), ("q", "a", 9), ("q", "c", 3))
        ],
        "b>a a>c",
    ),
    "two ranked rows of one prompt": ([{**P, "response": "a", "rank": 2}, {**P, "response": "b", "rank": 1}], "b>a"),
    "lists of chosen and rejected": ([{**P, "chosen": ["a", "b"], "rejected": ["c"]}], "a>c b>c"),
    "other words for the sides": ([{"question": "p", "accepted": "a", "rejected": "b"}], "a>b"),
    "preferred and dispreferred": ([{"question": "p", "preferred": "a", "dispreferred": "b"}], "a>b"),
    "response_j and response_k": ([{"question": "p", "response_j": "a", "response_k": "b"}], "a>b"),
    "winning and losing": ([{**P, "winning_response": "a", "losing_response": "b"}], "a>b"),
    "chosen and reject": ([{**P, "chosen": "a", "reject": "b"}], "a>b"),
    "preferred and non-preferred": ([{**P, "preferred_answer": "a", "non_preferred_answer": "b"}], "a>b"),
    "one chosen and several rejected": ([{**P, "chosen_response": "a", "rejected_responses": ["b", "c"]}], "a>b a>c"),
    "a response and its rejected one": ([{"query": "p", "response": "a", "rejected_response": "b"}], "a>b"),
    "a conversation and another last answer": (
        [{"messages": [U, {"role": "assistant", "content": "a"}], "rejected_response": other} for other in OTHERS],
        "a>b a>b",
    ),
    "two whole conversations": (
        [{n: [U, {"role": "assistant", "content": t}] for n, t in (("messages", "a"), ("rejected_messages", "b"))}],
        "a>b",
    ),
    "the preference format of OpenAI": (
        [
            {
                "input": {"messages": [U], "tools": [], "parallel_tool_calls": True},
                "preferred_output": [{"role": "assistant", "content": "a"}],
                "non_preferred_output": [{"role": "assistant", "content": "b"}],
            }
        ],
        "a>b",
    ),
    "objects with messages and ranks": (
        [
            {
                "context": [U],
                "completions": [
                    {"rank": rank, "completion": [{"role": "assistant", "content": t}]}
                    for rank, t in ((1, "b"), (0, "a"))
                ],
            }
        ],
        "a>b",
    ),
    "the number of the chosen one": ([{**P, "responses": ["a", "b"], "chosen_idx": i} for i in (1, 0)], "b>a a>b"),
    "a label beside one in degrees": (
        [{**R12, "preference": p, "raw_preference": r} for p, r in ((1, 1), (2, 4), (1, 2), (2, 3))],
        "a>b b>a a>b b>a",
    ),
    "a prompt, and the whole conversation beside it": (
        [
            {"prompt": q, "chosen": "a", "rejected": "b", "messages": [U, {"role": "assistant", "content": "a"}]}
            for q in ("p", [U])
        ],
        "a>b a>b",
    ),
    "letters compared": (labelled(AB, "label", "A>B", "B>A", "A=B", "B >> A"), "a>b b>a tie b>a"),
    "letters compared, one kind seen": (labelled(AB, "verdict", "A>B", "A>B", "A<B"), "a>b a>b b>a"),
    "what a user writes, and a list with scores": (
        [
            {
                "user_input": "p",
                "responses_and_scores": [{"response": "a", "score": 8.0}, {"response": "b", "score": 9.0}],
            }
        ],
        "b>a",
    ),
    "a vote": (labelled(AB, "vote", "B", "A", "unsure", "can't tell"), "b>a a>b tie tie"),
    "three columns and the letter of the best": (labelled(ABC, "best", "C", "A"), "c>a c>b a>b a>c"),
    "three columns and its number, from 0": (labelled(ABC, "best", 0, 2), "a>b a>c c>a c>b"),
    "three columns and its number, from 1": (labelled(ABC, "best", 1, 3), "a>b a>c c>a c>b"),
    "columns 0 to 2 and its number": (labelled(Z012, "best", 1), "b>a b>c"),
    "columns 0 to 2 and their scores": ([{**Z012, "score_0": 1, "score_1": 5, "score_2": 3}], "b>a b>c"),
    "three columns and their ranks": ([{**ABC, "rank_a": 2, "rank_b": 3, "rank_c": 1}], "c>a c>b"),
    "three columns and their flags": ([{**ABC, "winner_a": 0, "winner_b": 0, "winner_c": 1}], "c>a c>b"),
    "three columns and names of models": (
        [{**ABC, "model_a": "x", "model_b": "y", "model_c": "z", "winner": w} for w in "zx"],
        "c>a c>b a>b a>c",
    ),
    "rows of one prompt by longer names": (
        [{"user_prompt": "p", "model_response": t, "score": s} for t, s in (("b", 10), ("a", 90))],
        "a>b",
    ),
}


@pytest.mark.parametrize(("rows", "pairs"), READ.values(), ids=READ)
def test_which_response_is_better(rows: list[dict[str, Any]], pairs: str):
    if pairs == "unreadable":  # more labels than responses: nothing to go by
        with pytest.raises(DataError, match=r"two readings: 'winner' a means .* order=a,"):
            read(rows)
    else:
        assert read(rows) == pairs.split()


REFUSED = {
    "1 alone": (labelled(AB, "winner", 1), "'winner' 1 means that response_b is better, counted from 0, or that respo"),
    "0, 1 and 2": (
        labelled(AB, "winner", 0, 1, 2),
        "response_b is better, counted from 0 and 2 is a tie, or that response_a is, counted from 1 and 0 is a tie",
    ),
    "2 alone": (labelled(AB, "winner", 2), "order=1,2 or order=2,1"),
    "a label that may be no and yes": (labelled(AB, "label", 0, 1), "'label' 0 means that response_a .* order=0,1 or"),
    "true and false": (labelled(AB, "winner", True, False), "'winner' false means .* order=false,true or order=true"),
    "true alone": (labelled(AB, "preference", True), "order=false,true or order=true,false"),
    "left and right": (labelled(AB, "choice", "left"), "order=left,right or order=right,left"),
    "a sign": (labelled(AB, "preference", -1, 2), "order=negative,positive or order=positive,negative"),
    "0 and 1 of columns that count from 1": (labelled(R12, "winner", 0, 1), "order=0,1 or order=1,0"),
    "the number of one of three, 1 and 2": (labelled(ABC, "best", 1, 2), "'best' counts .* from 0, or it counts them"),
    "a sign beside columns 1 and 2": (labelled(R12, "label", -1, 1), "a negative 'label' means"),
    "a fraction beside columns 1 and 2": (labelled(R12, "preference", 1.02, 1.98), "'preference' 1.02 means"),
    "a label in degrees against another one": (
        [{**R12, "preference": p, "raw_preference": r} for p, r in ((1, 1), (2, 4), (1, 4), (2, 3))],
        "'raw_preference' 1 means",
    ),
    "two labels that disagree": (
        [{**AB, "winner": "A", "better": "B"}],
        "winner=winner order=a,b says which response is better, or winner=better order=a,b does",
    ),
    "a label against scores": (
        [{**AB, "winner": "A", "score_a": 1, "score_b": 2}],
        "winner=winner order=a,b says which response is better, or scores=score_a,score_b does",
    ),
    "ranks against scores": (
        [{**AB, "rank_a": 1, "rank_b": 2, "score_a": 3, "score_b": 5}],
        "ranks=rank_a,rank_b says",
    ),
    "ranks that are no places": ([{**LIST, "ranks": [0.2, 0.1, 0.3]}], "'ranks' is a rank .* or it is a score"),
    "a list of three in an order of its own": (
        [{**P, "responses": ["a", "b", "c"], "ranking": [2, 0, 1]}],
        "'ranking' has a rank for each response .* or it lists the numbers of the responses, .*best_first=",
    ),
    "a place": (
        [{**P, "responses": ["a", "b"], "position": [2, 1]}],
        "'position' is a rank .* where the response was shown",
    ),
    "a label of a list that is no number": (
        [{**P, "responses": ["a", "b"], "winner": "B"}],
        "the responses are listed best first, or 'winner' says which is better",
    ),
    "the best of a list": ([{**LIST, "best": 1}], "'best' counts the responses from 0, or it counts them from 1"),
    "a name against a label": (
        [PAIR, {**PAIR, "winner": "rejected"}, {**PAIR, "winner": "chosen"}],
        "chosen is better by its name, or 'winner' says rejected in some rows",
    ),
    "a number that a score happens to be": (
        [{**AB, "winner": 1, "score_a": 2, "score_b": 1}],
        "'winner' 1 means that response_b is better, counted from 0, or that response_a",
    ),
    "two system texts": ([{**PAIR, "system": "s", "system_prompt": "t"}], "'system', or it is in 'system_prompt'"),
    "labelled responses of one prompt": (
        [{**P, "response": "a", "label": 1}, {**P, "response": "b", "label": 0}],
        "a good one, or rows of one prompt after one another .* completion=response label=label .* group=prompt",
    ),
}


@pytest.mark.parametrize(("rows", "message"), REFUSED.values(), ids=REFUSED)
def test_two_readings_are_refused_with_both(rows: list[dict[str, Any]], message: str):
    with pytest.raises(DataError, match=f"two readings: .*{message}") as caught:
        read(rows)
    assert "choose with --columns" in str(caught.value) and "--schema" not in str(caught.value)


def test_a_refused_reading_can_be_chosen_with_the_words_of_the_message():
    """Each of the two choices that a message names is understood, and they prefer the other way round."""
    names = {"prompt": "prompt", "responses": "response_a,response_b", "winner": "winner"}
    rows = labelled(AB, "winner", 1)
    assert read(rows, columns={**names, "order": "0,1"}) == ["b>a"]
    assert read(rows, columns={**names, "order": "1,2"}) == ["a>b"]
    signs = labelled(AB, "winner", -2, 0, "1.5")
    assert read(signs, columns={**names, "order": "negative,positive"}) == ["a>b", "tie", "b>a"]
    assert read(signs, columns={**names, "order": "positive,negative"}) == ["b>a", "tie", "a>b"]
    single = [{**P, "response": "a", "label": True}, {**P, "response": "b", "label": False}]
    words = {"prompt": "prompt", "responses": "response", "scores": "label", "group": "prompt"}
    assert read(single, columns=words) == ["a>b"]


def test_rows_of_one_prompt_that_lie_apart_are_not_lost():
    rows = [{"prompt": q, "response": r, "score": s} for q, r, s in (("p", "a", 1), ("q", "c", 2), ("p", "b", 2))]
    with pytest.raises(DataError, match="same 'prompt' are not next to each other: sort the data by it"):
        read(rows)


def test_an_alone_standing_answer_takes_the_place_of_the_last_one_and_of_no_other():
    turns = [U, {"role": "assistant", "content": "z"}, U, {"role": "assistant", "content": "a"}]
    (record,) = rows_in_memory([{"messages": turns, "rejected_response": "b"}])
    assert record.content["prompt"] == turns[:3] and text(record.content["rejected"]) == "b"
    for messages in ([U], turns[:3]):  # no answer that the other could replace
        with pytest.raises(DataError):
            list(rows_in_memory([{"messages": messages, "rejected_response": "b"}]))


def test_a_list_that_is_best_first_can_be_said_so():
    rows = [{"instruction": "p", "output": ["a", "b"]}]
    with pytest.raises(DataError, match=r"listed best first, --columns prompt=\.\.\. responses=output says so"):
        read(rows)
    assert read(rows, columns={"prompt": "instruction", "responses": "output"}) == ["a>b"]


def test_nothing_says_which_is_better():
    with pytest.raises(DataError, match=r"'best' says x, y, and it is not clear which of response_a,response_b,"):
        read(labelled(ABC, "best", "x", "y"))
    with pytest.raises(DataError, match="no column says which is better; found: prompt, response_a, response_b"):
        read([AB])


SHAPES = {
    "text": ("p", "a", "b"),
    "messages": tuple(
        [{"role": role, "content": t}] for role, t in zip(("user", *["assistant"] * 2), "pab", strict=True)
    ),
    "single messages": tuple(
        {"role": r, "content": t} for r, t in zip(("user", *["assistant"] * 2), "pab", strict=True)
    ),
    "from and value": tuple([{"from": f, "value": t}] for f, t in zip(("human", "gpt", "gpt"), "pab", strict=True)),
    "a single from and value": tuple(
        {"from": f, "value": t} for f, t in zip(("human", "gpt", "bot"), "pab", strict=True)
    ),
    "an object with messages": tuple(
        {"messages": [{"role": r, "content": t}]} for r, t in zip(("user", *["assistant"] * 2), "pab", strict=True)
    ),
    "JSON text": tuple(
        f'[{{"role": "{r}", "content": "{t}"}}]' for r, t in zip(("user", *["assistant"] * 2), "pab", strict=True)
    ),
    "JSON text of one message": tuple(
        f'{{"from": "{f}", "value": "{t}"}}' for f, t in zip(("human", "gpt", "gpt"), "pab", strict=True)
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("names", [("prompt", "chosen", "rejected"), ("question", "preferred", "dispreferred")])
def test_turns_of_any_shape_mean_the_same_pair(shape: str, names: tuple[str, str, str]):
    (record,) = rows_in_memory([dict(zip(names, SHAPES[shape], strict=True))])
    as_messages = shape != "text"
    want = SHAPES["messages" if as_messages else "text"]
    assert [record.content[n] for n in ("prompt", "chosen", "rejected")] == list(want)


@pytest.mark.parametrize("columns", [None, {"prompt": "q"}])
def test_text_that_looks_like_json_and_holds_no_turns_stays_text(columns: dict[str, str] | None):
    rows = [{**PAIR, "q": "[1, 2]", "chosen": '{"fruit": "plum"}', "rejected": '["a", "b"]'}]
    (record,) = rows_in_memory(rows, columns)
    assert (record.content["chosen"], record.content["rejected"]) == ('{"fruit": "plum"}', '["a", "b"]')


def content(row: dict[str, Any], **options: Any) -> Any:
    (record,) = rows_in_memory([row], **options)
    return record.content["prompt"]


def test_system_and_input_belong_to_the_prompt():
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "p"}
    for name in ("system", "system_prompt", "system_message"):
        assert content({**PAIR, name: "s"}) == [system, user]
    assert content({**PAIR, "prompt": [user], "system": "s"}) == [system, user]
    assert content({**PAIR, "prompt": [system, user], "system": "s"}) == [system, user]  # it is there already
    assert content({**PAIR, "system": ""}) == content({**PAIR, "system": None}) == "p"
    assert content({"instruction": "p", "input": "more", "chosen": "a", "rejected": "b"}) == "p\nmore"
    assert content({"instruction": "p", "input": "", "chosen": "a", "rejected": "b"}) == "p"
    assert (
        content(
            {"question": "p", "extra": "more", "chosen": "a", "rejected": "b"},
            columns={"prompt": "question", "input": "extra", "chosen": "chosen", "rejected": "rejected"},
        )
        == "p\nmore"
    )
    with pytest.raises(DataError, match="two system texts"):
        content({**PAIR, "prompt": [system, user], "system": "another"})


NOTES = {
    "history": (
        {"history": "earlier"},
        "'history' looks like a prompt and is not read; --columns prompt=history takes it",
    ),
    "input": ({"input": "more"}, "prompt=input takes it instead of 'prompt', input=input puts it under that"),
    "turns": (
        {"history": [{"role": "user", "content": "hello"}]},
        "prompt=history takes it instead of 'prompt', history=history puts it in front of that",
    ),
    "context": ({"context": "a text of several words"}, "'context' looks like a prompt and is not read"),
    "passage": ({"passage": "a text of several words"}, "'passage' looks like a part of the prompt and is not read"),
    "scores": (
        {"score_chosen": 1, "score_rejected": 2.5},
        "'score_chosen' and 'score_rejected' say the opposite of schema chosen-rejected in 1 of 1 rows",
    ),
    "ranks": ({"chosen_rank": 2, "rejected_rank": 1}, "'chosen_rank' and 'rejected_rank' say the opposite"),
    "turned round": ({"flipped": True}, "'flipped' looks like a label"),
    "label": ({"label": 1}, "'label' looks like a label and is not read"),
    "rank": ({"rank": 2}, "'rank' looks like a rank and is not read"),
    "ties": ({"status": "tie"}, "'status' says tie in 1 of 1 rows and is not read"),
    "other sides": (
        {"full_chosen": "a text of words", "full_rejected": "another one of words"},
        "'full_chosen' and 'full_rejected' look like responses and are not read; --columns chosen=full_chosen",
    ),
    "safer": ({"safer_response_id": 0}, "'safer_response_id' looks like a label"),
    "an answer that is begun": (
        {"initial_reason_steps": "Step 1: we add the numbers."},
        "'initial_reason_steps' looks like a part of the prompt and is not read",
    ),
}


@pytest.mark.parametrize(("extra", "note"), NOTES.values(), ids=NOTES)
def test_a_column_that_may_matter_is_named(extra: dict[str, Any], note: str):
    source = rows_in_memory([{**PAIR, **extra}])
    assert any(note in line for line in source.messages())


@pytest.mark.parametrize("image", [{"bytes": b"x"}, "a.jpg", ["a.jpg"]])
@pytest.mark.parametrize("row", [PAIR, {**P, "responses": ["a", "b"], "scores": [2, 1]}, {**AB, "winner": "A"}])
def test_rows_that_show_something_are_refused_until_the_texts_alone_are_meant(image: Any, row: dict[str, Any]):
    """TRL refuses them too, where the model is one of texts: the pair is another one without its picture."""
    for more in ({"image": image}, {"clip_video": image}, {"image": None}):
        rows = [{**row, **more}, {**row, "image": None}]
        if more == {"image": None}:
            assert read(rows) == ["a>b"] * 2
            continue
        with pytest.raises(
            DataError, match=r"looks like what a prompt shows .*; to take the texts alone: --columns (.*)"
        ) as refusal:
            read(rows)
        words = str(refusal.value).partition("--columns ")[2]
        columns = dict(word.split("=") for word in words.split())
        assert read(rows, columns=columns) == ["a>b"] * 2
        assert any("looks like what a prompt shows" in note for note in rows_in_memory(rows, columns=columns).notes)
    assert read([{**row, "has_image": False}]) == ["a>b"]


@pytest.mark.parametrize(
    "others", [{"messages": 0}, {"conversations": 0}, {"question": 0, "system": "s"}, {"instruction": 0, "input": "i"}]
)
def test_a_column_that_is_called_prompt_is_the_prompt(others: dict[str, Any]):
    answer = [{"role": "assistant", "content": t} for t in "ab"]
    whole = [{"role": "user", "content": "another"}, answer[0]]
    row = {"prompt": [U], "chosen": answer[:1], "rejected": answer[1:]}
    beside = {n: (whole if "s" in n[-1:] and n != "input" else "another") if v == 0 else v for n, v in others.items()}
    (record,) = rows_in_memory([{**row, **beside}])
    assert [m["content"] for m in record.content["prompt"]] == (["s", "p"] if "system" in others else ["p"])


def test_texts_beside_token_ids_are_named_and_can_be_taken():
    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
    (note,) = rows_in_memory([{**PAIR, **ids}]).notes
    assert note.startswith(
        "prompt_ids, chosen_ids, rejected_ids are read, and the texts in 'chosen' and 'rejected' are not"
    )
    assert read([{**PAIR, **ids}], columns=dict.fromkeys(ids, "")) == ["a>b"]
    assert not rows_in_memory([{**P, **ids}]).notes


def test_roles_are_read_in_any_letters():
    sides = {s: [{"role": "Assistant", "content": t}] for s, t in (("chosen", "a"), ("rejected", "b"))}
    (record,) = rows_in_memory([{"prompt": [{"role": "USER", "content": "p"}], **sides}])
    assert [record.content[n][0]["role"] for n in ("prompt", "chosen", "rejected")] == [
        "user",
        "assistant",
        "assistant",
    ]


def test_the_turn_that_was_judged_is_named():
    turns = {s: [U, *({"role": "assistant", "content": f"{s}{i}"} for i in (1, 2))] for s in "ab"}
    rows = [{f"conversation_{s}": turns[s] for s in "ab"} | {"winner": "a", "turn": i} for i in (1, 2, 0, None)]
    (note,) = rows_in_memory(rows).notes
    assert note.startswith("column 'turn' says of 1 of the first 4 pairs that an earlier turn than their last")


def test_a_column_that_an_option_reads_is_not_named(tmp_path):
    """Beside it another one is; a longer name that begins alike is another column."""
    row = {**PAIR, "label_probability": 0.7, "label_probability_b": 0.2}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = open_pairs(str(tmp_path / "rows.jsonl"), read=["label_probability"])
    assert [note.split("'")[1] for note in source.notes] == ["label_probability_b"]
    assert len(open_pairs(str(tmp_path / "rows.jsonl")).notes) == 2


def test_a_list_of_which_nothing_says_the_order_is_reported():
    (warning,) = rows_in_memory([{**P, "responses": ["a", "b"]}]).messages()
    assert "no column says which of 'responses' is better: the first is taken for the best" in warning


def test_earlier_turns_go_in_front_of_the_prompt():
    earlier = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "p\nmore"}
    alpaca = {"instruction": "p", "input": "more", "chosen": "a", "rejected": "b"}
    assert content({**alpaca, "history": [["q", "r"]]}) == [*earlier, user]
    assert content({**alpaca, "history": [["q", "r"]], "system": "s"}) == [system, *earlier, user]
    first, second = rows_in_memory([{**alpaca, "history": [["q", "r"]]}, {**alpaca, "history": []}])
    assert second.content["prompt"] == [user] != first.content["prompt"]  # both are written by the template
    words = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "history": "before"}
    assert content({**PAIR, "before": earlier}, columns=words) == [*earlier, {"role": "user", "content": "p"}]
    assert read([{**PAIR, "before": "q"}, {**PAIR, "before": None}], columns=words) == ["unreadable", "a>b"]


def test_a_conversation_that_a_table_of_text_printed_is_read_back_or_reported():
    turns = [{"role": "user", "content": 'it\'s "p"'}]
    assert content({**PAIR, "prompt": str(turns)}) == turns
    printed = "array([{'content': 'p', 'role': 'user'}], dtype=object)"
    rows = [PAIR, {**PAIR, "prompt": printed}, {**PAIR, "chosen": printed}, {**PAIR, "prompt": "[{'role': 'user', ..."}]
    assert read(rows) == ["a>b", *["unreadable"] * 3]
    assert all("as a program prints it" in r.fault for r in list(rows_in_memory(rows).tolerant())[1:])


def test_columns_that_say_nothing_new_are_not_named():
    quiet = {"query": "p", "source": "web", "score_chosen": 2.0, "label": None, "system": " ", "messages": []}
    assert rows_in_memory([{**PAIR, **quiet}]).messages() == []


def test_rows_that_cannot_be_read_do_not_stop_the_others():
    bad = [{**PAIR, "chosen": v} for v in (None, 3, ["a", 3], {"text": "a"}, True)]
    missing = [{"prompt": "p", "chosen": "a"}, {}]
    assert read([PAIR, *bad, *missing, PAIR]) == ["a>b", *["unreadable"] * 7, "a>b"]
    faults = [r.fault for r in rows_in_memory([PAIR, *bad, *missing]).tolerant()][1:]
    assert "it is null here" in faults[0] and "int 3" in faults[1] and "no column 'rejected'" in faults[5]


def test_scores_that_contradict_the_label_of_a_preset_are_reported_and_a_tie_has_its_reason():
    shp = {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 9, "score_B": 2}
    assert any(
        "'score_A' and 'score_B' say the opposite of schema shp" in line for line in rows_in_memory([shp]).messages()
    )
    assert len(rows_in_memory([{**shp, "labels": 1}]).messages()) == 1
    (tie,) = rows_in_memory([{**AB, "winner_model_a": 0, "winner_model_b": 0, "winner_tie": 1}])
    assert tie.content["tie"] == "winner_tie is 1"


def test_the_order_of_a_list_can_be_taken_where_another_column_stands_beside_it():
    rows = [{**P, "responses": ["a", "b"], "winner": "B"}]
    assert read(rows, columns={"responses": "responses"}) == ["a>b"]


def test_what_is_wrong_with_numbers_is_reported_where_no_row_can_be_read():
    for ranks, why in (
        ([2, None, 1], "'ranks' is NoneType None; expected a finite number"),
        ([1, 2], "expected 3 numbers"),
    ):
        with pytest.raises(DataError, match=why):
            read([{**LIST, "ranks": ranks}])
