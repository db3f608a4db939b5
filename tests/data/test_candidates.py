"""Rows with several responses: what pairs they stand for, that these mean what they mean as rows of their own."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ches_jax import bundled
from ches_jax.data.packing import Candidates, PairRef, group_by_prompt, pack, packed_length, responses_of
from ches_jax.data.prompts import canonical_content, lookup, pair_contents
from ches_jax.data.sources import open_pairs
from ches_jax.data.tokenize import PairTokenizer, load_tokenizer
from ches_jax.errors import DataError
from ches_jax.types import Response, TokenPair
from tests.helpers import write_lines

ALL, AGAINST = "all-pairs", "chosen-against-all"


def numbers(row, pairing, columns=None):
    return [n for n, _ in pair_contents(row, columns or {}, pairing)]


@pytest.mark.parametrize(
    ("row", "against", "every"),
    [
        ({}, [(0, 1), (0, 2)], [(0, 1), (0, 2), (1, 2)]),
        ({"scores": [1, 3, 2]}, [(1, 0), (1, 2)], [(1, 0), (1, 2), (2, 0)]),
        ({"scores": [2.5, 2.5, 1]}, [(0, 2)], [(0, 2), (1, 2)]),
        ({"scores": [False, True, False]}, [(1, 0), (1, 2)], [(1, 0), (1, 2)]),
        ({"scores": [1, 1, 1]}, [()], [()]),
        ({"chosen": None, "rejected": None}, [(0, 1), (0, 2)], [(0, 1), (0, 2), (1, 2)]),
    ],
    ids=["best first", "scores", "ties", "labels", "all equal", "nulls"],
)
def test_the_pairs_of_three_candidates(row, against, every):
    row = {"prompt": "p", "responses": ["a", "b", "c"], **row}
    assert numbers(row, AGAINST) == against
    assert numbers(row, ALL) == every


@pytest.mark.parametrize("row", [{"scores": None}, {"chosen": None}, {"chosen": None, "scores": None}])
def test_a_column_with_nothing_in_it_is_not_the_order_of_the_list(row):
    with pytest.raises(DataError, match="is null, so that the row does not say which response is preferred"):
        numbers({"prompt": "p", "responses": ["a", "b"], **row}, AGAINST)


def test_the_chosen_one_by_its_number_stands_against_all_others():
    assert numbers({"prompt": "p", "responses": ["a", "b", "c"], "chosen": 1}, AGAINST) == [(1, 0), (1, 2)]


@pytest.mark.parametrize("responses", [[], ["a"]])
def test_fewer_than_two_make_no_pair(responses):
    row = {"prompt": "p", "responses": responses}
    assert pair_contents(row, {}, ALL) == pair_contents(row, {}, AGAINST) == [((), row)]


user, assistant = ({"role": role, "content": "q"} for role in ("user", "assistant"))
SHAPES = {
    "texts": ({"prompt": "p"}, [" a", " b", " c"]),
    "dialogues": ({}, [f"\n\nHuman: hi\n\nAssistant:{x}" for x in (" a", " b", " b\n\nHuman: x\n\nAssistant: y")]),
    "conversations": ({}, [[user, {**assistant, "content": x}] for x in "abc"]),
    "messages after a prompt": ({"prompt": [user], "tools": "[]"}, [[{**assistant, "content": x}] for x in "abc"]),
    "texts after messages": ({"prompt": [user]}, ["a", "b", "c"]),
    "token ids": ({"prompt_ids": [1, 2]}, [[3], [4, 5], []]),
}


@pytest.mark.parametrize(("shared", "responses"), SHAPES.values(), ids=SHAPES)
def test_a_pair_of_candidates_is_the_pair_that_it_would_be_as_a_row(shared, responses):
    sides = ("chosen_ids", "rejected_ids") if "prompt_ids" in shared else ("chosen", "rejected")
    actual = pair_contents({**shared, "responses": responses}, {}, ALL)
    assert [n for n, _ in actual] == [(0, 1), (0, 2), (1, 2)]
    for pair, content in actual:
        assert pair
        i, j = pair
        assert content == canonical_content({**shared, sides[0]: responses[i], sides[1]: responses[j]}, {})


def test_a_single_message_is_a_conversation_of_one():
    row = {"prompt": [user], "responses": [{**assistant, "content": x} for x in "ab"]}
    ((_, content),) = pair_contents(row, {}, AGAINST)
    assert content == {"prompt": [user], "chosen": [row["responses"][0]], "rejected": [row["responses"][1]]}


def test_columns_are_renamed_and_a_dot_reaches_into_objects():
    row = {
        "instruction": "p",
        "completions": [{"response": " a", "overall_score": 3.0}, {"response": " b", "overall_score": 8.5}],
    }
    columns = {"prompt": "instruction", "responses": "completions.response", "scores": "completions.overall_score"}
    assert pair_contents(row, columns, AGAINST) == [((1, 0), {"prompt": "p", "chosen": " b", "rejected": " a"})]
    by_field = {"completions": {"response": [" a", " b"]}}  # how datasets hands out its older Sequence feature
    assert lookup(by_field, "completions.response") == [" a", " b"]
    assert lookup({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert lookup(row, "instruction.response") is lookup(row, "") is None


def test_a_pair_beside_a_column_called_responses_stays_a_pair(tmp_path):
    row = {"prompt": "p", "chosen": " a", "rejected": " b", "responses": [" x", " y"], "scores": [1, 2]}
    path = write_lines(tmp_path / "a.jsonl", [row])
    (read,) = open_pairs(path)
    assert (read.candidates, read.extra) == (None, {"responses": [" x", " y"], "scores": [1, 2]})
    hidden = {"responses": "responses", "chosen": "", "rejected": ""}  # named explicitly
    (read,) = open_pairs(path, columns=hidden)
    assert (read.candidates, read.content) == ((1, 0), {"prompt": "p", "chosen": " y", "rejected": " x"})


@pytest.mark.parametrize(
    ("row", "pairing", "message"),
    [
        ({"responses": ["a"] * 3000}, ALL, "3000 responses make 4498500 pairs; a row may make 100000"),
        ({"responses": ["a", "b"], "scores": [1, 10**4000]}, ALL, "finite numbers"),
        ({"responses": "a"}, AGAINST, "'responses' is str 'a'; expected a list of texts"),
        ({"responses": [{"text": "a"}]}, AGAINST, "--columns responses=completions.response"),
        ({"responses": [None, "a"]}, AGAINST, "'responses' is list"),
        ({"responses": ["a", [user]]}, AGAINST, "responses 0 and 1 as chosen and rejected: one of"),
        ({"responses": [[1], [2]]}, AGAINST, "prompt_ids"),
        ({"responses": ["a", "b"], "chosen": 2}, AGAINST, "'chosen' is int 2; .*from 0 to 1"),
        ({"responses": ["a", "b"], "chosen": -1}, AGAINST, "from 0 to 1"),
        ({"responses": ["a", "b"], "chosen": "a"}, AGAINST, "--columns chosen= hides"),
        ({"responses": ["a", "b"], "chosen": True}, AGAINST, "'chosen' is bool"),
        ({"responses": ["a", "b"], "chosen": 0}, ALL, "all-pairs needs an order"),
        ({"responses": ["a", "b"], "chosen": 0, "scores": [1, 2]}, AGAINST, "hide one"),
        ({"responses": ["a", "b"], "scores": [1]}, AGAINST, "a list of 2 finite numbers"),
        ({"responses": ["a", "b"], "scores": [1, None]}, AGAINST, "finite numbers"),
        ({"responses": ["a", "b"], "scores": [1, float("nan")]}, ALL, "finite numbers"),
        ({"chosen": "a", "rejected": ["b", "c"]}, AGAINST, "several responses go into a column 'responses'"),
    ],
)
def test_what_cannot_be_read_is_one_clear_message(row, pairing, message):
    with pytest.raises(DataError, match=message):
        pair_contents({"prompt": "p", **row}, {}, pairing)


MIXED = [
    {"prompt": "p", "responses": [" a", " b", " c"], "category": "x"},
    {"prompt": "p", "chosen": " a", "rejected": " b", "note": 7},
    {"prompt": "p", "responses": [" a"]},
    {"prompt": "p", "responses": [" c", " a", " c"]},
]


def test_pairs_and_candidates_mix_in_any_format_and_keep_their_row_and_identity(tmp_path):
    names = {name for row in MIXED for name in row}
    pq.write_table(pa.Table.from_pylist([dict.fromkeys(names) | row for row in MIXED]), tmp_path / "a.parquet")
    source = open_pairs(write_lines(tmp_path / "a.jsonl", MIXED), pairing=ALL)
    rows = list(source)
    assert [(r.index, r.candidates) for r in rows] == [
        (0, (0, 1)),
        (0, (0, 2)),
        (0, (1, 2)),
        (1, None),
        (2, ()),
        (3, (0, 1)),
        (3, (0, 2)),
        (3, (1, 2)),
    ]
    assert rows[0].row_id == rows[3].row_id  # the same pair
    assert [r.category for r in rows[:4]] == ["x"] * 3 + [None]
    assert rows[3].extra == {"note": 7}
    assert [[r.candidates for r in some] for some in source.rows_from(2)] == [[()], [(0, 1), (0, 2), (1, 2)]]
    parquet = list(open_pairs(str(tmp_path / "a.parquet"), pairing=ALL))
    assert [(r.row_id, r.index, r.candidates) for r in parquet] == [(r.row_id, r.index, r.candidates) for r in rows]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(bundled.model_dir())


def test_each_pair_is_audited_as_it_would_be_alone(tmp_path, tokenizer):
    responses = [" Yes", "", " No" * 40, " Yes"]
    rows = [{"prompt": "Do you agree?", "responses": responses}, {"prompt": "a", "responses": []}]
    pairs = PairTokenizer(tokenizer, 24)(list(open_pairs(write_lines(tmp_path / "a.jsonl", rows), pairing=ALL)))
    alone = [
        {"prompt": "Do you agree?", "chosen": responses[i], "rejected": responses[j]}
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    own = PairTokenizer(tokenizer, 24)(list(open_pairs(write_lines(tmp_path / "b.jsonl", alone))))
    assert [(p.row_id, p.prompt, p.chosen, p.rejected, p.flags, p.detail) for p in pairs[:-1]] == [
        (p.row_id, p.prompt, p.chosen, p.rejected, p.flags, p.detail) for p in own
    ]
    assert {p.candidates: p.flags for p in pairs[:-1]} == {
        (0, 1): ("empty_rejected",),
        (0, 2): ("truncated_rejected",),
        (0, 3): ("identical",),
        (1, 2): ("empty_chosen", "truncated_rejected"),
        (1, 3): ("empty_chosen",),
        (2, 3): ("truncated_chosen",),
    }
    assert (pairs[-1].flags, pairs[-1].detail) == (("no_pair",), {"no_pair": "0 responses"})


def test_each_text_is_written_and_tokenised_once(tmp_path, tokenizer, monkeypatch):
    written, apply = Counter(), tokenizer.apply_chat_template

    def counted(messages, **options):
        written[json.dumps(messages)] += 1
        return apply(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counted)
    row = {"prompt": [user], "responses": [[{**assistant, "content": f"Yes {i}"}] for i in range(6)]}
    tokenise = PairTokenizer(tokenizer, 100)
    rows = list(open_pairs(write_lines(tmp_path / "a.jsonl", [row]), pairing=ALL))
    first = tokenise(rows)  # what the template does to such a conversation is learned here
    written.clear()
    assert tokenise(rows) == first  # and no text is kept
    assert len(first) == 15
    assert sorted(written.values()) == [1] * 7


def pair(index, prompt, chosen, rejected, candidates):
    chosen, rejected = (Response(tuple(r), 2) for r in (chosen, rejected))
    return TokenPair(
        row_id="r", index=index, prompt=tuple(prompt), chosen=chosen, rejected=rejected, candidates=candidates
    )


A, B, C = (7, 8), (7, 9, 10), (7,)


def test_the_pairs_of_a_row_are_one_item_with_each_response_once():
    pairs = [
        pair(0, [5], A, B, (0, 1)),
        pair(0, [5], A, C, (0, 2)),
        pair(0, [5], B, C, (1, 2)),
        pair(1, [5], A, B, None),
        pair(2, [5], A, A, (0, 1)),
        pair(2, [5], A, B, (0, 2)),
        pair(2, [5, 6], A, C, (0, 3)),
    ]
    items, refs = group_by_prompt(pairs)
    assert refs == [
        PairRef(0, 0, 1),
        PairRef(0, 0, 2),
        PairRef(0, 1, 2),
        PairRef(1, 0, 1),
        PairRef(2, 0, 0),
        PairRef(2, 0, 1),
        PairRef(3, 0, 1),
    ]
    assert [isinstance(item, Candidates) for item in items] == [True, False, True, True]
    assert [[r.content for r in responses_of(item)] for item in items] == [[A, B, C], [A, B], [A, B], [A, C]]
    # a token merged across the prompt's end: that pair has another prompt, as it has in a row of its own
    assert [item.prompt for item in items] == [(5,), (5,), (5,), (5, 6)]


def test_three_responses_in_a_row():
    ((rows, (place,)),) = pack(
        group_by_prompt([pair(0, [5, 6], B, A, (0, 1)), pair(0, [5, 6], B, C, (0, 2))])[0],
        length=64,
        rows_per_batch=1,
        eos="include",
    )
    assert rows.tokens[0, :6].tolist() == [5, 6, 7, 9, 10, 8]
    assert rows.positions[0, :6].tolist() == [0, 1, 2, 3, 4, 3]
    assert rows.own_start[0, :6].tolist() == [0, 0, 0, 3, 3, 5]
    assert rows.context_end[0, :6].tolist() == [0, 0, 0, 3, 3, 3]
    used = rows.segment[0] < rows.last.shape[1]
    assert list(zip(rows.source[0][used], rows.target[0][used], rows.segment[0][used], strict=True)) == [
        (1, 7, 0),
        (2, 9, 1),
        (3, 10, 1),
        (4, 2, 1),
        (2, 8, 2),
        (5, 2, 2),
        (2, 2, 3),
    ]
    assert rows.last[0, 1:4].tolist() == [4, 5, 2]
    assert (place.shared, place.segments) == (0, 4)
    assert rows.preferred[0, :5].tolist() == [1, 1, 0, 0, 0]


def test_beyond_the_length_threshold_each_candidate_has_its_own_prompt():
    (item,), _ = group_by_prompt([pair(0, [5, 6], A, B, (0, 1)), pair(0, [5, 6], A, C, (0, 2))])
    assert packed_length(item) == 2 + 1 + 1 + 2
    assert packed_length(item, length_threshold=3) == 4 + 5 + 3


def test_many_candidates_get_a_row_that_holds_them():
    many = [pair(0, [5], (7,), (8 + i,), (0, i + 1)) for i in range(99)]
    few = [pair(1 + i, [5], (7,), (8,), None) for i in range(3)]
    items, _ = group_by_prompt(many + few)
    placed = []
    for rows, places in pack(items, length=64, rows_per_batch=2, eos="include"):
        placed += [p.item for p in places]
        for p in places:
            mine = (rows.segment[p.row] >= p.shared) & (rows.segment[p.row] < p.shared + p.segments)
            assert mine.sum() == 2 * (p.segments - 1)  # one token and EOS of each response
    assert sorted(placed) == list(range(4))
