"""What a claim means by holding, and the list of claims."""

import numpy as np
import pytest

from ches_jax.errors import ChesError
from theory.claims import Claim, Context, Outcome, all_claims, find
from theory.claims.bounds import outcome
from theory.claims.registry import sweep, worst
from theory.toy.search import SearchResult


def claim_with(status, tolerance=1.0):
    return Claim(
        id="t",
        statement="",
        source="",
        status=status,
        scope="toy",
        tolerance=tolerance,
        check=lambda ctx: Outcome(value=0.0, n=0),
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "status, value, holds",
    [
        ("exact", 0.5, True),
        ("exact", 2.0, False),
        ("bound", -3.0, True),
        ("refuted as printed", 2.0, True),
        ("refuted as printed", 0.5, False),
        ("exact", np.nan, False),
        ("refuted as printed", np.inf, False),
    ],
)
def test_a_claim_holds_on_the_right_side_of_its_tolerance(status, value, holds):
    assert claim_with(status).holds(Outcome(value=value, n=1)) == holds


def test_every_claim_names_its_source_and_no_id_is_used_twice():
    claims = all_claims()
    assert len(claims) > 60
    assert all(c.source and c.statement for c in claims)
    assert len({c.id for c in claims}) == len(claims)


def test_unknown_ids_are_reported_together():
    with pytest.raises(ChesError, match=r"(?s)'Q1'.*'Q2'"):
        find(["Q1", "T4", "Q2"])


def test_a_value_that_is_not_a_number_is_the_worst_and_so_is_none():
    assert worst(np.array([0.1, np.nan])) == np.inf
    assert worst(np.array([])) == np.inf


def test_a_bound_that_cannot_be_improved_has_to_be_reached():
    """Of a quantity that is 0 throughout every bound holds, and a claim about its bounds must not."""
    seen, far = {"alpha - 2": np.full(3, -2.0)}, {"alpha - 2": SearchResult(-2.0, 1)}
    near = {"alpha - 2": SearchResult(-0.003, 1)}
    assert outcome(seen, far).value < 0 < outcome(seen, far, tight=True).value
    assert outcome(seen, near, tight=True).value < 0


def test_a_sweep_deals_instances_over_sizes_and_repeats_itself(x64):
    key = Context(seed=3).key("x")
    runs = [sweep(key, 10, lambda draw, n: draw.uniform((n,)).sum(), [{"n": 1}, {"n": 2}]) for _ in range(2)]
    assert runs[0].shape == (10,)
    assert (runs[0] == runs[1]).all() and len(set(runs[0])) == 10
