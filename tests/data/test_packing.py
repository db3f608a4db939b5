"""Packed rows hold every pair once, aligned as the drawing in ``data.packing`` says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ches_jax.data.packing import (
    FEW_BATCHES,
    SHORT_ROWS,
    Candidates,
    first_fit_decreasing,
    fitting_length,
    pack,
    packed_length,
    plan_batches,
    row_capacity,
    row_length,
)
from ches_jax.types import Response, TokenPair


def pair(prompt, chosen, rejected, *, complete=True, index=0):
    end = 2 if complete else None
    return TokenPair(
        row_id=str(index),
        index=index,
        prompt=tuple(prompt),
        chosen=Response(tuple(chosen), end),
        rejected=Response(tuple(rejected), end),
    )


def only(batches):
    ((rows, placements),) = batches
    return rows, placements


def test_the_drawing_of_the_module_docstring():
    p = pair([10, 11, 12], [21, 22, 23], [21, 32])
    rows, (place,) = only(pack([p], length=64, rows_per_batch=1, eos="include"))
    assert rows.tokens[0, :7].tolist() == [10, 11, 12, 21, 22, 23, 32]
    assert rows.positions[0, :7].tolist() == [0, 1, 2, 3, 4, 5, 4]
    assert rows.own_start[0, :7].tolist() == [0, 0, 0, 0, 4, 4, 6]
    assert rows.context_end[0, :7].tolist() == [0, 0, 0, 0, 4, 4, 4]
    predictions = list(zip(rows.source[0], rows.target[0], rows.segment[0], strict=True))
    used = [tuple(map(int, p)) for p in predictions if p[2] < row_capacity(64)[2]]
    shared, chosen, rejected = place.shared, place.chosen, place.rejected
    assert used == [
        (2, 21, shared),
        (3, 22, chosen),
        (4, 23, chosen),
        (5, 2, chosen),
        (3, 32, rejected),
        (6, 2, rejected),
    ]
    assert rows.last[0, [chosen, rejected]].tolist() == [5, 6]


def test_without_the_terminator_the_last_state_predicts_nothing():
    rows, (place,) = only(pack([pair([5], [6], [7])], length=64, rows_per_batch=1, eos="exclude"))
    assert (rows.segment[0] == place.chosen).sum() == 1
    assert rows.source[0][rows.segment[0] == place.chosen].tolist() == [0]
    assert rows.last[0, place.chosen] == 1  # but it is the last hidden state


def test_a_response_that_begins_the_other_is_wholly_shared():
    rows, (place,) = only(pack([pair([5], [6, 7], [6, 7, 8])], length=64, rows_per_batch=1, eos="include"))
    assert rows.target[0][rows.segment[0] == place.chosen].tolist() == [2]
    assert rows.last[0, place.chosen] == 2
    assert rows.target[0][rows.segment[0] == place.rejected].tolist() == [8, 2]


def test_a_cut_response_has_no_terminator_to_predict():
    rows, (place,) = only(pack([pair([5], [6], [7], complete=False)], length=64, rows_per_batch=1, eos="include"))
    assert rows.target[0][rows.segment[0] == place.chosen].tolist() == [6]


def test_beyond_the_length_threshold_nothing_is_shared():
    p = pair([5, 6], [7, 8], [7, 9])
    assert packed_length(p) == 5
    assert packed_length(p, length_threshold=3) == 8
    rows, (place,) = only(pack([p], length=64, rows_per_batch=1, eos="include", length_threshold=3))
    assert rows.tokens[0, :8].tolist() == [5, 6, 7, 8, 5, 6, 7, 9]
    assert (rows.segment[0] == place.shared).sum() == 0
    assert rows.lengths[0, :8].tolist() == [4] * 8


def test_a_pair_too_long_for_a_row_gets_a_doubled_one():
    p = pair(range(100), range(100, 180), range(200, 260))
    assert row_length(p, 64) == 256
    assert [rows.tokens.shape for rows, _ in pack([p], length=64, rows_per_batch=4, eos="include")] == [(1, 256)]
    shapes = [r.tokens.shape for r, _ in pack([p], length=64, rows_per_batch=4, row_multiple=2, eos="include")]
    assert shapes == [(2, 256)]


def test_assign_fills_rows_first_fit_in_falling_size():
    assert first_fit_decreasing([40, 20, 32, 64], 64) == [[3], [0, 1], [2]]


lists = st.lists(st.integers(3, 9), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(lists, lists, lists), min_size=1, max_size=9), st.sampled_from([32, 64, 128]), st.integers(1, 3)
)
def test_every_prediction_of_every_pair_is_there_once(triples, length, rows_per_batch):
    pairs = [pair(*t, index=i) for i, t in enumerate(triples)]
    seen = set()
    for rows, placements in pack(pairs, length=length, rows_per_batch=rows_per_batch, eos="include"):
        for place in placements:
            assert place.pair not in seen
            seen.add(place.pair)
            p = pairs[place.pair]
            by_segment = {
                s: rows.target[place.row][rows.segment[place.row] == s].tolist()
                for s in (place.shared, place.chosen, place.rejected)
            }
            assert by_segment[place.shared] + by_segment[place.chosen] == list(p.chosen.targets("include"))
            assert by_segment[place.shared] + by_segment[place.rejected] == list(p.rejected.targets("include"))
            for s in by_segment:
                sources = rows.source[place.row][rows.segment[place.row] == s]
                # the state that predicts the k-th token stands k - 1 after the prompt's last
                assert (np.diff(rows.positions[place.row][sources]) == 1).all()
    assert seen == set(range(len(pairs)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(lists, st.lists(lists, min_size=1, max_size=4)), min_size=1, max_size=6))
def test_every_position_sees_the_sequence_that_it_continues_and_no_more(drawn):
    """Of any number of responses: what the state of a prediction sees is the prompt and its own response."""
    items = [
        Candidates(tuple(prompt), tuple(Response((*r, 10 + k), 2) for k, r in enumerate(responses)), 1)
        for prompt, responses in drawn
    ]
    for rows, placements in pack(items, length=64, rows_per_batch=2, eos="include"):
        for place in placements:
            of = {name: values[place.row] for name, values in rows._asdict().items() if values is not None}
            item = items[place.item]
            longest = len(item.prompt) + max(len(r.content) for r in item.responses)
            for k, response in enumerate(item.responses):
                segment, expected = place.shared + 1 + k, [*item.prompt, *response.content, 2]
                at = np.flatnonzero((of["segment"] == place.shared) | (of["segment"] == segment))
                for done, prediction in enumerate(at, len(item.prompt)):
                    source = of["source"][prediction]
                    seen = [*range(of["context_start"][source], of["context_end"][source])]
                    seen += range(of["own_start"][source], source + 1)
                    assert of["tokens"][seen].tolist() == expected[:done]
                    assert of["target"][prediction] == expected[done]
                    assert of["positions"][source] == done - 1 and of["lengths"][source] == longest
                assert len(at) == len(response.content) + 1 and of["tokens"][of["last"][segment]] == 10 + k


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 64), max_size=20))
def test_no_row_holds_more_than_it_has_room_for(lengths):
    rows = first_fit_decreasing(lengths, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 64 for row in rows)


@pytest.mark.parametrize("length", [32, 64, 2048])
def test_capacity_bounds_what_a_row_can_hold(length):
    pairs, predictions, segments = row_capacity(length)
    assert segments == 3 * pairs
    assert predictions >= length + pairs


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 120), st.integers(1, 150), st.integers(1, 150)), max_size=40),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([256, 512, 2048]),
)
def test_few_pairs_get_the_row_length_with_the_fewest_positions(lengths, rows, standard):
    pairs = [pair(range(3, 3 + p), range(9, 9 + c), range(2, 2 + r)) for p, c, r in lengths]

    def computed(length):
        batches = list(pack(pairs, length=length, rows_per_batch=rows, row_multiple=rows, eos="include"))
        assert sum(len(places) for _, places in batches) == len(pairs)
        return sum(batch.tokens.size for batch, _ in batches), {batch.tokens.shape[1] for batch, _ in batches}

    length = fitting_length(pairs, standard, rows)
    if sum(map(packed_length, pairs)) > FEW_BATCHES * rows * standard:
        assert length == standard
    elif pairs:
        positions, shapes = computed(length)
        assert length in (*SHORT_ROWS, standard) and length <= standard and (shapes == {length} or length == standard)
        for other in (*SHORT_ROWS, standard):
            theirs, shapes = computed(other)
            # a row that cannot hold the longest pair would be a second shape
            assert other > standard or shapes != {other} or (positions, length) <= (theirs, other)


def test_what_a_long_row_has_left_holds_short_pairs():
    long, short = pair(range(900), range(300), range(9, 400)), pair(range(50), range(60), range(9, 90))
    plans = list(plan_batches([short, long, *[short] * 3], length=1024, rows_per_batch=2))
    assert [(plan.length, plan.rows) for plan in plans] == [(1024, [[3, 4]]), (2048, [[0, 1, 2]])]


@pytest.mark.parametrize(
    ("lengths", "rows"), [((1500,), 1536), ((1500, 1530), 1536), ((1500, 1900), 2048), ((900,), 1024)]
)
def test_long_rows_are_as_short_as_all_of_their_kind_allow(lengths, rows):
    """And never of two lengths between two doublings: each is a program."""
    items = [pair(range(3, 3 + n - 20), range(100, 110), range(200, 210)) for n in lengths]
    assert {plan.length for plan in plan_batches(items, length=1024, rows_per_batch=1)} == {rows}
