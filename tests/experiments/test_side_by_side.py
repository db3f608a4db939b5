"""The comparison's arithmetic, and that every way computes every response once."""

import json

import numpy as np
import pytest

from experiments.benchmarks import scoring_ways, side_by_side
from experiments.benchmarks.side_by_side_page import write_page

ROWS = [
    {"prompt": [5] * p, "chosen": [7] * c, "rejected": [9] * r}
    for p, c, r in np.random.default_rng(0).integers(1, 700, (23, 3)).tolist()
]


@pytest.mark.parametrize("plan", [scoring_ways._one_by_one, scoring_ways._padded, scoring_ways._packed])
def test_every_response_is_in_a_plan_once_with_its_prompt_before_it(plan):
    plans = plan(scoring_ways.sequences(ROWS))
    seen = {}
    for one in plans:
        for pair, side, line, start, stop in one.places:
            ids = ROWS[pair][("chosen", "rejected")[side]]
            assert (pair, side) not in seen and stop - start == len(
                ids
            ) + 1  # the last of the prompt predicts the first
            assert one.tokens[line][start + 1 : stop] == ids
            seen[pair, side] = True
            if plan is scoring_ways._packed:
                first = stop - len(ids) - len(ROWS[pair]["prompt"])
                assert (
                    set(one.mask[first:stop]) == {one.mask[first]} and one.mask.count(one.mask[first]) == stop - first
                )
                assert one.positions[first:stop] == list(range(stop - first))
    assert len(seen) == 2 * len(ROWS)
    if plan is not scoring_ways._one_by_one:
        assert all(sum(map(len, one.tokens)) <= scoring_ways.TOKENS for one in plans)


def turn(ours, theirs):
    def answer(seconds, peak):
        return {"cpu_seconds": seconds, "seconds": seconds, "peak_gflops": peak, "others": 0.0, "steal": 0.3}

    return {"ours": answer(ours, 10.0), "torch-packed": answer(theirs, 20.0)}


def test_shares_are_of_the_higher_peak_and_ratios_are_turn_by_turn(tmp_path):
    ready = {
        way: {"ches_sum": 3.0, "weights": 10**9, "positions": 9, "warming_cpu_seconds": 1.0}
        for way in ("ours", "torch-packed")
    }
    result = side_by_side.compared(ready, [turn(1, 2), turn(2, 6), turn(1, 1)], {"useful_positions": 5})
    assert result["peak_gflops_per_core"] == 20 and result["ratios"] == {"torch-packed": [1, 2, 3]}
    assert result["table"]["ours"]["share_of_peak"] == pytest.approx(2 * 5 / 20)
    assert result["load"] == {"others": 0.0, "steal": 0.3}
    ready["ours"]["ches_sum"] = 3.1
    with pytest.raises(SystemExit, match="differ"):
        side_by_side.compared(ready, [turn(1, 2)], {"useful_positions": 5})
    case = {"data": "<hh>", "size": "3m", "threads": 1, **result}
    case |= {"pairs": 2, "repeats": 3}
    record = {"environment": {"cpu": "a", "cores": 2}, "loaded": True, "cases": [case]}
    page = write_page(json.loads(json.dumps(record)), tmp_path / "page.html").read_text()
    assert "no evidence" in page and "50% of the measured peak" in page and "<hh>" not in page


def test_cases_are_added_to_those_of_the_same_environment_alone():
    def case(data: str, pairs: int) -> dict:
        return {"data": data, "size": "3m", "threads": 1, "pairs": pairs}

    before = {"environment": {"commit": "a"}, "cases": [case("hh", 16), case("long", 16)]}
    actual = side_by_side.added(before, {"commit": "a"}, [case("hh", 48)])
    assert actual == [case("long", 16), case("hh", 48)]
    with pytest.raises(SystemExit, match="another environment"):
        side_by_side.added(before, {"commit": "b"}, [])


def test_work_counts_a_prompt_once_for_its_pair_and_a_common_beginning_once():
    rows = [{"prompt": [1, 2, 3], "chosen": [4], "rejected": [5, 6]}]
    assert side_by_side.work_of(rows) == {"useful_positions": 6, "positions_apart": 9}
    more = [
        *rows,
        {"prompt": [1, 2, 4, 3], "chosen": [4], "rejected": [5]},
        {"prompt": [1, 3], "chosen": [], "rejected": []},
    ]
    # the 1 that all begin with, once
    assert side_by_side.work_of(more) == {"useful_positions": 6 + 6 + 2 - 2, "positions_apart": 9 + 10 + 4}
